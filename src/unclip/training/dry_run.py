"""Whether a run's settings fit together and fit into memory, found out before any data are read.

A step is computed on the meta device, which has shapes and no memory: settings that do not fit each other fail there at
once, and what the step would keep for its backward pass can be counted.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from unclip.data.batches import ShardSource
from unclip.data.source import FolderSource
from unclip.errors import ConfigError, UnclipError
from unclip.training.recipe import Recipe
from unclip.training.sharding import is_sharded
from unclip.training.task import Batch, Sourced, Task, check_room, computing_device, num_processes
from unclip.training.trainer import Trainer, step_generator

STATE_COPIES = 4
"""Of each number in a network that is trained, at least: weight, gradient, the optimizer's and the average."""

SURE_SHARE = 0.8
"""Of the counted bytes, what a step surely needs: kernels differ in what they keep."""

N = TypeVar("N", bound=nn.Module)


def built(make: Callable[[], N], recipe: Recipe, what: str) -> N:
    """The network that `make` makes, once it is known that it can be trained in this machine's memory.

    Args:
        make: builds the network on torch's default device.
        recipe: of the run.
        what: names it in messages.

    Raises: ConfigError when the memory does not suffice.
    """
    with torch.device("meta"):
        check_parameters(make(), recipe, what)
    return make()


def check_parameters(module: nn.Module, recipe: Recipe, what: str) -> None:
    """Raises: ConfigError when `module`, all of which is trained, is too large for this machine's memory."""
    count = sum(parameter.numel() for parameter in module.parameters())
    check_room(
        4 * count * (1 if recipe.shard else STATE_COPIES),
        computing_device(),
        f"{what} has {count:,} parameters; to train them",
        "make the network smaller",
    )


def try_step(module: nn.Module, batch: Callable[[int], Batch], recipe: Recipe, *, large: Batch | None = None) -> None:
    """Compute a step of a task without memory.

    Args:
        module: the task's, wherever its weights lie.
        batch: makes a batch of so many rows on the meta device.
        recipe: of the run.
        large: a batch that the networks must be able to read too, beside those they are trained on.

    Raises: ConfigError when the networks cannot read such a batch, or a step needs more memory than there is.
    """
    for tried in (batch(2), large):
        if tried is None:
            continue
        try:
            kept_bytes(module, tried)
        except (UnclipError, RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(
                f"the networks of [{recipe.stage}] do not fit what they are given: {error!s:.300}. Check their settings"
            ) from error
    rows = -(-recipe.batch_size // (recipe.accumulation * num_processes()))
    try:
        kept = kept_bytes(module, batch(rows))
    except RuntimeError:  # more than 64 bits can count
        kept = 2**63
    share = SURE_SHARE / 2 if recipe.precision != "no" or recipe.compile else SURE_SHARE
    check_room(
        int(share * kept),
        computing_device(),
        f"batch_size is {recipe.batch_size}, with accumulation {recipe.accumulation}; for a step of {rows:,} pictures",
        "lower batch_size, or raise accumulation",
    )


def kept_bytes(module: nn.Module, batch: Batch) -> int:
    """Bytes that the forward pass of `module` keeps for the backward pass, besides the weights; nothing is computed.

    Args:
        module: a task's.
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
            kept[storage._cdata] = storage  # held, so that no other gets its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        torch.func.functional_call(module, on_meta, (batch,))
    return sum(storage.nbytes() for storage in kept.values())


WARM_UP_STEPS = 1


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Attributes:
        parameters: of each network, by name.
        trained: of all, those that change.
        state_bytes: weights, gradients, optimizer state and moving average together, of all shards where there are any.
        peak_bytes: the most memory that the process (on an accelerator: the device) held while a step was computed.
        read_px: sides that the data set's pictures are made square at, in pixels.
        trained_px: sides of the pictures in a batch, which may be crops; none where a batch holds embeddings alone.
        step_s: seconds a step takes.
        steps: how many the recipe asks for; batch_size: pictures in each.
        is_sharded: whether each process holds only its share of what `state_bytes` counts.
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
        """Seconds for the whole run, without saving and sample sheets."""
        return self.step_s * self.steps


def rehearse(task: Task, recipe: Recipe, *, num_steps: int = 3) -> Cost:
    """Take a few steps in a folder that is thrown away, and measure them.

    Raises: whatever the run itself would raise so early.
    """
    with tempfile.TemporaryDirectory(prefix="unclip-dry-run-") as folder:
        trainer = Trainer(task, recipe, Path(folder))
        for _ in range(WARM_UP_STEPS):
            trainer.take_step()
        begun = time.perf_counter()
        for _ in range(num_steps):
            trainer.take_step()
        step_s = (time.perf_counter() - begun) / num_steps
        tensors = [*task.module.parameters(), *trainer.ema.values()]
        tensors += [p for p in task.module.parameters() if p.requires_grad]  # their gradients
        for state in trainer.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return Cost(
            parameters={name: sum(p.numel() for p in part.parameters()) for name, part in task.module.named_children()},
            trained=sum(p.numel() for p in task.module.parameters() if p.requires_grad),
            state_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            peak_bytes=_peak_bytes(trainer.accelerator.device),
            read_px=_read_px(task),
            trained_px=_trained_px(task, recipe, trainer.step),
            step_s=step_s,
            steps=recipe.steps,
            batch_size=recipe.batch_size,
            is_sharded=is_sharded(trainer.weights),
        )


def _read_px(task: Task) -> tuple[int, ...]:
    if isinstance(task, Sourced) and isinstance(task.source, FolderSource | ShardSource):
        return tuple(sorted(task.source.sizes))
    return ()


def _trained_px(task: Task, recipe: Recipe, step: int) -> tuple[int, ...]:
    """Of the next batch, so that a stream just goes on."""
    batch = task.batch(step, recipe.batch_size, step_generator(recipe.seed, step))
    return tuple(sorted({values.shape[-1] for values in batch.values() if values.dim() == 4}))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
