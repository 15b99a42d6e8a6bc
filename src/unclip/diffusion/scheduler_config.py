"""Settings of schedulers: what a scheduler_config.json may say, and which of it a scheduler can follow.

Does not know what the settings do: names, values and verdicts only.
`scheduler` reads its constructors' and its files' settings with it.
"""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from unclip.errors import ConfigError

PROCESS_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "variance_type",
    "clip_sample",
    "clip_sample_range",
)
"""What every scheduler shares: it belongs to the trained network, not to the way of sampling."""

Neutral = Mapping[str, tuple[object, ...] | None]
"""The ecosystem's settings that unclip does not implement, and the values at which they change nothing.

None stands for every value: the setting does nothing as long as its neighbours are neutral.
"""

NEUTRAL_EVERYWHERE: Neutral = {
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
    "thresholding": (False,),
    "dynamic_thresholding_ratio": None,
    "sample_max_value": None,
}
NEUTRAL_DDIM: Neutral = {**NEUTRAL_EVERYWHERE, "set_alpha_to_one": (True,), "steps_offset": (0,)}
NEUTRAL_DPM_SOLVER: Neutral = {
    **NEUTRAL_EVERYWHERE,
    "steps_offset": (0,),
    "algorithm_type": ("dpmsolver++",),
    "solver_type": ("midpoint",),
    # The last step goes to no noise at all, which is of first order however these stand.
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

_ELSEWHERE = {*NEUTRAL_DDIM, *NEUTRAL_DPM_SOLVER, "timestep_spacing", "eta", "solver_order"}

_METHODS = ("algorithm_type", "solver_type")
"""What chooses among a solver's methods: to another way of sampling no value of it is neutral."""

FOREIGN_NEUTRAL: Neutral = {
    name: values for name, values in {**NEUTRAL_DDIM, **NEUTRAL_DPM_SOLVER}.items() if name not in _METHODS
}
"""Settings of the siblings, at the values that ask for nothing of a class that does not have them."""


class SchedulerConfig(dict[str, Any]):
    """A scheduler's settings, and its class as "_class_name". Cannot be changed; entries are attributes too.

    A dict, because the ecosystem's `from_config` takes no other mapping.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"the scheduler has no setting {name!r}")
        return self[name]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} cannot be set: make another scheduler with from_config(config, {name}=...)")

    def _refuse(self, *given: object, **named: object) -> NoReturn:
        raise TypeError("a scheduler's config cannot be changed: make another scheduler with from_config(config, ...)")

    __setitem__ = __delitem__ = clear = pop = popitem = _refuse
    __ior__ = setdefault = update = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return SchedulerConfig, (dict(self),)

    def __repr__(self) -> str:
        return f"SchedulerConfig({dict(self)})"


def check_neutral(class_name: str, neutral: Neutral, settings: Mapping[str, object]) -> None:
    """Accept settings that `class_name` does not implement, as long as they change nothing.

    Raises:
        ConfigError: one of them is not at a neutral value, or is not in `neutral` at all.
    """
    for name, value in settings.items():
        if name not in neutral:
            raise ConfigError(f"{class_name} has no setting {name!r}; leave it out")
        allowed = neutral[name]
        if allowed is not None and not any(type(value) is type(one) and value == one for one in allowed):
            raise ConfigError(
                f"{class_name} does not implement {name}={value!r}; only {' or '.join(map(repr, allowed))} is possible"
            )


def own_settings(class_name: str, known: set[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The `known` ones of `settings`: without private ones ("_...") and those of the class's siblings.

    What belongs to a sibling's way of sampling is dropped at any value; what would change the process is known to
    every class.

    Raises:
        ConfigError: a setting is unknown to all.
    """
    for name in settings:
        if name not in known and name not in _ELSEWHERE and not name.startswith("_"):
            raise ConfigError(
                f"{name!r} is no setting of {class_name} or its siblings; remove it from the configuration"
            )
    return {name: value for name, value in settings.items() if name in known}


def check_overrides(class_name: str, known: set[str], neutral: Neutral, overrides: Mapping[str, object]) -> None:
    """Accept what a caller wrote beside a configuration: `known` settings, and others that ask for nothing.

    `own_settings` drops a sibling's settings from a configuration, which was written for that sibling; what the caller
    wrote for this class must not vanish.

    Raises:
        ConfigError: a setting is unknown, or a sibling's at a value that `class_name` would not follow.
    """
    check_neutral(class_name, neutral, {name: value for name, value in overrides.items() if name not in known})


def is_unclip(config: Mapping[str, object]) -> bool:
    """Whether settings that do not name their class are a whole UnCLIPScheduler's.

    Of the ecosystem's classes it alone has a kind of variance and nothing of another's: no spacing of timesteps above
    all. A `config` that was never in a file says no class.
    """
    names = {name for name in config if not name.startswith("_")}
    return "_class_name" not in config and config.get("variance_type") is not None and names <= {*PROCESS_SETTINGS}
