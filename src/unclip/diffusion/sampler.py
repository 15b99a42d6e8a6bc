"""Samplers: one step from x_t towards the clean sample, or back.

Do not know the network, the condition or the loop, and mutate nothing: one sampler serves several threads.
The loop calls them; a scheduler makes them.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from unclip.diffusion.process import DiffusionProcess, Prediction
from unclip.errors import ConfigError, InputError
from unclip.numbers import real, whole

MAX_ROUNDS = 20
"""Forwards a step that a fixed point may take: what has not settled by then will not."""

Memory = Any
"""What a sampler hands from a step to the next one; None before the first. Only the sampler looks inside."""


class Sampler(Protocol):
    """The shape that all samplers share. Frozen: `step` returns what changes."""

    @property
    def process(self) -> DiffusionProcess:
        """Reads the network's outputs, and holds the noise levels."""
        ...

    def steps(self, timesteps: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """The (t, t_next) that lead along `timesteps`; t_next -1 is the clean sample.

        Raises:
            InputError: `timesteps` is empty, leaves the process's range, or goes the wrong way.
        """
        ...

    def needs_noise(self, t: int, t_next: int) -> bool:
        """Whether the step from `t` to `t_next` takes noise."""
        ...

    def step(
        self,
        prediction: Prediction,
        x_t: Tensor,
        t: int,
        t_next: int,
        memory: Memory = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """x at `t_next`, float32, and the memory for the step after it.

        Args:
            prediction: what the network said about `x_t`.
            x_t: the state at timestep `t`, [batch, ...].
            t, t_next: from where to where.
            memory: what the step before returned; None at the first.
            noise: standard normal, of x_t's shape; needed where `needs_noise` says so, ignored elsewhere.

        Raises:
            InputError: the noise is missing, or the timesteps go the wrong way.
        """
        ...


@dataclass(frozen=True)
class AncestralSampler:
    """Sampling of the reverse process itself (Ho et al. 2006.11239, algorithm 2), as Karlo does it.

    Where timesteps are skipped, beta is recomputed for the two noise levels. The variance is the process's, learned
    or fixed. No noise goes into the clean sample.
    """

    process: DiffusionProcess

    def steps(self, timesteps: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """See `Sampler.steps`: descending, then to the clean sample."""
        return _down(self.process, timesteps)

    def needs_noise(self, t: int, t_next: int) -> bool:
        """Everywhere but into the clean sample."""
        return t_next >= 0

    def step(
        self,
        prediction: Prediction,
        x_t: Tensor,
        t: int,
        t_next: int,
        memory: Memory = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """See `Sampler.step`."""
        posterior = self.process.posterior(t, t_next)
        mean = posterior.x0_weight * prediction.x0 + posterior.x_t_weight * x_t.float()  # 2006.11239, eq. 7
        if not self.needs_noise(t, t_next):
            return mean, None
        log_variance = self.process.log_variance(prediction, t, t_next)
        std = torch.exp(0.5 * log_variance) if isinstance(log_variance, Tensor) else math.exp(0.5 * log_variance)
        return mean + std * _given(noise, t, t_next), None


@dataclass(frozen=True)
class DDIMSampler:
    """Denoising diffusion implicit models (Song et al. 2010.02502, eq. 12), of first order.

    Args:
        process: its variance type plays no part; a learned variance is split off and ignored.
        eta: from 0, deterministic, to 1, as much noise as ancestral sampling (eq. 16).

    Raises:
        ConfigError: `eta` is no number from 0 to 1.
    """

    process: DiffusionProcess
    eta: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "eta", real(self.eta, "eta", 0, 1, error=ConfigError))

    def steps(self, timesteps: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """See `Sampler.steps`: descending, then to the clean sample."""
        return _down(self.process, timesteps)

    def needs_noise(self, t: int, t_next: int) -> bool:
        """With an eta above 0, everywhere but into the clean sample."""
        return self.eta > 0 and t_next >= 0

    def step(
        self,
        prediction: Prediction,
        x_t: Tensor,
        t: int,
        t_next: int,
        memory: Memory = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """See `Sampler.step`."""
        posterior = self.process.posterior(t, t_next)
        if t_next < 0:
            return prediction.x0, None
        alpha_next, sigma_next = self.process.tables.alpha[t_next], self.process.tables.sigma[t_next]
        std = self.eta * math.sqrt(posterior.variance)  # 2010.02502, eq. 16
        kept = math.sqrt(max(sigma_next**2 - std**2, 0.0))
        x = alpha_next * prediction.x0 + kept * prediction.noise  # eq. 12
        return (x + std * _given(noise, t, t_next) if self.eta > 0 else x), None


@dataclass(frozen=True)
class DDIMInversionSampler:
    """DDIM's deterministic step taken upwards: from a picture to the x_T that leads back to it.

    The same equation as `DDIMSampler` with eta 0 (Song et al. 2010.02502, section 4.3), towards more noise. The
    picture counts as x at the first timestep, which with timestep 0 is off by its least noise; each way is exact up
    to first order in the step. Clipping x0 costs exactness where the clip bites.
    """

    process: DiffusionProcess

    def steps(self, timesteps: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """See `Sampler.steps`: ascending; one step fewer than timesteps."""
        _check_path(self.process, timesteps)
        steps = tuple(itertools.pairwise(timesteps))
        if not steps or any(t_next <= t for t, t_next in steps):
            raise InputError(f"an inversion goes up along two timesteps or more, not along {_shown(timesteps)}")
        return steps

    def timesteps(self, num_steps: int) -> tuple[int, ...]:
        """The timesteps of a sampling in `num_steps`, from 0 up, to walk backwards what it will walk down.

        Raises:
            InputError: `num_steps` is no integer in 2..num_timesteps (one step has nothing to invert).
        """
        timesteps = self.process.spaced_timesteps(num_steps)[::-1]
        if len(timesteps) < 2:
            raise InputError(f"the number of steps is {num_steps}; an inversion needs 2 or more")
        return timesteps

    def needs_noise(self, t: int, t_next: int) -> bool:
        """Never."""
        return False

    def step(
        self,
        prediction: Prediction,
        x_t: Tensor,
        t: int,
        t_next: int,
        memory: Memory = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """See `Sampler.step`; here `t_next` is above `t`."""
        if not 0 <= t < t_next < self.process.num_timesteps:
            raise InputError(
                f"an inversion step goes up, from 0 at least to {self.process.num_timesteps - 1} at most; "
                f"this one goes from {t} to {t_next}"
            )
        tables = self.process.tables
        return tables.alpha[t_next] * prediction.x0 + tables.sigma[t_next] * prediction.noise, None


@dataclass(frozen=True)
class FixedPointInversionSampler:
    """The exact inverse of a deterministic DDIM walk: each step down is solved for the state that it began from.

    With alpha and sigma on the unit circle, DDIM's step (Song et al. 2010.02502, eq. 12) from t down to s is a turn by
    the angle between them, x_s = cos(d) x_t - sin(d) v(x_t, t), where v = alpha noise - sigma x0 (Salimans & Ho
    2202.00512, app. D). So x_t = (x_s + sin(d) v(x_t, t)) / cos(d), and x_t is found by putting guesses into the
    right-hand side, x_s the first. Unlike `DDIMInversionSampler` it evaluates v where the walk down will, its error
    shrinks with every round, and the last step, to the clean sample, is inverted too. Clipping x0 is part of v; where
    it leaves several solutions (a pure white that any x_t would give), one of them is found.

    Args:
        process: as of the walk down; a learned variance is split off and ignored.
        num_rounds: forwards a step, 1 to 20; one is about as exact as `DDIMInversionSampler`.

    Raises:
        ConfigError: `num_rounds` is outside its limits.
    """

    process: DiffusionProcess
    num_rounds: int = 2

    def __post_init__(self) -> None:
        num_rounds = whole(self.num_rounds, "num_rounds", 1, MAX_ROUNDS, error=ConfigError)
        object.__setattr__(self, "num_rounds", num_rounds)

    def steps(self, timesteps: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """See `Sampler.steps`: `timesteps` ascend; each (t, t_next) is one of the walk down, `num_rounds` times."""
        _check_path(self.process, timesteps)
        if len(timesteps) < 2 or any(after <= before for before, after in itertools.pairwise(timesteps)):
            raise InputError(f"an inversion goes up along two timesteps or more, not along {_shown(timesteps)}")
        undone = zip(timesteps, (-1, *timesteps[:-1]), strict=True)
        return tuple(step for step in undone for _ in range(self.num_rounds))

    def needs_noise(self, t: int, t_next: int) -> bool:
        """Never."""
        return False

    def step(
        self,
        prediction: Prediction,
        x_t: Tensor,
        t: int,
        t_next: int,
        memory: Memory = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
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
    """What the rounds of one step of `FixedPointInversionSampler` share: where they are, and the state below."""

    t: int
    x: Tensor


@dataclass(frozen=True)
class _LastPrediction:
    """What the two-step solver remembers of the step before."""

    x0: Tensor
    half_log_snr: float


@dataclass(frozen=True)
class DPMSolverPlusPlus2MSampler:
    """DPM-Solver++(2M), deterministic, predicting x0 (Lu et al. 2211.01095, algorithm 2).

    The first step is of first order, for want of a step before; so is the last, to the clean sample, which is x0.
    It is at its best on timesteps that leave out 0: the step down to it is a long one in log-SNR.

    Args:
        process: its variance type plays no part; a learned variance is split off and ignored.
        order: 2; or 1, which is DDIM.

    Raises:
        ConfigError: `order` is neither.
    """

    process: DiffusionProcess
    order: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", whole(self.order, "the solver's order", 1, 2, error=ConfigError))

    def steps(self, timesteps: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """See `Sampler.steps`: descending, then to the clean sample."""
        return _down(self.process, timesteps)

    def needs_noise(self, t: int, t_next: int) -> bool:
        """Never."""
        return False

    def step(
        self,
        prediction: Prediction,
        x_t: Tensor,
        t: int,
        t_next: int,
        memory: Memory = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """See `Sampler.step`."""
        self.process.posterior(t, t_next)  # checks the direction
        if t_next < 0:
            return prediction.x0, None
        tables = self.process.tables
        now = tables.half_log_snr[t]
        width = tables.half_log_snr[t_next] - now
        x0 = prediction.x0
        if self.order == 2 and memory is not None:
            # 2211.01095, algorithm 2: D = (1 + 1 / 2r) x0 - 1 / 2r x0_before, r the ratio of the two widths.
            lean = 0.5 * width / (now - memory.half_log_snr)
            x0 = (1 + lean) * x0 - lean * memory.x0
        # The same algorithm's update; with x0 in place of D it is DDIM's.
        x = tables.sigma[t_next] / tables.sigma[t] * x_t.float() - tables.alpha[t_next] * math.expm1(-width) * x0
        return x, _LastPrediction(prediction.x0, now)


def _down(process: DiffusionProcess, timesteps: Sequence[int]) -> tuple[tuple[int, int], ...]:
    _check_path(process, timesteps)
    steps = tuple(itertools.pairwise((*timesteps, -1)))
    if any(t_next >= t for t, t_next in steps):
        raise InputError(f"timesteps must descend; these are {_shown(timesteps)}")
    return steps


def _check_path(process: DiffusionProcess, timesteps: Sequence[int]) -> None:
    if not timesteps:
        raise InputError("there are no timesteps; give one or more")
    for t in timesteps:
        whole(t, "a timestep", 0, process.num_timesteps - 1)


def _shown(timesteps: Sequence[int]) -> str:
    head = ", ".join(str(t) for t in timesteps[:8])
    return f"({head}, …)" if len(timesteps) > 8 else f"({head})"


def _given(noise: Tensor | None, t: int, t_next: int) -> Tensor:
    if noise is None:
        raise InputError(f"the step from {t} to {t_next} needs noise, and none was given")
    return noise.float()


MAX_RESAMPLES = 100


@dataclass(frozen=True)
class InpaintingSampler:
    """Any sampler, with the known part of the sample put back after each of its steps (RePaint, 2201.09865, eq. 8).

    The known part at a timestep is the clean one, noised to that timestep; at the end it is the clean one itself, to
    the bit. The rest is the wrapped sampler's. Both take the same draw of noise: every element is of one part alone,
    so no element's noise is used twice.

    A step that looks at a fresh known part beside what was drawn so far cannot make the two agree at once. So parts of
    the path are walked several times, with the forward process between (section 4.2): `jump_length` steps down, up
    again, `num_resamples` times in all. The last step, to the clean sample, is taken once.

    Args:
        sampler: takes the steps; one that goes down.
        x0: the clean sample, float32 [batch, channels, ...].
        kept: bool, of `x0`'s shape or one that broadcasts to it; true where `x0` is known.
        num_resamples: how often each part of the path is walked, 1 to 100; 1 never goes up.
        jump_length: steps in such a part, 1 or more.

    Raises:
        InputError: a count is outside its limits; `kept` is not bool, or does not broadcast to `x0`.
    """

    sampler: Sampler
    x0: Tensor
    kept: Tensor
    num_resamples: int = 1
    jump_length: int = 1

    def __post_init__(self) -> None:
        for name, value in zip(
            ("num_resamples", "jump_length"), check_resampling(self.num_resamples, self.jump_length), strict=True
        ):
            object.__setattr__(self, name, value)
        if self.kept.dtype != torch.bool:
            raise InputError(f"what is kept is told by bool, not {self.kept.dtype}")
        try:
            fits = torch.broadcast_shapes(self.kept.shape, self.x0.shape) == self.x0.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise InputError(
                f"what is kept has shape {tuple(self.kept.shape)}, the sample {tuple(self.x0.shape)}: it must broadcast"
            )

    @property
    def process(self) -> DiffusionProcess:
        """The wrapped sampler's."""
        return self.sampler.process

    def steps(self, timesteps: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """See `Sampler.steps`; a step that starts above the end of the one before comes after a way up."""
        *down, last = self.sampler.steps(timesteps)
        parts = [down[start : start + self.jump_length] for start in range(0, len(down), self.jump_length)]
        return (*(step for part in parts for step in part * self.num_resamples), last)

    def needs_noise(self, t: int, t_next: int) -> bool:
        """Everywhere but into the clean sample."""
        return t_next >= 0

    def step(
        self,
        prediction: Prediction,
        x_t: Tensor,
        t: int,
        t_next: int,
        memory: Memory = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """See `Sampler.step`."""
        x, memory = self.sampler.step(prediction, x_t, t, t_next, memory, noise)
        if t_next < 0:
            known = self.x0
        elif noise is None:
            raise InputError(f"the step from {t} to {t_next} needs noise for what is kept, and none was given")
        else:
            known = self.process.add_noise(self.x0, noise, t_next)
        return torch.where(self.kept, known, x), memory


def check_resampling(num_resamples: object, jump_length: object) -> tuple[int, int]:
    """Both as ints. Raises: InputError unless they are whole numbers, from 1 to 100 and from 1."""
    return whole(num_resamples, "num_resamples", 1, MAX_RESAMPLES), whole(jump_length, "jump_length")
