"""The engine: a bounded queue of requests, and one worker for each device that computes them in batches.

Pictures of several requests are computed together when their model, kind, size and settings are the same. Each picture
has its own seed, so it does not depend on its batch except for rounding.

A cancelled request gets no results, and a batch stops after its step when all of its requests are cancelled. Until
then, the rows of a cancelled request stay in the batch: another batch size would change how the other pictures are
rounded.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from unclip.errors import Cancelled, UnclipError
from unclip.images import to_pil
from unclip.pipelines.session import Compute
from unclip.server.models import Model, Models, Row, Step, Work

log = logging.getLogger(__name__)
FIRST_GUESS_S = 2.0
"""Seconds for a picture, before the first one is measured."""
MAX_RETRY_AFTER_S = 600


class QueueFullError(UnclipError):
    """The queue is full. `retry_after_s` is when there will be room, as a whole number of seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class ClosedError(UnclipError):
    """The server is stopping."""


class MemoryExhaustedError(UnclipError):
    """The device has too little memory, also for half of the batch."""


class ReplicaError(UnclipError):
    """No replica of a cluster answers: it was not started, was lost, or stalled."""


@dataclass(frozen=True, eq=False)
class Part:
    """Consecutive rows of one request in one batch."""

    work: Work
    first: int
    count: int

    @property
    def rows(self) -> Sequence[Row]:
        return self.work.rows[self.first : self.first + self.count]


class Engine:
    """Takes requests and computes them, in the order in which they arrive.

    Args:
        folders: the models' folders by their names; the first one is loaded at the start.
        computes: device and precision of each worker.
        max_batch: pictures computed at once by a worker.
        max_queue: pictures that may wait or be computed. A single request is always accepted by an idle engine.
        max_model_bytes: size limit of a device's loaded models; None: no limit.
        models: makes the models of a worker.

    Attributes:
        on_batch: is called with the size and the seconds of each batch.
        load_error: why the first model cannot be loaded; None while it can.

    Raises: CheckpointError for a folder that is not a model.
    """

    def __init__(
        self,
        folders: Mapping[str, str],
        computes: Sequence[Compute],
        *,
        max_batch: int = 8,
        max_queue: int = 64,
        max_model_bytes: float | None = None,
        models: Callable[[Mapping[str, str], Compute, float | None], Models] = Models,
    ) -> None:
        self.max_batch, self.max_queue = max_batch, max_queue
        self.on_batch: Callable[[int, float], None] = lambda size, seconds: None
        self.load_error: str | None = None
        self._workers = [models(folders, compute, max_model_bytes) for compute in computes]
        self._first = next(iter(folders))
        self._changed = threading.Condition()
        self._queue: deque[Work] = deque()
        self._num_running = 0
        self._running: set[Work] = set()
        self._num_loaded = 0
        self._closed = False
        self._seconds = FIRST_GUESS_S
        self._threads = [
            threading.Thread(target=self._serve, args=(models,), name=f"unclip-worker-{number}", daemon=True)
            for number, models in enumerate(self._workers)
        ]

    def start(self) -> None:
        """Start the workers, which load the first model."""
        for thread in self._threads:
            thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether the first model is loaded on every device, and requests are accepted."""
        return self._num_loaded == len(self._workers) and not self._closed

    @property
    def is_closed(self) -> bool:
        """Whether the engine accepts no more requests."""
        return self._closed

    @property
    def models(self) -> Mapping[str, Model]:
        """The models of the first device, for what needs no weights."""
        return self._workers[0].each

    @property
    def num_pending(self) -> int:
        """How many pictures wait or are computed."""
        return self._num_running + sum(work.size - work.num_taken for work in self._queue)

    def submit(self, work: Work) -> Work:
        """Queue a request. Raises: QueueFullError, ClosedError."""
        with self._changed:
            if self._closed:
                raise ClosedError("the server is stopping")
            pending = self.num_pending
            if pending and pending + work.size > self.max_queue:
                over = pending + work.size - self.max_queue
                wait = math.ceil(over * self._seconds / len(self._workers))
                raise QueueFullError(min(MAX_RETRY_AFTER_S, max(1, wait)))
            self._queue.append(work)
            self._changed.notify()
        return work

    def cancel(self, work: Work) -> None:
        """Stop a request; those in the same batch go on. A finished one does not change."""
        with self._changed:
            work.cancelled = True
            if work in self._queue:
                self._queue.remove(work)
            work.future.cancel()

    def position(self, work: Work) -> int:
        """How many requests are before this one; 0 when it is computed or finished."""
        with self._changed:
            return self._queue.index(work) + bool(self._num_running) if work in self._queue and not work.started else 0

    def close(self, timeout_s: float = 0.0) -> None:
        """Accept no more requests, finish the others within the time, and cancel what is left."""
        end = time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            while (self._queue or self._num_running) and time.monotonic() < end:
                self._changed.wait(max(0.01, min(0.5, end - time.monotonic())))
            left = [*self._queue, *self._running]
        for work in left:
            self.cancel(work)
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=10)

    # ---- the workers ----

    def _serve(self, models: Models) -> None:
        try:
            models.get(self._first).load()
            self._num_loaded += 1
        except Exception as error:
            log.exception("the model %s cannot be loaded", self._first)
            self.load_error = str(error)
        while (parts := self._take()) is not None:
            done: list[tuple[Work, Any]] = []
            try:
                self._compute(models, parts, done)
            except Exception as error:
                log.exception("a batch failed")
                done += [(part.work, error.with_traceback(None)) for part in parts]
            with self._changed:
                self._num_running -= sum(part.count for part in parts)
                self._running -= {part.work for part in parts}
                for work, result in done:  # there is room in the queue before a client can know it
                    self._finish(work, result)
                self._changed.notify_all()

    def _take(self) -> list[Part] | None:
        """The next batch: rows of the first request, and of others that can be computed with them. None at the end."""
        with self._changed:
            while not self._queue:
                if self._closed:
                    return None
                self._changed.wait()
            key = self._queue[0].key
            parts: list[Part] = []
            room = self.max_batch
            for work in [work for work in self._queue if work.key == key]:
                count = min(room, work.size - work.num_taken)
                if count:
                    parts.append(Part(work, work.num_taken, count))
                    work.num_taken += count
                    work.started = True
                    room -= count
                if work.num_taken == work.size:
                    self._queue.remove(work)
                if not room:
                    break
            self._num_running += sum(part.count for part in parts)
            self._running |= {part.work for part in parts}
            return parts

    def _compute(
        self, models: Models, parts: list[Part], done: list[tuple[Work, Any]], *, halved: bool = False
    ) -> None:
        """Compute a batch, and append each finished request with its result or its error to `done`.

        When a batch of several requests fails, each one is computed alone, so that only the one at fault fails. When
        memory is exhausted, both halves are computed.
        """
        problem = self._try(models, parts, done)
        if problem is None:
            return
        again: list[list[Part]] = []
        if _is_memory(problem):
            free_memory()
            if not halved:
                again = halves(parts)
            problem = MemoryExhaustedError("the device has too little memory for this request; ask for fewer pictures")
        elif len(parts) > 1 and not isinstance(problem, ReplicaError):
            again = [[part] for part in parts]
        for each in again:
            self._compute(models, each, done, halved=halved or isinstance(problem, MemoryExhaustedError))
        if not again:
            done += [(part.work, problem) for part in parts]

    def _try(self, models: Models, parts: list[Part], done: list[tuple[Work, Any]]) -> Exception | None:
        """Compute a batch. Returns: the error, without its traceback, which would hold the batch's memory."""
        parts = [part for part in parts if not part.work.cancelled]
        if not parts:
            return None
        work, start = parts[0].work, time.monotonic()

        def on_step(pipe: Any, index: int, t: int, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
            if all(part.work.cancelled for part in parts):
                return {"stop": True}
            first = 0
            for part in parts:
                if part.work.on_step is not None and not part.work.cancelled:
                    try:
                        part.work.on_step(_step(part, first, index, state))
                    except Exception:  # it must not fail the others in the batch
                        log.exception("a preview failed")
                first += part.count
            return None

        try:
            result = models.get(work.model).run(work, [row for part in parts for row in part.rows], on_step)
            if work.function is not None:
                done.append((work, result))
            else:
                made = iter(result)
                for part in parts:
                    for number in range(part.first, part.first + part.count):
                        part.work.made[number] = next(made)
                    if len(part.work.made) == part.work.size:
                        done.append((part.work, [part.work.made[number] for number in range(part.work.size)]))
            models.make_room()
        except Cancelled:
            return None
        except Exception as error:
            if not isinstance(error, UnclipError) and not _is_memory(error):
                log.exception("a request failed")
            return error.with_traceback(None)
        size, seconds = sum(part.count for part in parts), time.monotonic() - start
        self.on_batch(size, seconds)
        if work.function is None:
            self._seconds += 0.3 * (seconds / size - self._seconds)
        return None

    def _finish(self, work: Work, result: Any) -> None:
        if work in self._queue:  # the rest of a request that failed
            self._queue.remove(work)
        if work.future.done():
            return
        if isinstance(result, Exception):
            work.future.set_exception(result)
        else:
            work.future.set_result(result)


def _step(part: Part, first: int, index: int, state: Mapping[str, Any]) -> Step:
    numbers = state.get("rows", range(part.first, part.first + part.count))

    def previews() -> list[Image.Image]:
        x0 = state["x0"]
        return to_pil(x0[first : first + len(numbers)]) if x0.ndim == 4 and x0.shape[1] == 3 else []

    return Step(state["stage"], index, state["num_steps"], numbers, previews)


def halves(parts: Sequence[Part]) -> list[list[Part]]:
    """A batch as two batches; a single picture stays one, and cannot be halved."""
    total = sum(part.count for part in parts)
    left, right = [], []
    room = total // 2
    for part in parts:
        head = min(room, part.count)
        room -= head
        if head:
            left.append(Part(part.work, part.first, head))
        if part.count > head:
            right.append(Part(part.work, part.first + head, part.count - head))
    return [left, right] if left and right else []


def _is_memory(error: Exception) -> bool:
    """Whether the device or the machine has too little memory."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(each in str(error).lower() for each in words)
    )


def free_memory() -> None:
    """Return cached memory of the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
