"""The settings of schedulers that scheduler_config.json may contain, and checks of those that are not implemented."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn

from unclip.diffusion.process import (
    Beta,
    ClipRange,
    PredictionType,
    ThresholdMax,
    ThresholdRatio,
    Timesteps,
    VarianceType,
)
from unclip.diffusion.sampler import Eta
from unclip.diffusion.schedule import BetaSchedule, Spacing
from unclip.errors import ConfigError
from unclip.limits import Range

_Variance = VarianceType | None

PROCESS_SETTINGS = {
    "num_train_timesteps": Timesteps,
    "beta_start": Beta,
    "beta_end": Beta,
    "beta_schedule": BetaSchedule,
    "prediction_type": PredictionType,
    "variance_type": _Variance,
    "clip_sample": bool,
    "clip_sample_range": ClipRange,
}
"""The settings of all schedulers, with their kinds: they belong to the trained network, not to the sampler."""
THRESHOLD_SETTINGS = {
    "thresholding": bool,
    "dynamic_thresholding_ratio": ThresholdRatio,
    "sample_max_value": ThresholdMax,
}
"""Dynamic thresholding, for the schedulers that have it in diffusers. It belongs to the network too."""
KINDS = {
    **PROCESS_SETTINGS,
    **THRESHOLD_SETTINGS,
    "timestep_spacing": Spacing,
    "steps_offset": Annotated[int, Range(0, 1000)],
    "set_alpha_to_one": bool,
    "eta": Eta,
    "solver_order": Annotated[int, Range(1, 2)],
}

Neutral = Mapping[str, tuple[object, ...] | None]
"""Settings of diffusers that unclip does not implement, with the values that have no effect.

None means every value: the setting has no effect while the others are neutral.
"""

NEUTRAL_EVERYWHERE: Neutral = {"trained_betas": (None,), "rescale_betas_zero_snr": (False,)}
NEUTRAL_UNCLIP: Neutral = {
    **NEUTRAL_EVERYWHERE,
    "thresholding": (False,),
    "dynamic_thresholding_ratio": None,
    "sample_max_value": None,
}
NEUTRAL_DDPM: Neutral = {**NEUTRAL_EVERYWHERE, "steps_offset": (0,)}
NEUTRAL_DPM_SOLVER: Neutral = {
    **NEUTRAL_EVERYWHERE,
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint",),
    # The last step goes to the clean sample, which is first order at any value of these.
    "lower_order_final": (True, False),
    "euler_at_final": (True, False),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "flow_shift": None,
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (-math.inf,),
    "use_dynamic_shifting": (False,),
    "time_shift_type": None,
}

ELSEWHERE = {*NEUTRAL_UNCLIP, *NEUTRAL_DPM_SOLVER, *KINDS} - PROCESS_SETTINGS.keys()

_METHODS = ("algorithm_type", "solver_type")
"""Settings that select a solver's method: for another sampler, no value of them is neutral."""

FOREIGN_NEUTRAL: Neutral = {
    name: values for name, values in {**NEUTRAL_UNCLIP, **NEUTRAL_DPM_SOLVER}.items() if name not in _METHODS
} | {"set_alpha_to_one": (True,), "steps_offset": (0,)}
"""Settings of the other schedulers, with the values that have no effect for a class without them."""


class SchedulerConfig(dict[str, Any]):
    """A scheduler's settings, and its class as "_class_name". Read-only; entries are attributes too.

    It is a dict because `from_config` of diffusers takes no other mapping.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the scheduler has no setting {name!r}")
        return self[name]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} cannot be set: create another scheduler with from_config(config, {name}=...)")

    def _refuse(self, *given: object, **named: object) -> NoReturn:
        raise TypeError("a scheduler's config cannot be changed: use from_config(config, ...)")

    __setitem__ = __delitem__ = clear = pop = popitem = _refuse
    __ior__ = setdefault = update = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return SchedulerConfig, (dict(self),)


def check_neutral(class_name: str, neutral: Neutral, settings: Mapping[str, object]) -> None:
    """Check that settings that `class_name` does not implement have no effect.

    Raises:
        ConfigError: a setting is not in `neutral`, or is not at a neutral value.
    """
    for name, value in settings.items():
        if name not in neutral:
            raise ConfigError(f"{class_name} has no setting {name!r}; leave it out")
        allowed = neutral[name]
        if allowed is not None and not any(type(value) is type(one) and value == one for one in allowed):
            raise ConfigError(
                f"{class_name} does not implement {name}={value!r}; supported: {', '.join(map(repr, allowed))}"
            )


def is_unclip(config: Mapping[str, object]) -> bool:
    """Whether settings without a class name are those of an UnCLIPScheduler.

    It is the only class of diffusers that has a variance type and no spacing of timesteps. A `config` that was never
    written to a file has no class name.
    """
    names = {name for name in config if not name.startswith("_")}
    return "_class_name" not in config and config.get("variance_type") is not None and names <= PROCESS_SETTINGS.keys()
