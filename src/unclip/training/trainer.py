"""The one trainer: steps, precision, moving average, logs, checkpoints and resuming, for every stage alike.

Knows a task only as a module, a source of batches and a way to be saved. Called by `unclip train`.
"""

import json
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unclip.checkpoints.files import atomic_folder, read_json, write_json
from unclip.errors import ConfigError, TrainingError
from unclip.training.recipe import Recipe, as_dict

Batch = dict[str, Tensor]


class Task(Protocol):
    """What is trained. All randomness of a step is drawn into its batch, so a step is a function of (seed, step)."""

    module: nn.Module
    """Its forward takes a batch and returns named scalars, `loss` among them."""

    def batch(self, batch_size: int, generator: torch.Generator) -> Batch: ...

    def save(self, module: nn.Module, folder: Path) -> None:
        """Write the networks of `module` in the ecosystem's layout."""
        ...

    def sample_sheet(self, module: nn.Module, path: Path) -> None:
        """Draw a picture of what the networks can do now."""
        ...


def step_generator(seed: int, step: int) -> torch.Generator:
    """The source of all randomness of one step: the same whether the run was interrupted or not."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay_share` of the steps."""
    optimizer = recipe.optimizer
    warm = min(1.0, (step + 1) / max(1, optimizer.warmup_steps))
    left = (recipe.steps - step) / max(1.0, optimizer.decay_share * recipe.steps)
    return optimizer.learning_rate * warm * min(1.0, left)


class Trainer:
    """Runs one recipe in one folder, from its last checkpoint if it has one.

    The folder holds `recipe.json`, `metrics.jsonl`, `samples/`, `state/` (to resume from) and `model/` (the moving
    average in the ecosystem's layout).
    """

    def __init__(self, task: Task, recipe: Recipe, folder: Path):
        self.task, self.recipe, self.folder = task, recipe, Path(folder)
        self.accelerator = Accelerator(mixed_precision=recipe.precision)
        set_seed(recipe.seed)
        optimizer = torch.optim.AdamW(
            _parameter_groups(task.module, recipe.optimizer.weight_decay),
            lr=recipe.optimizer.learning_rate,
            betas=(recipe.optimizer.beta1, recipe.optimizer.beta2),
            eps=recipe.optimizer.eps,
        )
        self.ema = {name: p.detach().clone() for name, p in task.module.named_parameters() if p.requires_grad}
        self.module, self.optimizer = self.accelerator.prepare(task.module, optimizer)
        self.step = 0
        self._stop = False
        self._resume()

    def run(self, *, progress: Callable[..., Any] | None = None) -> None:
        """Train to the recipe's last step. SIGINT and SIGTERM save and return.

        Raises: TrainingError when the loss is no longer a number; the last checkpoint stays as it was.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "recipe.json", as_dict(self.recipe))
        bar = progress(total=self.recipe.steps, initial=self.step, unit="step") if progress else None
        saved_at = logged_at = time.monotonic()
        sums: dict[str, float] = {}
        first = self.step
        with self._signals():
            while self.step < self.recipe.steps and not self._stop:
                metrics = self._train_step()
                self.step += 1
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
                if bar is not None:
                    bar.update(1)
                if self.step % self.recipe.log_every_steps == 0:
                    count = min(self.recipe.log_every_steps, self.step - first)
                    now = time.monotonic()
                    row = {name: total / count for name, total in sums.items()}
                    row["pictures_per_s"] = count * self.recipe.batch_size / (now - logged_at)
                    self._log(row)
                    if bar is not None:
                        bar.set_postfix(loss=f"{row['loss']:.4f}", pictures_s=f"{row['pictures_per_s']:.0f}")
                    sums, logged_at, first = {}, now, self.step
                if self.step % self.recipe.sample_every_steps == 0:
                    self._sample()
                if time.monotonic() - saved_at > self.recipe.save_every_s:
                    self.save()
                    saved_at = time.monotonic()
            self.save()
        if bar is not None:
            bar.close()

    def save(self) -> None:
        """Write the state to resume from and the averaged model; each replaces the old one only when whole."""
        if not self.accelerator.is_main_process:
            return
        module = self.accelerator.unwrap_model(self.module)
        with atomic_folder(self.folder / "state", overwrite=True) as draft:
            save_file({k: v.detach().contiguous().clone() for k, v in module.state_dict().items()}, draft / "module.safetensors")
            save_file({k: v.contiguous() for k, v in self.ema.items()}, draft / "ema.safetensors")
            save_file(_optimizer_tensors(self.optimizer), draft / "optimizer.safetensors")
            write_json(draft / "state.json", {"step": self.step, "seed": self.recipe.seed, "stage": self.recipe.stage})
        with self.averaged(), atomic_folder(self.folder / "model", overwrite=True) as draft:
            self.task.save(module, draft)

    @contextmanager
    def averaged(self):
        """Within it, the module carries the moving average of its weights."""
        module = self.accelerator.unwrap_model(self.module)
        own = {name: p.detach().clone() for name, p in module.named_parameters() if name in self.ema}
        _assign(module, self.ema)
        module.eval()
        try:
            yield module
        finally:
            _assign(module, own)
            module.train()

    def _train_step(self) -> dict[str, float]:
        recipe = self.recipe
        batch = self.task.batch(recipe.batch_size, step_generator(recipe.seed, self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, self.step)
        totals: dict[str, float] = {}
        for part in self._parts(batch):
            with self.accelerator.autocast():
                metrics = self.module(part)
            self.accelerator.backward(metrics["loss"] / recipe.accumulation)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) / recipe.accumulation
        if not torch.isfinite(torch.tensor(totals["loss"])):
            raise TrainingError(
                f"the loss is {totals['loss']} at step {self.step}; the last checkpoint in {self.folder / 'state'} is "
                "whole: lower the learning rate and run again"
            )
        self.accelerator.clip_grad_norm_(self.module.parameters(), recipe.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_average()
        return totals

    def _parts(self, batch: Batch) -> list[Batch]:
        """This process's share of the batch, cut for gradient accumulation."""
        world, rank, pieces = self.accelerator.num_processes, self.accelerator.process_index, self.recipe.accumulation
        parts = []
        for piece in range(pieces):
            part = {}
            for name, value in batch.items():
                chunk = value.chunk(world * pieces)[piece * world + rank]
                part[name] = chunk.to(self.accelerator.device)
            parts.append(part)
        return parts

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        module = self.accelerator.unwrap_model(self.module)
        live = {name: p for name, p in module.named_parameters() if name in self.ema}
        torch._foreach_lerp_(list(self.ema.values()), [live[name].detach() for name in self.ema], 1 - decay)

    def _resume(self) -> None:
        state = self.folder / "state"
        if not state.is_dir():
            return
        about = read_json(state / "state.json")
        if about["stage"] != self.recipe.stage or about["seed"] != self.recipe.seed:
            raise ConfigError(
                f"{state} is of a run with stage {about['stage']!r} and seed {about['seed']}, the recipe has "
                f"{self.recipe.stage!r} and {self.recipe.seed}: name another run folder"
            )
        module = self.accelerator.unwrap_model(self.module)
        module.load_state_dict(load_file(state / "module.safetensors"))
        for name, value in load_file(state / "ema.safetensors").items():
            self.ema[name].copy_(value)
        _load_optimizer(self.optimizer, load_file(state / "optimizer.safetensors"))
        self.step = about["step"]

    def _log(self, row: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            line = {"step": self.step, "learning_rate": learning_rate(self.recipe, self.step - 1)}
            line |= {name: float(f"{value:.6g}") for name, value in row.items()}
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")

    def _sample(self) -> None:
        if self.accelerator.is_main_process:
            (self.folder / "samples").mkdir(exist_ok=True)
            with self.averaged() as module, torch.no_grad():
                self.task.sample_sheet(module, self.folder / "samples" / f"{self.step:07d}.png")

    @contextmanager
    def _signals(self):
        def stop(number: int, frame: Any) -> None:
            self._stop = True

        old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases, norms' scales and single vectors do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


@torch.no_grad()
def _assign(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if name in values:
            parameter.copy_(values[name])


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}/{name}": value.detach().contiguous().clone()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
