"""Samplers: the rule for one step from x_t towards the clean sample, or back to noise.

This module has the base class and the samplers that other code creates directly. A sampler that only its scheduler
creates is defined beside that scheduler, in `scheduler`.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from unclip.diffusion.process import DiffusionProcess, Prediction
from unclip.errors import InputError
from unclip.limits import Range, check_fields
from unclip.numbers import whole

MAX_ROUNDS = 20
"""The largest number of forwards for each step of a fixed-point inversion."""
MAX_RESAMPLES = 100
Eta = Annotated[float, Range(0, 1)]

Memory = Any
"""The state that a sampler passes from one step to the next; None before the first step."""


@dataclass(frozen=True)
class Sampler(ABC):
    """Base class of all samplers.

    Samplers are immutable, so one sampler can serve several threads. A subclass implements `step`; by default it
    descends to the clean sample and needs no noise.

    Attributes:
        process: holds the noise levels, and interprets the network's outputs.
    """

    process: DiffusionProcess

    def steps(self, timesteps: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """The steps (t, t_next) along `timesteps`; t_next -1 is the clean sample.

        Raises:
            InputError: `timesteps` is empty, has a value outside the process's range, or is in the wrong direction.
        """
        _check_range(self.process, timesteps)
        steps = tuple(itertools.pairwise((*timesteps, -1)))
        if any(t_next >= t for t, t_next in steps):
            raise InputError(f"timesteps must descend; these are {_shown(timesteps)}")
        return steps

    def needs_noise(self, t: int, t_next: int) -> bool:
        """Whether the step from `t` to `t_next` uses noise."""
        return False

    @abstractmethod
    def step(
        self,
        prediction: Prediction,
        x_t: Tensor,
        t: int,
        t_next: int,
        memory: Memory = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """The state at `t_next`, float32, and the memory for the next step.

        Args:
            prediction: the network's prediction for `x_t`.
            x_t: the state at timestep `t`, [batch, ...].
            t, t_next: the first and the last timestep of the step.
            memory: the memory that the previous step returned; None at the first step.
            noise: standard normal, of x_t's shape. Required where `needs_noise` is true, ignored elsewhere.

        Raises:
            InputError: the noise is missing, or the timesteps are in the wrong direction.
        """


@dataclass(frozen=True)
class AncestralSampler(Sampler):
    """Sampling of the reverse process itself (Ho et al. 2006.11239, algorithm 2), as Karlo does it.

    Where timesteps are skipped, beta is recomputed for the two noise levels. The variance is the process's, learned
    or fixed. The last step, to the clean sample, adds no noise.
    """

    def needs_noise(self, t: int, t_next: int) -> bool:
        """True except for the step to the clean sample."""
        return t_next >= 0

    def step(self, prediction, x_t, t, t_next, memory=None, noise=None):
        """See `Sampler.step`."""
        posterior = self.process.posterior(t, t_next)
        mean = posterior.x0_weight * prediction.x0 + posterior.x_t_weight * x_t.float()  # 2006.11239, eq. 7
        if not self.needs_noise(t, t_next):
            return mean, None
        log_variance = self.process.log_variance(prediction, t, t_next)
        std = torch.exp(0.5 * log_variance) if isinstance(log_variance, Tensor) else math.exp(0.5 * log_variance)
        return mean + std * _required(noise, t, t_next), None


@dataclass(frozen=True)
class DDIMSampler(Sampler):
    """Denoising diffusion implicit models (Song et al. 2010.02502, eq. 12), first order.

    Args:
        process: its variance type has no effect; a learned variance is split off and ignored.
        eta: from 0 (deterministic) to 1 (as much noise as ancestral sampling, eq. 16).
        ends_clean: whether the last step leads to the clean sample; otherwise it leads to the noise level of timestep
            0, as in Stable Diffusion and Kandinsky (`set_alpha_to_one=False` in diffusers).

    Raises:
        ConfigError: `eta` is not a number from 0 to 1.
    """

    eta: Eta = 0.0
    ends_clean: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "eta")

    def needs_noise(self, t: int, t_next: int) -> bool:
        """True if eta is above 0, except for the step to the clean sample."""
        return self.eta > 0 and self._end(t_next) >= 0

    def _end(self, t_next: int) -> int:
        """The timestep of the noise level that a step to `t_next` leads to; -1 is the clean sample."""
        return t_next if self.ends_clean else max(t_next, 0)

    def step(self, prediction, x_t, t, t_next, memory=None, noise=None):
        """See `Sampler.step`."""
        t_next = self._end(t_next)
        if t_next == t == 0:
            return x_t.float(), None
        posterior = self.process.posterior(t, t_next)
        if t_next < 0:
            return prediction.x0, None
        alpha_next, sigma_next = self.process.tables.alpha[t_next], self.process.tables.sigma[t_next]
        std = self.eta * math.sqrt(posterior.variance)  # 2010.02502, eq. 16
        kept = math.sqrt(max(sigma_next**2 - std**2, 0.0))
        x = alpha_next * prediction.x0 + kept * prediction.noise  # eq. 12
        return (x + std * _required(noise, t, t_next) if self.eta > 0 else x), None


@dataclass(frozen=True)
class ShiftedDDIMSampler(Sampler):
    """DDIM with eta 1 as DALLE2-pytorch computes it, to repeat the samples of its priors.

    The levels of a step (Song et al. 2010.02502, eq. 12) are those one timestep lower, t - 1 and t_next - 1, but the
    noise is derived from x0 by the level of t. Timestep 0 is the clean sample.
    """

    def needs_noise(self, t: int, t_next: int) -> bool:
        """True except for the steps to timestep 0 and to the clean sample."""
        return t_next > 0

    def step(self, prediction, x_t, t, t_next, memory=None, noise=None):
        """See `Sampler.step`."""
        self.process.posterior(t, t_next)  # checks the direction
        if t_next <= 0:
            return prediction.x0, None
        left, left_next = (self.process.tables.alphas_cumprod[place - 1] for place in (t, t_next))
        variance = (1 - left / left_next) * (1 - left_next) / (1 - left)
        x = math.sqrt(left_next) * prediction.x0 + math.sqrt(1 - left_next - variance) * prediction.noise
        return x + math.sqrt(variance) * _required(noise, t, t_next), None


@dataclass(frozen=True)
class FixedPointInversionSampler(Sampler):
    """The exact inverse of deterministic DDIM: each DDIM step is solved for the state that it started from.

    With alpha and sigma on the unit circle, DDIM's step (Song et al. 2010.02502, eq. 12) from t down to s is a rotation
    by the angle between them, x_s = cos(d) x_t - sin(d) v(x_t, t), where v = alpha noise - sigma x0 (Salimans & Ho
    2202.00512, app. D). So x_t = (x_s + sin(d) v(x_t, t)) / cos(d). This is solved by fixed-point iteration on the
    right-hand side, with x_s as the first guess. Its error shrinks with every round, and it inverts the last step, to
    the clean sample, too.
    Clipping x0 is part of v. Where it leaves several solutions (a pure white that any x_t would give), the iteration
    finds one of them.

    Args:
        process: the process of the DDIM sampling; a learned variance is split off and ignored.
        num_rounds: forwards for each step, 1 to 20.

    Raises:
        ConfigError: `num_rounds` is outside its limits.
    """

    num_rounds: Annotated[int, Range(1, MAX_ROUNDS)] = 2

    def __post_init__(self) -> None:
        check_fields(self, "num_rounds")

    def steps(self, timesteps: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """See `Sampler.steps`: `timesteps` ascend; each (t, t_next) is a step of DDIM, repeated `num_rounds` times."""
        _check_range(self.process, timesteps)
        if len(timesteps) < 2 or any(t_next <= t for t, t_next in itertools.pairwise(timesteps)):
            raise InputError(f"an inversion needs two or more ascending timesteps; these are {_shown(timesteps)}")
        inverted = zip(timesteps, (-1, *timesteps[:-1]), strict=True)
        return tuple(step for step in inverted for _ in range(self.num_rounds))

    def step(self, prediction, x_t, t, t_next, memory=None, noise=None):
        """One round: a better guess of the state at `t` from which DDIM steps to the known state at `t_next`."""
        self.process.posterior(t, t_next)  # checks the direction
        known = memory if memory is not None and memory.t == t else _StateBelow(t, x_t.float())
        tables = self.process.tables
        alpha, sigma = tables.alpha[t], tables.sigma[t]
        alpha_next, sigma_next = (tables.alpha[t_next], tables.sigma[t_next]) if t_next >= 0 else (1.0, 0.0)
        v = alpha * prediction.noise - sigma * prediction.x0
        cos, sin = alpha * alpha_next + sigma * sigma_next, sigma * alpha_next - alpha * sigma_next
        return (known.x + sin * v) / cos, known


@dataclass(frozen=True)
class _StateBelow:
    """Memory of `FixedPointInversionSampler`: the timestep that is being solved for, and the known state below it."""

    t: int
    x: Tensor


@dataclass(frozen=True)
class InpaintingSampler(Sampler):
    """Any descending sampler, with the known part of the sample restored after each step (RePaint, 2201.09865, eq. 8).

    At each timestep the known part is the clean sample, noised to that timestep; at the end it is exactly the clean
    sample. The rest comes from the wrapped sampler. Both use the same noise tensor: each element belongs to only one
    part, so no noise is used twice.

    A single step cannot make the restored part and the generated part agree. So parts of the path are repeated
    (section 4.2): `jump_length` steps down, back up by the forward process, `num_resamples` times in all. The last
    step, to the clean sample, is taken once.

    Args:
        sampler: takes the steps.
        x0: the clean sample, float32 [batch, channels, ...].
        kept: bool, of `x0`'s shape or one that broadcasts to it; true where `x0` is known.
        num_resamples: how often each part of the path is sampled, 1 to 100; 1 means no repetition.
        jump_length: steps in such a part, 1 or more.
        noise: of `x0`'s shape; the known part has this noise at every timestep, as in Kandinsky's pipelines. None: that
            of each step.
    """

    process: DiffusionProcess = field(init=False, repr=False)
    sampler: Sampler
    x0: Tensor
    kept: Tensor
    num_resamples: int = 1
    jump_length: int = 1
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "process", self.sampler.process)

    def steps(self, timesteps: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """See `Sampler.steps`. Where a step starts above the end of the previous one, the loop adds noise first."""
        *down, last = self.sampler.steps(timesteps)
        parts = [down[start : start + self.jump_length] for start in range(0, len(down), self.jump_length)]
        return (*(step for part in parts for step in part * self.num_resamples), last)

    def needs_noise(self, t: int, t_next: int) -> bool:
        """True except for the step to the clean sample; with a `noise` of its own, where the wrapped sampler does."""
        return t_next >= 0 if self.noise is None else self.sampler.needs_noise(t, t_next)

    def step(self, prediction, x_t, t, t_next, memory=None, noise=None):
        """See `Sampler.step`."""
        x, memory = self.sampler.step(prediction, x_t, t, t_next, memory, noise)
        own = noise if self.noise is None else self.noise
        known = self.x0 if t_next < 0 else self.process.add_noise(self.x0, _required(own, t, t_next), t_next)
        return torch.where(self.kept, known, x), memory


def check_resampling(num_resamples: object, jump_length: object) -> tuple[int, int]:
    """Both as ints. Raises: InputError unless they are whole numbers, from 1 to 100 and from 1."""
    return whole(num_resamples, "num_resamples", 1, MAX_RESAMPLES), whole(jump_length, "jump_length")


def _check_range(process: DiffusionProcess, timesteps: Sequence[int]) -> None:
    if not timesteps:
        raise InputError("the list of timesteps is empty; give one or more")
    for t in timesteps:
        whole(t, "a timestep", 0, process.num_timesteps - 1)


def _shown(timesteps: Sequence[int]) -> str:
    head = ", ".join(str(t) for t in timesteps[:8])
    return f"({head}, …)" if len(timesteps) > 8 else f"({head})"


def _required(noise: Tensor | None, t: int, t_next: int) -> Tensor:
    if noise is None:
        raise InputError(f"the step from {t} to {t_next} needs noise, but none was given")
    return noise.float()
