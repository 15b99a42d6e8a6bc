"""Write shards so that an interrupted run resumes after the last complete shard."""

import hashlib
import io
import itertools
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unclip.checkpoints.files import TEMPORARY_PREFIX, atomic_file, output_path, read_json, sync, write_json
from unclip.data.shards import RawSample
from unclip.errors import DataError, OutputExistsError

STATE = "unfinished.json"
STATE_LIMIT_BYTES = 1 << 30


def unfinished_folder(out: Path) -> Path:
    """The folder of the shards of `out` until it is complete: beside it, with the suffix .unfinished."""
    target = output_path(out)
    return target.with_name(f"{target.name}.unfinished")


def write_shards(samples: Iterator[tuple[str, Mapping[str, bytes]]], folder: Path, *, per_shard: int) -> list[Path]:
    """Write (key, parts) samples as 00000.tar, 00001.tar, … into an existing folder."""
    written: list[Path] = []
    for first in samples:
        path = folder / f"{len(written):05}.tar"
        write_shard(itertools.chain([first], itertools.islice(samples, per_shard - 1)), path)
        written.append(path)
    return written


def write_shard(samples: Iterable[tuple[str, Mapping[str, bytes]]], path: Path) -> None:
    """Write (key, parts) samples as one tar. Names above 100 bytes get a PAX header."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, parts in samples:
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


class Portion:
    """The next `count` samples of an iterator, counted and hashed as they are taken."""

    def __init__(self, samples: Iterator[RawSample], count: int):
        self._samples, self._hash = itertools.islice(samples, count), hashlib.sha256()
        self.count = 0

    def __iter__(self) -> Iterator[RawSample]:
        for sample in self._samples:
            self.count += 1
            for name, content in (("", sample.key.encode(errors="surrogateescape")), *sample.parts.items()):
                self._hash.update(f"{name} {len(content)} ".encode(errors="surrogateescape"))
                self._hash.update(content)
            yield sample

    @property
    def content(self) -> str:
        """A hash of the samples that were taken."""
        return self._hash.hexdigest()


class Unfinished:
    """The shards of an incomplete folder `out`: one for each portion of the samples that has readable ones.

    A shard is written atomically. It counts once the state file beside it records its portion.

    Args:
        out: the final folder; it must not exist, or must be empty.
        settings: the settings on which the shards depend.

    Raises: OutputExistsError when `out` is not empty, or the unfinished shards have other settings.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        self.out, self.folder = output_path(out), unfinished_folder(out)
        self._check_out()
        self._settings, self.portions = dict(settings), self._read(dict(settings)) if self.folder.exists() else []
        for path in self.folder.glob("*.tar"):  # incomplete, or written before the state
            if path.name not in self.shards:
                path.unlink()

    @property
    def shards(self) -> list[str]:
        """Names of the complete files."""
        return [portion["shard"] for portion in self.portions if portion["shard"]]

    def finished(self, number: int, portion: Portion) -> dict[str, str] | None:
        """What was broken in a finished portion, whose samples are read again to compare them; None for a new one.

        Raises: DataError when the samples have changed.
        """
        if number >= len(self.portions):
            return None
        done = self.portions[number]
        for _ in portion:
            pass
        if (portion.count, portion.content) != (done["num_samples"], done["content"]):
            first = sum(earlier["num_samples"] for earlier in self.portions[:number])
            raise DataError(
                f"the data have changed since {self.folder} was started: samples from number {first:,} on differ; "
                "remove that folder to start again"
            )
        return done["broken"]

    def add(self, portion: Portion, rows: Iterator[tuple[str, Mapping[str, bytes]]], broken: Mapping[str, str]) -> None:
        """Write `rows`, which take the samples of the portion, as the next shard, and record what was broken."""
        name, size = None, 0
        if (first := next(rows, None)) is not None:
            name = f"{len(self.shards):05}.tar"
            with atomic_file(self.folder / name) as draft:
                write_shard(itertools.chain([first], rows), draft)
            size = (self.folder / name).stat().st_size
        if portion.count:
            about = {"num_samples": portion.count, "content": portion.content, "broken": dict(broken)}
            self.portions.append(about | {"shard": name, "num_bytes": size})
            write_json(self.folder / STATE, {"asked": self._settings, "portions": self.portions})

    def finish(self) -> None:
        """Rename the folder to `out`."""
        self._check_out()
        if self.out.exists():
            self.out.rmdir()
        os.rename(self.folder, self.out)
        sync(self.out.parent)
        (self.out / STATE).unlink()

    def discard(self) -> None:
        """Remove the unfinished shards."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def _check_out(self) -> None:
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise OutputExistsError(f"{self.out} exists; choose another --out")

    def _read(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        if not (self.folder / STATE).is_file():
            is_ours = self.folder.is_dir() and all(
                path.name.startswith(TEMPORARY_PREFIX) for path in self.folder.iterdir()
            )
            if not is_ours:
                raise OutputExistsError(f"{self.folder} exists but has no {STATE}; remove it, or choose another --out")
            return []
        state = read_json(self.folder / STATE, limit_bytes=STATE_LIMIT_BYTES)
        if state.get("asked") != settings:
            changed = [name for name, value in settings.items() if state.get("asked", {}).get(name) != value]
            raise OutputExistsError(
                f"{self.folder} was started with other settings ({', '.join(changed)}); use the same "
                "ones, or remove the folder"
            )
        return list(itertools.takewhile(self._is_whole, state["portions"]))

    def _is_whole(self, portion: dict[str, Any]) -> bool:
        path = self.folder / (portion["shard"] or "")
        return not portion["shard"] or (path.is_file() and path.stat().st_size == portion["num_bytes"])
