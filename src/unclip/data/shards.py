"""Read tar shards in the layout of webdataset, and prepare items in a background thread."""

import bz2
import contextlib
import gzip
import itertools
import json
import lzma
import math
import os
import queue
import re
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from unclip.data.folder import check_share, some_of, weight_in
from unclip.errors import Cancelled, DataError

POLL_S = 0.1
"""How often a waiting `Prefetch` checks whether to stop."""
PARTING_S = 0.5
"""How long `Prefetch.close` waits for its thread."""

T = TypeVar("T")
_Made = queue.SimpleQueue[tuple[Any, BaseException | None]]


class Prefetch(Iterator[T]):
    """Iterates over `items` in a background thread, which makes one item ahead.

    The thread may wait for a server for a long time, which does not delay a stop or the end of the process.

    Args:
        items: the items; only the thread may use this iterator from now on.
        should_stop: called while waiting for an item.

    Raises: on `next`, the error that occurred in `items`; Cancelled when `should_stop` returned true.
    """

    def __init__(self, items: Iterator[T], should_stop: Callable[[], bool] = lambda: False) -> None:
        self._should_stop = should_stop
        self._requests, self._made = queue.SimpleQueue[bool](), _Made()
        # The thread refers only to the queues, so deleting this object ends it.
        about = (items, self._requests, self._made)
        self._thread = threading.Thread(target=_make, args=about, name="unclip-read", daemon=True)
        self._thread.start()
        self._requests.put(True)

    def __next__(self) -> T:
        while True:
            try:
                item, error = self._made.get(timeout=POLL_S)
                break
            except queue.Empty:
                if self._should_stop():
                    raise Cancelled("stopped while waiting for data") from None
        if error is not None:
            self._made.put((None, error))  # every later call raises it too
            raise error
        self._requests.put(True)
        return item

    def close(self) -> None:
        """End the thread, and close `items`. A thread that hangs is abandoned."""
        self._requests.put(False)
        self._thread.join(PARTING_S)

    def __del__(self) -> None:
        self._requests.put(False)


def _make(items: Iterator[Any], requests: queue.SimpleQueue[bool], made: _Made) -> None:
    while requests.get():
        try:
            made.put((next(items), None))
        except BaseException as error:  # StopIteration too
            made.put((None, error))
            return


MAX_PART_BYTES = 256 * 2**20
MAX_SHARDS = 1_000_000
MAX_STEP_BYTES = MAX_PART_BYTES + 2**20
"""The largest number of bytes that are read or skipped in a shard at once."""
MAX_HELD_PARTS = 32
"""The largest number of files with several dots in their names that are held before they are split into samples."""
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
UNPACKERS: dict[bytes, Any] = {rb"\x1f\x8b": gzip.open, rb"BZh\d1AY&SY": bz2.open, rb"\xfd7zXZ": lzma.open}
"""How a compressed shard is read, by a pattern of its first bytes."""
EMBEDDING = "img_emb.npy"
WAITS_S = (2.0, 8.0, 20.0)
"""Waiting times before the attempts to read a URL again, because networks fail for a while."""
FIRST_WAITS_S = (0.4, 0.8, 1.6)
"""The same if nothing was read before: the URL is probably wrong."""
TIMEOUT_S = 60.0
_BRACES = re.compile(r"\{(\d{1,20})\.\.(\d{1,20})\}")


@dataclass(frozen=True)
class RawSample:
    """The files of one sample in a shard: {"jpg": …, "txt": …}, by the part of the name after the first dot."""

    key: str
    shard: str
    parts: Mapping[str, bytes]

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.shard}: {self.key}"


@dataclass
class Damage:
    """What could not be read.

    Attributes:
        broken: the reasons, by the name of a picture, sample or shard.
        num_read: number of samples, including broken ones.
        shards: names in `broken` that are shards (cut off, damaged or missing), and whether they are still broken.
            A shard may be read completely later, for example after a network failure.
        num_shards: number of shards.
    """

    broken: dict[str, str] = field(default_factory=dict)
    num_read: int = 0
    shards: dict[str, bool] = field(default_factory=dict)
    num_shards: int = 0

    @property
    def num_broken_samples(self) -> int:
        """The number of broken samples, not counting those after the damage in a shard."""
        return len(self.broken) - len(self.shards)

    @property
    def num_broken_shards(self) -> int:
        """The number of shards whose last reading failed."""
        return sum(self.shards.values())

    def note_shard(self, shard: str, reason: str | None) -> None:
        """Record that a shard was read completely (no reason), or the reason why it is broken."""
        if reason is not None:
            self.broken[shard] = reason
        if shard in self.broken:
            self.shards[shard] = reason is not None

    def check(self, share: float, share_of_shards: float, at_least: int = 0) -> None:
        """Raises: DataError when a larger share of the samples, or of the shards, is broken; see `check_share`."""
        check_share(self.broken, self.num_broken_samples, self.num_read, share, at_least=at_least)
        check_share(self.broken, self.num_broken_shards, self.num_shards, share_of_shards, "shards")


def expand(source: str | Path) -> list[str]:
    """The shards that `source` names: a folder, one tar, a glob, or any of them or a URL with ranges in braces.

    "https://host/set/{00000..00041}.tar" is 42 shards. Missing files of a range are returned too, and count as damaged
    when they are read, as missing URLs do.

    Raises: DataError if no shard exists.
    """
    check_ranges(source)
    start, *others = _BRACES.split(str(source))  # text, low, high, text, low, high, …
    parts = [[start]]
    for low, high, text in zip(others[::3], others[1::3], others[2::3], strict=True):
        parts += [[f"{number:0{len(low)}}" for number in range(int(low), int(high) + 1)], [text]]
    names = map("".join, itertools.product(*parts))
    try:
        found = [(name, _found(name)) for name in names]
    except RuntimeError as error:
        raise DataError(f"{source!s:.80} is in a home folder that does not exist") from error
    if not any(existing for _, existing in found):
        raise DataError(
            f"{source} names no shards; give a folder with .tar files, a glob, or a URL with {{00000..00009}}"
        )
    return [shard for name, existing in found for shard in existing or [str(Path(name).expanduser())]]


def check_ranges(source: str | Path) -> None:
    """Raises: DataError where the ranges in braces of `source` name more than `MAX_SHARDS` shards."""
    bounds = [(int(low), int(high)) for low, high in _BRACES.findall(str(source))]
    if math.prod(max(0, high - low + 1) for low, high in bounds) > MAX_SHARDS:
        raise DataError(f"{source!s:.80} names more than {MAX_SHARDS:,} shards, the limit")


def is_shards(source: str | Path) -> bool:
    """Whether `source` means tar shards, and not a folder with `metadata.jsonl`."""
    text = str(source)
    if is_url(text) or text.endswith(SUFFIXES) or "{" in text or "*" in text:
        return True
    folder = Path(text)
    return folder.is_dir() and not (folder / "metadata.jsonl").is_file() and bool(_shards_in(folder))


def is_url(name: str) -> bool:
    """Whether a shard is fetched over the network."""
    return name.startswith(("http://", "https://"))


def about(raw: RawSample) -> dict[str, Any]:
    """The object in a sample's .json; empty where it has none.

    Raises: DataError when it cannot be read.
    """
    try:
        found = json.loads(raw.parts.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"its .json cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def weight_of(raw: RawSample) -> float:
    """How often a sample is used relative to others: `weight` in its .json.

    An invalid weight counts as 1, so the sample is used, and decoding it raises the error.
    """
    try:
        return float(weight_in(about(raw)))
    except DataError:
        return 1.0


def read_shard(shard: str, damage: Damage | None = None) -> Iterator[RawSample]:
    """Stream the samples of one shard in their order.

    A damaged shard yields the complete samples before the damage, and is recorded in `damage`. A URL is tried
    several times before it counts as damaged; samples are not repeated.
    """
    damage = damage or Damage()
    given = 0
    for wait_s in (*(WAITS_S if damage.num_read else FIRST_WAITS_S), None):
        try:
            for sample in itertools.islice(_samples(shard), given, None):
                yield sample
                given += 1
            return damage.note_shard(shard, None)
        except Exception as error:  # a damaged header makes tarfile raise errors of many kinds
            if wait_s is None or not is_url(shard) or _is_final(error):
                return damage.note_shard(shard, f"{type(error).__name__}: {error} (after {given} samples)")
            time.sleep(wait_s)


@dataclass
class ShardStream:
    """An endless, shuffled, reproducible sequence of the samples in shards, which can start at any position.

    Each epoch permutes the shards, and this process takes every `world`-th of them. Their samples are shuffled in
    blocks of `block` samples. Two blocks of encoded files are in memory: the current one, and the next one.
    The order depends only on the seed.

    If the samples of a block have different weights, the block is resampled with replacement, in proportion to the
    weights. So weights compare the samples of one block, and all blocks count the same. Samples of weight 0 are
    skipped.

    Attributes:
        shards: as `expand` returns them; at least one for each process.
        seed: the seed of the order.
        block: number of samples that are shuffled together.
        rank, world: the number of this process, and the number of processes.
        counts: number of samples of the shards that were read completely. They make a start in the middle fast.
        weight_power: samples are used in proportion to their weight to this power; with 0, all are used equally often
            (except those of weight 0).
    """

    shards: list[str]
    _: KW_ONLY
    seed: int
    block: int = 1024
    rank: int = 0
    world: int = 1
    counts: dict[str, int] = field(default_factory=dict)
    weight_power: float = 1.0

    def __post_init__(self) -> None:
        if len(self.shards) < self.world:
            raise DataError(f"there are {len(self.shards)} shards for {self.world} processes; each process needs one")
        self.damage = Damage(num_shards=len(self.shards))

    def read_from(self, position: int) -> Iterator[RawSample]:
        """All samples of this process's endless sequence from `position` on.

        Raises: DataError when the shards have no samples.
        """
        with contextlib.closing(Prefetch(self._blocks(position))) as blocks:
            yield from self._samples_of(blocks)

    def one_epoch(self) -> Iterator[RawSample]:
        """Every sample of this process's first epoch once, whatever its weight (except 0)."""
        return self._samples_of(self._epoch(0, 0, weighted=False))

    def _samples_of(self, blocks: Iterator[list[RawSample]]) -> Iterator[RawSample]:
        for block in blocks:
            while block:  # frees the memory of a sample that was used
                self.damage.num_read += 1
                yield block.pop(0)

    def _order(self, epoch: int) -> list[str]:
        order = torch.randperm(len(self.shards), generator=self._generator(epoch)).tolist()
        return [self.shards[number] for number in order[self.rank :: self.world]]

    def _generator(self, *place: int) -> torch.Generator:
        number = self.seed
        for part in place:
            number = (number * 1_000_003 + part + 1) % 2**63
        return torch.Generator().manual_seed(number)

    def _blocks(self, position: int) -> Iterator[list[RawSample]]:
        """The endless sequence from `position` on, block by block.

        Earlier epochs are skipped if all their shards were counted; otherwise they are read.
        """
        for epoch in itertools.count():
            order = self._order(epoch)
            is_counted = all(shard in self.counts for shard in order)
            if not is_counted or position < self._length(order):
                is_reached = yield from self._epoch(epoch, position)
                if is_reached:
                    position = 0
                    continue
            if not (length := self._length(order)):
                some = some_of(self.damage.broken) or "they are empty, or all weights are 0"
                raise DataError(f"{len(self.shards)} shards have no samples: {some}")
            position -= length

    def _length(self, shards: list[str]) -> int:
        return sum(self.counts[shard] for shard in shards)

    def _epoch(self, epoch: int, start: int, *, weighted: bool = True) -> Generator[list[RawSample], None, bool]:
        """The samples of an epoch from number `start` on, block by block. Returns: whether there were any."""
        number, skip = divmod(start, self.block)
        samples = self._raw(epoch, number * self.block)
        is_reached = False
        while len(held := list(itertools.islice(samples, self.block))) > skip:
            generator = self._generator(epoch, self.rank, number)
            weights = [weight_of(sample) ** self.weight_power for sample in held] if weighted else []
            yield [held[place] for place in _places(weights, len(held), generator)[skip:]]
            del held  # before the next ones are read
            number, skip, is_reached = number + 1, 0, True
        return is_reached

    def _raw(self, epoch: int, start: int) -> Iterator[RawSample]:
        for shard in self._order(epoch):
            count = self.counts.get(shard)
            if count is not None and start and start >= count:  # otherwise read it: an empty shard may have samples now
                start -= count
                continue
            number = 0
            for sample in read_shard(shard, self.damage):
                if weight_of(sample):
                    number += 1
                    if number > start:
                        yield sample
            self.counts[shard] = number
            start = max(0, start - number)


def _places(weights: list[float], count: int, generator: torch.Generator) -> list[int]:
    """`count` indices of samples of a block: each once, or sampled by weight if the weights differ."""
    if len(set(weights)) < 2:
        return torch.randperm(count, generator=generator).tolist()
    shares = torch.tensor(weights, dtype=torch.float64) / max(weights)
    return torch.multinomial(shares, count, replacement=True, generator=generator).tolist()


def _found(name: str) -> list[str]:
    if is_url(name):
        return [name]
    path = Path(name).expanduser()
    if path.is_dir():
        return _shards_in(path)
    if any(letter in str(path) for letter in "*?[") and not path.is_file():
        folder = next(parent for parent in path.parents if parent.is_dir())  # its own name may have such letters
        return sorted(str(tar) for tar in folder.glob(str(path.relative_to(folder))))
    return [str(path)] if path.is_file() else []


def _shards_in(folder: Path) -> list[str]:
    names = (path.name for path in folder.iterdir())
    return sorted(str(folder / name) for name in names if name.endswith(SUFFIXES) and not name.startswith("."))


class _Member(tarfile.TarInfo):
    """A member's header. If it is damaged, this is an error; tarfile would treat it as the end of the file."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Member":  # type: ignore[override]  # `tarfile` is the module here
        try:
            return super().fromtarfile(tar)
        except (tarfile.HeaderError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            if type(error).__name__ == "EOFHeaderError":  # the two blocks of zeros that end a tar
                raise
            what = str(error) or "it is cut off"
            raise tarfile.ReadError(f"a header is damaged: {what}") from error


class _Stream:
    """A file that tarfile reads forwards, with a limit for each step, whatever size a header states."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._position = file, 0

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_STEP_BYTES:
            raise tarfile.ReadError(f"a header states {size:,} bytes; at most {MAX_STEP_BYTES:,} are read")
        content = self._file.read(size)
        self._position += len(content)
        return content

    def seek(self, position: int) -> int:
        distance = position - self._position
        if not 0 <= distance <= MAX_STEP_BYTES:
            raise tarfile.ReadError(f"a header states {distance:,} bytes; at most {MAX_STEP_BYTES:,} are read")
        while (left := position - self._position) and self.read(min(left, 2**20)):
            pass
        return self._position


def _samples(shard: str) -> Iterator[RawSample]:
    """Group consecutive files with the same key into samples, as webdataset does.

    A second file with the same extension begins the next sample. A key that was used before gets a number.
    """
    counts: dict[str, int] = {}

    def whole(key: str, parts: dict[str, bytes]) -> Iterator[RawSample]:
        for own, group in _by_name(key, parts):
            unique = own
            while unique in counts:
                counts[own] += 1
                unique = f"{own} ({counts[own]})"
            counts[unique] = 1
            yield RawSample(unique, shard, group)

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_opened(shard))
        start = file.peek(10)  # type: ignore[attr-defined]  # all files from `_opened` have it
        for pattern, unpacked in UNPACKERS.items():
            if re.match(pattern, start):
                file = stack.enter_context(unpacked(file))
        tar = stack.enter_context(tarfile.TarFile(fileobj=_Stream(file), tarinfo=_Member))  # type: ignore[arg-type]
        key, parts = "", {}
        for name, content in _files(tar):
            folder, slash, base = name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not (stem and dot):
                continue
            own, extension = f"{folder}{slash}{stem}", extension.lower()
            if own != key or extension in parts or _is_long(parts, extension):
                yield from whole(key, parts)
                key, parts = own, {}
            parts[extension] = content.read()
        yield from whole(key, parts)


def _by_name(key: str, parts: dict[str, bytes]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The sample with its key. If the names of all its files have several dots (a.000.jpg, a.000.txt, a.001.jpg), one
    sample for each name before the last dot, so that each of them is counted."""
    if not all(map(_middle, parts)):
        yield key, parts
        return
    groups: dict[str, dict[str, bytes]] = {}
    for extension, content in parts.items():
        groups.setdefault(_middle(extension), {})[extension] = content
    for middle, group in groups.items():
        yield f"{key}.{middle}", group


def _middle(extension: str) -> str:
    """The part before the file extension: "000" of 000.jpg, nothing of jpg."""
    if extension.endswith(EMBEDDING):
        return extension.removesuffix(EMBEDDING).rstrip(".")
    return extension.rpartition(".")[0]


def _is_long(parts: dict[str, bytes], extension: str) -> bool:
    """Whether these parts are too many for one sample and can be split by their names."""
    if len(parts) < MAX_HELD_PARTS:
        return False
    middles = set(map(_middle, parts))
    return "" not in middles and _middle(extension) not in middles


def _files(tar: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        if member.issparse() or member.size > MAX_PART_BYTES:
            what = "is a sparse file" if member.issparse() else f"has {member.size:,} bytes"
            raise tarfile.ReadError(f"{member.name} {what}; at most {MAX_PART_BYTES:,} are read, and no sparse files")
        if member.isfile():
            content = tar.extractfile(member)
            assert content is not None
            yield member.name, content


def _opened(shard: str) -> IO[bytes]:
    if not is_url(shard):
        if os.path.exists(shard) and not os.path.isfile(shard):  # a pipe would block
            raise DataError("it is not a regular file")
        return open(shard, "rb")
    request = urllib.request.Request(shard, headers={"User-Agent": "unclip"})
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def _is_final(error: BaseException) -> bool:
    """Whether a server's answer will not change at another attempt."""
    return isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code not in (408, 429)
