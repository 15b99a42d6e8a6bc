"""Bulk runs: read a table, make each of its rows once, on processes or on a Ray cluster, and keep an index.

A row is identified by its content. A run that was stopped or killed at any moment continues where it ended.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import signal
import warnings
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from unclip.checkpoints.files import TEMPORARY_PREFIX, atomic_file, locked, output_folder, safe_join, sync, writing
from unclip.errors import DataError, InputError, MissingDependencyError, OutputExistsError, TrainingError, UnclipError
from unclip.numbers import whole
from unclip.pipelines.session import MADE_WITH, Compute, Session, png_texts, sampler_name
from unclip.settings import SETTINGS

PROMPTS = ("prompt", "caption", "text")
"""Columns of the caption; the first one that a row has is used."""
MAX_SEED = 2**64 - 1
OWN = ("id", "path", "error", "seed")
"""Columns of the index that are ours; those of a table get the prefix `input_`, except a valid seed."""
MAX_LOSSES = 3
"""A batch that has ended its worker so many times fails."""
STALL_S = 120.0
"""Seconds to wait for the first actor of a Ray cluster."""
INDEX = "index.jsonl"


# -- tables --------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a file: .parquet, .csv, .tsv, .jsonl (objects, or texts), or .txt (one caption on each line).

    Empty cells, null and NaN are left out. In JSON lines and texts, blank lines are skipped.

    Raises: InputError for a file that cannot be read, or has another suffix; DataError for a line that is not valid, or
        a table without rows; MissingDependencyError for a Parquet file without pyarrow.
    """
    read = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".txt": _texts}
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            rows = _parquet().read_table(path).to_pylist()
        elif suffix in read:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = list(read[suffix](file, path))
        else:
            raise InputError(f"{path} must end in .parquet, {', '.join(read)}")
    except UnicodeDecodeError as problem:
        raise InputError(f"{path} is not UTF-8 text") from problem
    except (OSError, csv.Error) as problem:
        raise InputError(f"{path} cannot be read: {getattr(problem, 'strerror', None) or problem}") from problem
    except ValueError as problem:  # pyarrow's ArrowInvalid
        if isinstance(problem, UnclipError):
            raise
        raise InputError(f"{path} cannot be read: {problem}") from problem
    if not rows:
        raise DataError(f"{path} has no rows")
    return [{name: value for name, value in row.items() if not _is_empty(value)} for row in rows]


def _is_empty(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _csv(file: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    for row in (reader := csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)):
        if None in row:
            raise DataError(f"{path}, line {reader.line_num}: there are more cells than columns")
        yield row


def _json_lines(file: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as problem:
                raise DataError(f"{path}, line {number}: it is not JSON") from problem
            if not isinstance(row, dict | str):
                raise DataError(f"{path}, line {number}: it must be an object with columns, or a text")
            yield row if isinstance(row, dict) else {"prompt": row}


def _texts(file: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    return ({"prompt": text} for line in file if (text := line.rstrip("\r\n")).strip())


def _parquet() -> Any:
    try:
        import pyarrow.parquet  # type: ignore[import-not-found]
    except ImportError as problem:
        raise MissingDependencyError("a Parquet file needs pyarrow: pip install 'unclip[tables]'") from problem
    return pyarrow.parquet


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with all columns of the rows, atomically. A column of values of several types becomes JSON.

    Raises: MissingDependencyError without pyarrow; OutputError when it cannot be written.
    """
    parquet, names = _parquet(), dict.fromkeys(name for row in rows for name in row)
    import pyarrow

    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (ValueError, TypeError, OverflowError):  # pyarrow's errors are of these kinds
            columns[name] = pyarrow.array([None if value is None else json.dumps(value) for value in values])
    with atomic_file(path) as draft:
        parquet.write_table(pyarrow.table(columns), draft)


# -- rows ----------------------------------------------------------------------------------------------------------


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


def content_id(*parts: Any) -> str:
    """A hash of values that JSON can express, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def model_fingerprint(session: Session) -> str:
    """A hash of the model's files, without loading them."""
    digest = hashlib.sha256()
    for name in sorted(name for name in session.index if not name.startswith("_")):
        for path in sorted(safe_join(session.folder, name).glob("*")):
            if path.is_file() and not path.name.startswith("."):
                digest.update(f"{name}/{path.name} {path.stat().st_size} ".encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def picture_rows(
    table: Iterable[Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    of_model: Sequence[Any],
    negative: str | None = None,
    seed: int | None = None,
    num_images: int = 1,
) -> list[Row]:
    """The pictures that a table asks for, in its order.

    The columns are `prompt` (or `caption` or `text`), `negative_prompt`, `seed`, `width`, `height`, and the rows of
    `unclip.settings.SETTINGS` by the name of the argument or of the option (`decoder_steps`). All columns are copied to
    the index. A row without a seed gets one that follows from its content. Equal rows are distinguished by their number
    among the equal ones, so each gets its picture.

    Args:
        table: the rows, without empty cells.
        settings: of a call, for rows that do not have their own.
        of_model: what else identifies the pictures, such as the model's fingerprint.
        negative: the negative prompt of rows without one.
        seed: changes the seeds of rows without one.
        num_images: pictures of each row. The seeds of a row with a seed are consecutive.
    """
    from unclip.clip.encoders import check_prompt

    seen: Counter[str] = Counter()
    found = []
    for cells, copy in itertools.product(table, range(num_images)):
        about = {f"input_{name}" if name in OWN else name: value for name, value in cells.items()}
        try:
            prompt = next((cells[name] for name in PROMPTS if name in cells), None)
            if prompt is None:
                raise InputError(f"the row has no {', '.join(PROMPTS[:-1])} or {PROMPTS[-1]}")
            away = cells.get("negative_prompt", negative)
            for text in (prompt, "" if away is None else away):
                check_prompt(text)
            own = {**settings, **_own_settings(cells)}
            start = whole(_number(cells["seed"], int), "seed", 0, MAX_SEED) if "seed" in cells else None
            fixed = None if start is None else (start + copy) % (MAX_SEED + 1)
            content = [prompt, away, own, fixed]
            key = content_id(*content)
            seen[key] += 1
            chosen = int(content_id(seed, *content, seen[key])[:8], 16) if fixed is None else fixed
        except InputError as problem:
            key = content_id(dict(cells), copy)
            seen[key] += 1
            found.append(Row(content_id(key, seen[key]), about, error=str(problem)))
            continue
        about.pop("input_seed", None)
        about |= {"prompt": prompt, "seed": chosen} | ({} if away is None else {"negative_prompt": away})
        id = content_id(prompt, away, own, chosen, seen[key], *of_model)
        given = {"prompt": prompt, "seed": chosen}
        found.append(Row(id, about, given, (json.dumps(own), away)))
    return found


def _own_settings(cells: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: whole(_number(cells[name], int), name) for name in ("height", "width") if name in cells
    }
    for row in SETTINGS.values():
        for name in (row.name, row.option.removeprefix("--").replace("-", "_")):
            if name in cells:
                found[row.name] = row.check(_number(cells[name], row.kind), name)
    return found


def _number(value: Any, kind: type) -> Any:
    """The number in a cell. Whole floats are accepted as ints: many programs write a column with gaps so."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value) if kind is float or not re.fullmatch(r"\s*\d+\s*", value) else int(value)
    return int(value) if kind is int and isinstance(value, float) and value.is_integer() else value


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


# -- results -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failed:
    """The error of a row that could not be made."""

    error: str


Made = bytes | Failed
Part = Callable[[Sequence[tuple[Row, bytes]], Path], None]


class Results:
    """A folder of results with an index: a JSON object on each line of `index.jsonl`, for each row that is finished.

    A result is written under a temporary name and renamed, and its line is appended after that. So a result without a
    line is made again. A last line that is not complete is removed.

    Args:
        folder: created if it does not exist.
        suffix: of the files.
        write_part: writes several results into one file; None: each result has a file.
        per_part: the number of these.

    Raises: OutputExistsError for another folder that is not empty, or if another process writes to it.
    """

    def __init__(self, folder: Path, suffix: str, write_part: Part | None = None, per_part: int = 1000) -> None:
        self.folder, self.suffix, self.write_part, self.per_part = folder, suffix, write_part, per_part
        self.lines: dict[str, dict[str, Any]] = {}
        self._kept: list[tuple[Row, bytes]] = []

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """A context in which no other process can write to the folder. At its end, what was made is written."""
        output_folder(self.folder)
        refusal = OutputExistsError(f"another process is writing to {self.folder}; wait, or choose another --out")
        with locked(self.folder, refusal):
            path = self.folder / INDEX
            if not path.exists() and any(not name.startswith(TEMPORARY_PREFIX) for name in os.listdir(self.folder)):
                raise OutputExistsError(f"{self.folder} has files, but no {INDEX}; choose an empty folder as --out")
            with writing(path), path.open("a+b") as self._index:
                self._read()
                self._remove_rests()
                sync(self.folder)
                try:
                    yield
                finally:
                    self._write_part()

    def _read(self) -> None:
        """Read the index, without a torn last line."""
        self._index.seek(0)
        data = self._index.read()
        whole_bytes = data.rfind(b"\n") + 1
        self._index.truncate(whole_bytes)
        for number, line in enumerate(data[:whole_bytes].splitlines(), 1):
            try:
                entry = json.loads(line)
                self.lines[entry["id"]] = entry
            except (ValueError, TypeError, KeyError) as problem:
                raise DataError(f"{self.folder / INDEX}, line {number}: it is not a line of an index") from problem

    def _remove_rests(self) -> None:
        """Remove temporary files of a killed run, and parts that the index does not name."""
        for left in (*self.folder.glob(f"{TEMPORARY_PREFIX}*"), *self.folder.glob(f"??/{TEMPORARY_PREFIX}*")):
            left.unlink()
        if self.write_part is not None:
            named = {entry.get("path") for entry in self.lines.values()}
            for path in self.folder.glob(f"*{self.suffix}"):
                if re.fullmatch(r"\d{5,}", path.stem) and path.name not in named:
                    path.unlink()

    def is_missing(self, row: Row, retry_failed: bool = False) -> bool:
        """Whether a row has no result; a failed row is finished, unless it is to be tried again."""
        return row.id not in self.lines or (retry_failed and "error" in self.lines[row.id])

    def add(self, made: Iterable[tuple[Row, Made]]) -> None:
        """Write results and append their lines. Raises: OutputError."""
        lines = []
        for row, content in made:
            if isinstance(content, Failed):
                lines.append({"id": row.id, **row.about, "error": content.error})
            elif self.write_part is not None:
                self._kept.append((row, content))
                if len(self._kept) >= self.per_part:
                    self._write_part()
            else:
                name = f"{row.id[:2]}/{row.id}{self.suffix}"
                with atomic_file(self.folder / name) as draft:
                    draft.write_bytes(content)
                lines.append({"id": row.id, **row.about, "path": name})
        self._append(lines)

    def _write_part(self) -> None:
        if self._kept and self.write_part is not None:
            numbers = (Path(entry["path"]).stem for entry in self.lines.values() if "path" in entry)
            name = f"{max(map(int, numbers), default=-1) + 1:05}{self.suffix}"
            with atomic_file(self.folder / name) as draft:
                self.write_part(self._kept, draft)
            lines = [{"id": row.id, **row.about, "path": name} for row, _ in self._kept]
            self._kept = []
            self._append(lines)

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        if lines:
            self._index.write(b"".join(map(_line, lines)))
            self._index.flush()
            os.fsync(self._index.fileno())
            self.lines |= {entry["id"]: entry for entry in lines}

    def finish(self, rows: Sequence[Row]) -> None:
        """Write the index again with one line for each row, in the order of the table, and as Parquet.

        Lines of other rows come first. Without pyarrow, only JSON is written.
        """
        self._write_part()
        own = {row.id: self.lines[row.id] for row in rows}
        self.lines = {id: entry for id, entry in self.lines.items() if id not in own} | own
        with atomic_file(self.folder / INDEX) as draft:
            draft.write_bytes(b"".join(map(_line, self.lines.values())))
        with contextlib.suppress(MissingDependencyError):
            write_parquet((self.folder / INDEX).with_suffix(".parquet"), list(self.lines.values()))


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, default=str).encode() + b"\n"


def write_webdataset(made: Sequence[tuple[Row, bytes]], path: Path) -> None:
    """A shard of pictures with their captions (.txt) and columns (.json); the keys are the ids."""
    from unclip.data.shard_writer import write_shard

    write_shard(
        ((row.id, {"png": png, "txt": row.given["prompt"].encode(), "json": _line(row.about)}) for row, png in made),
        path,
    )


# -- work ----------------------------------------------------------------------------------------------------------

Make = Callable[[Sequence[Row]], Sequence[Made]]


class Work(Protocol):
    """What a worker does; it can be pickled."""

    def load(self, worker: int) -> Make:
        """Load the model, and return a function that makes a batch."""
        ...


@dataclass(frozen=True)
class PictureWork:
    """Makes pictures from captions, as PNG files with the metadata of `unclip generate`."""

    model: str
    compute: Compute
    sampler: str | None = None

    def load(self, worker: int) -> Make:
        from unclip.pipelines.text_to_image import UnCLIPPipeline

        session = Session(self.model, _on_device(self.compute, worker), sampler=self.sampler, progress=False)
        pipe = session.pipeline(UnCLIPPipeline)
        about = session.metadata(pipe, {})
        sampler = sampler_name(pipe)

        def make(batch: Sequence[Row]) -> list[Made]:
            own, negative = batch[0].group  # type: ignore[misc]
            settings = json.loads(own)
            prompts, seeds = [row.given["prompt"] for row in batch], [row.given["seed"] for row in batch]
            images: Any = pipe(prompts, negative_prompt=negative, seed=seeds, **settings).images  # type: ignore[union-attr]
            same = [prompts.index(prompt) for prompt in prompts]
            call = {"command": "generate", "options": {} if negative is None else {"negative": negative}}
            several = {"prompts": same} if any(same) else {}
            made: list[Made] = []
            for place, (row, image) in enumerate(zip(batch, images, strict=True)):
                content, facts = io.BytesIO(), dict(about)
                facts["settings"] = {**settings, "sampler": sampler, **about["settings"]}
                facts[MADE_WITH] = {**call, **about[MADE_WITH], "index": 0, "batch": [place, len(batch)], **several}
                texts = png_texts({"prompt": row.given["prompt"], "negative": negative, **facts, "seed": seeds[place]})
                image.save(content, format="PNG", pnginfo=texts)
                made.append(content.getvalue())
            return made

        return make


def _on_device(compute: Compute, worker: int) -> Compute:
    """With several GPUs and the device "auto", each worker uses the next one."""
    import torch

    if compute.device == "auto" and (count := torch.cuda.device_count()) > 1:
        return Compute(compute.dtype, f"cuda:{worker % count}", compute.cpu_offload, compute.tile)
    return compute


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
