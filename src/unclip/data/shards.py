"""Captioned pictures streamed from tar shards, in the layout of webdataset that img2dataset writes.

Knows tar files, where they lie and in which order they are read; knows neither pixels nor networks. Called by
`unclip.data.stream` and the commands that build and inspect data.
"""

import contextlib
import http.client
import io
import itertools
import json
import math
import re
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from unclip.data.ahead import Ahead
from unclip.errors import DataError

MAX_PART_BYTES = 256 * 2**20
MAX_SHARDS = 1_000_000
WAITS_S = (2.0, 8.0, 20.0)
"""Before a URL is asked again, the first time, the second, the last: networks fail for a while."""
FIRST_WAITS_S = (0.4, 0.8, 1.6)
"""The same while nothing at all was read yet: then it is rather the address that is wrong."""
TIMEOUT_S = 60.0
_BRACES = re.compile(r"\{(\d{1,20})\.\.(\d{1,20})\}")
_FAILURES = (OSError, EOFError, tarfile.TarError, zlib.error, http.client.HTTPException)


@dataclass(frozen=True)
class RawSample:
    """The files of one sample as they lie in a shard: {"jpg": …, "txt": …}, by what follows the key's first dot."""

    key: str
    shard: str
    parts: Mapping[str, bytes]

    @property
    def name(self) -> str:
        """How it is called in messages."""
        return f"{self.shard}: {self.key}"


@dataclass
class Damage:
    """What could not be read, and how much was looked at.

    Attributes:
        broken: the reason, by the name of a picture, sample or shard.
        num_read: samples in all, the broken ones too.
        shards: names in `broken` that are whole shards: cut off, damaged or not there.
        mended: those of them that were read whole later, as after a failure of the network that passed.
        num_shards: in all, where they are counted.
    """

    broken: dict[str, str] = field(default_factory=dict)
    num_read: int = 0
    shards: set[str] = field(default_factory=set)
    mended: set[str] = field(default_factory=set)
    num_shards: int = 0

    @property
    def num_broken_samples(self) -> int:
        """Samples that could not be read; those that a damaged shard lost are in no count."""
        return len(self.broken) - len(self.shards)

    @property
    def num_broken_shards(self) -> int:
        """Shards that could not be read when they were last."""
        return len(self.shards) - len(self.mended)

    def note_shard(self, shard: str, reason: str | None) -> None:
        """Note how a shard was read: whole, or broken for a reason."""
        if reason is not None:
            self.mended.discard(shard)
            self.shards.add(shard)
            self.broken[shard] = reason
        elif shard in self.shards:
            self.mended.add(shard)

    def some(self) -> str:
        """The first three, for a message."""
        return "; ".join(f"{name}: {why}" for name, why in list(self.broken.items())[:3])

    def check(self, max_skipped_share: float) -> None:
        """Raises: DataError when a larger share of the samples, or of the shards, could not be read."""
        counts = {
            "samples": (self.num_broken_samples, self.num_read),
            "shards": (self.num_broken_shards, self.num_shards),
        }
        for what, (num_broken, num_all) in counts.items():
            if num_broken > max_skipped_share * num_all:
                raise DataError(
                    f"{num_broken:,} of {num_all:,} {what} cannot be read, more than the {max_skipped_share:.3g} of "
                    f"all that is allowed: {self.some()}"
                )


def expand(source: str | Path) -> list[str]:
    """The shards that `source` names: a folder, one tar, a glob, or any of them or a URL with ranges in braces.

    "https://host/set/{00000..00041}.tar" is 42 shards. What a range names and is not there stays among them: reading
    it counts as damage, for a file as for a URL.

    Raises: DataError when there is none.
    """
    check_ranges(source)
    text = str(source)
    ranges = [range(int(low), int(high) + 1) for low, high in _BRACES.findall(text)]
    widths = [len(low) for low, _ in _BRACES.findall(text)]
    pieces = _BRACES.split(text)[::3]
    names = []
    for numbers in itertools.product(*ranges):
        filled = [f"{number:0{width}}" for number, width in zip(numbers, widths, strict=True)]
        names.append("".join(itertools.chain(*itertools.zip_longest(pieces, filled, fillvalue=""))))
    try:
        found = [(name, _found(name)) for name in names]
    except RuntimeError as error:
        raise DataError(f"{source!s:.80} is in a home folder that does not exist") from error
    if not any(there for _, there in found):
        raise DataError(
            f"{source} names no shards; give a folder with .tar files, a glob, or a URL with {{00000..00009}}"
        )
    return [shard for name, there in found for shard in there or [str(Path(name).expanduser())]]


def check_ranges(source: str | Path) -> None:
    """Raises: DataError where the ranges in braces of `source` name more than `MAX_SHARDS` shards."""
    bounds = [(int(low), int(high)) for low, high in _BRACES.findall(str(source))]
    if math.prod(max(0, high - low + 1) for low, high in bounds) > MAX_SHARDS:
        raise DataError(f"{source!s:.80} names more than {MAX_SHARDS:,} shards; that many are the limit")


def is_shards(source: str | Path) -> bool:
    """Whether `source` means tar shards, and not a folder with `metadata.jsonl`."""
    text = str(source)
    if is_url(text) or text.endswith((".tar", ".tar.gz", ".tgz")) or "{" in text or "*" in text:
        return True
    folder = Path(text)
    return folder.is_dir() and not (folder / "metadata.jsonl").is_file() and any(folder.glob("*.tar"))


def is_url(name: str) -> bool:
    """Whether a shard is fetched over the network."""
    return name.startswith(("http://", "https://"))


def about(raw: RawSample) -> dict[str, Any]:
    """What a sample's .json says; nothing where it has none, or none that can be read."""
    try:
        found = json.loads(raw.parts.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def weight_of(raw: RawSample) -> float:
    """How often a sample is drawn, relative to others: `weight` in its .json; 1 where that is no number from 0 up."""
    weight = about(raw).get("weight", 1.0)
    is_weight = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < math.inf
    return float(weight) if is_weight else 1.0


def read_shard(shard: str, damage: Damage | None = None) -> Iterator[RawSample]:
    """The samples of one shard, in its order, as they are streamed.

    A shard that is cut off or damaged gives the samples that are surely whole before the damage, and is named in
    `damage`. A URL is tried several times before it counts as damaged; what it gave already is not given again.
    """
    given = 0
    is_first = damage is not None and not damage.num_read
    for wait_s in (*(FIRST_WAITS_S if is_first else WAITS_S), None):
        try:
            for sample in itertools.islice(_samples(shard), given, None):
                yield sample
                given += 1
            if damage is not None:
                damage.note_shard(shard, None)
            return
        except _FAILURES as error:
            if wait_s is None or not is_url(shard) or _is_final(error):
                if damage is not None:
                    damage.note_shard(shard, f"{type(error).__name__}: {error} (after {given} samples)")
                return
            time.sleep(wait_s)


class ShardStream:
    """An endless, shuffled, repeatable order of the samples in shards, that can be entered at any place.

    Each epoch permutes the shards; of them this process takes every `world`-th; what they hold is shuffled in blocks of
    `block` samples, which are in memory as encoded files: one block that is used, and the next one that is read.
    All of it depends on the seed and the place alone.

    Where the samples of a block differ in weight, as many are drawn from it as it holds, with replacement, each by its
    weight: weights compare the samples of one block, and every block counts alike. Those of weight 0 are passed over.

    Args:
        shards: as `expand` gives them; at least one for each process.
        seed: of the order.
        block: how many samples are shuffled together.
        rank, world: this process's number, and how many there are.
        counts: samples a shard, if known; learned while reading, and needed to enter in the middle.
        weight_power: a sample is drawn by its weight to this power; 0 takes all alike (but those of weight 0).
    """

    def __init__(
        self,
        shards: list[str],
        *,
        seed: int,
        block: int = 1024,
        rank: int = 0,
        world: int = 1,
        counts: Mapping[str, int] | None = None,
        weight_power: float = 1.0,
    ) -> None:
        if len(shards) < world:
            raise DataError(f"{len(shards)} shards for {world} processes; cut the data into {world} shards or more")
        self.shards, self.seed, self.block, self.rank, self.world = shards, seed, block, rank, world
        self.counts: dict[str, int] = dict(counts or {})
        self.weight_power = weight_power
        self.damage = Damage()

    def read_from(self, position: int) -> Iterator[RawSample]:
        """All samples from number `position` of this process's endless order on.

        Raises: DataError when there are none at all.
        """
        with contextlib.closing(Ahead(self._blocks(position))) as blocks:
            for block in blocks:
                yield from self._given(block)
                del block  # before the next but one is read

    def one_epoch(self) -> Iterator[RawSample]:
        """Every sample of this process's first epoch, once, whatever its weight (but 0)."""
        for block in self._epoch(0, 0, weighted=False):
            yield from self._given(block)

    def _given(self, block: list[RawSample]) -> Iterator[RawSample]:
        for sample in block:
            self.damage.num_read += 1
            yield sample

    def _order(self, epoch: int) -> list[str]:
        order = torch.randperm(len(self.shards), generator=self._generator(epoch)).tolist()
        return [self.shards[number] for number in order[self.rank :: self.world]]

    def _generator(self, *place: int) -> torch.Generator:
        number = self.seed
        for part in place:
            number = (number * 1_000_003 + part + 1) % 2**63
        return torch.Generator().manual_seed(number)

    def _blocks(self, position: int) -> Iterator[list[RawSample]]:
        """The endless order from number `position` on, block by block.

        An epoch of which every shard is counted already is passed over; of another one what lies before is read.
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
                raise DataError(f"there is no sample in {len(self.shards)} shards: {self._some_damage()}")
            position -= length

    def _length(self, shards: list[str]) -> int:
        return sum(self.counts[shard] for shard in shards)

    def _read(self, shard: str) -> Iterator[RawSample]:
        number = 0
        for sample in read_shard(shard, self.damage):
            if weight_of(sample):
                number += 1
                yield sample
        self.counts[shard] = number

    def _epoch(self, epoch: int, start: int, *, weighted: bool = True) -> Generator[list[RawSample], None, bool]:
        """What an epoch has from number `start` on, block by block. Returns: whether that was anything."""
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
            known = self.counts.get(shard)
            if known is not None and start and start >= known:  # else read: what gave none may give some by now
                start -= known
                continue
            for sample in self._read(shard):
                if start:
                    start -= 1
                else:
                    yield sample

    def _some_damage(self) -> str:
        return self.damage.some() or "they are empty, or all weights are 0"


def _places(weights: list[float], count: int, generator: torch.Generator) -> list[int]:
    """`count` numbers of samples of a block: each once, or, if they have weights that differ, drawn by weight."""
    if len(set(weights)) < 2:
        return torch.randperm(count, generator=generator).tolist()
    shares = torch.tensor(weights, dtype=torch.float64) / max(weights)
    return torch.multinomial(shares, count, replacement=True, generator=generator).tolist()


def write_shards(samples: Iterator[tuple[str, Mapping[str, bytes]]], folder: Path, *, per_shard: int) -> list[Path]:
    """Write (key, parts) samples as 00000.tar, 00001.tar, … into `folder`, which is there already."""
    written: list[Path] = []
    for first in samples:
        path = folder / f"{len(written):05}.tar"
        write_shard(itertools.chain([first], itertools.islice(samples, per_shard - 1)), path)
        written.append(path)
    return written


def write_shard(samples: Iterable[tuple[str, Mapping[str, bytes]]], path: Path) -> None:
    """Write (key, parts) samples as one tar. A name of any length is kept: one above 100 bytes has a PAX header."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, parts in samples:
            for extension, content in parts.items():
                _add(tar, f"{key}.{extension}", content)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _found(name: str) -> list[str]:
    if is_url(name):
        return [name]
    path = Path(name).expanduser()
    if path.is_dir():
        return sorted(str(tar) for tar in path.glob("*.tar"))
    if any(letter in str(path) for letter in "*?[") and not path.is_file():
        folder = next(parent for parent in path.parents if parent.is_dir())  # its own name may have such letters
        return sorted(str(tar) for tar in folder.glob(str(path.relative_to(folder))))
    return [str(path)] if path.is_file() else []


class _Member(tarfile.TarInfo):
    """A member's header; tarfile takes a damaged one after the first for the end of the file, and this does not."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the two blocks of zeros that end a tar
                raise
            what = str(error) or "it is cut off"
            raise tarfile.ReadError(f"a header is damaged: {what}") from error


def _samples(shard: str) -> Iterator[RawSample]:
    """Neighbours of one key together, as webdataset has them."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(_opened(shard))
        tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member))
        key, parts = None, {}
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
            if not member.isfile():
                continue
            folder, slash, name = member.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            if not (stem and dot):
                continue
            if (full := f"{folder}{slash}{stem}") != key:
                if key is not None:
                    yield RawSample(key, shard, parts)
                key, parts = full, {}
            if member.size > MAX_PART_BYTES:
                raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes; at most {MAX_PART_BYTES:,} are read")
            content = tar.extractfile(member)
            assert content is not None
            parts[extension.lower()] = content.read()
        if key is not None:
            yield RawSample(key, shard, parts)


def _opened(shard: str) -> IO[bytes]:
    if not is_url(shard):
        return open(shard, "rb")
    request = urllib.request.Request(shard, headers={"User-Agent": "unclip"})
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def _is_final(error: BaseException) -> bool:
    """A server's word that asking again will not change."""
    return isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code not in (408, 429)
