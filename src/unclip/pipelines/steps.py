"""The second half that all pipelines share: image embedding → small picture → large picture → output.

Knows decoder and super-resolution as stages; knows not where the embedding came from. Base of the public pipelines.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from PIL import Image
from torch import Tensor

from unclip.checkpoints.layout import FURTHER
from unclip.clip.encoders import TextEmbedding, TextEncoder
from unclip.diffusion.guidance import uses_guidance
from unclip.diffusion.loop import NoiseSource
from unclip.diffusion.sampler import InpaintingSampler, Sampler
from unclip.diffusion.scheduler import Scheduler
from unclip.errors import ConfigError, InputError
from unclip.images import to_square
from unclip.models.text_proj import UnCLIPTextProjModel
from unclip.models.unet import UNet2DConditionModel, UNet2DModel
from unclip.pipelines import cascade
from unclip.pipelines.arguments import (
    Callback,
    ImagePipelineOutput,
    as_prompts,
    check_finite,
    check_latents,
    in_form,
    on_step,
)
from unclip.pipelines.cascade import Fact
from unclip.pipelines.pipeline import Pipeline, stage_words
from unclip.stages.decoder import DecoderStage
from unclip.stages.stage import DecoderCondition, Size, Stage, SuperResCondition, invert, sample, size_px
from unclip.stages.super_res import SuperResStage, Tiling

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer


@dataclass(frozen=True)
class Known:
    """What one stage knows of its result, when a picture is edited.

    Attributes:
        x0: the picture at the stage's size, float32 [batch, channels, height, width] in [-1, 1].
        kept: bool [batch, 1, height, width], true where `x0` stays; None where nothing must.
        strength: the share of the steps that are taken, from `x0` noised as far as that; None: all, from pure noise.
        num_resamples, jump_length: see `InpaintingSampler`.
    """

    x0: Tensor
    kept: Tensor | None = None
    strength: float | None = None
    num_resamples: int = 1
    jump_length: int = 1

    def sampler(self, sampler: Sampler) -> Sampler:
        """`sampler`, keeping what must stay."""
        if self.kept is None:
            return sampler
        return InpaintingSampler(sampler, self.x0, self.kept, self.num_resamples, self.jump_length)

    def timesteps(self, timesteps: tuple[int, ...]) -> tuple[int, ...]:
        """The last ones, as many as the share says, and one at least."""
        return timesteps if self.strength is None else timesteps[-max(1, round(self.strength * len(timesteps))) :]


@dataclass(frozen=True)
class StageRun:
    """How one stage runs in one call.

    Attributes:
        num_steps: how many steps.
        guidance_scale: above 1 guides.
        latents: x_T, or None to draw it.
        size: height and width of what the stage makes; None where it makes no picture, or one of its own size.
        known: what it knows of its result; None where all is drawn.
    """

    num_steps: int
    guidance_scale: float = 1.0
    latents: Tensor | None = None
    size: Size | None = None
    known: Known | None = None

    @property
    def guided(self) -> bool:
        """Whether null predictions are needed."""
        return uses_guidance(self.guidance_scale)


@dataclass(frozen=True)
class Call:
    """What holds for all stages of one call: where noise comes from, and who is told of each step."""

    noise: NoiseSource
    callback: Callback | None


class GenerationPipeline(Pipeline):
    """Text encoder, decoder and super-resolution: what all pipelines have.

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
    def _annotation(cls, name: str) -> Any:
        return super()._annotation(re.sub(r"^super_res_\d_", "super_res_", name))

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
        """Let super-resolution's networks see large pictures in overlapping tiles: memory no longer grows with a side.

        Every step averages the tiles where they overlap. A stage whose pictures are no larger than a tile is left as it
        is. Tiles of the size that the network was trained on (of crops, say) look best.

        Raises: InputError for sizes that no tiling has, or that some stage's network cannot halve often enough.
        """
        tiling = Tiling(tile_px, overlap_px)
        for part in self.cascade.values():
            tiling.check_multiple(part.multiple)
        self._tiling = tiling

    def disable_super_res_tiling(self) -> None:
        """Let them see pictures as a whole again."""
        self._tiling = None

    def check(self) -> None:
        """Raises: ConfigError when the components do not fit one another."""
        text, proj, decoder = self.text_encoder.config, self.text_proj.config, self.decoder.config
        channels, dim = decoder.in_channels, proj.clip_embeddings_dim
        stages = self.cascade
        largest = max(self.tokenizer.get_vocab().values())
        if largest >= text.vocab_size:
            raise ConfigError(
                f"the components do not fit: tokenizer numbers its tokens up to {largest}, text_encoder has "
                f"{text.vocab_size} of them, from 0"
            )
        if decoder.class_embed_type != "identity":
            raise ConfigError(
                f"the components do not fit: decoder.class_embed_type is {decoder.class_embed_type!r}; it must be "
                "'identity', for what text_proj makes of the image embedding goes in there"
            )
        fits: list[Fact] = [
            ("text_proj.clip_embeddings_dim", dim, "text_encoder.projection_dim", text.projection_dim),
            ("text_proj.clip_embeddings_dim", dim, "text_encoder.hidden_size", text.hidden_size),
            ("text_proj.cross_attention_dim", proj.cross_attention_dim, "decoder's", decoder.cross_attention_dim),
            ("text_proj.time_embed_dim", proj.time_embed_dim, "decoder's", decoder.embedding_width),
            *cascade.fits(decoder, stages),
        ]
        networks: list[tuple[str, Any, Scheduler]] = [("decoder", decoder, self.decoder_scheduler)]
        for stage, part in stages.items():
            networks.append((f"{stage}_first", part.first.config, part.scheduler))
            networks.append((f"{stage}_last", part.last.config, part.scheduler))
        for name, config, scheduler in networks:
            variance_type = scheduler.config["variance_type"]
            wanted = channels * (2 if scheduler.process.learns_variance else 1)
            fits.append((f"{name}.out_channels", config.out_channels, f"its scheduler's ({variance_type=})", wanted))
        self._check_fits(fits)

    def _check_finite(self, results: Mapping[str, Tensor]) -> None:
        """Raises: NonFiniteError; see `check_finite`."""
        check_finite(results, has_float16=any(network.dtype == torch.float16 for network in self.networks.values()))

    def _check_fits(self, fits: Sequence[Fact]) -> None:
        for name, value, other, wanted in fits:
            if value != wanted:
                raise ConfigError(f"the components do not fit: {name} is {value}, but {other} is {wanted}")

    def _check_steps(self, name: str, run: StageRun) -> None:
        """Raises: InputError, before anything is computed, for a number of steps that the scheduler cannot take."""
        getattr(self, f"{name}_scheduler").spaced_timesteps(run.num_steps)

    def _sample_shape(self, name: str) -> tuple[int, ...]:
        """The shape of one sample of a stage."""
        if name == "decoder":
            channels, size = self.decoder.config.in_channels, size_px(self.decoder.config.sample_size)
        else:
            config = getattr(self, f"{name}_first").config
            channels, size = config.in_channels // 2, size_px(config.sample_size)
        return (channels, size, size)

    def _sizes(self, height: int | None, width: int | None) -> dict[str, Size]:
        """The pictures' sizes at "decoder" and at each super-resolution stage.

        Raises: InputError for an impossible one.
        """
        return cascade.picture_sizes(self.decoder, self.cascade, height, width)

    def _super_res_runs(
        self, num_steps: int | Sequence[int], latents: Any, sizes: Mapping[str, Size]
    ) -> dict[str, StageRun]:
        """How each super-resolution stage runs: steps and latents are for all stages, or one for each.

        Raises: InputError when there is another number of them than of stages.
        """
        stages = list(self.cascade)
        steps = cascade.per_stage(num_steps, stages, "super_res_num_inference_steps")
        latents = [latents, *[None] * (len(stages) - 1)] if isinstance(latents, Tensor) else latents
        noise = cascade.per_stage(latents, stages, "super_res_latents")
        return {stage: StageRun(steps[stage], 1.0, noise[stage], sizes[stage]) for stage in stages}

    def _check_latents(self, batch_size: int, **runs: StageRun) -> None:
        """Raises: InputError, before any stage runs, for given noise that is not for its stage."""
        for name, run in runs.items():
            shape = self._sample_shape(name)
            check_latents(run.latents, f"{name}_latents", (batch_size, *(shape[:1] + run.size if run.size else shape)))

    def _text(self) -> TextEncoder:
        return TextEncoder(self.text_encoder, self.tokenizer)

    def _captions(self, prompt: str | Sequence[str] | None, rows: int) -> list[str]:
        """One caption (the empty one by default), or one for each of `rows` prompts or pictures."""
        captions = [""] if prompt is None else as_prompts(prompt)
        if len(captions) not in (1, rows):
            raise InputError(f"there are {len(captions)} captions for {rows} pictures; give one, or one for each")
        return captions

    def _repeated_text(self, captions: list[str], rows: int, repeat: int) -> TextEmbedding:
        """The embeddings of `_captions` for every picture; one caption is encoded once for all."""
        encoded = self._text().encode(captions, self.device)
        return (encoded if len(captions) == rows else encoded.select([0] * rows)).repeat(repeat)

    def _run(self, name: str, stage: Any, condition: Any, null: Any, run: StageRun, call: Call) -> Tensor:
        scheduler: Scheduler = getattr(self, f"{name}_scheduler")
        sampler, timesteps, origin = scheduler.sampler(), scheduler.spaced_timesteps(run.num_steps), None
        if (known := run.known) is not None:
            sampler, timesteps = known.sampler(sampler), known.timesteps(timesteps)
            origin = None if known.strength is None else known.x0
        with self._freed_when_stopped():
            return sample(
                stage,
                condition,
                sampler=sampler,
                timesteps=timesteps,
                noise=call.noise,
                null=null,
                guidance_scale=run.guidance_scale,
                latents=run.latents,
                origin=origin,
                progress=self.progress(name),
                on_step=on_step(self, name, call.callback),
            )

    @contextmanager
    def _freed_when_stopped(self) -> Iterator[None]:
        """A run that is stopped within leaves nothing on the accelerator either."""
        try:
            yield
        except BaseException:
            self.maybe_free_model_hooks()
            raise

    def _decode(
        self, text: TextEmbedding, null_text: TextEmbedding | None, embeddings: Tensor, run: StageRun, call: Call
    ) -> Tensor:
        """Image embeddings [batch, dim] → small pictures [batch, 3, height, width] in [-1, 1]."""
        stage = DecoderStage(self.decoder, self.text_proj, self.decoder_scheduler.process, run.size)
        null = DecoderCondition.null(null_text) if null_text is not None and run.guided else None
        return self._run("decoder", stage, DecoderCondition.of(text, embeddings), null, run, call)

    def _enlarge(self, small: Tensor, runs: Mapping[str, StageRun], call: Call) -> Tensor:
        """Small pictures → large ones, in [-1, 1]: one super-resolution stage after another."""
        picture = small
        for name, part in self.cascade.items():
            stage = SuperResStage(part.first, part.last, part.scheduler.process, runs[name].size, self._tiling)
            picture = self._run(name, stage, SuperResCondition(picture), None, runs[name], call)
        return picture

    def _finish(
        self, large: Tensor, small: Tensor, embeddings: Tensor, output_type: str, intermediates: bool, return_dict: bool
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        self.maybe_free_model_hooks()
        self._check_finite({"image embeddings": embeddings, "decoder's pictures": small, "pictures": large})
        output = ImagePipelineOutput(in_form(large, output_type))
        if intermediates:
            output.image_embeddings = embeddings.float().cpu()
            output.small_images = in_form(small, output_type)
        return output if return_dict else output.to_tuple()


def inverted(
    pipe: GenerationPipeline,
    name: str,
    stage: Stage,
    condition: Any,
    null: Any,
    pictures: Sequence[Image.Image],
    run: StageRun,
    *,
    num_rounds: int,
    callback: Callback | None,
) -> Tensor:
    """x_T of one stage for pictures, which are brought to its size: float32 [batch, channels, size, size].

    Args:
        pipe: has the stage's scheduler, by its name.
        name: the stage's.
        stage, condition, null, num_rounds: as of `unclip.stages.stage.invert`.
        pictures: one for each row of the condition.
        run: steps and guidance.
        callback: as of a pipeline's call.

    Raises: NonFiniteError when it is NaN or infinity.
    """
    size = stage.sample_shape(condition)[-1]
    timesteps = getattr(pipe, f"{name}_scheduler").spaced_timesteps(run.num_steps)
    try:
        x_T = invert(
            stage,
            condition,
            torch.stack([to_square(picture, size) for picture in pictures]),
            timesteps=timesteps,
            num_rounds=num_rounds,
            null=null,
            guidance_scale=run.guidance_scale,
            progress=pipe.progress(name),
            on_step=on_step(pipe, name, callback),
        )
    finally:
        pipe.maybe_free_model_hooks()
    pipe._check_finite({f"{stage_words(name)}'s noise": x_T})
    return x_T


def inverted_super_res(
    pipe: GenerationPipeline,
    pictures: Sequence[Image.Image],
    small: Tensor,
    runs: Mapping[str, StageRun],
    *,
    num_rounds: int,
    callback: Callback | None,
) -> list[Tensor]:
    """x_T of every super-resolution stage, on the CPU; each starts from the picture that the stage before makes.

    Args:
        pipe: samples by DDIM without noise.
        pictures, num_rounds, callback: as of `inverted`.
        small: what the decoder makes, [batch, 3, size, size] in [-1, 1].
        runs: steps of each stage, by its name.
    """
    found: list[Tensor] = []
    picture, stages, call = small, pipe.cascade, Call(NoiseSource(None, len(pictures)), None)
    for name, part in stages.items():
        stage = SuperResStage(part.first, part.last, part.scheduler.process, tiling=pipe._tiling)
        below, told = SuperResCondition(picture), {"num_rounds": num_rounds, "callback": callback}
        x_T = inverted(pipe, name, stage, below, None, pictures, runs[name], **told)  # type: ignore[arg-type]
        found.append(x_T.cpu())
        if len(found) < len(stages):
            picture = pipe._run(name, stage, below, None, replace(runs[name], latents=x_T), call)
    return found
