"""What a run would cost: sizes, memory and time, from a few steps that are thrown away.

Knows the trainer; writes nothing that stays. Called by `unclip train --dry-run`.
"""

import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from unclip.data.source import FolderSource
from unclip.data.stream import ShardSource
from unclip.training.recipe import Recipe
from unclip.training.sharding import is_sharded
from unclip.training.task import Sourced, Task
from unclip.training.trainer import Trainer, step_generator

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
