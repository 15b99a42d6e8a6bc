"""Stable unCLIP: pictures from captions, and variations, by a decoder in the latent space of Stable Diffusion.

The names and arguments are those of diffusers' pipelines. The U-Net and the autoencoder are classes of diffusers (extra
`family`); the schedulers, samplers and the loop are unclip's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from unclip.checkpoints.weights import state_of
from unclip.clip.encoders import ImageEncoder, TextEncoder
from unclip.clip.networks import CLIPTextEncoderOutput
from unclip.clip.statistics import EmbeddingStatistics
from unclip.diffusion.scheduler import DDIMScheduler, Scheduler
from unclip.errors import CheckpointError, ConfigError, InputError
from unclip.images import Pictures, as_pictures
from unclip.models.image_normalizer import StableUnCLIPImageNormalizer
from unclip.models.prior import PriorConfig, PriorTransformer
from unclip.models.prior_autoregressive import AutoregressivePrior
from unclip.numbers import real, whole
from unclip.pipelines.arguments import (
    FORMS,
    Callback,
    ImagePipelineOutput,
    as_captions,
    as_prompts,
    check_count,
    check_embeddings,
    check_output_type,
    check_tensor,
    noise_source,
)
from unclip.pipelines.cascade import MAX_SIDE_PX, Fact, check_fits
from unclip.pipelines.pipeline import Kind, Pipeline
from unclip.pipelines.steps import Call, PriorRun, StageRun, embed, encode
from unclip.pipelines.text_to_image import UnCLIPPipeline, prior_facts
from unclip.settings import SETTINGS
from unclip.stages.latent import LatentStage
from unclip.stages.stable_diffusion import KLAutoencoder, StableCondition, noised_with_level, stable_denoiser
from unclip.stages.stage import Size

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection
    from transformers.image_processing_utils import BaseImageProcessor

LATENT = "latent"
"""The output type of the decoder's latents."""
ReferenceCallback = Callable[[int, int, Tensor], None]
Seed = int | Sequence[int] | None
Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class _StateEncoder:
    """CLIPTextModel, which has no projection, with the interface that `TextEncoder` calls.

    Attributes:
        skipped: the number of last layers that are left out.
    """

    network: Any
    skipped: int

    @property
    def config(self) -> Any:
        return self.network.config

    @property
    def device(self) -> torch.device:
        return self.network.device

    def __call__(self, input_ids: Tensor) -> CLIPTextEncoderOutput:
        found = self.network(input_ids, output_hidden_states=True)
        states = found.last_hidden_state
        if self.skipped:
            norm = getattr(self.network, "text_model", self.network).final_layer_norm
            states = norm(found.hidden_states[-(self.skipped + 1)])
        return CLIPTextEncoderOutput(found.pooler_output, states)


class StableUnCLIPBase(Pipeline):
    """What both pipelines share: the normalizer, the decoder with its text encoder, and the autoencoder."""

    KINDS: ClassVar[Mapping[str, Kind]] = {
        "text_encoder": Kind((nn.Module,), ("config.vocab_size", "config.hidden_size"), "transformers' CLIPTextModel"),
        "unet": Kind(
            (nn.Module,),
            ("config.projection_class_embeddings_input_dim", "config.cross_attention_dim"),
            "diffusers' UNet2DConditionModel with class_embed_type 'projection'",
        ),
        "vae": Kind((nn.Module,), ("config.scaling_factor", "encode", "decode"), "diffusers' AutoencoderKL"),
        "image_normalizer": Kind(
            (StableUnCLIPImageNormalizer,), (), "unclip's StableUnCLIPImageNormalizer, which reads diffusers' files"
        ),
    }
    image_normalizer: StableUnCLIPImageNormalizer
    image_noising_scheduler: Scheduler
    tokenizer: "CLIPTokenizer"
    text_encoder: "CLIPTextModel"
    unet: "UNet2DConditionModel"
    scheduler: Scheduler
    vae: "AutoencoderKL"

    @classmethod
    def kind(cls, component: str) -> Kind:
        return cls.KINDS[component] if component in cls.KINDS else super().kind(component)

    @property
    def embedding_dim(self) -> int:
        """Width of the image embeddings."""
        return self.image_normalizer.config.embedding_dim

    @property
    def autoencoder(self) -> KLAutoencoder:
        """The autoencoder of the latents."""
        return KLAutoencoder(self.vae)

    @property
    def statistics(self) -> EmbeddingStatistics | None:
        """The distribution of the model's image embeddings; None if it is not known.

        It is read from the file embedding_statistics.safetensors of the model's folder. Without it, those of the
        normalizer are used.
        """
        return self._statistics or EmbeddingStatistics.of_prior(*self._mean_and_std())

    @statistics.setter
    def statistics(self, value: EmbeddingStatistics | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._statistics = value

    def _check_width(self, embeddings: Tensor, path: Any) -> None:
        if embeddings.shape[-1] != self.embedding_dim:
            raise CheckpointError(
                f"{path} has embeddings of width {embeddings.shape[-1]}, but the model has width {self.embedding_dim}: "
                "remove the file, or write it again"
            )

    def check(self) -> None:
        """Raises: ConfigError when the components do not fit one another."""
        unet: Any = self.unet.config
        text, dim = self.text_encoder.config, self.embedding_dim
        self.autoencoder.check()
        if (largest := max(self.tokenizer.get_vocab().values())) >= text.vocab_size:
            raise ConfigError(
                f"the components do not fit: tokenizer's largest token id is {largest}, but text_encoder has "
                f"{text.vocab_size} tokens"
            )
        own = self.scheduler.process.learns_variance
        width, channels = unet.projection_class_embeddings_input_dim, self.autoencoder.channels
        check_fits(
            [
                ("unet.class_embed_type", unet.class_embed_type, "that of Stable unCLIP", "projection"),
                ("unet.projection_class_embeddings_input_dim", width, "twice image_normalizer.embedding_dim", 2 * dim),
                ("unet.cross_attention_dim", unet.cross_attention_dim, "text_encoder.hidden_size", text.hidden_size),
                ("unet.in_channels", unet.in_channels, "vae.latent_channels", channels),
                ("unet.out_channels", unet.out_channels, "what the scheduler needs", channels * (2 if own else 1)),
                *self.facts(),
            ]
        )

    def facts(self) -> list[Fact]:
        """The settings of the further components that must agree."""
        return []

    def size(self, height: int | None = None, width: int | None = None) -> Size:
        """Height and width of the latents in cells, for pictures of this size in pixels.

        None: those that the U-Net was trained on. Raises: InputError for a side that is not a multiple of a cell's.
        """
        factor, own = self.autoencoder.factor, self.unet.config.sample_size  # type: ignore[attr-defined]
        sides = []
        for name, given in (("height", height), ("width", width)):
            side = own * factor if given is None else whole(given, name, 1, MAX_SIDE_PX, unit="whole number of pixels")
            if side % factor:
                near = max(1, round(side / factor)) * factor
                raise InputError(f"{name} is {side}; it must be a multiple of {factor}, such as {near}")
            sides.append(side // factor)
        return sides[0], sides[1]

    def decoder_run(
        self,
        num_steps: int,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        size: Size | None = None,
        *,
        eta: float = 0.0,
        decodes: bool = True,
    ) -> StageRun[StableCondition]:
        """The decoder with its scheduler's sampler and a call's settings.

        Args:
            num_steps, guidance_scale, latents: of a call.
            size: as `size` returns it; None: the decoder's own.
            eta: of a `DDIMScheduler`, from 0 to 1; other schedulers ignore it.
            decodes: whether the result is pictures; otherwise it is latents.

        Raises: InputError for a wrong setting.
        """
        scheduler = self.scheduler
        if isinstance(scheduler, DDIMScheduler) and real(eta, "eta", 0, 1):
            scheduler = DDIMScheduler.from_config(scheduler.config, eta=eta)
        stage = LatentStage(
            partial(stable_denoiser, self.unet), self.autoencoder, scheduler.process, size or self.size(), decodes
        )
        return StageRun(
            "decoder",
            stage,
            scheduler.sampler(),
            scheduler.spaced_timesteps(num_steps),
            float(SETTINGS["decoder_guidance_scale"].check(guidance_scale, "guidance_scale")),
            latents,
        )

    def _labels(self, embeddings: Tensor, level: int, noise: Tensor) -> Tensor:
        process = self.image_noising_scheduler.process
        return noised_with_level(embeddings, level, noise, *self._mean_and_std(), process)

    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        """The normalizer's tensors, also where it is offloaded."""
        found = state_of(self.image_normalizer)
        return found["mean"].detach(), found["std"].detach()

    def _level(self, noise_level: int) -> int:
        return whole(noise_level, "noise_level", 0, self.image_noising_scheduler.process.num_timesteps - 1)

    def decoder_text_encoder(self, clip_skip: int | None = None) -> TextEncoder:
        """The decoder's text encoder with its tokenizer, without its last `clip_skip` layers."""
        return TextEncoder(cast(Any, _StateEncoder(self.text_encoder, clip_skip or 0)), self.tokenizer)

    def _states(
        self, captions: Sequence[str], given: Tensor | None, rows: int, count: int, clip_skip: int | None
    ) -> Tensor:
        """The text's hidden states [rows · count, tokens, hidden_size] of captions, or those given [rows, …]."""
        if given is not None:
            return given.to(self.device).repeat_interleave(count, dim=0)
        return encode(self.decoder_text_encoder(clip_skip), captions, rows, count, self.device).hidden_states

    def _check_states(self, given: Tensor | None, name: str, rows: int) -> None:
        if given is None:
            return
        check_tensor(given, name)
        width = self.text_encoder.config.hidden_size
        if given.ndim != 3 or given.shape[::2] != (rows, width):
            raise InputError(f"{name} has shape {tuple(given.shape)}; it must be [{rows}, tokens, {width}]")

    def _sample(
        self,
        embeddings: Callable[[Call, int], Tensor],
        rows: int,
        run: StageRun[StableCondition],
        *,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        num_images_per_prompt: int,
        generator: Generators,
        seed: Seed,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        output_type: str,
        return_dict: bool,
        noise_level: int,
        clip_skip: int | None,
        callback_on_step_end: Callback | None,
        return_intermediates: bool,
        prior: PriorRun | None = None,
        noisy_at_0: bool = True,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Check a call's arguments, then make its pictures.

        Args:
            embeddings: makes the image embeddings [rows · count, embedding_dim], from the call and the count of
                pictures of each row.
            rows: the number of prompts or pictures.
            run: the decoder.
            prior: the prior, if it makes the embeddings.
            noisy_at_0: whether level 0 adds its little noise, as in diffusers.

        The others are as in the pipelines' calls.
        """
        level = self._level(noise_level)
        if clip_skip is not None:
            clip_skip = whole(clip_skip, "clip_skip", 0, self.text_encoder.config.num_hidden_layers - 1)
        for name, text, states in (("", prompt, prompt_embeds), ("negative_", negative_prompt, negative_prompt_embeds)):
            self._check_states(states, f"{name}prompt_embeds", rows)
            if name and text is not None and states is not None:
                raise InputError(f"give {name}prompt or {name}prompt_embeds, not both")
        if prompt_embeds is not None and negative_prompt_embeds is not None:
            both = (tuple(prompt_embeds.shape), tuple(negative_prompt_embeds.shape))
            if both[0] != both[1]:
                raise InputError(f"prompt_embeds and negative_prompt_embeds have shapes {both}; they must be equal")
        captions, negative = as_captions(prompt, rows), as_captions(negative_prompt, rows)
        count = check_count(num_images_per_prompt, rows)
        for each in (run, prior):
            if each is not None:
                each.check_latents(count * rows)
        call = Call(self, noise_source(generator, seed, count * rows), callback_on_step_end)

        found = embeddings(call, count)
        states = self._states(captions, prompt_embeds, rows, count, clip_skip)
        null = None
        if run.guided:
            null_states = self._states(negative, negative_prompt_embeds, rows, count, clip_skip)
            null = StableCondition.null(null_states, self.embedding_dim)
        noise = call.noise.draw(found.shape, found.device) if level or noisy_at_0 else torch.zeros_like(found)
        made = run.sample(StableCondition(states, self._labels(found, level, noise)), null, call)
        call.close({"image embeddings": found, "latents" if output_type == LATENT else "pictures": made})
        output = ImagePipelineOutput(made if output_type == LATENT else FORMS[output_type](made))
        if return_intermediates:
            output.image_embeddings = found.float().cpu()
        return output if return_dict else output.to_tuple()


class StableUnCLIPPipeline(StableUnCLIPBase):
    """Makes pictures from captions: a prior of CLIP ViT-L/14 (Karlo's) and Stable unCLIP's decoder.

    Components, by name: `prior_tokenizer`, `prior_text_encoder`, `prior` and `prior_scheduler`; `image_normalizer` and
    `image_noising_scheduler`; `tokenizer`, `text_encoder`, `unet`, `scheduler` and `vae`. The prior may be any that
    `UnCLIPPipeline` takes; its noise schedule is kept by every scheduler of unclip.
    """

    COMPONENTS = (
        "prior_tokenizer",
        "prior_text_encoder",
        "prior",
        "prior_scheduler",
        "image_normalizer",
        "image_noising_scheduler",
        "tokenizer",
        "text_encoder",
        "unet",
        "scheduler",
        "vae",
    )
    OPTIONAL = ("prior_scheduler",)
    prior_tokenizer: "CLIPTokenizer"
    prior_text_encoder: "CLIPTextModelWithProjection"
    prior: PriorTransformer | AutoregressivePrior
    prior_scheduler: Scheduler | None

    def facts(self) -> list[Fact]:
        prior = self.prior.config
        if self.prior_scheduler is None and isinstance(prior, PriorConfig) and prior.takes_timestep:
            raise InputError(
                "StableUnCLIPPipeline needs the component 'prior_scheduler': its prior is a diffusion prior"
            )
        own, dim = self.embedding_dim, prior.embedding_dim
        facts = [
            (name, value, other.replace("text_encoder", "prior_text_encoder"), wanted)
            for name, value, other, wanted in prior_facts(self.prior_text_encoder.config, prior)
        ]
        return [*facts, ("image_normalizer.embedding_dim", own, "prior.embedding_dim", dim)]

    prior_run = UnCLIPPipeline.prior_run

    def _prompts(self, prompt: Any, image_embeds: Tensor | None, prior_latents: Tensor | None) -> list[str]:
        """The captions, one for each of `image_embeds` if these are given. Raises: InputError."""
        if image_embeds is None:
            if prompt is None:
                raise InputError("give a prompt, or image embeddings")
            return as_prompts(prompt)
        check_embeddings(image_embeds, self.embedding_dim)
        prompts = [""] * len(image_embeds) if prompt is None else as_prompts(prompt)
        if len(image_embeds) != len(prompts) or prior_latents is not None:
            raise InputError(
                f"there are {len(image_embeds)} image embeddings for {len(prompts)} prompts: give one for each, and no "
                "prior_latents, as the prior does not run"
            )
        return prompts

    def _embeddings(
        self, prompts: list[str], image_embeds: Tensor | None, prior: PriorRun
    ) -> Callable[[Call, int], Tensor]:
        """What makes the image embeddings of a call."""
        encoder, rows = TextEncoder(self.prior_text_encoder, self.prior_tokenizer), len(prompts)

        def embeddings(call: Call, count: int) -> Tensor:
            if image_embeds is not None:
                return image_embeds.to(self.device).float().repeat_interleave(count, dim=0)
            text = encode(encoder, prompts, rows, count, self.device)
            null = encode(encoder, [""], rows, count, self.device) if prior.guided else None
            return embed(prior, text, null, call)

        return embeddings

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 10.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: ReferenceCallback | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        noise_level: int = 0,
        prior_num_inference_steps: int = 25,
        prior_guidance_scale: float = 4.0,
        prior_latents: Tensor | None = None,
        clip_skip: int | None = None,
        *,
        seed: Seed = None,
        num_prior_candidates: int = 1,
        image_embeds: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        return_intermediates: bool = False,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make pictures from captions.

        Args:
            prompt: a caption, or several. May be None only with `image_embeds`.
            height, width: of the pictures in pixels; multiples of 8. By default those that the U-Net was trained on.
            num_inference_steps, guidance_scale: of the decoder. A scale of 1 or less turns guidance off.
            negative_prompt: the caption that the decoder's guidance moves away from; one, or one for each prompt.
            num_images_per_prompt: pictures of each caption, which are next to each other in the output.
            eta: of a `DDIMScheduler`, from 0 to 1; other schedulers ignore it.
            generator: the source of all noise; a list has one for each picture.
            latents: x_T of the decoder, [batch, 4, height / 8, width / 8].
            prompt_embeds, negative_prompt_embeds: hidden states [prompts, tokens, hidden_size] for the decoder, in
                place of those of `text_encoder`. The prior always needs the prompt.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a plain tuple.
            callback, callback_steps: called as (step, timestep, latents) after every so many steps of each stage.
            cross_attention_kwargs: must be None.
            noise_level: noise that is added to the image embedding, 0 to 999; level 0 adds a little. The U-Net sees
                the level.
            prior_num_inference_steps, prior_guidance_scale, prior_latents: of the prior.
            clip_skip: the number of the text encoder's last layers that are left out.
            seed: picture i is made with seed + i (or the i-th of a list), independently of the others in its batch.
            num_prior_candidates: as in `UnCLIPPipeline`.
            image_embeds: [prompts, embedding_dim]; the prior does not run then.
            callback_on_step_end, return_intermediates: as in `UnCLIPPipeline`.

        Raises: as `UnCLIPPipeline`.
        """
        self.check()
        check_output(output_type, cross_attention_kwargs)
        run = self.decoder_run(
            num_inference_steps,
            guidance_scale,
            latents,
            self.size(height, width),
            eta=eta,
            decodes=output_type != LATENT,
        )
        prior = self.prior_run(
            prior_num_inference_steps, prior_guidance_scale, prior_latents, num_candidates=num_prior_candidates
        )
        prompts = self._prompts(prompt, image_embeds, prior_latents)
        return self._sample(
            self._embeddings(prompts, image_embeds, prior),
            len(prompts),
            run,
            prompt=prompts,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            seed=seed,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            return_dict=return_dict,
            noise_level=noise_level,
            clip_skip=clip_skip,
            callback_on_step_end=either_callback(callback, callback_steps, callback_on_step_end),
            return_intermediates=return_intermediates,
            prior=prior if image_embeds is None else None,
        )


class StableUnCLIPImg2ImgPipeline(StableUnCLIPBase):
    """Makes variations of pictures, and pictures of image embeddings, by Stable unCLIP's decoder.

    Components, by name: `feature_extractor` and `image_encoder` (CLIP ViT-L/14 for the small model, ViT-H/14 for the
    large one); the others are those of `StableUnCLIPPipeline` without the prior's.
    """

    COMPONENTS = (
        "feature_extractor",
        "image_encoder",
        "image_normalizer",
        "image_noising_scheduler",
        "tokenizer",
        "text_encoder",
        "unet",
        "scheduler",
        "vae",
    )
    feature_extractor: "BaseImageProcessor"
    image_encoder: "CLIPVisionModelWithProjection"

    def facts(self) -> list[Fact]:
        ImageEncoder(self.image_encoder, self.feature_extractor).check()
        own, width = self.embedding_dim, self.image_encoder.config.projection_dim
        return [("image_normalizer.embedding_dim", own, "image_encoder.projection_dim", width)]

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures | Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 10.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: ReferenceCallback | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        noise_level: int = 0,
        image_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        *,
        seed: Seed = None,
        callback_on_step_end: Callback | None = None,
        return_intermediates: bool = False,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make variations.

        Args:
            image: as in `UnCLIPImageVariationPipeline`. May be None only with `image_embeds`.
            prompt: a caption for the decoder in addition to the embedding; one, or one for each picture. Several
                captions may be given for one picture. Empty by default.
            noise_level: noise that is added to the image embedding, 0 to 999: how far variations may differ. Every
                picture has its own noise; in diffusers, the pictures of one prompt share it.
            image_embeds: [batch, embedding_dim] in place of `image`, for example an interpolation, or embeddings of a
                prior of the same CLIP.
            height, width, num_inference_steps, guidance_scale, negative_prompt, num_images_per_prompt, eta, generator,
                latents, prompt_embeds, negative_prompt_embeds, output_type, return_dict, callback, callback_steps,
                cross_attention_kwargs, clip_skip, seed, callback_on_step_end, return_intermediates: as in
                `StableUnCLIPPipeline`.

        Raises: as `UnCLIPImageVariationPipeline`.
        """
        self.check()
        check_output(output_type, cross_attention_kwargs)
        run = self.decoder_run(
            num_inference_steps,
            guidance_scale,
            latents,
            self.size(height, width),
            eta=eta,
            decodes=output_type != LATENT,
        )
        if prompt is not None and prompt_embeds is not None:
            raise InputError("give prompt or prompt_embeds, not both")
        found = self.embed_images(image, image_embeds)
        rows = len(found)
        if rows == 1:  # one picture for several captions
            given = prompt if prompt_embeds is None else prompt_embeds
            rows = 1 if given is None else len([given] if isinstance(given, str) else given)
            found = found.expand(rows, -1)
        return self._sample(
            lambda call, count: found.repeat_interleave(count, dim=0),
            rows,
            run,
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            seed=seed,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            return_dict=return_dict,
            noise_level=noise_level,
            clip_skip=clip_skip,
            callback_on_step_end=either_callback(callback, callback_steps, callback_on_step_end),
            return_intermediates=return_intermediates,
        )

    def embed_images(self, image: Pictures | Tensor | None, image_embeds: Tensor | None = None) -> Tensor:
        """The embeddings of pictures, or the given ones: float32 [batch, embedding_dim].

        Args: as in a call.

        Raises: InputError unless exactly one of the two is given (ImageError: a picture is wrong).
        """
        if (image is None) == (image_embeds is None):
            raise InputError("give image or image_embeds, and only one of them")
        if image_embeds is not None:
            check_embeddings(image_embeds, self.embedding_dim)
            return image_embeds.to(self.device).float()
        given = image if isinstance(image, Tensor) else as_pictures(cast(Pictures, image))
        return ImageEncoder(self.image_encoder, self.feature_extractor).encode(given, self.device).float()


def check_output(output_type: str, cross_attention_kwargs: Mapping[str, Any] | None) -> None:
    """Raises: InputError for an unknown output type, or arguments that unclip does not have."""
    if output_type != LATENT:
        check_output_type(output_type)
    if cross_attention_kwargs is not None:
        raise InputError("cross_attention_kwargs must be None: attention processors of diffusers are not supported")


def either_callback(
    callback: ReferenceCallback | None, callback_steps: int, callback_on_step_end: Callback | None
) -> Callback | None:
    """The one callback of a call. Raises: InputError for two callbacks, or a wrong `callback_steps`."""
    every = whole(callback_steps, "callback_steps", 1)
    if callback is None:
        return callback_on_step_end
    if callback_on_step_end is not None:
        raise InputError("give callback or callback_on_step_end, not both")
    if not callable(callback):
        raise InputError(f"callback must be a function, not {type(callback).__name__}")

    def call(pipe: Any, step: int, t: int, state: Mapping[str, Any]) -> None:
        if step % every == 0:
            callback(step, t, state["latents"])

    return call
