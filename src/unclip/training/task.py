"""What the trainer asks of a task, and what the tasks have in common: a source of pictures.

Knows no network and no optimizer. Called by the trainer and the tasks.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from unclip.data.rows import Source
from unclip.data.source import open_source
from unclip.errors import ConfigError
from unclip.models.kernels import is_emulated
from unclip.training.recipe import Recipe

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
        rank=place.process_index,
        world=place.num_processes,
        **how,
    )
