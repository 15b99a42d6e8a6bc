"""The diffusion process: adding noise, interpreting a network's output, and the training loss."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from unclip.diffusion import schedule
from unclip.diffusion.schedule import BetaSchedule, Tables
from unclip.errors import InputError
from unclip.limits import Range, check_fields
from unclip.numbers import whole

PredictionType = Literal["epsilon", "sample", "v_prediction"]
VarianceType = Literal["fixed_small_log", "fixed_small", "fixed_large", "learned_range"]
Timesteps = Annotated[int, Range(1, 100_000)]
Beta = Annotated[float, Range(1e-12, 1, below=True)]
"""With a smaller beta, 1 - beta is rounded to almost 1."""
ClipRange = Annotated[float, Range(0, 1e6, above=True)]
ThresholdRatio = Annotated[float, Range(0, 1, above=True)]
ThresholdMax = Annotated[float, Range(1, 1e6)]
WEIGHTINGS = ("simple", "min_snr")

_MIN_SNR_GAMMA = 5.0  # Hang et al. 2303.09556
_LEAST_VARIANCE = 1e-20


@dataclass(frozen=True)
class Prediction:
    """A network's output for x_t, converted. All tensors are float32, of x_t's shape.

    Attributes:
        x0: the clean sample, inside the process's clipping range.
        noise: the noise that leads from this `x0` to x_t: x_t = alpha * x0 + sigma * noise.
        log_variance: for a learned variance, the network's raw fraction, -1 for the posterior's variance and 1 for
            beta; `DiffusionProcess.log_variance` maps it. None for a fixed variance.
    """

    x0: Tensor
    noise: Tensor
    log_variance: Tensor | None = None


class Posterior(NamedTuple):
    """q(x_next | x_t, x0) for two timesteps, as Python floats (Ho et al. 2006.11239, eq. 6 and 7).

    The mean is `x0_weight` * x0 + `x_t_weight` * x_t. `beta` is the variance that was added between the two
    timesteps, recomputed where timesteps are skipped; `variance` is the variance given x0.
    """

    x0_weight: float
    x_t_weight: float
    variance: float
    beta: float


@dataclass(frozen=True)
class DiffusionProcess:
    """A noise schedule with a prediction type. Immutable, and not a module.

    Tables are float64. Tensors are converted to float32 before any arithmetic, whatever the network's dtype. A
    timestep `t` is a Python int (the tables are then read as Python floats, without waiting for a device) or a
    LongTensor [batch]. Sample tensors are [batch, ...], with the channels second.

    Attributes:
        num_timesteps: noise levels; timestep 0 has the least noise.
        beta_schedule: "squaredcos_cap_v2", "linear" or "scaled_linear".
        beta_start, beta_end: first and last beta of the linear schedules; the cosine schedule ignores them.
        prediction_type: "epsilon" (the noise), "sample" (x0) or "v_prediction" (Salimans & Ho 2202.00512, app. D).
        variance_type: the variance of a reverse step. "fixed_small" is the posterior's variance, "fixed_small_log" the
            same but at least 1e-20, "fixed_large" beta, and "learned_range" between the two (Nichol & Dhariwal
            2102.09672, eq. 15), where the network has twice the output channels.
        clip_range: predicted x0 is clamped to [-clip_range, clip_range]; None means no clamping.
        threshold_ratio: dynamic thresholding in place of clamping (Saharia et al. 2205.11487, section 2.3): a sample's
            predicted x0 is clamped to [-s, s] and divided by s, the quantile of its absolute values at this ratio, but
            at least 1 and at most `threshold_max`. None: off.
        threshold_max: see `threshold_ratio`.

    Raises:
        ConfigError: a field is unknown or outside its limits.
    """

    num_timesteps: Timesteps = 1000
    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    beta_start: Beta = 0.0001
    beta_end: Beta = 0.02
    prediction_type: PredictionType = "epsilon"
    variance_type: VarianceType = "fixed_small_log"
    clip_range: ClipRange | None = 1.0
    threshold_ratio: ThresholdRatio | None = None
    threshold_max: ThresholdMax = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        _ = self.tables  # an unusable schedule is refused here, not at the first step

    @property
    def tables(self) -> Tables:
        """The schedule's float64 tables, shared by all processes with the same schedule."""
        return schedule.tables(self.num_timesteps, self.beta_schedule, self.beta_start, self.beta_end)

    @property
    def learns_variance(self) -> bool:
        """Whether the network's output has twice the channels of a sample."""
        return self.variance_type == "learned_range"

    def spaced_timesteps(self, num_steps: int) -> tuple[int, ...]:
        """`num_steps` timesteps evenly from the last down to 0, as Karlo spaces them; one step is (last,).

        Raises:
            InputError: `num_steps` is not an integer from 1 to num_timesteps.
        """
        return schedule.spaced_timesteps(self.num_timesteps, num_steps)

    # ---- forward: from the clean sample to x_t ----

    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """x_t = alpha * x0 + sigma * noise (Ho et al. 2006.11239, eq. 4), float32.

        Raises:
            InputError: the shapes of `noise` and `x0` differ, or `t` is not a timestep.
        """
        if noise.shape != x0.shape:
            raise InputError(f"noise has shape {tuple(noise.shape)}; it must be the sample's, {tuple(x0.shape)}")
        alpha, sigma = self._alpha_sigma(t, x0)
        return alpha * x0.float() + sigma * noise.float()

    def renoise(self, x: Tensor, t: int, t_up: int, noise: Tensor) -> Tensor:
        """x at `t_up` from x at `t` below it: q(x_up | x_t), the forward process; float32.

        The product of the steps of Ho et al. 2006.11239, eq. 2. `t` -1 is the clean sample.

        Raises:
            InputError: the shapes of `noise` and `x` differ, or not -1 <= t < t_up < num_timesteps.
        """
        if noise.shape != x.shape:
            raise InputError(f"noise has shape {tuple(noise.shape)}; it must be the sample's, {tuple(x.shape)}")
        beta = self.posterior(t_up, t).beta
        return math.sqrt(1 - beta) * x.float() + math.sqrt(beta) * noise.float()

    def target(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """The training target for x_t = add_noise(x0, noise, t), without the variance half; float32."""
        if self.prediction_type == "epsilon":
            return noise.float()
        if self.prediction_type == "sample":
            return x0.float()
        alpha, sigma = self._alpha_sigma(t, x0)
        return alpha * noise.float() - sigma * x0.float()  # 2202.00512, app. D

    # ---- reverse: from the network's output to x0 ----

    def predict(self, output: Tensor, x_t: Tensor, t: int | Tensor) -> Prediction:
        """Convert a network's output to x0 and noise.

        Where x0 is clipped, the noise is recomputed from x_t and the clipped x0 (`use_clipped_model_output` in
        diffusers), so the two are always consistent. Ancestral sampling uses x0 only.

        Args:
            output: of x_t's shape, or with twice its channels for a learned variance.
            x_t: the network's input.
            t: its timestep.

        Raises:
            InputError: `output` has the wrong shape (for example without the channels of a learned variance), or `t` is
                not a timestep.
        """
        output, fraction = self._split(output, x_t)
        x_t = x_t.float()
        x0, noise = self._x0_and_noise(output, x_t, t)
        if self.bounds:
            x0 = self._bounded(x0)
            alpha, sigma = self._alpha_sigma(t, x_t)
            noise = (x_t - alpha * x0) / sigma
        return Prediction(x0, noise, fraction)

    @property
    def bounds(self) -> bool:
        """Whether predicted x0 is clamped or thresholded."""
        return self.clip_range is not None or self.threshold_ratio is not None

    def _bounded(self, x0: Tensor) -> Tensor:
        if self.threshold_ratio is not None:  # as in diffusers, it is then not clamped to `clip_range`
            limit = torch.quantile(x0.flatten(1).abs(), self.threshold_ratio, dim=1).clamp(1, self.threshold_max)
            limit = limit.view(-1, *[1] * (x0.ndim - 1))
            return x0.clamp(-limit, limit) / limit
        assert self.clip_range is not None
        return x0.clamp(-self.clip_range, self.clip_range)

    def _x0_and_noise(self, output: Tensor, x_t: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """Unclipped, of float32 tensors; `output` is without its variance half."""
        alpha, sigma = self._alpha_sigma(t, x_t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * output) / alpha, output
        if self.prediction_type == "sample":
            return output, (x_t - alpha * output) / sigma
        return alpha * x_t - sigma * output, alpha * output + sigma * x_t  # 2202.00512, app. D

    def posterior(self, t: int, t_next: int) -> Posterior:
        """q(x_next | x_t, x0) for a step that may skip timesteps; `t_next` -1 is the clean sample.

        Beta is recomputed from the two noise levels, 1 - alphas_cumprod[t] / alphas_cumprod[t_next], as Karlo does;
        for neighbours that is the schedule's own beta.

        Raises:
            InputError: not -1 <= t_next < t < num_timesteps.
        """
        t = self._checked_timestep(t)
        if not -1 <= t_next < t:
            raise InputError(f"the next timestep is {t_next}; it must be from -1 (the clean sample) to {t - 1}")
        left = self.tables.alphas_cumprod[t]
        left_next = self.tables.alphas_cumprod[t_next] if t_next >= 0 else 1.0
        beta = 1 - left / left_next
        return Posterior(
            x0_weight=math.sqrt(left_next) * beta / (1 - left),
            x_t_weight=math.sqrt(1 - beta) * (1 - left_next) / (1 - left),
            variance=beta * (1 - left_next) / (1 - left),
            beta=beta,
        )

    def log_variance(self, prediction: Prediction, t: int, t_next: int) -> float | Tensor:
        """Log of the variance of the reverse step t -> t_next: a number, or a tensor if the network learned it.

        Raises:
            InputError: the variance is learned and the prediction has none, or not -1 <= t_next < t.
        """
        posterior = self.posterior(t, t_next)
        small = math.log(max(posterior.variance, _LEAST_VARIANCE))
        if self.variance_type == "fixed_small_log":
            return small
        if self.variance_type == "fixed_small":
            return math.log(posterior.variance) if posterior.variance > 0 else -math.inf
        large = math.log(posterior.beta)
        if self.variance_type == "fixed_large":
            return large
        if prediction.log_variance is None:
            raise InputError("the process learns its variance, but the prediction has none")
        return _between(prediction.log_variance, small, large)

    def snr(self, t: int | Tensor) -> float | Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2: a number for an int, float32 [batch] for a LongTensor."""
        return self._at("snr", t, t if isinstance(t, Tensor) else torch.empty(0))

    # ---- training ----

    def loss(
        self,
        output: Tensor,
        x0: Tensor,
        noise: Tensor,
        x_t: Tensor,
        t: int | Tensor,
        *,
        weighting: str = "simple",
        vlb_weight: float = 0.001,
    ) -> Tensor:
        """Mean-squared error of each sample, float32 [batch]; with a learned variance, the hybrid loss.

        The hybrid adds `vlb_weight` * num_timesteps * L_t, an estimate of the whole variational bound in bits per
        dimension (Nichol & Dhariwal 2102.09672, eq. 16). The mean in it is behind a stop-gradient, so it trains
        only the variance. L_0 is the likelihood of pictures with 256 even levels in [-1, 1] (Ho et al. 2006.11239,
        eq. 13); the other terms are Gaussian divergences (2102.09672, eq. 6), of the unclipped x0.

        Args:
            output: the network's, of x_t's shape or with twice its channels.
            x0, noise, x_t: the clean sample, its noise, and `add_noise` of the two.
            t: timestep, int or LongTensor [batch].
            weighting: "simple" weights all timesteps equally (2006.11239, eq. 14); "min_snr" weights the error of x0
                by min(snr, 5), whatever the network predicts (Hang et al. 2303.09556, section 3.4).
            vlb_weight: 0 or more; 0 does not train the variance.

        Raises:
            InputError: a shape, `t` or `weighting` is wrong.
        """
        if weighting not in WEIGHTINGS:
            raise InputError(f"the weighting is {weighting!r}; it must be one of {', '.join(WEIGHTINGS)}")
        if not isinstance(t, Tensor):
            t = torch.full((x_t.shape[0],), self._checked_timestep(t), dtype=torch.long, device=x_t.device)
        output, fraction = self._split(output, x_t)
        x0, x_t = x0.float(), x_t.float()
        error = _mean((output - self.target(x0, noise, t)) ** 2)
        if weighting == "min_snr":
            error = error * self._min_snr_weight(t)
        if fraction is None or vlb_weight == 0:
            return error
        return error + vlb_weight * self.num_timesteps * self._bound(output.detach(), fraction, x0, x_t, t)

    def _min_snr_weight(self, t: Tensor) -> Tensor:
        # In terms of x0 the weight is min(snr, gamma). The error of the noise is snr times that of x0, and the error of
        # v is snr + 1 times that of x0.
        snr = self.tables.on("snr", t.device)[t]
        weight = snr.clamp(max=_MIN_SNR_GAMMA)
        if self.prediction_type == "epsilon":
            return weight / snr
        if self.prediction_type == "v_prediction":
            return weight / (snr + 1)
        return weight

    def _bound(self, output: Tensor, fraction: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """L_t in bits per dimension, [batch]."""
        guess = self._x0_and_noise(output, x_t, t)[0]
        small = self._at("min_log_variance", t, x_t)
        log_variance = _between(fraction, small, self._at("max_log_variance", t, x_t))
        # x_t contributes equally to both means, so their difference depends on x0 only; this avoids cancellation.
        gap = self._at("x0_weight", t, x_t) * (x0 - guess)
        divergence = 0.5 * (
            log_variance - small + torch.exp(small - log_variance) + gap**2 * torch.exp(-log_variance) - 1
        )
        # At t = 0 the mean is x0 itself: x0_weight is 1 and x_t's weight 0.
        likelihood = _level_log_likelihood(x0, guess, torch.exp(0.5 * log_variance))
        return torch.where(t == 0, -_mean(likelihood), _mean(divergence)) / math.log(2)

    # ---- reading arguments ----

    def _split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output without its variance half, and that half; both float32."""
        batch, channels, *size = x_t.shape
        wanted = (batch, 2 * channels if self.learns_variance else channels, *size)
        if output.shape != wanted:
            raise InputError(
                f"the network's output has shape {tuple(output.shape)}; a process with variance type "
                f"{self.variance_type!r} and samples of shape {tuple(x_t.shape)} needs {wanted}"
            )
        output = output.float()
        return output[:, :channels], output[:, channels:] if self.learns_variance else None

    def _alpha_sigma(self, t: int | Tensor, x: Tensor) -> tuple[float | Tensor, float | Tensor]:
        return self._at("alpha", t, x), self._at("sigma", t, x)

    def _at(self, name: str, t: int | Tensor, x: Tensor) -> float | Tensor:
        """Entry t of a table: a Python float, or a float32 tensor that broadcasts against `x`."""
        if not isinstance(t, Tensor) or t.ndim == 0:
            return getattr(self.tables, name)[self._checked_timestep(t)]
        self._check_timesteps(t)
        if t.shape[0] not in (1, x.shape[0]):
            raise InputError(
                f"there are {t.shape[0]} timesteps for {x.shape[0]} samples; give one, or one for each sample"
            )
        return self.tables.on(name, x.device)[t.to(x.device)].view(-1, *[1] * (x.ndim - 1))

    def _checked_timestep(self, t: object) -> int:
        return whole(t, "the timestep", 0, self.num_timesteps - 1)

    def _check_timesteps(self, t: Tensor) -> None:
        if t.ndim != 1 or t.dtype not in (torch.int64, torch.int32):
            raise InputError(f"timesteps are {t.dtype} {tuple(t.shape)}; they must be integers [batch]")
        # Only on the CPU: on another device the check would wait for all pending work.
        if t.device.type == "cpu" and bool(((t < 0) | (t >= self.num_timesteps)).any()):
            raise InputError(
                f"timesteps go from {int(t.min())} to {int(t.max())}; they must be from 0 to {self.num_timesteps - 1}"
            )


def _between(fraction: Tensor, small: float | Tensor, large: float | Tensor) -> Tensor:
    # Nichol & Dhariwal 2102.09672, eq. 15, with the network's [-1, 1] brought to [0, 1].
    share = (fraction + 1) / 2
    return share * large + (1 - share) * small


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)


def _level_log_likelihood(x0: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-probability of x0's level, one of 256 in [-1, 1] (Ho et al. 2006.11239, eq. 13)."""
    below = torch.special.ndtr((x0 - 1 / 255 - mean) / std)
    above = torch.special.ndtr((x0 + 1 / 255 - mean) / std)
    # The outermost levels extend to infinity.
    below = torch.where(x0 < -0.999, 0.0, below)
    above = torch.where(x0 > 0.999, 1.0, above)
    return torch.log((above - below).clamp(min=1e-12))
