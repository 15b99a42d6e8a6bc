"""Checks of a run's settings before data are read, and the measured cost of its steps.

A step on PyTorch's meta device, which has shapes but no memory, shows whether the settings fit together and how much
memory the backward pass needs.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from unclip.errors import ConfigError, UnclipError
from unclip.training.recipe import Recipe
from unclip.training.sharding import is_sharded
from unclip.training.task import Batch, Task, check_room, computing_device, place
from unclip.training.trainer import Trainer, step_generator

STATE_COPIES = 4
"""Minimum number of values per trained parameter: weight, gradient, optimizer state and average."""

SURE_SHARE = 0.8
"""Share of the counted bytes that a step needs with any kernel; kernels differ in what they save."""


def check_parameters(module: nn.Module, recipe: Recipe, what: str) -> None:
    """Raises: ConfigError when training all of `module` needs more memory than this machine has."""
    count = sum(parameter.numel() for parameter in module.parameters())
    num_bytes = 4 * count * (1 if recipe.shard else STATE_COPIES)
    check_room(
        num_bytes, computing_device(), f"{what} has {count:,} parameters; to train them", "make the network smaller"
    )


def try_step(module: nn.Module, batch: Callable[[int], Batch], recipe: Recipe, *, large: Batch | None = None) -> None:
    """Try a step of a task on the meta device.

    Args:
        module: of the task, on any device.
        batch: makes a batch of the given number of rows on the meta device.
        recipe: of the run.
        large: another batch that the networks must accept.

    Raises: ConfigError when the networks do not accept a batch, or a step needs more memory than is available.
    """
    for tried in (batch(2), large):
        if tried is None:
            continue
        try:
            kept_bytes(module, tried)
        except (UnclipError, RuntimeError, ValueError, TypeError, IndexError) as error:
            what = f"the networks of [{recipe.stage}] do not fit their inputs: {error!s:.300}"
            raise ConfigError(f"{what}. Check their settings") from error
    rows = -(-recipe.batch_size // (recipe.accumulation * place().num_processes))
    try:
        kept = kept_bytes(module, batch(rows))
    except RuntimeError:  # the count exceeds 64 bits
        kept = 2**63
    share = SURE_SHARE / 2 if recipe.precision != "no" or recipe.compile else SURE_SHARE
    what = (
        f"batch_size is {recipe.batch_size}, with accumulation {recipe.accumulation}; for a step of {rows:,} pictures"
    )
    check_room(int(share * kept), computing_device(), what, "lower batch_size, or raise accumulation")


def kept_bytes(module: nn.Module, batch: Batch) -> int:
    """The bytes that the forward pass of `module` saves for the backward pass, without the weights.

    Args:
        module: of a task.
        batch: on the meta device.
    """
    on_meta = {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    own = {tensor.untyped_storage()._cdata for tensor in on_meta.values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # keeps the storage alive, so that its address is unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        torch.func.functional_call(module, on_meta, (batch,))
    return sum(storage.nbytes() for storage in kept.values())


WARM_UP_STEPS = 1


@dataclass(frozen=True)
class Cost:
    """The size of a run's networks, and the memory and time that it needs.

    Attributes:
        parameters: number of parameters by network.
        trained: number of trained parameters.
        state_bytes: memory of weights, gradients, optimizer state and moving average, over all shards.
        peak_bytes: peak memory of the process (on an accelerator: of the device) in a step.
        read_px: sides of the pictures read from the data set, in pixels.
        trained_px: sides of the pictures or crops in a batch, in pixels; empty if it contains only embeddings.
        step_s: seconds per step.
        steps: number of steps in the recipe.
        batch_size: pictures per step.
        is_sharded: whether each process has only a shard of the state.
    """

    parameters: dict[str, int]
    trained: int
    state_bytes: int
    peak_bytes: int
    read_px: tuple[int, ...]
    trained_px: tuple[int, ...]
    step_s: float
    steps: int
    batch_size: int
    is_sharded: bool = False

    @property
    def total_s(self) -> float:
        """Seconds for all steps, without saving and sample sheets."""
        return self.step_s * self.steps


def measure_cost(task: Task, recipe: Recipe, *, num_steps: int = 3) -> Cost:
    """Take a few steps in a temporary folder, and measure them.

    Raises: the same errors as the first steps of the run.
    """
    with tempfile.TemporaryDirectory(prefix="unclip-dry-run-") as folder:
        trainer = Trainer(task, recipe, Path(folder))
        for _ in range(WARM_UP_STEPS):
            trainer.take_step()
        start = time.perf_counter()
        for _ in range(num_steps):
            trainer.take_step()
        step_s = (time.perf_counter() - start) / num_steps
        trained = [p for p in task.module.parameters() if p.requires_grad]
        tensors = [*task.module.parameters(), *trained, *trainer.ema.values()]  # the second are gradients
        for state in trainer.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        batch = task.batch(trainer.step, recipe.batch_size, step_generator(recipe.seed, trainer.step))
        return Cost(
            parameters={name: sum(p.numel() for p in part.parameters()) for name, part in task.module.named_children()},
            trained=sum(p.numel() for p in trained),
            state_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            peak_bytes=_peak_bytes(trainer.accelerator.device),
            read_px=tuple(sorted(getattr(task.source, "sizes", ()))),
            trained_px=tuple(sorted({values.shape[-1] for values in batch.values() if values.dim() == 4})),
            step_s=step_s,
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            is_sharded=is_sharded(trainer.weights),
        )


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
