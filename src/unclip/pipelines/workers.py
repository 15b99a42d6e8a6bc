"""Work off batches of rows in this process, on worker processes, or on actors of a Ray cluster."""

import contextlib
import itertools
import logging
import math
import os
import signal
import warnings
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from unclip.errors import InputError, MissingDependencyError, TrainingError, UnclipError

MAX_LOSSES = 3
"""A batch that has ended its worker so many times fails."""
STALL_S = 120.0
"""Seconds to wait for the first actor of a Ray cluster."""


@dataclass(frozen=True)
class Row:
    """One result to make.

    Attributes:
        id: a hash of everything that the result depends on.
        about: its columns in the index.
        given: what makes the result.
        group: rows of one batch have the same value.
        error: why it cannot be made.
    """

    id: str
    about: dict[str, Any]
    given: Any = None
    group: Hashable = None
    error: str = ""


def batches_of(rows: Iterable[Row], missing: Callable[[Row], bool], size: int) -> list[list[Row]]:
    """Batches of rows of one group, those that have a missing row.

    They depend only on the rows, and not on what is missing, because results depend on the batch in their last digits.
    """
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        if not row.error:
            groups.setdefault(row.group, []).append(row)
    batches = (group[start : start + size] for group in groups.values() for start in range(0, len(group), size))
    return [batch for batch in batches if any(map(missing, batch))]


@dataclass(frozen=True)
class Failed:
    """The error of a row that could not be made."""

    error: str


Made = bytes | Failed
Make = Callable[[Sequence[Row]], Sequence[Made]]


class Work(Protocol):
    """What a worker does; it can be pickled."""

    def load(self, worker: int) -> Make:
        """Load the model, and return a function that makes a batch."""
        ...


def _attempt(make: Make, batch: Sequence[Row]) -> list[Made]:
    """The results of a batch. If it fails, its rows are made alone, so that only those fail that must."""
    try:
        return list(make(batch))
    except Exception as problem:
        if len(batch) == 1:
            return [
                Failed(f"{type(problem).__name__}: {problem}" if not isinstance(problem, UnclipError) else str(problem))
            ]
        return [made for row in batch for made in _attempt(make, [row])]


Answer = tuple[list[Made], list[str]] | Exception
"""The results of a batch and the texts of warnings; or the error of a worker that cannot work."""


@dataclass
class _Worker:
    """The state of a worker process: the model is loaded with the first batch."""

    work: Work
    number: int
    make: Make | None = None

    def answer(self, batch: Sequence[Row]) -> Answer:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                self.make = self.make or self.work.load(self.number)
            except Exception as problem:
                return (
                    problem if isinstance(problem, UnclipError) else InputError(f"{type(problem).__name__}: {problem}")
                )
            made = _attempt(self.make, batch)
        return made, [str(each.message) for each in caught if issubclass(each.category, UserWarning)]


def work_off(
    batches: Sequence[Sequence[Row]],
    work: Work,
    *,
    processes: int | None = None,
    ray: str | None = None,
    stall_s: float = STALL_S,
) -> Iterator[list[tuple[Row, Made]]]:
    """The results of the batches, in the order in which they are finished.

    A batch whose worker was lost (killed, or its machine was) is given to another one.

    Args:
        batches: of rows.
        work: what makes them.
        processes: worker processes, or actors of Ray; None: this process, or as many actors as the cluster has GPUs,
            or else CPUs.
        ray: the address of a Ray cluster, "auto" for a running one, or "local" to start one on this machine. If this
            process is connected to a cluster already, that one is used.
        stall_s: how long to wait for an actor.

    Raises: what `Work.load` raises; TrainingError if workers are lost again and again, or no actor is scheduled in
        time; MissingDependencyError without Ray.
    """
    if not batches:
        return
    if ray is None and processes in (None, 1):
        make = work.load(0)
        for batch in batches:
            yield list(zip(batch, _attempt(make, batch), strict=True))
        return
    processes = None if processes is None else min(processes, len(batches))
    pool = _Processes(work, processes or 1) if ray is None else _Actors(work, processes, ray)
    waiting, losses, in_a_row = deque(batches), Counter[int](), 0
    numbers = itertools.count()
    try:
        busy: dict[Any, Sequence[Row] | None] = {
            pool.start(next(numbers)): None for _ in range(min(pool.count, len(batches)))
        }
        while waiting or any(busy.values()):
            done = pool.wait(list(busy), None if any(busy.values()) else stall_s)
            if not done:
                raise TrainingError(f"no worker has started within {stall_s:.0f} s. {pool.describe()}")
            for worker in done:
                batch, answer, made = busy.pop(worker), None, None
                try:
                    answer = pool.receive(worker)
                except pool.lost:
                    in_a_row += 1
                    if in_a_row > MAX_LOSSES * (pool.count + 2):
                        raise TrainingError(
                            f"{in_a_row} workers were killed one after the other; perhaps there is too little memory "
                            "for so many processes"
                        ) from None
                    busy[pool.start(next(numbers))] = None
                    if batch is not None:
                        losses[id(batch)] += 1
                        if losses[id(batch)] < MAX_LOSSES:
                            waiting.appendleft(batch)
                        else:
                            made = [Failed(f"its worker was killed {MAX_LOSSES} times")] * len(batch)
                else:
                    if isinstance(answer, Exception):
                        raise answer
                    if waiting:
                        busy[worker] = waiting.popleft()
                        pool.send(worker, busy[worker])
                    if answer is not None:
                        in_a_row, (made, texts) = 0, answer
                        for text in texts:
                            warnings.warn(text, stacklevel=2)
                if batch is not None and made is not None:
                    yield list(zip(batch, made, strict=True))
    finally:
        pool.stop()


class _Processes:
    """Worker processes of this machine, each with a pipe. A worker ends with this process."""

    lost = (EOFError, OSError)

    def __init__(self, work: Work, count: int) -> None:
        import multiprocessing

        self.work, self.count = work, count
        self._context = multiprocessing.get_context("spawn")
        self._started: list[Any] = []

    def start(self, number: int) -> Any:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self.work, number, self.count), daemon=True)
        process.start()
        theirs.close()
        self._started.append(process)
        return ours

    def wait(self, workers: Sequence[Any], timeout_s: float | None) -> list[Any]:
        from multiprocessing.connection import wait

        return wait(workers, timeout_s)

    def receive(self, worker: Any) -> Answer | None:
        return worker.recv()

    def send(self, worker: Any, batch: Any) -> None:
        with contextlib.suppress(OSError):  # `receive` reports that the worker is lost
            worker.send(batch)

    def describe(self) -> str:
        return ""

    def stop(self) -> None:
        for process in self._started:
            process.kill()
            process.join()


def _serve(connection: Any, work: Work, number: int, count: int) -> None:
    """The main function of a worker process. It answers None at its start."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which stops this one
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    worker = _Worker(work, number)
    with contextlib.suppress(EOFError, OSError):  # the main process has ended
        connection.send(None)
        while True:
            connection.send(worker.answer(connection.recv()))


class _Actors:
    """Actors of a Ray cluster."""

    def __init__(self, work: Work, count: int | None, address: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as problem:
            raise MissingDependencyError("--ray needs Ray: pip install 'unclip[ray]'") from problem
        self._own, on_term = not ray.is_initialized(), signal.getsignal(signal.SIGTERM)
        if self._own:
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            except (ConnectionError, RuntimeError, ValueError) as problem:
                raise InputError(f"the Ray cluster {address!r} cannot be reached: {problem}") from problem
            signal.signal(signal.SIGTERM, on_term)  # Ray replaces it
        from ray.exceptions import RayActorError

        self._ray, self._work, self.lost = ray, work, RayActorError
        has = ray.cluster_resources()
        cpus, gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
        self.count = count or int(gpus) or max(1, int(cpus))
        self._share = {"num_cpus": _floor(min(1.0, cpus / self.count)), "num_gpus": _floor(min(1.0, gpus / self.count))}
        self._actor: Any = ray.remote(**self._share)(_Worker)  # type: ignore[arg-type]
        self._refs: dict[Any, Any] = {}
        self._started: list[Any] = []

    def start(self, number: int) -> Any:
        actor = self._actor.remote(self._work, number)
        self._started.append(actor)
        self._refs[actor] = actor.__ray_ready__.remote()
        return actor

    def wait(self, workers: Sequence[Any], timeout_s: float | None) -> list[Any]:
        done, _ = self._ray.wait([self._refs[worker] for worker in workers], timeout=timeout_s)
        return [worker for worker in workers if self._refs[worker] in done]

    def receive(self, worker: Any) -> Answer | None:
        answer = self._ray.get(self._refs.pop(worker))
        return None if answer is True else answer

    def send(self, worker: Any, batch: Any) -> None:
        self._refs[worker] = worker.answer.remote(batch)

    def describe(self) -> str:
        return (
            f"Each one needs {self._share}; the cluster has {self._ray.cluster_resources()}, of which "
            f"{self._ray.available_resources()} are free"
        )

    def stop(self) -> None:
        for actor in self._started:
            self._ray.kill(actor)
        if self._own:
            self._ray.shutdown()


def _floor(share: float) -> float:
    """A share of a resource in Ray's precision."""
    return math.floor(share * 10_000) / 10_000
