"""The steps of a call: encode captions, embed, decode, enlarge, finish; and the way back, from pictures to noise.

Each step takes the stage that it runs, together with its sampler and settings (`StageRun`, `PriorRun`), and what all
steps of one call share (`Call`). A decoder of another kind, in latent space for example, is another
`Stage[DecoderCondition]` whose `finish` returns pictures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, Self

import torch
from PIL import Image
from torch import Tensor

from unclip.clip.encoders import TextEmbedding, TextEncoder
from unclip.clip.statistics import EmbeddingStatistics
from unclip.diffusion.loop import NoiseSource, OnStep, StepInfo
from unclip.diffusion.sampler import Sampler
from unclip.diffusion.scheduler import Scheduler
from unclip.errors import Cancelled, InputError, NonFiniteError
from unclip.images import to_square
from unclip.models.prior import PriorTransformer
from unclip.pipelines.arguments import FORMS, Callback, ImagePipelineOutput, check_latents
from unclip.pipelines.pipeline import Pipeline, stage_words
from unclip.settings import SETTINGS
from unclip.stages import stage as stages
from unclip.stages.latent import LatentStage
from unclip.stages.prior import AutoregressivePriorStage, OneCallPriorStage, PriorStage, sample_best
from unclip.stages.prior_dalle2 import TextPriorStage
from unclip.stages.stage import (
    ALWAYS,
    Condition,
    DecoderCondition,
    Interval,
    PriorCondition,
    Stage,
    SuperResCondition,
)


@dataclass(frozen=True)
class Call:
    """What all steps of one call share.

    Attributes:
        pipe: the pipeline that is called; it shows the progress and frees the accelerator.
        noise: the source of all noise.
        callback: is called after each denoising step.
    """

    pipe: Pipeline
    noise: NoiseSource
    callback: Callback | None = None

    def __post_init__(self) -> None:
        if self.callback is not None and not callable(self.callback):
            raise InputError(f"callback_on_step_end must be a function, not {type(self.callback).__name__}")

    def on_step(self, stage: str) -> OnStep | None:
        """The loop's hook that calls the callback after each step of a stage.

        Raises (in the loop): Cancelled when the callback returns {"stop": True}.
        """
        callback = self.callback
        if callback is None:
            return None

        def call_back(step: StepInfo) -> Tensor | None:
            state = {"stage": stage, "num_steps": step.num_steps, "latents": step.x, "x0": step.x0}
            answer = callback(self.pipe, step.index, step.t, state)
            if answer is None:
                return None
            if not isinstance(answer, Mapping) or not answer.keys() <= {*state, "stop"}:
                raise InputError(
                    f"the callback returned {answer!r:.100}; it may return None, or a dict with 'latents' or 'stop'"
                )
            if answer.get("stop"):
                raise Cancelled(
                    f"the callback stopped the run in stage {stage!r} after step {step.index + 1} of {step.num_steps}"
                )
            return answer.get("latents")

        return call_back

    @contextmanager
    def freed_on_error(self) -> Iterator[None]:
        """Free the accelerator when a step fails or is cancelled, if the pipeline is offloaded."""
        try:
            yield
        except BaseException:
            self.pipe.maybe_free_model_hooks()
            raise

    def close(self, results: Mapping[str, Tensor]) -> None:
        """Free the accelerator, if the pipeline is offloaded, and check the results.

        Args:
            results: by their names in messages, in the order in which they were made.

        Raises: NonFiniteError that names the first result with NaN or infinity, and the likely cause.
        """
        self.pipe.maybe_free_model_hooks()
        for name, result in results.items():
            if bool(result.isfinite().all()):
                continue
            inputs = "given embeddings, latents or text_model_output are too large"
            cause = f"the {inputs}, or the model's weights are damaged"
            if any(network.dtype == torch.float16 for network in self.pipe.networks.values()):
                largest = f"{torch.finfo(torch.float16).max:g}"
                cause = (
                    f"a number exceeded {largest}, the largest of float16: load the model with "
                    f"torch_dtype=torch.bfloat16 or torch.float32; or the {inputs}"
                )
            raise NonFiniteError(f"{name}: the result is NaN or infinite. Likely cause: {cause}")


@dataclass(frozen=True)
class StageRun(Generic[Condition]):
    """A stage, and how a call samples it.

    Attributes:
        name: of the stage: "decoder", "super_res", "super_res_2" and so on.
        stage: the diffusion model.
        sampler: takes the denoising steps.
        timesteps: descending.
        guidance_scale: guidance is on above 1.
        latents: x_T; None: random.
        origin: a clean sample that is noised to the first timestep, where the path starts; None: it starts from x_T.
        guidance_interval: the noise levels with guidance.
    """

    name: str
    stage: Stage[Condition]
    sampler: Sampler
    timesteps: tuple[int, ...]
    guidance_scale: float = 1.0
    latents: Tensor | None = None
    origin: Tensor | None = None
    guidance_interval: Interval = ALWAYS

    @property
    def guided(self) -> bool:
        """Whether a null condition is needed."""
        return self.guidance_scale > 1

    def check_latents(self, batch_size: int) -> None:
        """Raises: InputError for latents of another shape than this stage needs, or that are not finite."""
        check_latents(self.latents, f"{self.name}_latents", self.stage.sample_shape(batch_size))

    def sample(self, condition: Condition, null: Condition | None, call: Call) -> Tensor:
        """One sample for each row of the condition; see `unclip.stages.stage.sample`."""
        with call.freed_on_error():
            return stages.sample(
                self.stage,
                condition,
                sampler=self.sampler,
                timesteps=self.timesteps,
                noise=call.noise,
                null=null,
                guidance_scale=self.guidance_scale,
                guidance_interval=self.guidance_interval,
                latents=self.latents,
                origin=self.origin,
                progress=call.pipe.progress(self.name),
                on_step=call.on_step(self.name),
            )

    def invert(
        self,
        condition: Condition,
        null: Condition | None,
        pictures: Sequence[Image.Image],
        call: Call,
        *,
        num_rounds: int,
    ) -> Tensor:
        """x_T for pictures, which are resized to the stage's squares; see `unclip.stages.stage.invert`.

        A stage in latent space gets the latents of the pictures.

        Returns: float32 [batch, channels, size, size].

        Raises: NonFiniteError when the result is NaN or infinity.
        """
        size = self.stage.sample_shape(1)[-1]
        autoencoder = self.stage.autoencoder if isinstance(self.stage, LatentStage) else None
        factor = 1 if autoencoder is None else autoencoder.factor
        x0 = torch.stack([to_square(picture, size * factor) for picture in pictures])
        with call.freed_on_error():
            if autoencoder is not None:
                x0 = autoencoder.encode_pictures(x0.to(condition.device))
            x_T = stages.invert(
                self.stage,
                condition,
                x0,
                timesteps=self.timesteps,
                num_rounds=num_rounds,
                null=null,
                guidance_scale=self.guidance_scale,
                progress=call.pipe.progress(self.name),
                on_step=call.on_step(self.name),
            )
        call.close({f"{stage_words(self.name)}'s noise": x_T})
        return x_T


@dataclass(frozen=True)
class PriorRun:
    """A prior, and how a call samples it.

    Attributes:
        stage: the prior.
        draw: samples it; with the arguments of `unclip.stages.stage.sample` from the condition and the noise on.
        guidance_scale: guidance is on above 1.
        latents: the noise of the first candidate; None: random.
        num_candidates: how many embeddings are sampled for each caption; one is kept.
        captions_per_choice: how many consecutive captions keep the candidate of the same number; see `closest`.
    """

    stage: PriorStage | OneCallPriorStage | TextPriorStage | AutoregressivePriorStage
    draw: Callable[..., Tensor]
    guidance_scale: float = 1.0
    latents: Tensor | None = None
    num_candidates: int = 1
    captions_per_choice: int = 1

    @classmethod
    def of(
        cls,
        prior: PriorTransformer,
        scheduler: Scheduler | None,
        num_steps: int,
        guidance_scale: float,
        latents: Tensor | None = None,
        **choice: int,
    ) -> Self:
        """A diffusion prior with the sampler of its scheduler, or a prior of ECLIPSE, which needs neither.

        Args:
            num_steps, guidance_scale: as a call's; a prior of ECLIPSE ignores them.
            choice: `num_candidates` and `captions_per_choice`.

        Raises: InputError for a wrong setting.
        """
        scale = float(SETTINGS["prior_guidance_scale"].check(guidance_scale))
        if not prior.config.takes_timestep:
            once = OneCallPriorStage(prior)
            return cls(once, once.sample, 1.0, latents, **choice)
        assert scheduler is not None  # see the pipelines' checks
        stage = PriorStage(prior, scheduler.process)
        steps = scheduler.spaced_timesteps(num_steps)
        draw = partial(stages.sample, stage, sampler=scheduler.sampler(), timesteps=steps)
        return cls(stage, draw, scale, latents, **choice)

    @property
    def guided(self) -> bool:
        """Whether a null condition is needed."""
        return self.guidance_scale > 1

    def check_latents(self, batch_size: int) -> None:
        """Raises: InputError for latents of another shape than this prior needs, or that are not finite."""
        check_latents(self.latents, "prior_latents", self.stage.sample_shape(batch_size))


def encode(
    encoder: TextEncoder, captions: Sequence[str], rows: int, repeat: int, device: torch.device
) -> TextEmbedding:
    """Captions → text embeddings, each row `repeat` times.

    Args:
        encoder: CLIP's text encoder and tokenizer.
        captions: one for all `rows`, or one for each.
        rows: the number of different rows.
        repeat: the number of pictures of each row.
        device: where the encoder runs.
    """
    encoded = encoder.encode(captions, device)
    return (encoded if len(captions) == rows else encoded.select([0] * rows)).repeat(repeat)


def embed(run: PriorRun, text: TextEmbedding, null_text: TextEmbedding | None, call: Call) -> Tensor:
    """Text embeddings → image embeddings, float32 [batch, embedding_dim]; guidance needs `null_text`."""
    null = PriorCondition(null_text) if null_text is not None and run.guided else None

    def draw(noise: NoiseSource, latents: Tensor | None) -> Tensor:
        return run.draw(
            PriorCondition(text),
            noise=noise,
            null=null,
            guidance_scale=run.guidance_scale,
            latents=latents,
            progress=call.pipe.progress("prior"),
            on_step=call.on_step("prior"),
        )

    with call.freed_on_error():
        return sample_best(
            draw,
            text.embeds,
            num_candidates=run.num_candidates,
            captions_per_choice=run.captions_per_choice,
            noise=call.noise,
            latents=run.latents,
        )


def noised(embeddings: Tensor, statistics: EmbeddingStatistics | None, level: int, call: Call) -> Tensor:
    """Image embeddings [batch, embedding_dim] with the noise of a level; unchanged without `statistics`."""
    if statistics is None:
        return embeddings
    return statistics.noised(embeddings, level, call.noise.draw(embeddings.shape, embeddings.device))


def decode(
    run: StageRun[DecoderCondition],
    text: TextEmbedding,
    null_text: TextEmbedding | None,
    embeddings: Tensor,
    call: Call,
) -> Tensor:
    """Image embeddings [batch, embedding_dim] → small pictures [batch, 3, height, width] in [-1, 1].

    Guidance needs `null_text`.
    """
    return run.sample(*decoder_conditions(run, text, null_text, embeddings), call)


def decoder_conditions(
    run: StageRun[DecoderCondition], text: TextEmbedding, null_text: TextEmbedding | None, embeddings: Tensor
) -> tuple[DecoderCondition, DecoderCondition | None]:
    """The decoder's condition, and its null condition where it is guided."""
    null = DecoderCondition.null(null_text) if null_text is not None and run.guided else None
    return DecoderCondition.of(text, embeddings), null


def enlarge(runs: Sequence[StageRun[SuperResCondition]], pictures: Tensor, call: Call) -> Tensor:
    """Small pictures → large ones, in [-1, 1], by one super-resolution stage after another."""
    for run in runs:
        pictures = run.sample(SuperResCondition(pictures), None, call)
    return pictures


def finish(
    large: Tensor, small: Tensor, embeddings: Tensor, call: Call, *, output_type: str, return_intermediates: bool
) -> ImagePipelineOutput:
    """Pictures [batch, 3, height, width] in [-1, 1] → a call's output.

    Raises: NonFiniteError when a result is NaN or infinity.
    """
    call.close({"image embeddings": embeddings, "decoder's pictures": small, "pictures": large})
    output = ImagePipelineOutput(FORMS[output_type](large))
    if return_intermediates:
        output.image_embeddings = embeddings.float().cpu()
        output.small_images = FORMS[output_type](small)
    return output


def invert_super_res(
    runs: Sequence[StageRun[SuperResCondition]],
    small: Tensor,
    pictures: Sequence[Image.Image],
    call: Call,
    *,
    num_rounds: int,
) -> list[Tensor]:
    """x_T of every super-resolution stage, on the CPU; each starts from the picture that the stage before makes.

    Args:
        runs: sample by DDIM without noise.
        small: the decoder's pictures, [batch, 3, size, size] in [-1, 1].
        pictures, call, num_rounds: as in `StageRun.invert`.
    """
    found: list[Tensor] = []
    for run in runs:
        condition = SuperResCondition(small)
        x_T = run.invert(condition, None, pictures, call, num_rounds=num_rounds)
        found.append(x_T.cpu())
        if run is not runs[-1]:
            small = replace(run, latents=x_T).sample(condition, None, replace(call, callback=None))
    return found
