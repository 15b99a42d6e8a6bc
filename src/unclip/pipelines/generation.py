"""The base of the public pipelines: text encoder, decoder and super-resolution, as stages with their settings."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from unclip.checkpoints.layout import FURTHER, STATISTICS_FILE
from unclip.clip.encoders import TextEmbedding, TextEncoder
from unclip.clip.statistics import EmbeddingStatistics
from unclip.diffusion.scheduler import Scheduler
from unclip.errors import ConfigError, EmbeddingScaleWarning, InputError, UnknownCaptionWarning
from unclip.models.text_proj import UnCLIPTextProjModel
from unclip.models.unet import UNet2DConditionModel, UNet2DModel
from unclip.pipelines import cascade
from unclip.pipelines.arguments import (
    Callback,
    ImagePipelineOutput,
    as_captions,
    check_count,
    check_embeddings,
    check_output_type,
    noise_source,
)
from unclip.pipelines.cascade import Fact
from unclip.pipelines.pipeline import Pipeline
from unclip.pipelines.steps import Call, StageRun, decode, decoder_conditions, encode, enlarge, finish, noised
from unclip.settings import SETTINGS
from unclip.stages.decoder import DecoderStage
from unclip.stages.stage import ALWAYS, DecoderCondition, Size, Stage, SuperResCondition
from unclip.stages.super_res import SuperResStage, Tiling

if TYPE_CHECKING:
    import numpy as np
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer


class GenerationPipeline(Pipeline):
    """A pipeline with a text encoder, a decoder and super-resolution.

    Further super-resolution stages may follow: `super_res_2_first` and `super_res_2_scheduler`, with
    `super_res_2_last` if its last step has its own network, then `super_res_3_…`, up to `super_res_9_…`.
    """

    OPTIONAL = FURTHER
    text_encoder: "CLIPTextModelWithProjection"
    tokenizer: "CLIPTokenizer"
    text_proj: UnCLIPTextProjModel
    decoder: UNet2DConditionModel
    super_res_first: UNet2DModel
    super_res_last: UNet2DModel
    decoder_scheduler: Scheduler
    super_res_scheduler: Scheduler
    _tiling: Tiling | None = None

    @classmethod
    def from_pipe(cls, pipeline: Pipeline, **components: Any) -> Self:
        made = super().from_pipe(pipeline, **components)
        tiling = getattr(pipeline, "_tiling", None)
        if tiling is not None:
            made.enable_super_res_tiling(tiling.tile_px, tiling.overlap_px)
        return made

    @property
    def cascade(self) -> dict[str, cascade.SuperResParts]:
        """The super-resolution stages, in order: "super_res", then "super_res_2" and so on."""
        return cascade.parts(self.components)

    def enable_super_res_tiling(self, tile_px: int = 256, overlap_px: int = 32) -> None:
        """Run super-resolution's networks on overlapping tiles, so that memory does not grow with the pictures.

        Every step averages the tiles where they overlap. Stages whose pictures are not larger than a tile do not
        change. Tiles of the size that the network was trained on look best.

        Raises: InputError for sizes that are not valid, or that the networks cannot halve.
        """
        tiling = Tiling(tile_px, overlap_px)
        for part in self.cascade.values():
            tiling.check_multiple(part.multiple)
        self._tiling = tiling

    def disable_super_res_tiling(self) -> None:
        """Run super-resolution's networks on whole pictures again."""
        self._tiling = None

    def check(self) -> None:
        """Raises: ConfigError when the components do not fit one another."""
        text, proj, decoder = self.text_encoder.config, self.text_proj.config, self.decoder.config
        channels, dim = decoder.in_channels, proj.clip_embeddings_dim
        stages = self.cascade
        largest = max(self.tokenizer.get_vocab().values())
        if largest >= text.vocab_size:
            raise ConfigError(
                f"the components do not fit: tokenizer's largest token id is {largest}, but text_encoder has "
                f"{text.vocab_size} tokens"
            )
        if decoder.class_embed_type != "identity":
            raise ConfigError(
                f"the components do not fit: decoder.class_embed_type is {decoder.class_embed_type!r}; it must be "
                "'identity', since the output of text_proj is added there"
            )
        fits: list[Fact] = [
            ("text_proj.clip_embeddings_dim", dim, "text_encoder.projection_dim", text.projection_dim),
            ("text_proj.clip_embeddings_dim", dim, "text_encoder.hidden_size", text.hidden_size),
            ("text_proj.cross_attention_dim", proj.cross_attention_dim, "decoder's", decoder.cross_attention_dim),
            ("text_proj.time_embed_dim", proj.time_embed_dim, "decoder's", decoder.embedding_width),
            *cascade.fits(decoder, stages),
        ]
        if (encoder := self.components.get("image_encoder")) is not None:
            width = encoder.config.projection_dim
            fits.append(("image_encoder.projection_dim", width, "text_proj.clip_embeddings_dim", dim))
        networks: list[tuple[str, Any, Scheduler]] = [("decoder", decoder, self.decoder_scheduler)]
        for stage, part in stages.items():
            networks.append((f"{stage}_first", part.first.config, part.scheduler))
            networks.append((f"{stage}_last", part.last.config, part.scheduler))
        for name, config, scheduler in networks:
            variance_type = scheduler.config["variance_type"]
            wanted = channels * (2 if scheduler.process.learns_variance else 1)
            fits.append((f"{name}.out_channels", config.out_channels, f"its scheduler's ({variance_type=})", wanted))
        cascade.check_fits(fits)

    @property
    def embedding_dim(self) -> int:
        """Width of the image embeddings that the decoder takes."""
        return self.text_proj.config.clip_embeddings_dim

    @property
    def side_multiple(self) -> int:
        """The number that must divide a result's height and width, unless they are the model's own."""
        return cascade.side_multiple(self.decoder, self.cascade)

    @property
    def decoder_networks(self) -> list[nn.Module]:
        """The networks that a picture of given embeddings and noise depends on, without super-resolution."""
        return [self.text_proj, self.decoder]

    @property
    def caption_encoder(self) -> TextEncoder:
        """The text encoder with its tokenizer."""
        return TextEncoder(self.text_encoder, self.tokenizer)

    def report_unknown(self, captions: Sequence[str], text: TextEmbedding) -> None:
        """Warn of each caption that is not close to any concept that the model knows (`concepts`).

        Args:
            captions: as many as `text` has rows.
            text: their embeddings.
        """
        if self.concepts is not None:
            for message in self.concepts.reports(captions, text.embeds):
                warnings.warn(message, UnknownCaptionWarning, stacklevel=4)

    @torch.no_grad()
    def decode(
        self,
        image_embeddings: "Tensor | np.ndarray",
        *,
        rescale: str | None = None,
        check_scale: bool = True,
        **settings: Any,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make pictures of image embeddings from any source, such as a file (`read_embeddings`) or a regression.

        The same as the call of `UnCLIPImageVariationPipeline` with `image_embeddings`. It works in any pipeline,
        also in one without an image encoder. The scale of the embeddings is compared with `statistics`.

        Args:
            image_embeddings: floating point [batch, embedding_dim], in the space of the model's CLIP, not normalised.
            rescale: "norm": each embedding gets the mean norm of the model's own. "dimensions": each dimension gets
                their mean and standard deviation; this needs 16 or more embeddings. "unwhiten": each dimension is
                multiplied by their standard deviation, and their mean is added. None: embeddings stay as they are.
            check_scale: warn of embeddings that are not like the model's own (`EmbeddingScaleWarning`).
            settings: `num_images_per_prompt`, `decoder_num_inference_steps`, `seed`, `prompt`, `noise_level` and the
                others of that call.

        Raises: as that call; InputError for an unknown `rescale`, or for a model without statistics.
        """
        rows = torch.as_tensor(image_embeddings)
        check_embeddings(rows, self.embedding_dim)
        if rescale is not None:
            rows = self.statistics_for("rescale").rescaled(rows, rescale)
        statistics = self.statistics if check_scale else None
        if statistics is not None and (message := statistics.report(rows)) is not None:
            warnings.warn(message, EmbeddingScaleWarning, stacklevel=3)
        return self._decode(lambda: rows.to(self.device).float(), **settings)

    def _decode(
        self,
        embed: Callable[[], Tensor],
        num_images_per_prompt: int = 1,
        decoder_num_inference_steps: int = 25,
        super_res_num_inference_steps: int | Sequence[int] = 7,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        decoder_latents: Tensor | None = None,
        super_res_latents: Tensor | Sequence[Tensor | None] | None = None,
        decoder_guidance_scale: float = 8.0,
        output_type: str = "pil",
        return_dict: bool = True,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        noise_level: int = 0,
        callback_on_step_end: Callback | None = None,
        return_intermediates: bool = False,
        decoder_guidance_low: float = 0.0,
        decoder_guidance_high: float = 1.0,
        decoder_reuse: int = 1,
        super_res_reuse: int = 1,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """A call of `UnCLIPImageVariationPipeline` with the embeddings [batch, embedding_dim] that `embed` returns."""
        self.check()
        check_output_type(output_type)
        sizes = self.sizes(height, width)
        decoder = self.decoder_run(
            decoder_num_inference_steps,
            decoder_guidance_scale,
            decoder_latents,
            sizes["decoder"],
            guidance_interval=(decoder_guidance_low, decoder_guidance_high),
            reuse=decoder_reuse,
        )
        super_res = self.super_res_runs(super_res_num_inference_steps, super_res_latents, sizes, reuse=super_res_reuse)
        statistics = self.noise_statistics(noise_level)
        embeddings = embed()
        rows = len(embeddings)
        captions, negative = as_captions(prompt, rows), as_captions(negative_prompt, rows)
        count = check_count(num_images_per_prompt, rows)
        for run in (decoder, *super_res):
            run.check_latents(count * rows)
        call = Call(self, noise_source(generator, seed, count * rows), callback_on_step_end)

        text = encode(self.caption_encoder, captions, rows, count, self.device)
        null_text = encode(self.caption_encoder, negative, rows, count, self.device) if decoder.guided else None
        embeddings = noised(embeddings.repeat_interleave(count, dim=0), statistics, noise_level, call)
        small = decode(decoder, text, null_text, embeddings, call)
        large = enlarge(super_res, small, call)
        output = finish(
            large, small, embeddings, call, output_type=output_type, return_intermediates=return_intermediates
        )
        return output if return_dict else output.to_tuple()

    def noise_statistics(self, noise_level: int) -> EmbeddingStatistics | None:
        """The statistics by which embeddings are noised; None for level 0.

        Raises: InputError for a level outside its limits, or for a model without statistics.
        """
        return self.statistics_for("noise_level") if SETTINGS["noise_level"].check(noise_level) else None

    def statistics_for(self, argument: str) -> EmbeddingStatistics:
        """The statistics that a call's argument needs. Raises: InputError for a model without them."""
        if self.statistics is None:
            raise InputError(
                f"{argument} needs the statistics of the model's image embeddings: write {STATISTICS_FILE} into its "
                "folder with unclip data statistics, or set pipe.statistics"
            )
        return self.statistics

    def sizes(self, height: int | None = None, width: int | None = None) -> dict[str, Size]:
        """Height and width of the pictures at "decoder" and at each super-resolution stage, for a result of this size.

        Raises: InputError for a size that the networks cannot make.
        """
        return cascade.picture_sizes(self.decoder, self.cascade, height, width)

    def decoder_stage(self, size: Size | None = None, reuse: int = 1) -> Stage[DecoderCondition]:
        """The decoder as a stage; without a size it makes its own squares."""
        return DecoderStage(self.decoder, self.text_proj, self.decoder_scheduler.process, size, reuse)

    def super_res_stages(self, sizes: Mapping[str, Size] | None = None, reuse: int = 1) -> dict[str, SuperResStage]:
        """The super-resolution stages, in order; without `sizes` they make their own squares."""
        return {
            name: SuperResStage(
                part.first,
                part.last,
                part.scheduler.process,
                None if sizes is None else sizes[name],
                self._tiling,
                reuse,
            )
            for name, part in self.cascade.items()
        }

    def decoder_run(
        self,
        num_steps: int,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        size: Size | None = None,
        *,
        guidance_interval: tuple[float, float] = ALWAYS,
        reuse: int = 1,
    ) -> StageRun[DecoderCondition]:
        """The decoder with its scheduler's sampler and a call's settings. Raises: InputError for a wrong setting."""
        scheduler = self.decoder_scheduler
        low, high = guidance_interval
        low = float(SETTINGS["decoder_guidance_low"].check(low))
        high = float(SETTINGS["decoder_guidance_high"].check(high))
        if low > high:
            raise InputError(f"decoder_guidance_low is {low:g}; it must not be above decoder_guidance_high, {high:g}")
        return StageRun(
            "decoder",
            self.decoder_stage(size, int(SETTINGS["decoder_reuse"].check(reuse))),
            scheduler.sampler(),
            scheduler.spaced_timesteps(num_steps),
            float(SETTINGS["decoder_guidance_scale"].check(guidance_scale)),
            latents,
            guidance_interval=(low, high),
        )

    def conditions(
        self, run: StageRun[DecoderCondition], prompt: str | Sequence[str] | None, embeddings: Tensor
    ) -> tuple[DecoderCondition, DecoderCondition | None]:
        """The decoder's condition for embeddings [batch, embedding_dim] and captions, and its null condition if guided.

        Args:
            run: the decoder.
            prompt: a caption, or one for each row; None: the empty caption.
            embeddings: on the pipeline's device.
        """
        encoder, rows = self.caption_encoder, len(embeddings)
        text = encode(encoder, as_captions(prompt, rows), rows, 1, self.device)
        null_text = encode(encoder, [""], rows, 1, self.device) if run.guided else None
        return decoder_conditions(run, text, null_text, embeddings)

    def super_res_runs(
        self,
        num_steps: int | Sequence[int],
        latents: Tensor | Sequence[Tensor | None] | None = None,
        sizes: Mapping[str, Size] | None = None,
        *,
        reuse: int = 1,
    ) -> list[StageRun[SuperResCondition]]:
        """The super-resolution stages, in order, as in `decoder_run`.

        Args:
            num_steps: one number for all stages, or one for each.
            latents: x_T of the first stage, or one or None for each.
            sizes: as in `super_res_stages`.
            reuse: of the deep levels, for all stages.

        Raises: InputError for a wrong setting, or another number of them than of stages.
        """
        reuse = int(SETTINGS["super_res_reuse"].check(reuse))
        stages, schedulers = self.super_res_stages(sizes, reuse), [part.scheduler for part in self.cascade.values()]
        steps = cascade.per_stage(num_steps, len(stages), "super_res_num_inference_steps")
        noise: list[Tensor | None]
        if isinstance(latents, Tensor):
            latents = [latents, *[None] * (len(stages) - 1)]
        noise = cascade.per_stage(latents, len(stages), "super_res_latents")
        return [
            StageRun(name, stage, scheduler.sampler(), scheduler.spaced_timesteps(count), latents=x_T)
            for (name, stage), scheduler, count, x_T in zip(stages.items(), schedulers, steps, noise, strict=True)
        ]
