"""Kandinsky's decoders: image embeddings → pictures, from noise, from a picture, or in a region of a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.clip.encoders import TextEmbedding
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.sampler import InpaintingSampler
from unclip.diffusion.scheduler import Scheduler
from unclip.errors import ConfigError, ImageError, InputError
from unclip.images import Pictures, as_pictures, rgb, to_tensor
from unclip.models.kandinsky import KandinskyUNet, KandinskyUNetConfig
from unclip.models.movq import VQModel
from unclip.numbers import real, whole
from unclip.pipelines.arguments import (
    FORMS,
    Callback,
    ImagePipelineOutput,
    as_captions,
    check_count,
    check_latents,
    check_tensor,
    noise_source,
)
from unclip.pipelines.cascade import MAX_SIDE_PX, Fact, check_fits
from unclip.pipelines.kandinsky_prior import Generators, check_tensor_inputs
from unclip.pipelines.masks import drawn_region, resized
from unclip.pipelines.pipeline import Kind, Pipeline
from unclip.pipelines.steps import Call, StageRun
from unclip.settings import SETTINGS
from unclip.stages.kandinsky import KandinskyCondition, kandinsky_denoiser, kept_cells
from unclip.stages.latent import LatentStage
from unclip.stages.stage import Size

OUTPUT_TYPES = (*FORMS, "latent")
Embeddings = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class _Picture:
    """The pictures that a call starts from.

    Attributes:
        pixels: float32 [batch, 3, height, width] in [-1, 1], of the result's size.
        kept: the cells of the latents that are kept, bool [batch, 1, h, w]; None without a mask.
    """

    pixels: Tensor
    kept: Tensor | None


class _KandinskyDecoder(Pipeline):
    """What Kandinsky's decoders share."""

    COMPONENTS = ("unet", "movq", "scheduler")
    HAS_TEXT: ClassVar[bool] = False
    INPAINTS: ClassVar[bool] = False
    unet: KandinskyUNet
    movq: VQModel
    scheduler: Scheduler

    def check(self) -> None:
        """Raises: ConfigError when the components do not fit one another, or are of another decoder."""
        check_decoder(self.unet.config, self.movq, self.scheduler, has_text=self.HAS_TEXT, inpaints=self.INPAINTS)

    def _generate(
        self,
        image_embeds: Embeddings,
        negative_image_embeds: Embeddings | None,
        *,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        num_images_per_prompt: int,
        generator: Generators,
        latents: Tensor | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callback | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        seed: int | Sequence[int] | None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        image: Pictures | None = None,
        mask_image: Pictures | None = None,
        strength: float = 1.0,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """A call of any of the pipelines."""
        self.check()
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type is {output_type!r}; it must be one of {', '.join(map(repr, OUTPUT_TYPES))}")
        check_tensor_inputs(callback_on_step_end_tensor_inputs)
        scale = float(SETTINGS["decoder_guidance_scale"].check(guidance_scale))
        size = latent_size(height, width, self.movq.factor)
        steps = self.scheduler.spaced_timesteps(num_inference_steps)
        taken = int(len(steps) * real(strength, "strength", 0, 1, above=True))
        if taken < 1:
            raise InputError(f"strength is {strength}, which takes none of {len(steps)} steps: raise one of the two")
        embeddings = self._embeddings(image_embeds, "image_embeds")
        rows = len(embeddings)
        negative = None
        if scale > 1:
            if negative_image_embeds is None:
                raise InputError("guidance_scale is above 1: give negative_image_embeds, which the prior returns")
            negative = self._embeddings(negative_image_embeds, "negative_image_embeds")
            if len(negative) != rows:
                raise InputError(f"there are {len(negative)} negative_image_embeds for {rows} image_embeds")
        count = check_count(num_images_per_prompt, rows)
        given = self._given(image, mask_image, size, rows) if image is not None else None
        stage = LatentStage(
            kandinsky_denoiser(self.unet, self.scheduler.process),
            self.movq,
            self.scheduler.process,
            size,
            decodes=output_type != "latent",
        )
        check_latents(latents, "latents", stage.sample_shape(count * rows))
        call = Call(self, noise_source(generator, seed, count * rows), callback_on_step_end)

        text = self._text(prompt, rows, count)
        null_text = self._text(negative_prompt, rows, count) if scale > 1 else None
        embeddings = embeddings.repeat_interleave(count, dim=0)
        sampler, origin, known = self.scheduler.sampler(), None, None
        if given is not None:
            x0 = self.movq.encode_pictures(given.pixels.to(self.device)).expand(rows, -1, -1, -1)
            x0 = x0.repeat_interleave(count, dim=0)
            latents = call.noise.draw(x0.shape, self.device) if latents is None else latents.to(self.device).float()
            if given.kept is None:
                latents, origin = self._start(x0, latents, real(strength, "strength"))
            else:
                kept = given.kept.to(self.device).expand(rows, -1, -1, -1).repeat_interleave(count, dim=0)
                known = torch.cat([x0 * kept, kept.float()], dim=1)
                sampler = self._restoring(sampler, x0, kept, latents)
        condition, null = KandinskyCondition(embeddings, text, known), None
        if negative is not None:
            null = KandinskyCondition(negative.repeat_interleave(count, dim=0), null_text, known)
        run = StageRun("decoder", stage, sampler, steps[len(steps) - taken :], scale, latents, origin)
        result = run.sample(condition, null, call)
        call.close({"pictures": result})
        output = ImagePipelineOutput(result if output_type == "latent" else FORMS[output_type](result))
        return output if return_dict else output.to_tuple()

    def _start(self, x0: Tensor, noise: Tensor, strength: float) -> tuple[Tensor, Tensor | None]:
        """The latents and the origin of a `StageRun` that starts from a noised picture."""
        return noise, x0

    def _restoring(self, sampler: Any, x0: Tensor, kept: Tensor, noise: Tensor) -> Any:
        """The sampler of inpainting."""
        return InpaintingSampler(sampler, x0, kept, noise=noise)

    def _text(self, prompt: str | Sequence[str] | None, rows: int, count: int) -> TextEmbedding | None:
        return None

    def _embeddings(self, given: Embeddings, name: str) -> Tensor:
        width = self.unet.config.image_embedding_dim
        if not isinstance(given, Tensor):
            if not given or not all(isinstance(one, Tensor) for one in given):
                raise InputError(f"{name} must be a tensor, or a list of tensors")
            given = torch.cat(list(given))
        check_tensor(given, name)
        if given.ndim != 2 or given.shape[1] != width or len(given) < 1:
            raise InputError(
                f"{name} have shape {tuple(given.shape)}; this decoder needs [batch, {width}]. Embeddings of another "
                "CLIP do not fit it"
            )
        return given.to(self.device).float()

    def _given(self, image: Pictures, mask_image: Pictures | None, size: Size, rows: int) -> _Picture:
        """The pictures and masks of a call, whose latents have this size."""
        height, width = (side * self.movq.factor for side in size)
        pictures = [rgb(one) for one in as_pictures(image)]
        if len(pictures) not in (1, rows):
            raise ImageError(f"there are {len(pictures)} pictures for {rows} image_embeds; give one, or one for each")
        shown = [one.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=1) for one in pictures]
        pixels = torch.stack([to_tensor(one) for one in shown])
        if mask_image is None:
            return _Picture(pixels, None)
        masks = as_pictures(mask_image, "mask_image", are_masks=True)
        if len(masks) not in (1, len(pictures)):
            raise ImageError(f"there are {len(masks)} masks for {len(pictures)} pictures; give one, or one for each")
        regions = []
        for picture, mask in zip(pictures, masks * (len(pictures) // len(masks)), strict=True):
            drawn = drawn_region(picture, mask)
            assert drawn is not None
            drawn = resized(Image.fromarray(drawn.numpy().astype(np.uint8) * 255), (height, width))
            regions.append(torch.from_numpy(np.asarray(drawn) >= 128))
        return _Picture(pixels, kept_cells(torch.stack(regions)[:, None], size))


class _KandinskyTextDecoder(_KandinskyDecoder):
    """What the decoders of Kandinsky 2.1 share: they see the caption too."""

    COMPONENTS = ("text_encoder", "tokenizer", *_KandinskyDecoder.COMPONENTS)
    HAS_TEXT = True
    STARTS_BY: ClassVar[DiffusionProcess] = DiffusionProcess(beta_schedule="linear", clip_range=None)
    """The process by which image to image adds noise; it is not that of the sampling, as in the original code."""
    text_encoder: Any
    tokenizer: Any

    @classmethod
    def kind(cls, component: str) -> Kind:
        if component == "text_encoder":
            return Kind((torch.nn.Module,), ("transformer", "LinearTransformation"), "unclip's MultilingualCLIP")
        return super().kind(component)

    def check(self) -> None:
        super().check()
        text, unet = self.text_encoder.config, self.unet.config
        check_fits(
            [
                ("text_encoder.numDims", text.numDims, "unet.cross_attention_dim", unet.cross_attention_dim),
                ("text_encoder.hidden_size", text.hidden_size, "unet.encoder_hid_dim", unet.encoder_hid_dim),
            ]
        )

    def _text(self, prompt: str | Sequence[str] | None, rows: int, count: int) -> TextEmbedding | None:
        from unclip.clip.multilingual import MultilingualTextEncoder  # imports transformers

        captions = as_captions(prompt, rows)
        encoded = MultilingualTextEncoder(self.text_encoder, self.tokenizer).encode(captions, self.device)
        return (encoded if len(captions) == rows else encoded.select([0] * rows)).repeat(count)

    def _start(self, x0: Tensor, noise: Tensor, strength: float) -> tuple[Tensor, Tensor | None]:
        t = max(0, int(self.scheduler.process.num_timesteps * strength) - 2)
        return self.STARTS_BY.add_noise(x0, noise, t), None

    def _restoring(self, sampler: Any, x0: Tensor, kept: Tensor, noise: Tensor) -> Any:
        return sampler  # the reference does not restore the kept region


def check_decoder(config: Any, movq: Any, scheduler: Scheduler, *, has_text: bool, inpaints: bool) -> None:
    """Check that the parts of a decoder fit one another.

    Raises: ConfigError.
    """
    if not isinstance(config, KandinskyUNetConfig):
        raise ConfigError("component 'unet' is not a network of Kandinsky: its encoder_hid_dim_type is None")
    if config.has_text != has_text:
        version, other = ("2.1", "2.2") if config.has_text else ("2.2", "2.1")
        raise ConfigError(f"component 'unet' is a network of Kandinsky {version}; this pipeline is for {other}")
    cells, wanted = movq.channels, movq.channels * 2 + 1 if inpaints else movq.channels
    facts: list[Fact] = [("unet.in_channels", config.in_channels, "those of this pipeline", wanted)]
    if scheduler.process.learns_variance or config.out_channels != cells:
        facts.append(("unet.out_channels", config.out_channels, "twice those of movq's latents", 2 * cells))
    check_fits(facts)


def latent_size(height: object, width: object, factor: int) -> Size:
    """Height and width of the latents for pictures of at least this size; networks halve them three times.

    The pictures may be larger: a side of 520 px gives 72 cells, which are 576 px.

    Raises: InputError for a side that is not a whole number of pixels, or is too large.
    """
    sides = ((height, "height"), (width, "width"))
    checked = [whole(side, name, 1, MAX_SIDE_PX, unit="whole number of pixels") for side, name in sides]
    rows, columns = (-(-side // factor**2) * factor for side in checked)
    return rows, columns


class KandinskyV22Pipeline(_KandinskyDecoder):
    """Makes pictures of image embeddings with Kandinsky 2.2's decoder.

    Names, arguments and results are those of diffusers' pipeline, with two differences: "pt" pictures are in [0, 1],
    and without guidance `num_images_per_prompt` may be above 1. Components: `unet`, `movq` and `scheduler`.
    """

    @torch.no_grad()
    def __call__(
        self,
        image_embeds: Embeddings,
        negative_image_embeds: Embeddings | None = None,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make pictures.

        Args:
            image_embeds: [batch, embedding_dim] of the decoder's CLIP, or a list of such tensors.
            negative_image_embeds: of the same shape; only needed with guidance.
            height, width: of the pictures in pixels; rounded up to a multiple of 64.
            num_inference_steps: 1 to 1000.
            guidance_scale: 1 or less turns guidance off.
            num_images_per_prompt: pictures of each embedding, which are next to each other in the output.
            generator: the source of all noise; a list has one for each picture.
            latents: x_T, [rows, 4, height / 8, width / 8].
            output_type: "pil", "np", "pt", or "latent" for the latents.
            return_dict: False returns a plain tuple.
            callback_on_step_end: as in `UnCLIPPipeline`; "x0" is in latents.
            callback_on_step_end_tensor_inputs: only ("latents",), which the callback always gets.
            seed: picture i is made with seed + i (or the i-th of a list), independently of the others in its batch.

        Raises:
            InputError: an argument is wrong; nothing was computed.
            ConfigError: a component that was replaced does not fit the others.
            Cancelled: the callback stopped the run.
            NonFiniteError: the result has NaN or infinity.
        """
        return self._generate(
            image_embeds,
            negative_image_embeds,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            seed=seed,
        )


class KandinskyV22Img2ImgPipeline(_KandinskyDecoder):
    """Makes pictures that start from a given one, with Kandinsky 2.2's decoder; as diffusers' pipeline."""

    @torch.no_grad()
    def __call__(
        self,
        image_embeds: Embeddings,
        image: Pictures,
        negative_image_embeds: Embeddings | None = None,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        strength: float = 0.3,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make pictures; arguments and errors as in `KandinskyV22Pipeline`.

        Args:
            image: a picture, or one for each embedding, as `UnCLIPInpaintPipeline` takes it; resized to the result.
            strength: the share of the steps that are taken, above 0 and up to 1; a lower value keeps more.
        """
        return self._generate(
            image_embeds,
            negative_image_embeds,
            image=image,
            strength=strength,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=None,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            seed=seed,
        )


class KandinskyV22InpaintPipeline(_KandinskyDecoder):
    """Repaints a region of a picture with Kandinsky 2.2's network for inpainting; as diffusers' pipeline."""

    INPAINTS = True

    @torch.no_grad()
    def __call__(
        self,
        image_embeds: Embeddings,
        image: Pictures,
        mask_image: Pictures,
        negative_image_embeds: Embeddings | None = None,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Repaint; arguments and errors as in `KandinskyV22Pipeline`.

        Args:
            image, mask_image: a picture and its mask of the same size, or one for each embedding, as
                `UnCLIPInpaintPipeline` takes them: white or transparent parts of the mask are repainted.
        """
        return self._generate(
            image_embeds,
            negative_image_embeds,
            image=image,
            mask_image=mask_image,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            seed=seed,
        )


class KandinskyPipeline(_KandinskyTextDecoder):
    """Makes pictures of image embeddings and captions with Kandinsky 2.1's decoder; as diffusers' pipeline.

    Components: `text_encoder` and `tokenizer` (multilingual), `unet`, `movq` and `scheduler`.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image_embeds: Embeddings,
        negative_image_embeds: Embeddings | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        callback_on_step_end: Callback | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make pictures; arguments and errors as in `KandinskyV22Pipeline`.

        Args:
            prompt, negative_prompt: captions for the decoder in any language; one, or one for each embedding.
        """
        return self._generate(
            image_embeds,
            negative_image_embeds,
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=(),
            seed=seed,
        )


class KandinskyImg2ImgPipeline(_KandinskyTextDecoder):
    """Makes pictures that start from a given one, with Kandinsky 2.1's decoder; as diffusers' pipeline."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Pictures,
        image_embeds: Embeddings,
        negative_image_embeds: Embeddings | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 100,
        strength: float = 0.3,
        guidance_scale: float = 7.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        callback_on_step_end: Callback | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make pictures; arguments and errors as in `KandinskyPipeline` and `KandinskyV22Img2ImgPipeline`."""
        return self._generate(
            image_embeds,
            negative_image_embeds,
            prompt=prompt,
            negative_prompt=negative_prompt,
            image=image,
            strength=strength,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=None,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=(),
            seed=seed,
        )


class KandinskyInpaintPipeline(_KandinskyTextDecoder):
    """Repaints a region of a picture with Kandinsky 2.1's network for inpainting; as diffusers' pipeline.

    As there, the kept region is an input of the network and is not restored, so it may change slightly.
    """

    INPAINTS = True

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: Pictures,
        mask_image: Pictures,
        image_embeds: Embeddings,
        negative_image_embeds: Embeddings | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 100,
        guidance_scale: float = 4.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        callback_on_step_end: Callback | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Repaint; arguments and errors as in `KandinskyPipeline` and `KandinskyV22InpaintPipeline`."""
        return self._generate(
            image_embeds,
            negative_image_embeds,
            prompt=prompt,
            negative_prompt=negative_prompt,
            image=image,
            mask_image=mask_image,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=(),
            seed=seed,
        )
