"""Noise schedules as float64 tables, and the spacing of timesteps."""

import functools
import itertools
import math
import operator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unclip.errors import ConfigError
from unclip.limits import check
from unclip.numbers import whole

BetaSchedule = Literal["squaredcos_cap_v2", "linear", "scaled_linear"]
Spacing = Literal["linspace", "leading", "trailing"]

# Below this the signal is lost in float32, and x0 = (x_t - sigma * noise) / alpha divides by zero.
_LEAST_ALPHA_CUMPROD = 1e-20


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of one schedule; every field has one float64 entry for each timestep.

    Attributes:
        betas: the variance that timestep t adds, in (0, 1).
        alphas_cumprod: product of 1 - beta up to t, the share of the variance that is still signal.
        alpha: square root of `alphas_cumprod`: x_t = alpha * x0 + sigma * noise (Ho et al. 2006.11239, eq. 4).
        sigma: square root of 1 - `alphas_cumprod`.
        snr: alpha^2 / sigma^2.
        half_log_snr: log(alpha / sigma), the time of DPM-Solver (Lu et al. 2211.01095).
        x0_weight: the weight of the clean sample in the mean of q(x_{t-1} | x_t, x0) (2006.11239, eq. 7).
        min_log_variance: log of that distribution's variance. At timestep 0 that is zero;
            timestep 1's value is used there, as in Nichol & Dhariwal 2102.09672.
        max_log_variance: log of beta.
    """

    betas: tuple[float, ...]
    alphas_cumprod: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    snr: tuple[float, ...]
    half_log_snr: tuple[float, ...]
    x0_weight: tuple[float, ...]
    min_log_variance: tuple[float, ...]
    max_log_variance: tuple[float, ...]

    def on(self, name: str, device: torch.device) -> Tensor:
        """Field `name` as a float32 tensor [num_timesteps] on `device`, cached."""
        return _on_device(self, name, device)


@functools.lru_cache(maxsize=64)
def _on_device(tables: Tables, name: str, device: torch.device) -> Tensor:
    return torch.tensor(getattr(tables, name), dtype=torch.float32, device="cpu").to(device)


def _cosine_betas(num_timesteps: int) -> list[float]:
    # Nichol & Dhariwal 2102.09672, eq. 17, with s = 0.008; betas are clipped at 0.999 as in the paper.
    def alpha_bar(step: int) -> float:
        return math.cos((step / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - alpha_bar(step + 1) / alpha_bar(step), 0.999) for step in range(num_timesteps)]


def _even(first: float, last: float, count: int) -> list[float]:
    if count == 1:
        return [first]
    return [first + (last - first) * index / (count - 1) for index in range(count)]


def _betas(num_timesteps: int, beta_schedule: str, beta_start: float, beta_end: float) -> list[float]:
    if beta_schedule == "squaredcos_cap_v2":
        return _cosine_betas(num_timesteps)
    if beta_schedule == "linear":
        return _even(beta_start, beta_end, num_timesteps)
    check(beta_schedule, BetaSchedule, "beta_schedule")
    return [root**2 for root in _even(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps)]


@functools.lru_cache(maxsize=32)
def tables(num_timesteps: int, beta_schedule: str, beta_start: float, beta_end: float) -> Tables:
    """The tables of a schedule, computed in float64 and cached.

    Args:
        num_timesteps: from 1 to 100,000.
        beta_schedule: "squaredcos_cap_v2" (cosine; `beta_start` and `beta_end` are ignored), "linear" (even steps),
            or "scaled_linear" (even steps of the square root).
        beta_start: the first beta, in (0, 1).
        beta_end: the last beta, in (0, 1).

    Raises:
        ConfigError: the schedule is unknown, or less than 1e-20 of the signal's variance is left at the end.
    """
    beta_table = _betas(num_timesteps, beta_schedule, beta_start, beta_end)
    alphas_cumprod = list(itertools.accumulate((1 - beta for beta in beta_table), operator.mul))
    if (left := alphas_cumprod[-1]) < _LEAST_ALPHA_CUMPROD:
        raise ConfigError(
            f"the {beta_schedule} schedule of {num_timesteps} timesteps up to beta {beta_end} leaves {left:.1e} of the "
            f"signal, less than {_LEAST_ALPHA_CUMPROD:.0e}; use fewer timesteps or a smaller beta_end"
        )
    snr = [a / (1 - a) for a in alphas_cumprod]
    before = [1.0, *alphas_cumprod[:-1]]
    variances = [beta * (1 - b) / (1 - a) for beta, a, b in zip(beta_table, alphas_cumprod, before, strict=True)]
    variances[0] = variances[1] if num_timesteps > 1 else beta_table[0]
    return Tables(
        betas=tuple(beta_table),
        alphas_cumprod=tuple(alphas_cumprod),
        alpha=tuple(math.sqrt(a) for a in alphas_cumprod),
        sigma=tuple(math.sqrt(1 - a) for a in alphas_cumprod),
        snr=tuple(snr),
        half_log_snr=tuple(0.5 * math.log(ratio) for ratio in snr),
        x0_weight=tuple(
            math.sqrt(b) * beta / (1 - a) for beta, a, b in zip(beta_table, alphas_cumprod, before, strict=True)
        ),
        min_log_variance=tuple(math.log(variance) for variance in variances),
        max_log_variance=tuple(math.log(beta) for beta in beta_table),
    )


def spaced_timesteps(
    num_timesteps: int, num_steps: int, spacing: str = "linspace", *, includes_zero: bool = True, offset: int = 0
) -> tuple[int, ...]:
    """`num_steps` different timesteps, descending.

    Args:
        num_timesteps: the number of training timesteps.
        num_steps: from 1 to `num_timesteps`; `num_timesteps` gives every timestep, whatever the spacing.
        spacing: "linspace", evenly from the last timestep to 0 (Karlo's; one step is the last timestep alone);
            "leading", multiples of an integer stride from 0 up; "trailing", even strides down from the last timestep.
        includes_zero: False computes one timestep more and leaves out timestep 0, as DPM-Solver in diffusers does for
            "linspace" and "leading" ("trailing" is the same either way).
        offset: is added to the timesteps of "leading", as far as there are timesteps.

    Raises:
        InputError: `num_steps` is not an integer, or is outside its limits.
        ConfigError: `spacing` is unknown.
    """
    num_steps = whole(num_steps, "the number of steps", 1, num_timesteps)
    check(spacing, Spacing, "timestep_spacing")
    if num_steps == num_timesteps:
        return tuple(range(num_timesteps - 1, -1, -1))
    if spacing == "trailing":
        return tuple(round(num_timesteps - index * num_timesteps / num_steps) - 1 for index in range(num_steps))
    points = num_steps if includes_zero else num_steps + 1
    if spacing == "leading":
        stride: float = num_timesteps // points
    elif points == 1:
        return (num_timesteps - 1,)
    else:
        stride = (num_timesteps - 1) / (points - 1)
    path = [round(index * stride) for index in reversed(range(points - num_steps, points))]
    shift = min(offset, num_timesteps - 1 - path[0]) if spacing == "leading" else 0
    return tuple(t + shift for t in path)
