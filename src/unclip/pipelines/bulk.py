"""Bulk runs: make each row of a table once, and keep an index of the results.

A row is identified by its content. A run that was stopped or killed at any moment continues where it ended.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclip.checkpoints.files import TEMPORARY_PREFIX, atomic_file, locked, output_folder, safe_join, sync, writing
from unclip.data.tables import write_parquet
from unclip.errors import DataError, InputError, MissingDependencyError, OutputExistsError
from unclip.numbers import whole
from unclip.pipelines.samplers import sampler_name
from unclip.pipelines.session import MADE_WITH, Compute, Session, png_texts
from unclip.pipelines.workers import Failed, Made, Make, Row
from unclip.settings import SETTINGS

PROMPTS = ("prompt", "caption", "text")
"""Columns of the caption; the first one that a row has is used."""
MAX_SEED = 2**64 - 1
OWN = ("id", "path", "error", "seed")
"""Columns of the index that are ours; those of a table get the prefix `input_`, except a valid seed."""
INDEX = "index.jsonl"


# -- rows ----------------------------------------------------------------------------------------------------------


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


# -- results -------------------------------------------------------------------------------------------------------


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


# -- pictures ------------------------------------------------------------------------------------------------------


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
