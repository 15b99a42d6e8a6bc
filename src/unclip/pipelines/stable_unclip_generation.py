"""Stable unCLIP with the argument names of unclip's own pipelines, for the session, the commands and `Manipulator`."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unclip.checkpoints.recommended import Recommended
from unclip.clip.encoders import TextEncoder
from unclip.diffusion.scheduler import Scheduler
from unclip.errors import InputError
from unclip.images import Pictures
from unclip.pipelines.arguments import Callback, ImagePipelineOutput, as_captions, check_output_type
from unclip.pipelines.cascade import SuperResParts, per_stage
from unclip.pipelines.generation import GenerationPipeline
from unclip.pipelines.stable_unclip import StableUnCLIPImg2ImgPipeline, StableUnCLIPPipeline
from unclip.pipelines.stable_unclip_decoder import Generators, Seed, StableUnCLIPBase
from unclip.pipelines.steps import PriorRun, StageRun
from unclip.pipelines.text_to_image import UnCLIPPipeline
from unclip.stages.latent import LatentStage
from unclip.stages.stable_diffusion import StableCondition
from unclip.stages.stage import Size, Stage


class _Unified(StableUnCLIPBase):
    """What a `GenerationPipeline` has, without super-resolution stages. Level 0 adds no noise."""

    DEFAULTS: ClassVar[Mapping[str, Recommended]] = {
        "decoder_num_inference_steps": 20,
        "decoder_guidance_scale": 10.0,
    }
    decode = GenerationPipeline.decode
    report_unknown = GenerationPipeline.report_unknown
    statistics_for = GenerationPipeline.statistics_for
    cascade: Mapping[str, SuperResParts] = {}
    """The super-resolution stages: none."""

    @property
    def folder_class(self) -> str:
        has_prior = isinstance(self, StableUnCLIPPipeline)
        return (StableUnCLIPPipeline if has_prior else StableUnCLIPImg2ImgPipeline).__name__

    @property
    def side_multiple(self) -> int:
        """The number that must divide a result's height and width."""
        return self.autoencoder.factor

    def sizes(self, height: int | None = None, width: int | None = None) -> dict[str, Size]:
        """Height and width of the pictures, at "decoder". Raises: InputError for a side that is not a multiple."""
        cells, factor = self.size(height, width), self.autoencoder.factor
        return {"decoder": (cells[0] * factor, cells[1] * factor)}

    @property
    def decoder_networks(self) -> list[nn.Module]:
        """The networks that a decoder's latents belong to."""
        return [self.unet, self.vae]

    @property
    def decoder_scheduler(self) -> Scheduler:
        """The decoder's scheduler."""
        return self.scheduler

    @decoder_scheduler.setter
    def decoder_scheduler(self, value: Scheduler) -> None:
        self.scheduler = value

    def enable_super_res_tiling(self, tile_px: int = 256, overlap_px: int = 32) -> None:
        """Raises: InputError, because these pipelines have no super-resolution."""
        raise InputError("this model has no super-resolution, so its pictures cannot be computed in tiles")

    def super_res_stages(self, sizes: Mapping[str, Size] | None = None, reuse: int = 1) -> dict[str, Stage[Any]]:
        """The super-resolution stages: none."""
        return {}

    def super_res_runs(
        self,
        num_steps: int | Sequence[int],
        latents: Any = None,
        sizes: Mapping[str, Size] | None = None,
        *,
        reuse: int = 1,
    ) -> list[StageRun[Any]]:
        """The super-resolution stages: none. Raises: InputError for settings of several stages."""
        per_stage(num_steps, 0, "super_res_num_inference_steps")
        per_stage(latents, 0, "super_res_latents")
        return []

    def decoder_stage(self, size: Size | None = None) -> LatentStage[StableCondition]:
        """The decoder as a stage; `size` is in cells of the latents."""
        return self.decoder_run(1, size=size).stage  # type: ignore[return-value]

    def conditions(
        self, run: StageRun[StableCondition], prompt: str | Sequence[str] | None, embeddings: Tensor
    ) -> tuple[StableCondition, StableCondition | None]:
        """As `GenerationPipeline.conditions`; the embeddings have no noise."""
        rows = len(embeddings)
        labels = self._labels(embeddings, 0, torch.zeros_like(embeddings))
        states = self._states(as_captions(prompt, rows), None, rows, 1, None)
        null = None
        if run.guided:
            null = StableCondition.null(self._states([""], None, rows, 1, None), self.embedding_dim)
        return StableCondition(states, labels), null

    def _decode(
        self,
        embed: Callable[[], Tensor],
        num_images_per_prompt: int = 1,
        decoder_num_inference_steps: int = 20,
        super_res_num_inference_steps: int | Sequence[int] = 7,
        generator: Generators = None,
        decoder_latents: Tensor | None = None,
        super_res_latents: Tensor | Sequence[Tensor | None] | None = None,
        decoder_guidance_scale: float = 10.0,
        output_type: str = "pil",
        return_dict: bool = True,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        seed: Seed = None,
        height: int | None = None,
        width: int | None = None,
        noise_level: int = 0,
        callback_on_step_end: Callback | None = None,
        return_intermediates: bool = False,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """As `GenerationPipeline._decode`."""
        self.check()
        check_output_type(output_type)
        run = self.decoder_run(
            decoder_num_inference_steps, decoder_guidance_scale, decoder_latents, self.size(height, width)
        )
        self.super_res_runs(super_res_num_inference_steps, super_res_latents)
        embeddings = embed()
        return self._sample(
            lambda call, count: embeddings.repeat_interleave(count, dim=0),
            len(embeddings),
            run,
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            seed=seed,
            prompt_embeds=None,
            negative_prompt_embeds=None,
            output_type=output_type,
            return_dict=return_dict,
            noise_level=noise_level,
            clip_skip=None,
            callback_on_step_end=callback_on_step_end,
            return_intermediates=return_intermediates,
            noisy_at_0=False,
        )


class StableTextToImage(_Unified, StableUnCLIPPipeline):
    """`StableUnCLIPPipeline` with the call of `UnCLIPPipeline`; the negative prompt is for the decoder alone."""

    embed_captions = UnCLIPPipeline.embed_captions

    @property
    def caption_encoder(self) -> TextEncoder:
        """The text encoder of the prior, with its tokenizer."""
        return TextEncoder(self.prior_text_encoder, self.prior_tokenizer)

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        prior_num_inference_steps: int = 25,
        decoder_num_inference_steps: int = 20,
        super_res_num_inference_steps: int | Sequence[int] = 7,
        generator: Generators = None,
        prior_latents: Tensor | None = None,
        decoder_latents: Tensor | None = None,
        super_res_latents: Tensor | Sequence[Tensor | None] | None = None,
        prior_guidance_scale: float = 4.0,
        decoder_guidance_scale: float = 10.0,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        seed: Seed = None,
        num_prior_candidates: int = 1,
        prior_temperature: float = 1.0,
        prior_top_p: float = 1.0,
        image_embeddings: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        noise_level: int = 0,
        callback_on_step_end: Callback | None = None,
        return_intermediates: bool = False,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """As `UnCLIPPipeline`, without its settings of super-resolution."""
        self.check()
        check_output_type(output_type)
        run = self.decoder_run(
            decoder_num_inference_steps, decoder_guidance_scale, decoder_latents, self.size(height, width)
        )
        self.super_res_runs(super_res_num_inference_steps, super_res_latents)
        prior: PriorRun = self.prior_run(
            prior_num_inference_steps,
            prior_guidance_scale,
            prior_latents,
            num_candidates=num_prior_candidates,
            temperature=prior_temperature,
            top_p=prior_top_p,
        )
        prompts = self._prompts(prompt, image_embeddings, prior_latents)
        return self._sample(
            self._embeddings(prompts, image_embeddings, prior),
            len(prompts),
            run,
            prompt=prompts,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            seed=seed,
            prompt_embeds=None,
            negative_prompt_embeds=None,
            output_type=output_type,
            return_dict=return_dict,
            noise_level=noise_level,
            clip_skip=None,
            callback_on_step_end=callback_on_step_end,
            return_intermediates=return_intermediates,
            prior=prior if image_embeddings is None else None,
            noisy_at_0=False,
        )


class StableVariation(_Unified, StableUnCLIPImg2ImgPipeline):
    """`StableUnCLIPImg2ImgPipeline` with the call of `UnCLIPImageVariationPipeline`."""

    @property
    def caption_encoder(self) -> TextEncoder:
        """The text encoder of the decoder. Its embeddings are not in the space of the image embeddings."""
        return self.decoder_text_encoder()

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: Pictures | Tensor | None = None,
        num_images_per_prompt: int = 1,
        decoder_num_inference_steps: int = 20,
        super_res_num_inference_steps: int | Sequence[int] = 7,
        generator: Generators = None,
        decoder_latents: Tensor | None = None,
        super_res_latents: Tensor | Sequence[Tensor | None] | None = None,
        image_embeddings: Tensor | None = None,
        decoder_guidance_scale: float = 10.0,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        seed: Seed = None,
        height: int | None = None,
        width: int | None = None,
        noise_level: int = 0,
        callback_on_step_end: Callback | None = None,
        return_intermediates: bool = False,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """As `UnCLIPImageVariationPipeline`, without its settings of super-resolution."""
        return self._decode(
            partial(self.embed_images, image, image_embeddings),
            num_images_per_prompt,
            decoder_num_inference_steps,
            super_res_num_inference_steps,
            generator,
            decoder_latents,
            super_res_latents,
            decoder_guidance_scale,
            output_type,
            return_dict,
            prompt,
            negative_prompt,
            seed,
            height,
            width,
            noise_level,
            callback_on_step_end,
            return_intermediates,
        )
