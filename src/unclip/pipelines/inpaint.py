"""Inpainting and image to image: regenerate a part of a picture, or all of it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unclip.checkpoints.layout import FURTHER
from unclip.clip.encoders import ImageEncoder
from unclip.diffusion.sampler import InpaintingSampler, check_resampling
from unclip.errors import ConfigError, InputError
from unclip.images import Pictures
from unclip.numbers import real
from unclip.pipelines import cascade
from unclip.pipelines.arguments import (
    Callback,
    ImagePipelineOutput,
    as_captions,
    as_prompts,
    check_count,
    check_embeddings,
    check_output_type,
    noise_source,
    takes_preset,
)
from unclip.pipelines.masks import MaskedPictures, read_pictures
from unclip.pipelines.steps import Call, StageRun, decode, embed, encode, enlarge, finish
from unclip.pipelines.text_to_image import UnCLIPPipeline
from unclip.stages.stage import Condition, Size

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection
    from transformers.image_processing_utils import BaseImageProcessor

EMBEDDING_SOURCES = ("prompt", "image")


class UnCLIPInpaintPipeline(UnCLIPPipeline):
    """Regenerates a part of a picture (inpainting), or all of it from a noised state (image to image).

    The components are those of `UnCLIPPipeline`, so any of its folders can be loaded. With `image_encoder` and
    `feature_extractor` (transformers' CLIP), the picture's own embedding can be used in place of a prompt.

    The decoder and super-resolution sample the masked region and restore the known pixels at every step. They repeat
    parts of the path (RePaint, Lugmayr et al. 2201.09865). Pixels outside the mask do not change at the result's size,
    transparent ones included. With `strength` below 1, sampling starts from the noised picture instead of pure noise
    (SDEdit, Meng et al. 2108.01073).
    """

    OPTIONAL = ("image_encoder", "feature_extractor", *UnCLIPPipeline.OPTIONAL)
    image_encoder: "CLIPVisionModelWithProjection"
    feature_extractor: "BaseImageProcessor"

    @classmethod
    def component_names(cls) -> tuple[str, ...]:
        return (*cls.OPTIONAL[:2], *cls.COMPONENTS, *FURTHER)

    def check(self) -> None:
        super().check()
        if (self.image_encoder is None) != (self.feature_extractor is None):
            raise ConfigError("image_encoder and feature_extractor belong together; give both, or neither")

    @takes_preset
    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        image: Pictures | None = None,
        mask_image: Pictures | None = None,
        strength: float = 1.0,
        num_images_per_prompt: int = 1,
        prior_num_inference_steps: int = 25,
        decoder_num_inference_steps: int = 25,
        super_res_num_inference_steps: int | Sequence[int] = 7,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        prior_guidance_scale: float = 4.0,
        decoder_guidance_scale: float = 8.0,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        num_resamples: int = 4,
        jump_length: int = 1,
        embedding_from: str | None = None,
        image_embeddings: Tensor | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        num_prior_candidates: int = 1,
        prior_temperature: float = 1.0,
        prior_top_p: float = 1.0,
        decoder_guidance_low: float = 0.0,
        decoder_guidance_high: float = 1.0,
        decoder_reuse: int = 1,
        super_res_reuse: int = 1,
        preset: str | None = None,
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end: Callback | None = None,
        return_intermediates: bool = False,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Edit pictures.

        Args:
            prompt: describes the whole result; one, or one for each picture. Without it, the picture's own embedding
                describes the result.
            image: a PIL image of any mode; a numpy array [height, width], [height, width, channels] or [batch, height,
                width, channels], uint8 in [0, 255], floating point in [0, 1] or bool, of 1 to 4 channels; or a list of
                these. One picture can serve several prompts. Pictures are resized to the result's size.
            mask_image: the region to replace, as `image` is given, or an array [batch, height, width]; of the picture's
                size. Fully transparent pixels are replaced, or white ones in a mask without transparency (an alpha
                channel that is opaque everywhere counts as none). Without a mask, the pixels of the picture that are
                not opaque are replaced; in a picture without transparency, all of it, which needs a strength below 1.
            strength: the share of the steps that are taken, above 0 and up to 1. 1 starts from pure noise; a lower
                value keeps more of the picture, also under the mask.
            num_images_per_prompt: results of each prompt or picture, which are next to each other in the output.
            prior_num_inference_steps, decoder_num_inference_steps, super_res_num_inference_steps, generator,
                prior_guidance_scale, decoder_guidance_scale, return_dict: as in `UnCLIPPipeline`.
            output_type: "pil", "np" or "pt". With "pil", a picture of the result's size with transparency and a mask
                keeps its own pixels outside the mask, in RGBA; otherwise transparency becomes white.
            num_resamples: how often each part of the path is repeated, so that the new region matches the rest; 1 to
                100. It multiplies the time, and has no effect without a mask.
            jump_length: the steps of each part.
            embedding_from: "prompt", the prior's embedding; or "image", the picture's own, with the prompt only as the
                decoder's caption. The prompt's by default, if there is one.
            image_embeddings: [batch, embedding_dim] in place of both, for example an interpolation of the two.
            negative_prompt, seed, callback_on_step_end, return_intermediates: as in `UnCLIPPipeline`.
            num_prior_candidates, prior_temperature, prior_top_p: as in `UnCLIPPipeline`, for a prompt's embedding.
            decoder_guidance_low, decoder_guidance_high, decoder_reuse, super_res_reuse, preset: as in `UnCLIPPipeline`.
            height, width: size of the result; give both or neither. By default the result has the picture's shape and
                about as many pixels as the model's own square.

        Raises:
            InputError: an argument is wrong (ImageError: a picture or mask is); no stage has run.
            ConfigError: a component that was replaced does not fit the others.
            Cancelled: the callback stopped the run.
            NonFiniteError: the result has NaN or infinity.
        """
        self.check()
        check_output_type(output_type)
        num_resamples, jump_length = check_resampling(num_resamples, jump_length)
        strength = real(strength, "strength", 0, 1, above=True)
        source = self._embedding_source(embedding_from, prompt, image_embeddings)
        given = read_pictures(image, mask_image, lambda size: self._result_size(size, height, width))
        if given.region is None and strength == 1:
            raise InputError("nothing of the picture would be kept: give mask_image, or a strength below 1")
        rows = self._rows(prompt, given, image_embeddings)
        captions, negative = as_captions(prompt, rows), as_captions(negative_prompt, rows)
        count = check_count(num_images_per_prompt, rows)
        prior = self.prior_run(
            prior_num_inference_steps,
            prior_guidance_scale,
            num_candidates=num_prior_candidates,
            temperature=prior_temperature,
            top_p=prior_top_p,
        )
        sizes = self.sizes(*given.x0.shape[2:])
        decoder = self.decoder_run(
            decoder_num_inference_steps,
            decoder_guidance_scale,
            None,
            sizes["decoder"],
            guidance_interval=(decoder_guidance_low, decoder_guidance_high),
            reuse=decoder_reuse,
        )
        super_res = self.super_res_runs(super_res_num_inference_steps, None, sizes, reuse=super_res_reuse)
        call = Call(self, noise_source(generator, seed, count * rows), callback_on_step_end)

        known = given.repeat(rows, count, self.device)
        decoder = _keeping(decoder, known, strength, num_resamples, jump_length)
        super_res = [_keeping(run, known, strength, num_resamples, jump_length) for run in super_res]
        text, null_text = encode(self.caption_encoder, captions, rows, count, self.device), None
        self.report_unknown(captions, text.select([row * count for row in range(len(captions))]))
        if decoder.guided or (prior.guided and source == "prompt"):
            null_text = encode(self.caption_encoder, negative, rows, count, self.device)
        if source == "prompt":
            embeddings = embed(prior, text, null_text, call)
        else:
            embeddings = self._given_embeddings(given, image_embeddings).expand(rows, -1)
            embeddings = embeddings.repeat_interleave(count, dim=0)
        small = decode(decoder, text, null_text, embeddings, call)
        large = enlarge(super_res, small, call)
        output = finish(
            large, small, embeddings, call, output_type=output_type, return_intermediates=return_intermediates
        )
        if isinstance(output.images, list):
            output.images = known.with_transparency(output.images)
        return output if return_dict else output.to_tuple()

    def _embedding_source(self, requested: str | None, prompt: Any, image_embeddings: Tensor | None) -> str:
        """The source of the image embeddings: "prompt", "image" or "given"."""
        if image_embeddings is not None:
            if requested is not None:
                raise InputError("give image_embeddings or embedding_from, not both")
            check_embeddings(image_embeddings, self.prior.config.embedding_dim)
            return "given"
        if requested is not None and requested not in EMBEDDING_SOURCES:
            raise InputError(f"embedding_from is {requested!r}; it must be one of 'prompt', 'image'")
        source = requested or ("image" if prompt is None else "prompt")
        if source == "prompt" and prompt is None:
            raise InputError("embedding_from is 'prompt', but no prompt is given")
        if source == "image" and self.image_encoder is None:
            raise InputError("this model has no image_encoder to embed the picture: give a prompt, or image_embeddings")
        return source

    def _rows(self, prompt: Any, given: MaskedPictures, image_embeddings: Tensor | None) -> int:
        """The number of rows: that of the prompts, pictures or embeddings. One of a kind is used for all rows."""
        counts = {
            "prompts": 1 if prompt is None else len(as_prompts(prompt)),
            "pictures": len(given.originals),
            "image_embeddings": 1 if image_embeddings is None else len(image_embeddings),
        }
        rows = max(counts.values())
        if any(count not in (1, rows) for count in counts.values()):
            found = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise InputError(f"there are {found}; give as many of each, or one for all")
        return rows

    def _result_size(self, size: Size, height: int | None, width: int | None) -> Size:
        """The result's height and width for a picture of height and width `size`."""
        if (height is None) != (width is None):
            raise InputError("give both height and width, or neither to keep the picture's shape")
        if height is None and size[0] != size[1]:
            own = list(self.sizes().values())[-1][0]
            height, width = cascade.fitted_size(own, self.side_multiple, size)
        return list(self.sizes(height, width).values())[-1]

    def _given_embeddings(self, given: MaskedPictures, image_embeddings: Tensor | None) -> Tensor:
        if image_embeddings is not None:
            return image_embeddings.to(self.device).float()
        return ImageEncoder(self.image_encoder, self.feature_extractor).encode(given.originals, self.device).float()


def _keeping(
    run: StageRun[Condition], known: MaskedPictures, strength: float, num_resamples: int, jump_length: int
) -> StageRun[Condition]:
    """The run of a stage that keeps the picture outside the mask, and starts from it where the strength is below 1."""
    height, width = run.stage.sample_shape(1)[2:]
    x0, kept = known.at((height, width))
    sampler, timesteps, origin = run.sampler, run.timesteps, None
    if kept is not None:
        sampler = InpaintingSampler(sampler, x0, kept, num_resamples, jump_length)
    if strength < 1:
        timesteps, origin = timesteps[-max(1, round(strength * len(timesteps))) :], x0
    return replace(run, sampler=sampler, timesteps=timesteps, origin=origin)
