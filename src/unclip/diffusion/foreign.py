"""Conversion of schedulers of diffusers to those of unclip that sample in the same way."""

import warnings
from collections.abc import Mapping
from typing import Any

from unclip.diffusion.scheduler import SCHEDULERS, DDIMScheduler, DDPMScheduler, Scheduler
from unclip.errors import ConfigError
from unclip.settings import SAMPLERS

EQUIVALENTS = {
    **{name: SCHEDULERS[row.scheduler] for row in SAMPLERS.values() for name in row.equivalents},
    **dict.fromkeys(("DDPMScheduler", "DDPMParallelScheduler"), DDPMScheduler),
}
"""The schedulers of diffusers by class name, and the scheduler here that samples in the same way."""

PNDM = "PNDMScheduler"
PNDM_DEFAULTS = {"set_alpha_to_one": False, "clip_sample": False}
"""Where PNDMScheduler, which does not clip, differs from DDIMScheduler in what it leaves out of its files."""

READABLE = (*EQUIVALENTS, PNDM)
"""The classes of diffusers that `of_settings` reads."""

UNCLIP_SCHEDULE = "squaredcos_cap_v2"
"""The noise schedule of every UnCLIPScheduler."""


def is_foreign(value: object) -> bool:
    """Whether it is a scheduler of diffusers."""
    ours = type(value).__module__.partition(".")[0] != "diffusers"
    return not ours and hasattr(value, "set_timesteps") and isinstance(getattr(value, "config", None), Mapping)


def converted(scheduler: Any, replaced: Scheduler | None = None) -> Scheduler:
    """A scheduler that samples in the same way as a scheduler of diffusers.

    If that was built by `from_config` from a scheduler of unclip, the even spacing of timesteps, the variance type and
    the noise schedule are kept, as in unclip's own `from_config`. Where x0 is clipped, the noise is recomputed from it.

    Args:
        scheduler: see `is_foreign`.
        replaced: the scheduler that it replaces; gives the variance type where the class of diffusers does not.

    Raises: ConfigError for a class without an equivalent sampler, or a setting that is not implemented.
    """
    name, config = type(scheduler).__name__, scheduler.config
    settings = dict(config)
    defaults = config.get("_use_default_values", ())
    if settings.get("variance_type") is None:
        settings["variance_type"] = None if replaced is None else replaced.config["variance_type"]
    elif "_class_name" in config and "timestep_spacing" in defaults and "variance_type" not in defaults:
        settings["timestep_spacing"] = "linspace"
        if "beta_schedule" in defaults:  # Karlo's files leave it out, and diffusers' from_config then takes "linear"
            settings["beta_schedule"] = UNCLIP_SCHEDULE
    if name not in READABLE:
        raise ConfigError(f"unclip has no sampler like that of diffusers' {name}")
    return of_settings(name, settings)


def of_settings(name: str, settings: Mapping[str, Any]) -> Scheduler:
    """A scheduler that samples in the same way as diffusers' class `name` in `READABLE` with these settings.

    PNDMScheduler (a linear multistep method) becomes DDIMScheduler with the same noise levels, with a warning.

    Raises: ConfigError for a setting that is not implemented.
    """
    if name == PNDM:
        message = f"unclip does not implement {PNDM}; DDIMScheduler with the same noise levels replaces it"
        warnings.warn(message, stacklevel=2)
        kept = {key: value for key, value in settings.items() if key != "skip_prk_steps"}
        return DDIMScheduler.from_config({**PNDM_DEFAULTS, **kept, "_class_name": DDIMScheduler.__name__})
    return EQUIVALENTS[name].from_config({**settings, "_class_name": EQUIVALENTS[name].__name__})
