"""The interface of a stage, its conditions, and how it is sampled and inverted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from unclip.clip.encoders import Batched, TextEmbedding
from unclip.diffusion.guidance import guided
from unclip.diffusion.loop import Denoiser, NoiseSource, OnStep, Progress, run
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.sampler import FixedPointInversionSampler, Sampler
from unclip.errors import ConfigError
from unclip.models.kernels import packed_weights


@dataclass(frozen=True)
class PriorCondition(Batched):
    """The condition of the prior: the caption."""

    text: TextEmbedding


@dataclass(frozen=True)
class DecoderCondition(Batched):
    """The condition of the decoder: the caption and the image embedding.

    Attributes:
        text: the caption's embedding.
        image_embedding: [batch, embedding_dim], not whitened.
        given: bool [batch]; where false, the learned null embedding replaces the image embedding.
    """

    text: TextEmbedding
    image_embedding: Tensor
    given: Tensor

    @classmethod
    def of(cls, text: TextEmbedding, image_embedding: Tensor) -> Self:
        """The condition of given embeddings."""
        given = torch.ones(len(image_embedding), dtype=torch.bool, device=image_embedding.device)
        return cls(text, image_embedding, given)

    @classmethod
    def null(cls, text: TextEmbedding) -> Self:
        """The null condition of guidance: an empty (or negative) caption and no image embedding."""
        nothing = torch.zeros_like(text.embeds)
        return cls(text, nothing, torch.zeros(len(nothing), dtype=torch.bool, device=nothing.device))


@dataclass(frozen=True)
class SuperResCondition(Batched):
    """The condition of super-resolution: the small picture, float [batch, 3, height, width] in [-1, 1]."""

    low_res: Tensor


Condition = TypeVar("Condition", bound=Batched, contravariant=True)

Interval = tuple[float, float]
"""The lowest and the highest noise level, both included: a timestep's share of the last one, from 0 to 1."""
ALWAYS: Interval = (0.0, 1.0)
"""All noise levels."""


class Stage(Protocol[Condition]):
    """One diffusion model: the prior, the decoder, or a stage of super-resolution."""

    @property
    def process(self) -> DiffusionProcess:
        """The schedule, the kind of prediction, and clipping."""
        ...

    def prepare(self, condition: Condition) -> Denoiser:
        """Compute once what does not depend on x_t or t."""
        ...

    def sample_shape(self, batch_size: int) -> tuple[int, ...]:
        """The shape of x_t."""
        ...

    def finish(self, x0: Tensor) -> Tensor:
        """The stage's result from the last state of the loop."""
        ...


def sample(
    stage: Stage[Condition],
    condition: Condition,
    *,
    sampler: Sampler,
    timesteps: tuple[int, ...],
    noise: NoiseSource,
    null: Condition | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: Interval = ALWAYS,
    latents: Tensor | None = None,
    origin: Tensor | None = None,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample once for each row of `condition`.

    Args:
        stage: the diffusion model.
        condition: one row for each sample.
        sampler: takes the denoising steps.
        timesteps: descending.
        noise: the source of x_T (unless given) and of the steps' noise, in this order.
        null: the condition that guidance moves away from, with as many rows; needed for a scale above 1.
        guidance_scale: 1 or less evaluates the network once for each step, without guidance.
        guidance_interval: the noise levels with guidance.
        latents: x_T, of `stage.sample_shape`.
        origin: a clean sample of that shape, which is noised with x_T to the first timestep (SDEdit, Meng et al.
            2108.01073). Without it, the path starts from x_T itself.

    Returns: float32, from `stage.finish`.
    """
    if latents is None:
        x = noise.draw(stage.sample_shape(len(condition)), condition.device)
    else:
        x = latents.to(condition.device).float()
    if origin is not None:
        x = stage.process.add_noise(origin.to(condition.device), x, timesteps[0])
    denoiser = _denoiser(stage, condition, null, guidance_scale, guidance_interval)
    with packed_weights(len(timesteps)):
        x = run(denoiser, sampler, timesteps, x, noise=noise, progress=progress, on_step=on_step)
    return stage.finish(x)


def invert(
    stage: Stage[Condition],
    condition: Condition,
    x0: Tensor,
    *,
    timesteps: tuple[int, ...],
    num_rounds: int = 2,
    null: Condition | None = None,
    guidance_scale: float = 1.0,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Find the x_T from which `sample`, with DDIM and without noise, leads to `x0` (paper §3).

    Args:
        stage: the diffusion model.
        condition, null, guidance_scale: as in `sample`.
        x0: clean samples, of `stage.sample_shape`.
        timesteps: as in `sample`, descending.
        num_rounds: network evaluations for each step; see `FixedPointInversionSampler`.

    Returns: float32, of x0's shape.

    Raises: InputError for fewer than two timesteps; ConfigError for `num_rounds`.
    """
    return run(
        _denoiser(stage, condition, null, guidance_scale),
        FixedPointInversionSampler(stage.process, num_rounds),
        timesteps[::-1],
        x0.to(condition.device),
        noise=NoiseSource(None, len(x0)),
        progress=progress,
        on_step=on_step,
    )


def _denoiser(
    stage: Stage[Condition],
    condition: Condition,
    null: Condition | None,
    guidance_scale: float,
    guidance_interval: Interval = ALWAYS,
) -> Denoiser:
    if guidance_scale <= 1:
        return stage.prepare(condition)
    assert null is not None
    mixed = guided(stage.prepare(null.join(condition)), guidance_scale)
    if guidance_interval == ALWAYS:
        return mixed
    given, (low, high), last = stage.prepare(condition), guidance_interval, stage.process.num_timesteps - 1
    return lambda x_t, t: mixed(x_t, t) if low <= t / last <= high else given(x_t, t)


def reusing(network: Callable[..., Any], every: int) -> Callable[..., Tensor]:
    """A U-Net's `sample` for successive steps of one batch, with the deep levels computed in every `every`-th call.

    The others reuse what the deep levels computed last (DeepCache, Ma et al. 2312.00858). With 1, every call is exact.
    """
    if every == 1:
        return lambda *given, **named: network(*given, **named).sample
    num_calls, deep = 0, None

    def call(*given: Any, **named: Any) -> Tensor:
        nonlocal num_calls, deep
        output = network(*given, **named, deep=deep if num_calls % every else None, keep_deep=True)
        num_calls, deep = num_calls + 1, output.deep
        return output.sample

    return call


Size = tuple[int, int]
"""Height and width in pixels."""


def size_px(sample_size: object) -> int:
    """A network's `sample_size` as the side of its square pictures.

    Raises: ConfigError when the configuration does not have it.
    """
    if not isinstance(sample_size, int):
        raise ConfigError(f"a network's sample_size is {sample_size!r}; set it to the side of its pictures in pixels")
    return sample_size
