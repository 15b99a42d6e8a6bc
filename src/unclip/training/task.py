"""The interface of training tasks, the diffusion process of a recipe, and the device and data that a task uses."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from unclip.checkpoints.files import read_json, safe_join
from unclip.checkpoints.hub import resolve
from unclip.data.batches import Source
from unclip.data.folder import Keys
from unclip.data.source import FolderSource, open_source
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.scheduler import CONFIG_NAME, SCHEDULERS, UnCLIPScheduler
from unclip.errors import ConfigError
from unclip.models.kernels import is_emulated
from unclip.training.recipe import TASKS, ProcessRecipe, Recipe, located

KEYS = tuple(field.name for field in dataclasses.fields(DiffusionProcess))
"""The settings that belong to a trained network; `weighting` of a recipe does not."""


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
    """The process of a settled recipe."""
    return DiffusionProcess(**{key: getattr(recipe, key) for key in KEYS})


def scheduler_of(process: DiffusionProcess) -> UnCLIPScheduler:
    """The scheduler that is saved with a network trained on this process."""
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


def _check_agreement(stated: dict[str, object], found: DiffusionProcess, recipe: Recipe, name: str) -> None:
    other = [
        f"{key} is {getattr(found, key)!r} there and {value!r} here"
        for key, value in stated.items()
        if getattr(found, key) != value
    ]
    if other:
        raise ConfigError(
            f"the recipe's {recipe.stage}.process differs from the process of the model in {recipe.start_from} "
            f"({name}): {'; '.join(other)}. Remove these settings, or remove start_from"
        )


Batch = dict[str, Tensor]

DRAWN_BYTES = 9
"""Memory for a colour value of a picture in a batch, in bytes: a byte as read, and two float32 values."""


class Task(Protocol):
    """What is trained. The batch contains all randomness of a step, so a step is a function of (seed, step)."""

    @property
    def is_local(self) -> bool:
        """Whether `batch` returns only rows of this process. Otherwise all processes get the same batch."""
        ...

    @property
    def module(self) -> nn.Module:
        """The trained module. Its forward takes a batch and returns named scalars, including `loss`."""
        ...

    @property
    def skipped(self) -> Mapping[str, str]:
        """The samples that could not be read so far, with the reason."""
        ...

    @property
    def counts(self) -> dict[str, int]:
        """The number of samples in each shard, as far as known. Shards with a known number are not counted again."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies what the weights depend on: the tokenizer's vocabulary, or the CLIP."""
        ...

    def batch(self, step: int, batch_size: int, generator: torch.Generator, own: Tensor | None = None) -> Batch:
        """The data of a step: tensors with `batch_size` rows; with `own`, only the rows with these indices."""
        ...

    def reading(self, should_stop: Callable[[], bool]) -> AbstractContextManager[None]:
        """A context in which waiting for data raises Cancelled once `should_stop()`. It ends reading ahead."""
        ...

    def save(self, folder: Path) -> None:
        """Write the networks in the layout of diffusers and transformers."""
        ...

    def sample_sheet(self, path: Path) -> None:
        """Write a picture of sampled results, or a text file with figures (with the suffix .txt)."""
        ...


@runtime_checkable
class Limited(Protocol):
    """A module with limits for some of its parameters."""

    def keep_limits(self) -> None:
        """Clamp the parameters after an optimizer step; each process clamps its shard."""
        ...


def make_task(recipe: Recipe, progress: Callable[..., Any] | None = None, *, run: Path | None = None) -> Task:
    """The task that a recipe describes.

    Args:
        recipe: of the run. Models that it names are downloaded if necessary.
        progress: wraps an iterable, as `tqdm` does, where preparation takes long.
        run: the run's folder, which may contain an interrupted run.

    Raises: UnclipError when a setting does not fit the data, a named model, or this machine.
    """
    module, _, name = TASKS[recipe.stage].task.partition(":")
    return getattr(importlib.import_module(module), name)(located(settled(recipe)), progress, run)


class Sourced:
    """The part of a task that its data set answers."""

    source: Source

    @property
    def is_local(self) -> bool:
        return self.source.is_local

    @property
    def skipped(self) -> Mapping[str, str]:
        return self.source.skipped

    @property
    def counts(self) -> dict[str, int]:
        return self.source.counts

    def reading(self, should_stop: Callable[[], bool]) -> AbstractContextManager[None]:
        return self.source.reading(should_stop)


def computes_on_cpu() -> bool:
    """Whether training runs on the CPU: there is no accelerator, or ACCELERATE_USE_CPU is set."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def mixed_precision(precision: str) -> str:
    """The precision to compute in: a recipe's `precision`, but float32 ("no") on a CPU that only emulates bfloat16."""
    emulated = precision == "bf16" and computes_on_cpu() and is_emulated(torch.bfloat16, torch.device("cpu"))
    return "no" if emulated else precision


def computing_device() -> torch.device:
    """The device of this process."""
    return cast(torch.device, PartialState(cpu=computes_on_cpu()).device)


def num_processes() -> int:
    """The number of processes of this run."""
    return PartialState(cpu=computes_on_cpu()).num_processes


def available_bytes(device: torch.device) -> int:
    """Free memory of `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_room(needed_bytes: int, device: torch.device, what: str, remedy: str) -> None:
    """Raises: ConfigError when `device` has less free memory. `what` and `remedy` are parts of the message."""
    free = available_bytes(device)
    if needed_bytes > free:
        raise ConfigError(
            f"{what} at least {needed_bytes / 2**30:,.1f} GiB of memory are needed, but only {free / 2**30:,.1f} GiB "
            f"are available: {remedy}"
        )


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
    place = PartialState(cpu=computes_on_cpu())
    check_room(
        recipe.batch_size // place.num_processes * DRAWN_BYTES * sum(3 * side**2 for side in sizes_px),
        torch.device("cpu"),
        f"batch_size is {recipe.batch_size}; for the pictures of a batch",
        "lower batch_size",
    )
    return open_source(
        recipe.data,
        sizes_px,
        seed=recipe.seed,
        max_skipped_share=recipe.max_skipped_share,
        num_workers=recipe.reader_workers,
        keys=Keys(recipe.image_key, recipe.caption_key),
        rank=place.process_index,
        world=place.num_processes,
        **how,
    )
