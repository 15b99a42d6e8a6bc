"""The interface of training tasks, the diffusion process of a recipe, and the device and data that a task uses."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from unclip.checkpoints.files import read_json, safe_join
from unclip.checkpoints.hub import resolve
from unclip.data.folder import Keys
from unclip.data.source import FolderSource, Source, open_source
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.scheduler import CONFIG_NAME, SCHEDULERS, UnCLIPScheduler
from unclip.errors import ConfigError
from unclip.models.kernels import is_emulated
from unclip.training.recipe import TASKS, ProcessRecipe, Recipe, located
from unclip.training.sections import refuse

KEYS = tuple(field.name for field in dataclasses.fields(ProcessRecipe) if field.name != "weighting")
"""The settings of a process that a recipe has; others, such as dynamic thresholding, only change sampling."""


def settled(recipe: Recipe) -> Recipe:
    """The recipe with every setting of its diffusion process.

    Values that the recipe does not set come from the model in `start_from`, or else from the stage's default process.
    A settled recipe does not change.

    Raises:
        ConfigError: the recipe sets another process than that of the model in `start_from`.
        CheckpointError: the model is not available, or its scheduler cannot be read.
    """
    own = TASKS[recipe.stage].process
    if own is None:
        return recipe
    settings, name = getattr(recipe, recipe.stage), f"{recipe.stage}_scheduler"
    stated = {key: value for key in KEYS if (value := getattr(settings.process, key)) is not None}
    if (start := recipe.start_from) is not None:
        found = process_in(resolve(start) if isinstance(start, str) else start, name)
        if found is not None:
            own, other = found, differences(dataclasses.asdict(found), stated)
            what = f"the recipe's {recipe.stage}.process differs from the process of the model in {start} ({name})"
            refuse(other, f"{what}: {other}. Remove these settings, or remove start_from")
    process = dataclasses.replace(settings.process, **{key: getattr(own, key) for key in KEYS} | stated)
    try:
        process_of(process)
    except ConfigError as error:
        raise ConfigError(f"[{recipe.stage}.process] cannot be used: {error}") from error
    return dataclasses.replace(recipe, **{recipe.stage: dataclasses.replace(settings, process=process)})


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The settings in `here` that differ from those in `there`, in words."""
    other = {key: value for key, value in here.items() if there[key] != value}
    return "; ".join(f"{key} is {there[key]!r} there and {value!r} here" for key, value in other.items())


def process_of(recipe: ProcessRecipe) -> DiffusionProcess:
    """The process of a settled recipe."""
    return DiffusionProcess(**{key: getattr(recipe, key) for key in KEYS})


def scheduler_of(process: DiffusionProcess) -> UnCLIPScheduler:
    """The scheduler that is saved with a network trained on this process."""
    settings = {key: getattr(process, key) for key in KEYS}
    count, limit = settings.pop("num_timesteps"), settings.pop("clip_range")
    clip = {"clip_sample": limit is not None, "clip_sample_range": limit or 1.0}
    return UnCLIPScheduler(num_train_timesteps=count, **clip, **settings)


def process_in(model: Path, name: str) -> DiffusionProcess | None:
    """The process of the scheduler `name` of a model; None without a scheduler, or if its class is unknown.

    Raises: ConfigError for a process that is not implemented.
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


Batch = dict[str, Tensor]

DRAWN_BYTES = 9
"""Memory for a colour value of a picture in a batch, in bytes: a byte as read, and two float32 values."""


class Task(Protocol):
    """What is trained. The batch contains all randomness of a step, so a step is a function of (seed, step)."""

    @property
    def source(self) -> Source:
        """The data set."""
        ...

    @property
    def module(self) -> nn.Module:
        """The trained module. Its forward takes a batch and returns named scalars, including `loss`.

        If it has a method `keep_limits`, this is called after each optimizer step to clamp the shard of this process.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies what the weights depend on: the tokenizer's vocabulary, or the CLIP."""
        ...

    def batch(self, step: int, batch_size: int, generator: torch.Generator, own: Tensor | None = None) -> Batch:
        """The data of a step: tensors with `batch_size` rows; with `own`, only the rows with these indices."""
        ...

    def save(self, folder: Path) -> None:
        """Write the networks in the layout of diffusers and transformers."""
        ...

    def sample_sheet(self, path: Path) -> None:
        """Write a picture of sampled results, or a text file with figures (with the suffix .txt)."""
        ...


def make_task(recipe: Recipe, progress: Callable[..., Any] | None = None, *, run: Path | None = None) -> Task:
    """The task that a recipe describes.

    Args:
        recipe: of the run. Models that it names are downloaded if necessary.
        progress: wraps an iterable, as `tqdm` does, where preparation takes long.
        run: the run's folder, which may contain an interrupted run.

    Raises: UnclipError when a setting does not fit the data, a named model, or this machine.
    """
    task = TASKS[recipe.stage].task if recipe.condition is None else "vector_prior:condition_task"
    module, _, name = task.partition(":")
    return getattr(importlib.import_module(f"unclip.training.{module}"), name)(located(settled(recipe)), progress, run)


def computes_on_cpu() -> bool:
    """Whether training runs on the CPU: an accelerator is missing, or ACCELERATE_USE_CPU is set."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def mixed_precision(precision: str) -> str:
    """The precision to compute in: a recipe's `precision`, but float32 ("no") on a CPU that only emulates bfloat16."""
    emulated = precision == "bf16" and computes_on_cpu() and is_emulated(torch.bfloat16, torch.device("cpu"))
    return "no" if emulated else precision


def place() -> PartialState:
    """The device of this process, its number, and the number of processes."""
    return PartialState(cpu=computes_on_cpu())


def computing_device() -> torch.device:
    """The device of this process."""
    return cast(torch.device, place().device)


def available_bytes(device: torch.device) -> int:
    """Free memory of `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_room(needed_bytes: int, device: torch.device, what: str, remedy: str) -> None:
    """Raises: ConfigError when `device` has less free memory. `what` and `remedy` are parts of the message."""
    needed, free = (count / 2**30 for count in (needed_bytes, available_bytes(device)))
    have = f"{needed:,.1f} GiB of memory are needed, but only {free:,.1f} GiB are available"
    refuse(needed > free, f"{what} at least {have}: {remedy}")


def of_rows(batch: Batch, own: Tensor | None) -> Batch:
    """The rows with the indices `own`; all rows if it is None."""
    return batch if own is None else {name: value[own] for name, value in batch.items()}


def in_folders(source: Source, what: str) -> FolderSource:
    """The source. Raises: ConfigError for shards, which `what` does not support."""
    if not isinstance(source, FolderSource):
        raise ConfigError(f"{what} needs data in folders; it does not support shards")
    return source


def source_of(recipe: Recipe, sizes_px: tuple[int, ...], **how: Any) -> Source:
    """The data set of a recipe, for this process.

    Raises: ConfigError when the pictures of a batch do not fit into memory.
    """
    here = place()
    num_bytes = recipe.batch_size // here.num_processes * DRAWN_BYTES * sum(3 * side**2 for side in sizes_px)
    what = f"batch_size is {recipe.batch_size}; for the pictures of a batch"
    check_room(num_bytes, torch.device("cpu"), what, "lower batch_size")
    return open_source(
        recipe.data,
        sizes_px,
        seed=recipe.seed,
        max_skipped_share=recipe.max_skipped_share,
        num_workers=recipe.reader_workers,
        keys=Keys(recipe.image_key, recipe.caption_key),
        rank=here.process_index,
        world=here.num_processes,
        **how,
    )
