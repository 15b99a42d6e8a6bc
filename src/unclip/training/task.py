"""The diffusion process of a run: as the recipe states it, as the model that it starts from has it, or the stage's own.

Knows recipes and schedulers' files; knows no network. Called by the diffusion tasks, by `unclip train` and by
`unclip assemble`.
"""

import dataclasses
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
from unclip.data.source import open_source
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.scheduler import CONFIG_NAME, DDIMScheduler, DPMSolverMultistepScheduler, UnCLIPScheduler
from unclip.errors import ConfigError
from unclip.models.kernels import is_emulated
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


Batch = dict[str, Tensor]

DRAWN_BYTES = 9
"""Of a colour value of a picture that is drawn: a byte as it is read, and two float32."""


class Task(Protocol):
    """What is trained. All randomness of a step is drawn into its batch, so a step is a function of (seed, step)."""

    @property
    def is_local(self) -> bool:
        """Whether `batch` gives this process's rows alone; else it gives the same for all, which are shared out."""
        ...

    @property
    def module(self) -> nn.Module:
        """Its forward takes a batch and returns named scalars, `loss` among them."""
        ...

    @property
    def skipped(self) -> Mapping[str, str]:
        """What of the data could not be read so far, with the reason."""
        ...

    @property
    def counts(self) -> dict[str, int]:
        """Samples in each shard of the data, as far as known; what is laid in before need not be counted."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of what the weights mean nothing without: a tokenizer's vocabulary, the CLIP whose space is learned."""
        ...

    def batch(self, step: int, batch_size: int, generator: torch.Generator, own: Tensor | None = None) -> Batch:
        """What the step trains on: tensors that all have `batch_size` rows; with `own`, the rows of these numbers."""
        ...

    def reading(self, should_stop: Callable[[], bool]) -> AbstractContextManager[None]:
        """Within it a wait for data ends with Cancelled once `should_stop`; after it nothing is read ahead."""
        ...

    def save(self, folder: Path) -> None:
        """Write the module's networks in the ecosystem's layout."""
        ...

    def sample_sheet(self, path: Path) -> None:
        """Draw a picture of what the networks can do now, or write a text (with the suffix .txt) that says it."""
        ...


@runtime_checkable
class Limited(Protocol):
    """A task's module some of whose parameters have limits."""

    def keep_limits(self) -> None:
        """Bring them back after an optimizer step, each process what it holds of them."""
        ...


class Sourced:
    """A task that draws from a data set."""

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
    """Whether training runs on the CPU: there is nothing else, or accelerate was told so."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def mixed_precision(precision: str) -> str:
    """What a recipe's `precision` comes to here: "bf16" is "no" (float32) on a CPU that would only emulate it."""
    emulated = precision == "bf16" and computes_on_cpu() and is_emulated(torch.bfloat16, torch.device("cpu"))
    return "no" if emulated else precision


def computing_device() -> torch.device:
    """Where this process of a run computes."""
    return cast(torch.device, PartialState(cpu=computes_on_cpu()).device)


def num_processes() -> int:
    """Of this run."""
    return PartialState(cpu=computes_on_cpu()).num_processes


def available_bytes(device: torch.device) -> int:
    """Memory that is free on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_room(needed_bytes: int, device: torch.device, what: str, remedy: str) -> None:
    """Raises: ConfigError when `device` has not so many bytes free. `what` and `remedy` are parts of its message."""
    free = available_bytes(device)
    if needed_bytes > free:
        raise ConfigError(
            f"{what} at least {needed_bytes / 2**30:,.1f} GiB of memory are needed, and {free / 2**30:,.1f} GiB are "
            f"available: {remedy}"
        )


def of_rows(batch: Batch, own: Tensor | None) -> Batch:
    """The rows of these numbers; all where there are none."""
    return batch if own is None else {name: value[own] for name, value in batch.items()}


def source_of(recipe: Recipe, sizes_px: tuple[int, ...], **how: Any) -> Source:
    """The recipe's data set, as this process of a run reads it.

    Raises: ConfigError when memory does not hold the pictures of a batch.
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
