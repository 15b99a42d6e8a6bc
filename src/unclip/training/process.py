"""The diffusion process of a run: as the recipe states it, as the model that it starts from has it, or the stage's own.

Knows recipes and schedulers' files; knows no network. Called by the diffusion tasks, by `unclip train` and by
`unclip assemble`.
"""

import dataclasses
from pathlib import Path

from unclip.checkpoints.files import read_json, safe_join
from unclip.checkpoints.hub import resolve
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.scheduler import DDIMScheduler, DPMSolverMultistepScheduler, UnCLIPScheduler
from unclip.diffusion.scheduler_base import CONFIG_NAME
from unclip.errors import ConfigError
from unclip.training.recipe import ProcessRecipe, Recipe

OWN_PROCESSES = {
    "prior": DiffusionProcess(prediction_type="sample", clip_range=5.0),
    "decoder": DiffusionProcess(variance_type="learned_range"),
    "super_res": DiffusionProcess(),
}
"""What a stage of a diffusion is trained under if nobody says anything."""

KEYS = tuple(field.name for field in dataclasses.fields(DiffusionProcess))
"""What belongs to the network that was trained; a recipe's `weighting` does not."""

SCHEDULERS = {cls.__name__: cls for cls in (UnCLIPScheduler, DDIMScheduler, DPMSolverMultistepScheduler)}


def settled(recipe: Recipe) -> Recipe:
    """The recipe with its stage's process in full; a second time changes nothing.

    What it does not state is the process of the model that it starts from; where there is none, the stage's own.

    Raises:
        ConfigError: it states another process than that model's.
        CheckpointError: the model cannot be had, or its scheduler cannot be read.
    """
    own = OWN_PROCESSES.get(recipe.stage)
    if own is None:
        return recipe
    settings = getattr(recipe, recipe.stage)
    stated = {key: value for key in KEYS if (value := getattr(settings.process, key)) is not None}
    if (start := recipe.start_from) is not None:
        name = f"{recipe.stage}_scheduler"
        found = process_in(resolve(start) if isinstance(start, str) else start, name)
        if found is not None:
            _check_agreement(stated, found, recipe, name)
            own = found
    process = dataclasses.replace(settings.process, **dataclasses.asdict(own) | stated)
    try:
        process_of(process)
    except ConfigError as error:
        raise ConfigError(f"[{recipe.stage}.process] cannot be used: {error}") from error
    return dataclasses.replace(recipe, **{recipe.stage: dataclasses.replace(settings, process=process)})


def process_of(recipe: ProcessRecipe) -> DiffusionProcess:
    """The process that a settled recipe describes."""
    return DiffusionProcess(**{key: getattr(recipe, key) for key in KEYS})


def scheduler_of(process: DiffusionProcess) -> UnCLIPScheduler:
    """The scheduler that is saved beside a network trained on this process."""
    return UnCLIPScheduler(
        num_train_timesteps=process.num_timesteps,
        beta_schedule=process.beta_schedule,
        beta_start=process.beta_start,
        beta_end=process.beta_end,
        prediction_type=process.prediction_type,
        variance_type=process.variance_type,
        clip_sample=process.clip_range is not None,
        clip_sample_range=process.clip_range or 1.0,
    )


def process_in(model: Path, name: str) -> DiffusionProcess | None:
    """That of the model's scheduler `name`; None where it has none, or one of a class that is not known here.

    Raises: ConfigError for one that is not implemented.
    """
    if not (model / name / CONFIG_NAME).is_file():
        return None
    config = read_json(safe_join(model, f"{name}/{CONFIG_NAME}"), allow_infinity=True)
    cls = SCHEDULERS.get(str(config.get("_class_name", "UnCLIPScheduler")))
    if cls is None:
        return None
    try:
        return cls.from_config(config).process
    except ConfigError as error:
        raise ConfigError(f"the process of {model / name} cannot be trained on: {error}") from error


def _check_agreement(stated: dict[str, object], found: DiffusionProcess, recipe: Recipe, name: str) -> None:
    other = [
        f"{key} is {getattr(found, key)!r} there and {value!r} here"
        for key, value in stated.items()
        if getattr(found, key) != value
    ]
    if other:
        raise ConfigError(
            f"the recipe's {recipe.stage}.process is not the one that the model in {recipe.start_from} was trained "
            f"under ({name}): {'; '.join(other)}. Leave these settings out, or leave start_from out"
        )
