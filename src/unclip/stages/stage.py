"""What a stage is conditioned on, as small frozen values that join, repeat and select.

Knows tensors' batches only; knows no network. Built by pipelines and by training alike, so the two cannot drift apart.
"""

from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from unclip.clip.encoders import Batched, TextEmbedding
from unclip.diffusion.guidance import guided, uses_guidance
from unclip.diffusion.loop import Denoiser, NoiseSource, OnStep, Progress, run
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.sampler import FixedPointInversionSampler, Sampler
from unclip.errors import ConfigError, InputError


@dataclass(frozen=True)
class PriorCondition(Batched):
    """What the prior needs: the caption."""

    text: TextEmbedding


@dataclass(frozen=True)
class DecoderCondition(Batched):
    """What the decoder needs: the caption and the image embedding.

    Attributes:
        text: the caption's embedding.
        image_embedding: [batch, embedding_dim], not whitened.
        given: bool [batch]; where false, the learned null embedding stands in for the image embedding.
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
        """The condition that guidance pushes away from: an empty (or negative) caption and no image embedding."""
        nothing = torch.zeros_like(text.embeds)
        return cls(text, nothing, torch.zeros(len(nothing), dtype=torch.bool, device=nothing.device))


@dataclass(frozen=True)
class SuperResCondition(Batched):
    """What super-resolution needs: the small picture, float [batch, 3, height, width] in [-1, 1]."""

    low_res: Tensor


Condition = TypeVar("Condition", bound=Batched, contravariant=True)


class Stage(Protocol[Condition]):
    """One diffusion model of the chain."""

    @property
    def process(self) -> DiffusionProcess:
        """Schedule, what is predicted, clipping."""
        ...

    def prepare(self, condition: Condition) -> Denoiser:
        """Compute once all that depends on neither x_t nor t."""
        ...

    def sample_shape(self, condition: Condition) -> tuple[int, ...]:
        """The shape of x_t for a condition."""
        ...

    def finish(self, x0: Tensor) -> Tensor:
        """From the loop's last state to the stage's result."""
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
    latents: Tensor | None = None,
    origin: Tensor | None = None,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw one sample for each row of `condition`.

    Args:
        stage: the diffusion model.
        condition: what is asked for.
        sampler: how a step is taken.
        timesteps: descending.
        noise: where x_T (unless given) and the steps' noise come from, in this order.
        null: what guidance pushes away from, as many rows as `condition`; needed for a scale above 1.
        guidance_scale: not above 1 means one forward a step.
        latents: x_T, of `stage.sample_shape(condition)`.
        origin: a clean sample of that shape, from which the path departs: its first state is the origin with x_T as
            its noise (SDEdit, Meng et al. 2108.01073). Without it, it is x_T itself.

    Returns: float32, as `stage.finish` gives it.

    Raises: InputError for latents or an origin of a wrong shape.
    """
    shape = stage.sample_shape(condition)
    if latents is None:
        x = noise.draw(shape, condition.device)
    elif tuple(latents.shape) != shape:
        raise InputError(f"latents have shape {tuple(latents.shape)}; this call needs {shape}")
    else:
        x = latents.to(condition.device).float()
    if origin is not None:
        if tuple(origin.shape) != shape:
            raise InputError(f"the origin has shape {tuple(origin.shape)}; this call needs {shape}")
        x = stage.process.add_noise(origin.to(condition.device), x, timesteps[0])
    denoiser = _denoiser(stage, condition, null, guidance_scale)
    return stage.finish(run(denoiser, sampler, timesteps, x, noise=noise, progress=progress, on_step=on_step))


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
    """Find the x_T from which `sample`, with DDIM and no noise, leads to `x0`: its way back (paper §3).

    Args:
        stage: the diffusion model.
        condition: that of the sampling; `null` and `guidance_scale` too.
        x0: clean samples, of `stage.sample_shape(condition)`.
        timesteps: those of the sampling, descending.
        num_rounds: forwards a step; see `FixedPointInversionSampler`.

    Returns: float32, of x0's shape.

    Raises: InputError for samples of a wrong shape or fewer than two timesteps; ConfigError for `num_rounds`.
    """
    shape = stage.sample_shape(condition)
    if tuple(x0.shape) != shape:
        raise InputError(f"the samples to invert have shape {tuple(x0.shape)}; this call needs {shape}")
    return run(
        _denoiser(stage, condition, null, guidance_scale),
        FixedPointInversionSampler(stage.process, num_rounds),
        timesteps[::-1],
        x0.to(condition.device),
        noise=NoiseSource(None, len(x0)),
        progress=progress,
        on_step=on_step,
    )


def _denoiser(stage: Stage[Condition], condition: Condition, null: Condition | None, guidance_scale: float) -> Denoiser:
    if not uses_guidance(guidance_scale):
        return stage.prepare(condition)
    assert null is not None
    assert len(null) == len(condition)
    return guided(stage.prepare(null.join(condition)), guidance_scale)


Size = tuple[int, int]
"""Height and width in pixels."""


def size_px(sample_size: object) -> int:
    """A network's `sample_size` as the side of the square pictures it makes.

    Raises: ConfigError when its configuration does not say it.
    """
    if not isinstance(sample_size, int):
        raise ConfigError(f"a network's sample_size is {sample_size!r}; set it to the side of its pictures in pixels")
    return sample_size
