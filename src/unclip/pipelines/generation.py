"""The second half that both pipelines share: image embedding → small picture → large picture → output.

Knows decoder and super-resolution as stages; knows not where the embedding came from. Base of the two pipelines.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from unclip.diffusion.guidance import uses_guidance
from unclip.diffusion.noise import NoiseSource
from unclip.diffusion.scheduler import Scheduler
from unclip.errors import ConfigError, InputError
from unclip.models.text_proj import UnCLIPTextProjModel
from unclip.models.unet import UNet2DConditionModel, UNet2DModel
from unclip.pipelines.arguments import Callback, as_prompts, check_latents, on_step
from unclip.pipelines.output import ImagePipelineOutput, in_form
from unclip.pipelines.pipeline import Pipeline
from unclip.stages.condition import DecoderCondition, SuperResCondition, TextEmbedding
from unclip.stages.decoder import DecoderStage
from unclip.stages.encoders import TextEncoder
from unclip.stages.stage import sample, size_px
from unclip.stages.super_res import SuperResStage


@dataclass(frozen=True)
class StageRun:
    """How one stage runs in one call.

    Attributes:
        num_steps: how many steps.
        guidance_scale: above 1 guides.
        latents: x_T, or None to draw it.
    """

    num_steps: int
    guidance_scale: float = 1.0
    latents: Tensor | None = None

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
    """Text encoder, decoder and super-resolution: what both pipelines have."""

    text_encoder: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    text_proj: UnCLIPTextProjModel
    decoder: UNet2DConditionModel
    super_res_first: UNet2DModel
    super_res_last: UNet2DModel
    decoder_scheduler: Scheduler
    super_res_scheduler: Scheduler

    def check(self) -> None:
        """Raises: ConfigError when the components' widths or sizes do not fit one another."""
        text, proj, decoder = self.text_encoder.config, self.text_proj.config, self.decoder.config
        first, last = self.super_res_first.config, self.super_res_last.config
        channels, dim = decoder.in_channels, proj.clip_embeddings_dim
        for config in (decoder, first):
            size_px(config.sample_size)
        if len(self.tokenizer) > text.vocab_size:
            raise ConfigError(
                f"the components do not fit: tokenizer has {len(self.tokenizer)} tokens, text_encoder {text.vocab_size}"
            )
        fits = [
            ("text_proj.clip_embeddings_dim", dim, "text_encoder.projection_dim", text.projection_dim),
            ("text_proj.clip_embeddings_dim", dim, "text_encoder.hidden_size", text.hidden_size),
            ("text_proj.cross_attention_dim", proj.cross_attention_dim, "decoder's", decoder.cross_attention_dim),
            ("text_proj.time_embed_dim", proj.time_embed_dim, "decoder's", decoder.embedding_width),
            ("super_res_first.in_channels", first.in_channels, "twice the decoder's", 2 * channels),
            ("super_res_last.in_channels", last.in_channels, "super_res_first.in_channels", first.in_channels),
            ("super_res_last.sample_size", last.sample_size, "super_res_first.sample_size", first.sample_size),
        ]
        for name, config, scheduler in (
            ("decoder", decoder, self.decoder_scheduler),
            ("super_res_first", first, self.super_res_scheduler),
            ("super_res_last", last, self.super_res_scheduler),
        ):
            kind = scheduler.config["variance_type"]
            wanted = channels * (2 if scheduler.process.learns_variance else 1)
            fits.append((f"{name}.out_channels", config.out_channels, f"its scheduler's ({kind=})", wanted))
        self._check_fits(fits)

    def _check_fits(self, fits: Sequence[tuple[str, int | None, str, int | None]]) -> None:
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
            config = self.super_res_first.config
            channels, size = config.in_channels // 2, size_px(config.sample_size)
        return (channels, size, size)

    def _check_latents(self, batch_size: int, **runs: StageRun) -> None:
        """Raises: InputError, before any stage runs, for given noise that is not for its stage."""
        for name, run in runs.items():
            check_latents(run.latents, f"{name}_latents", (batch_size, *self._sample_shape(name)))

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
        with self._freed_when_stopped():
            return sample(
                stage,
                condition,
                sampler=scheduler.sampler(),
                timesteps=scheduler.spaced_timesteps(run.num_steps),
                noise=call.noise,
                null=null,
                guidance_scale=run.guidance_scale,
                latents=run.latents,
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
        """Image embeddings [batch, dim] → small pictures [batch, 3, size, size] in [-1, 1]."""
        stage = DecoderStage(self.decoder, self.text_proj, self.decoder_scheduler.process)
        null = DecoderCondition.null(null_text) if null_text is not None and run.guided else None
        return self._run("decoder", stage, DecoderCondition.of(text, embeddings), null, run, call)

    def _enlarge(self, small: Tensor, run: StageRun, call: Call) -> Tensor:
        """Small pictures → large ones, in [-1, 1]."""
        stage = SuperResStage(self.super_res_first, self.super_res_last, self.super_res_scheduler.process)
        return self._run("super_res", stage, SuperResCondition(small), None, run, call)

    def _finish(
        self, large: Tensor, small: Tensor, embeddings: Tensor, output_type: str, intermediates: bool, return_dict: bool
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        self.maybe_free_model_hooks()
        output = ImagePipelineOutput(in_form(large, output_type))
        if intermediates:
            output.image_embeddings = embeddings.float().cpu()
            output.small_images = in_form(small, output_type)
        return output if return_dict else output.to_tuple()
