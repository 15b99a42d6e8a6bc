"""The samplers of a pipeline's stages, by their names in `unclip.settings.SAMPLERS`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from unclip.checkpoints.layout import FURTHER_SUPER_RES
from unclip.errors import InputError
from unclip.settings import SAMPLERS

if TYPE_CHECKING:
    from unclip.diffusion.scheduler import Scheduler
    from unclip.pipelines.pipeline import Pipeline

STAGES = ("prior", "decoder", "super_res", *FURTHER_SUPER_RES)


def sampler_switch(pipe: "Pipeline") -> Callable[[str], None]:
    """A function that gives all stages of a pipeline the sampler of a name, or their own ones (`sampler_name`) again.

    It raises: InputError for an unknown name.
    """
    own_name, own = sampler_name(pipe), _schedulers(pipe)

    def use(name: str) -> None:
        kind = None if name == own_name else _scheduler_class(name)
        for component, scheduler in own.items():
            setattr(pipe, component, scheduler if kind is None else kind.from_config(scheduler.config))

    return use


def sampler_name(pipe: "Pipeline") -> str:
    """The sampler of the pipeline's stages: one name where they agree, else one for each stage."""
    names = [_short_name(scheduler) for scheduler in _schedulers(pipe).values()]
    return names[0] if len(set(names)) == 1 else ", ".join(names)


def _schedulers(pipe: "Pipeline") -> dict[str, "Scheduler"]:
    names = (*(f"{stage}_scheduler" for stage in STAGES), "scheduler")
    return {name: part for name in names if (part := pipe.components.get(name)) is not None}


def _scheduler_class(name: str) -> "type[Scheduler]":
    from unclip.diffusion import scheduler

    if name not in SAMPLERS:
        raise InputError(f"the sampler is {name!r}; it must be one of {', '.join(SAMPLERS)}")
    return getattr(scheduler, SAMPLERS[name].scheduler)


def _short_name(scheduler: "Scheduler") -> str:
    own = type(scheduler).__name__
    return next((name for name, row in SAMPLERS.items() if own in row.equivalents), own)
