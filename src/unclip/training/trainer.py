"""The trainer: it runs the steps of one recipe and saves, logs, samples, stops and resumes."""

import contextlib
import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, gather_object, set_seed
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from torch import Tensor, nn

from unclip.checkpoints.files import atomic_folder
from unclip.errors import Cancelled, CheckpointError, ConfigError, DataError, TrainingError
from unclip.training.optimizer import learning_rate, make_optimizer
from unclip.training.recipe import Recipe
from unclip.training.sections import flat, refuse
from unclip.training.sharding import is_sharded, leave_group, sharded, share_of, shared_like, shares_of, whole
from unclip.training.state import RunFolder, Snapshot, optimizer_tensors, restore_optimizer
from unclip.training.task import Batch, Task, computes_on_cpu, mixed_precision

OnLog = Callable[[int, Mapping[str, float]], None]


@contextmanager
def first_signal(ask: Callable[[int], None]) -> Iterator[None]:
    """A context in which the first SIGINT or SIGTERM calls `ask` with its number. A second one has its usual effect.

    It does nothing outside the main thread, because only that one can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        ask(number)
        signal.signal(number, old[number])

    old = {int(number): signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def start_trackers(accelerator: Accelerator, recipe: Recipe, folder: Path, run_id: str | None) -> None:
    """Start the trackers of a recipe with its settings.

    Args:
        accelerator: created with these trackers.
        recipe: of the run.
        folder: the run's folder; its name is the name of the run.
        run_id: identifies the run, also after it is resumed.
    """
    settings = flat(recipe.as_dict())
    plain = {name: v if isinstance(v, int | float | str) else str(v) for name, v in settings.items()}
    name = folder.absolute().name
    how: dict[str, Any] = {"trackio": {"name": name, "resume": "allow"}}
    how["wandb"] = how["trackio"] | {"dir": str(folder), "id": run_id}
    accelerator.init_trackers("unclip", config=plain, init_kwargs=how)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random generator of a step. It depends only on the seed and the step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def own_rows(batch_size: int, *, num_processes: int, rank: int, num_pieces: int) -> Tensor:
    """Indices of the rows of a batch that one process computes, in the order of the pieces of gradient accumulation.

    Each row belongs to one process, and all pieces have the same size. Therefore the mean over pieces and processes is
    the mean over the batch.

    Raises: ConfigError when the rows cannot be split evenly.
    """
    count = num_processes * num_pieces
    what = (
        f"a batch of {batch_size} cannot be split evenly among {num_processes} processes with accumulation {num_pieces}"
    )
    refuse(batch_size % count, f"{what}: make batch_size a multiple of {count}")
    return torch.arange(batch_size).view(num_pieces, num_processes, -1)[:, rank].flatten()


class Trainer:
    """Runs a recipe in a folder, starting from the folder's checkpoint if there is one.

    The folder contains `recipe.json`, `versions.json`, `metrics.jsonl`, `samples/`, `state/` (to resume from) and
    `model/` (the moving average, in the layout of diffusers and transformers). A step depends only on the recipe, its
    seed and the number of the step, so a resumed run gives the same weights as an uninterrupted one.

    Raises:
        ConfigError: the folder contains a run of another network, the processes see different folders, or this machine
            does not support a setting of the recipe.
        CheckpointError: the folder's state is broken.
    """

    def __init__(self, task: Task, recipe: Recipe, folder: Path):
        self.task, self.recipe, self.folder = task, recipe, Path(folder)
        self.run_folder = RunFolder(self.folder)
        try:
            self.accelerator = Accelerator(
                cpu=computes_on_cpu(),
                mixed_precision=mixed_precision(recipe.precision),
                log_with=list(recipe.trackers) or None,
                project_dir=folder,
                # `_train_step` accumulates by the recipe; a number set by a launcher would divide the loss again.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            )
        except ValueError as error:
            raise ConfigError(f"accelerate does not support this precision or tracker here: {error}") from error
        self._is_main = self.accelerator.is_main_process
        set_seed(recipe.seed % 2**32)  # the limit of NumPy
        snapshot = self.run_folder.read_state(recipe, task.module, task.fingerprint)
        step = 0 if snapshot is None else snapshot.step
        steps = set(gather_object([step])) if self.accelerator.num_processes > 1 else {step}
        apart = f"{folder} is at step {min(steps)} for one process and at {max(steps)} for another"
        refuse(len(steps) > 1, f"{apart}: all machines of a run need a shared folder")
        if snapshot is not None:
            task.module.load_state_dict(snapshot.module)
            task.source.counts.update(snapshot.counts)
        self.weights = task.module  # the module that the optimizer updates
        if recipe.shard and self.accelerator.num_processes > 1:
            self.weights = sharded(task.module, self.accelerator.device)
        if recipe.compile:
            self.weights.compile()
        optimizer = make_optimizer(self.weights, recipe.optimizer)
        if is_sharded(self.weights):
            self.module, self.optimizer = self.weights, self.accelerator.prepare(optimizer)
        else:
            self.module, self.optimizer = self.accelerator.prepare(task.module, optimizer)
        self.ema = {name: p.detach().clone() for name, p in self.weights.named_parameters() if p.requires_grad}
        self.step = 0
        self.skipped: dict[str, str] = {}  # of all processes and the whole run, at the last save
        self._sums: dict[str, float] = {}  # sums of the metrics since the last row of the log
        self._num_summed = 0
        self.stopped_by: int | None = None  # the signal that this process received
        self._all_stop = False  # a process received a signal, and all processes know it
        self._save_is_due = False
        if snapshot is not None:
            self._resume(snapshot)

    def run(self, *, progress: Callable[..., Any] | None = None, on_log: OnLog | None = None) -> None:
        """Train to the last step. The first SIGINT or SIGTERM saves and returns; a second one kills the process.

        With several processes, a process that waits for data does not stop, because the others wait for its step.

        Args:
            progress: makes a progress bar, as `tqdm` does.
            on_log: called with the step and the logged row: means since the previous row, and `pictures_per_s`.

        Raises: TrainingError when the loss is not finite, the folder cannot be written, or another process trains in
            it. The last checkpoint is kept.
        """
        is_finished = self.step >= self.recipe.steps  # then nothing is written
        with contextlib.ExitStack() as stack:
            if self._is_main:
                stack.enter_context(self.run_folder.locked())
                if not is_finished:
                    with self._writing():
                        self.run_folder.start(self.recipe, self.step)
            if self.recipe.trackers:
                own_id = self.run_folder.run_id(self.step) if self._is_main else None
                start_trackers(self.accelerator, self.recipe, self.folder, own_id)
            stack.callback(self._leave)
            bar = progress(total=self.recipe.steps, initial=self.step, unit="step") if progress else None
            if bar is not None:
                stack.callback(bar.close)
            stack.enter_context(self.task.source.reading(lambda: self._stop))
            stack.enter_context(first_signal(self._ask_to_stop))
            if not is_finished:
                try:
                    self._loop(bar, on_log)
                except Cancelled:  # stopped while it waited for data
                    pass
                except DataError:
                    with self._writing():
                        self.skipped = self.run_folder.note_skipped(self.task.source.skipped)
                    raise
                self.save()

    def save(self) -> None:
        """Write the state to resume from, and the averaged model. Each replaces the previous one when it is complete.

        All processes must call it; the first one writes.

        Raises: TrainingError when the disk is full or a folder cannot be written. The previous ones are kept.
        """
        log = {"sums": self._sums, "num_summed": self._num_summed}
        module, ema = self._gathered(self.weights.state_dict()), self._gathered(self.ema)
        optimizer, scaler = self._gathered(optimizer_tensors(self.optimizer)), self.accelerator.scaler
        skipped, counts = self._merged(self.task.source.skipped), self._merged(self.task.source.counts)
        snapshot = Snapshot(self.step, log, module, ema, optimizer, scaler.state_dict() if scaler else None, counts)
        if not self._is_main:
            return
        with self._writing():
            with self._with_weights(ema), atomic_folder(self.run_folder.model, overwrite=True) as draft:
                self.task.save(draft)
            self.skipped = self.run_folder.note_skipped(skipped)
            # Last, so that a state of the last step implies that the model is complete.
            self.run_folder.save_state(snapshot, self.recipe, self.task.fingerprint)

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors, in the first process only. They are gathered one by one to save memory."""
        found = {}
        for name, tensor in tensors.items():
            value = whole(tensor)
            if self._is_main:
                found[name] = value.cpu() if is_sharded(self.weights) else value
        return found

    def _merged(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The union of the tables of all processes, which must all call it."""
        merged: dict[str, Any] = {}
        for part in gather_object([dict(own)]):
            merged |= part
        return merged

    @contextmanager
    def _with_weights(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """A context in which the task's module has these weights, on the training device and in evaluation mode."""
        module = self.task.module
        own = {name: p.detach().clone() for name, p in module.named_parameters() if name in values}
        before = next(module.parameters()).device
        module.to(self.accelerator.device)  # the original of a sharded module is in host memory
        _assign(module, values)
        module.eval()
        try:
            yield
        finally:
            module.to(before)
            _assign(module, own)
            module.train()

    @property
    def _stop(self) -> bool:
        """Whether to stop before the next step. Several processes stop together; otherwise some would wait for ever."""
        return self._all_stop if self.accelerator.num_processes > 1 else self.stopped_by is not None

    def _loop(self, bar: Any, on_log: OnLog | None) -> None:
        recipe = self.recipe
        saved_at = logged_at = time.monotonic()
        timed = 0
        while self.step < recipe.steps and not self._stop:
            self._save_is_due = time.monotonic() - saved_at > recipe.save_every_s
            metrics = self.take_step()
            timed += 1
            self._num_summed += 1
            for name, value in metrics.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
            now = time.monotonic()
            row = {name: total / self._num_summed for name, total in self._sums.items()}
            row["pictures_per_s"] = timed * recipe.batch_size / max(now - logged_at, 1e-9)
            if bar is not None:
                shown = {"loss": f"{row['loss']:.4f}", "pictures/s": f"{row['pictures_per_s']:.1f}"}
                bar.set_postfix(shown, refresh=False)
                bar.update(1)
            if self.step % recipe.log_every_steps == 0 or self.step == recipe.steps:
                self._log(row)
                if on_log is not None:
                    on_log(self.step, row)
                self._sums, self._num_summed, logged_at, timed = {}, 0, now, 0
            if self.step % recipe.sample_every_steps == 0:
                self._sample()
            if self._save_is_due:
                self.save()
                saved_at = time.monotonic()

    def take_step(self) -> dict[str, float]:
        """Take one optimizer step. Returns: its metrics.

        Raises: TrainingError when the loss or a gradient is not finite, or memory is exhausted. Weights, optimizer and
            average do not change then.
        """
        try:
            metrics = self._train_step()
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            size, pieces = self.recipe.batch_size, self.recipe.accumulation
            what = f"a step of batch_size {size} with accumulation {pieces} does not fit into memory"
            raise TrainingError(f"{what}: lower batch_size, or raise accumulation ({error!s:.200})") from error
        self.step += 1
        return metrics

    def _train_step(self) -> dict[str, float]:
        recipe, accelerator = self.recipe, self.accelerator
        torch.manual_seed((recipe.seed * 1_000_003 + self.step) % 2**63)  # for dropout
        batch = self._batch()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, self.step)
        pieces = {name: value.chunk(recipe.accumulation) for name, value in batch.items()}
        totals: dict[str, float] = {}
        for place in range(recipe.accumulation):
            on_device = {name: parts[place].to(accelerator.device) for name, parts in pieces.items()}
            is_last = place == recipe.accumulation - 1
            waits = contextlib.nullcontext() if is_last else accelerator.no_sync(self.module)
            with waits:
                with accelerator.autocast():
                    metrics = self.module(on_device)
                accelerator.backward(metrics["loss"] / recipe.accumulation)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) / recipe.accumulation
        totals = self._mean(totals)
        norm = accelerator.clip_grad_norm_(self.module.parameters(), recipe.optimizer.max_grad_norm)
        self._check_finite(totals["loss"], norm if norm is None else whole(norm))
        self.optimizer.step()
        if callable(keep_limits := getattr(self.weights, "keep_limits", None)):
            keep_limits()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_average()
        return totals

    def _batch(self) -> Batch:
        """The part of the step's batch that this process computes."""
        size, seed, pieces = self.recipe.batch_size, self.recipe.seed, self.recipe.accumulation
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        own = own_rows(size, num_processes=world, rank=rank, num_pieces=pieces)
        if self.task.source.is_local:
            generator = step_generator(seed + rank * 7_919, self.step)  # each process has its own noise
            return self.task.batch(self.step, size // world, generator)
        return self.task.batch(self.step, size, step_generator(seed, self.step), own if world > 1 else None)

    def _mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """The means over all processes. Requests to stop or save are also shared, so that all processes follow them."""
        if self.accelerator.num_processes == 1:
            return metrics
        requests = [float(self.stopped_by is not None), float(self._save_is_due)]
        values = torch.tensor([*metrics.values(), *requests], device=self.accelerator.device)
        found: Tensor = self.accelerator.reduce(values, "mean")  # pyright: ignore[reportAssignmentType]
        *means, requested_to_stop, requested_to_save = found.tolist()
        self._all_stop, self._save_is_due = requested_to_stop > 0, requested_to_save > 0
        return dict(zip(metrics, means, strict=True))

    def _check_finite(self, loss: float, norm: Any) -> None:
        """Called before the update, because a gradient that is not finite would destroy the weights."""
        found = {"the loss": loss}
        if self.accelerator.scaler is None and norm is not None:  # a scaler skips a step whose gradient overflows
            found["the gradient's norm"] = float(norm)
        for what, value in found.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{what} is {value} at step {self.step}; {self.run_folder.last_checkpoint()}. Lower the learning "
                    "rate, or look for a broken picture, and run again"
                )

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        trained = [p.detach() for name, p in self.weights.named_parameters() if name in self.ema]
        torch._foreach_lerp_(shares_of(self.ema.values()), shares_of(trained), 1 - decay)  # pyright: ignore

    def _resume(self, snapshot: Snapshot) -> None:
        for name, value in snapshot.ema.items():
            own = self.ema[name]
            share_of(own).copy_(share_of(shared_like(value, own)))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        restore_optimizer(self.optimizer, snapshot.optimizer, parameters)
        if (scaler := self.accelerator.scaler) is not None and snapshot.scaler:
            if snapshot.scaler.keys() != scaler.state_dict().keys():
                raise CheckpointError(f"{self.run_folder.state / 'state.json'} lacks the loss scaler of float16")
            scaler.load_state_dict(snapshot.scaler)
        self.step = snapshot.step
        self._sums, self._num_summed = snapshot.log["sums"], snapshot.log["num_summed"]

    def _log(self, row: dict[str, float]) -> None:
        if self._is_main:
            line: dict[str, float] = {"step": self.step, "learning_rate": learning_rate(self.recipe, self.step - 1)}
            line |= {name: float(f"{value:.6g}") for name, value in row.items()}
            with self._writing():
                self.run_folder.log(line)
            if self.recipe.trackers:
                self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=self.step)

    def _ask_to_stop(self, number: int) -> None:
        self.stopped_by = number

    def _sample(self) -> None:
        ema = self._gathered(self.ema)
        if self._is_main:
            with self._writing(), self._with_weights(ema), torch.no_grad():
                self.run_folder.samples.mkdir(exist_ok=True)
                self.task.sample_sheet(self.run_folder.samples / f"{self.step:07d}.png")

    def _leave(self) -> None:
        """Close the trackers and the process group.

        DDP's reducer must be freed before the group. The last owner of the group waits for the group's thread, which
        may need the interpreter's lock; the Python object releases the lock, but the reducer does not. Sharded
        parameters own the group too, and would keep it until the interpreter ends.
        """
        if is_sharded(self.weights):
            leave_group(self.weights)
            self.weights, self.ema = self.task.module, {}
            del self.optimizer
        if self.module is not self.weights:
            self.module = self.weights
            self.accelerator.free_memory()
            gc.collect()
        self.accelerator.end_training()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A context in which a file that cannot be written raises TrainingError, whose message names the checkpoint."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"{self.folder} cannot be written at step {self.step}: {error}; {self.run_folder.last_checkpoint()}: "
                "make room on the disk, or check the folder's permissions, and run again"
            ) from error


@torch.no_grad()
def _assign(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if name in values:
            parameter.copy_(values[name])
