"""What a training run draws its batches from: a folder held in memory, or shards streamed.

Knows data sets and pixels; knows neither networks nor noise. Called by the training tasks.
"""

import hashlib
import io
import itertools
import json
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from unclip.data.folder import MAX_SKIPPED_SHARE, CaptionedPictures, in_percent, join, load_sizes, square_pixels
from unclip.data.shards import RawSample, ShardStream, expand, is_shards
from unclip.errors import DataError, ImageError
from unclip.images import open_image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
EMBEDDING = "img_emb.npy"
PLAIN_SHARE = 0.5
MIN_JUDGED = 200
"""Samples that must have been read before a share of broken ones says anything."""


@dataclass(frozen=True)
class Rows:
    """A batch as a data set gives it.

    Attributes:
        captions: one a row.
        images: by size in pixels, float32 [batch, 3, size, size] in [-1, 1].
        index: [batch]; rows of one number show one picture.
        embeddings: CLIP image embeddings [batch, width] that lay in the data, if they did.
    """

    captions: list[str]
    images: dict[int, Tensor]
    index: Tensor
    embeddings: Tensor | None = None


class Source(Protocol):
    """A data set as the tasks see it."""

    is_local: bool
    """Whether a batch holds the rows of this process alone; else every process draws the same batch, for all."""

    @property
    def skipped(self) -> dict[str, str]:
        """Pictures, samples and shards that could not be read so far, with the reason."""
        ...

    @property
    def counts(self) -> dict[str, int]:
        """Samples in each shard that was read to its end; what is laid in before need not be counted."""
        ...

    def draw(self, step: int, count: int, generator: torch.Generator) -> Rows:
        """The rows of one step."""
        ...

    def examples(self, count: int, *, held_out: bool = False) -> Rows:
        """At most `count` rows with their plain captions, the same ones every time.

        With `held_out`, of what is kept out of training; there may be none.
        """
        ...

    def examples_in_parts(self, count: int, size: int) -> Iterator[Rows]:
        """The same as `examples`, `size` rows at a time."""
        ...

    def all_captions(self) -> Iterator[str]:
        """What a tokenizer is to learn from."""
        ...


class FolderSource:
    """Folders with `metadata.jsonl` in memory; a picture is drawn by its weight to the power of `weight_power`."""

    is_local = False

    def __init__(
        self,
        folders: Sequence[Path],
        sizes: Sequence[int],
        *,
        weight_power: float = 1.0,
        include_held_out: bool = False,
        max_skipped_share: float = MAX_SKIPPED_SHARE,
    ) -> None:
        self.sizes = tuple(sizes)
        read = [load_sizes(folder, self.sizes, max_skipped_share=max_skipped_share) for folder in folders]
        everything = [join(parts) for parts in zip(*read, strict=True)]
        split = [pictures.split(need_training=not include_held_out) for pictures in everything]
        self.pictures = everything if include_held_out else [training for training, _ in split]
        self.held_out = [held for _, held in split]
        self.records = self.pictures[0].records
        # Weight 0 is never drawn, by the power 0 neither, though 0**0 is 1.
        self.weights = torch.tensor([record.weight**weight_power if record.weight else 0.0 for record in self.records])
        self.counts: dict[str, int] = {}

    @property
    def skipped(self) -> dict[str, str]:
        return self.pictures[0].skipped

    def of_size(self, size_px: int) -> CaptionedPictures:
        """The pictures that are trained on."""
        return self.pictures[self.sizes.index(size_px)]

    def draw(self, step: int, count: int, generator: torch.Generator) -> Rows:
        index = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        captions = choose_captions([self.records[i].captions for i in index.tolist()], generator)
        return _folder_rows(self.pictures, index, captions)

    def examples(self, count: int, *, held_out: bool = False) -> Rows:
        if not held_out:
            return next(self.examples_in_parts(count, count))
        records = self.held_out[0].records[:count]
        return _folder_rows(self.held_out, torch.arange(len(records)), [record.captions[0] for record in records])

    def examples_in_parts(self, count: int, size: int) -> Iterator[Rows]:
        count = min(count, int(self.weights.count_nonzero()))
        index = torch.multinomial(self.weights, count, generator=torch.Generator().manual_seed(0))
        for part in index.split(size):
            yield _folder_rows(self.pictures, part, [self.records[i].captions[0] for i in part.tolist()])

    def all_captions(self) -> Iterator[str]:
        return itertools.chain.from_iterable(record.captions for record in self.records)


def _folder_rows(pictures: list[CaptionedPictures], index: Tensor, captions: list[str]) -> Rows:
    return Rows(captions, {part.pixels.shape[-1]: part.images(index) for part in pictures}, index)


class ShardSource:
    """Tar shards, streamed and decoded ahead of the step that needs them.

    Step number n takes the n-th batch of an endless shuffled order, so a run that goes on sees what it would have seen.
    A row that cannot be decoded is replaced by another of its batch, and where that has none, by the next of the order.

    Args:
        shards: as `shards.expand` takes them.
        sizes: pictures are made square with white and resized to each of these.
        seed: of the order.
        rank, world: this process's number, and how many there are: each reads its own shards.
        max_skipped_share: of the samples that may be broken; of the shards half may be.
        num_workers: threads that decode.

    Raises: DataError when the shards are not there or hold nothing.
    """

    is_local = True

    def __init__(
        self,
        shards: str | Path,
        sizes: Sequence[int],
        *,
        seed: int = 0,
        block: int = 1024,
        rank: int = 0,
        world: int = 1,
        max_skipped_share: float = MAX_SKIPPED_SHARE,
        num_workers: int = 2,
    ) -> None:
        self.sizes, self.max_skipped_share = tuple(sizes), max_skipped_share
        self.stream = ShardStream(expand(shards), seed=seed, block=block, rank=rank, world=world)
        self._examples = ShardStream(self.stream.shards, seed=seed, block=1)  # the same for every process
        self._examples.counts = self.stream.counts
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="unclip-read")
        self._decoders = ThreadPoolExecutor(num_workers, thread_name_prefix="unclip-decode")
        self._samples = _Order(())
        self._next = -1
        self._ahead: Future[list[_Sample]] | None = None
        self._told = 0

    @property
    def skipped(self) -> dict[str, str]:
        return self.stream.damage.broken

    @property
    def counts(self) -> dict[str, int]:
        return self.stream.counts

    def draw(self, step: int, count: int, generator: torch.Generator) -> Rows:
        position = step * count
        if self._ahead is None or self._next != position:
            if self._ahead is not None:
                self._ahead.cancel()
            self._samples = _Order(self.stream.read_from(position))
            self._ahead = self._reader.submit(self._batch, self._samples, count)
        samples = self._ahead.result()
        self._next = position + count
        self._ahead = self._reader.submit(self._batch, self._samples, count)
        self._tell()
        captions = choose_captions([sample.captions for sample in samples], generator)
        return self._rows(samples, captions)

    def examples(self, count: int, *, held_out: bool = False) -> Rows:
        if held_out:  # shards of their own would have to say so
            return Rows([], {size: torch.zeros(0, 3, size, size) for size in self.sizes}, torch.zeros(0).long())
        return next(self.examples_in_parts(count, count))

    def examples_in_parts(self, count: int, size: int) -> Iterator[Rows]:
        decoded = (self._decode(raw) for raw in self._examples.one_epoch())
        good = itertools.islice((sample for sample in decoded if isinstance(sample, _Sample)), count)
        part = list(itertools.islice(good, size))
        if not part:
            raise DataError(f"no sample can be read: {self._some()}")
        while part:
            yield self._rows(part, [sample.captions[0] for sample in part])
            part = list(itertools.islice(good, size))

    def all_captions(self, limit: int = 200_000) -> Iterator[str]:
        for raw in itertools.islice(self._examples.one_epoch(), limit):
            try:
                yield from read_captions(raw)
            except DataError:
                continue  # named when it is drawn

    def close(self) -> None:
        """Let the threads end."""
        for pool in (self._reader, self._decoders):
            pool.shutdown(cancel_futures=True)

    def _batch(self, samples: "_Order", count: int) -> "list[_Sample]":
        raw = list(itertools.islice(samples, count))
        found = list(self._decoders.map(self._decode, raw))
        self._judge(raw, found)
        good = [sample for sample in found if isinstance(sample, _Sample)] or [self._next_good(samples)]
        return [s if isinstance(s, _Sample) else good[place % len(good)] for place, s in enumerate(found)]

    def _judge(self, raw: Sequence[RawSample], found: "Sequence[_Sample | DataError]") -> None:
        """Note what could not be read.

        Raises: DataError when that is too much by now.
        """
        damage = self.stream.damage
        for sample, reason in zip(raw, found, strict=True):
            if not isinstance(reason, _Sample):
                damage.broken[sample.name] = str(reason)
        shards = sum(name in self.stream.counts or name in self.stream.shards for name in damage.broken)
        broken = len(damage.broken) - shards
        if broken / max(damage.num_read, MIN_JUDGED) > self.max_skipped_share:
            raise DataError(
                f"{broken} of {damage.num_read} samples cannot be read, more than the "
                f"{in_percent(self.max_skipped_share)} allowed; {self._some()}"
            )
        if 2 * shards > len(self.stream.shards):
            raise DataError(f"{shards} of {len(self.stream.shards)} shards are damaged; {self._some()}")

    def _next_good(self, samples: "_Order") -> "_Sample":
        """The next sample of the order that can be read; it keeps its turn.

        Raises: DataError when there is none, or too many before it cannot be read.
        """
        met: set[str] = set()
        for count, raw in enumerate(samples.ahead()):
            found = self._decode(raw)
            if isinstance(found, _Sample):
                return found
            self._judge([raw], [found])
            met.add(raw.name)
            # Three times as many as there are, so a whole epoch lies between; a block drawn by weight repeats some.
            if count >= 3 * len(met) + 2 * self.stream.block:
                break
        raise DataError(f"of {len(met)} samples none can be read: {self._some()}")

    def _decode(self, raw: RawSample) -> "_Sample | DataError":
        try:
            return decode(raw, self.sizes)
        except DataError as error:
            return error

    def _rows(self, samples: "list[_Sample]", captions: list[str]) -> Rows:
        index = torch.tensor([_number(sample.name) for sample in samples])
        images = {
            size: torch.stack([s.pixels[size] for s in samples]).float() / 127.5 - 1
            for size in self.sizes
            if all(size in s.pixels for s in samples)
        }
        found = [sample.embedding for sample in samples]
        embeddings = torch.stack([e for e in found if e is not None]) if all(e is not None for e in found) else None
        return Rows(captions, images, index, embeddings)

    def _some(self) -> str:
        return "; ".join(f"{name}: {why}" for name, why in list(self.skipped.items())[:3])

    def _tell(self) -> None:
        new = list(self.skipped.items())[self._told :]
        self._told += len(new)
        for name, why in new:
            warnings.warn(f"skipped {name}: {why}", stacklevel=3)


class _Order:
    """Samples one after another, where one may look ahead without taking any."""

    def __init__(self, samples: Iterable[RawSample]) -> None:
        self._samples = iter(samples)
        self._seen: deque[RawSample] = deque()

    def __iter__(self) -> Iterator[RawSample]:
        return self

    def __next__(self) -> RawSample:
        return self._seen.popleft() if self._seen else next(self._samples)

    def ahead(self) -> Iterator[RawSample]:
        """The samples that come next; each still comes when it is its turn."""
        yield from tuple(self._seen)
        for sample in self._samples:
            self._seen.append(sample)
            yield sample


@dataclass(frozen=True)
class _Sample:
    name: str
    captions: tuple[str, ...]
    pixels: dict[int, Tensor]
    embedding: Tensor | None


def open_source(
    data: str | Path | Sequence[str | Path],
    sizes: Sequence[int],
    *,
    seed: int,
    weight_power: float = 1.0,
    include_held_out: bool = False,
    max_skipped_share: float = MAX_SKIPPED_SHARE,
    rank: int = 0,
    world: int = 1,
) -> Source:
    """The data set at `data`: folders with `metadata.jsonl`, or tar shards (a folder of them, a glob, URLs).

    Pictures or samples that cannot be read are skipped and named, up to `max_skipped_share` of all.

    Raises: DataError when it is neither, or cannot be read.
    """
    places = [data] if isinstance(data, str | Path) else list(data)
    if any(is_shards(place) for place in places):
        if len(places) > 1:
            raise DataError("shards are read from one place; put them into one folder, or name them with one pattern")
        return ShardSource(places[0], sizes, seed=seed, rank=rank, world=world, max_skipped_share=max_skipped_share)
    return FolderSource(
        [Path(place) for place in places],
        sizes,
        weight_power=weight_power,
        include_held_out=include_held_out,
        max_skipped_share=max_skipped_share,
    )


def choose_captions(choices: Sequence[Sequence[str]], generator: torch.Generator) -> list[str]:
    """A caption for each row: the first, plain one half the time, else any."""
    chances = torch.rand(2, len(choices), generator=generator).tolist()
    return [
        texts[0] if is_plain < PLAIN_SHARE else texts[int(which * len(texts))]
        for texts, is_plain, which in zip(choices, *chances, strict=True)
    ]


def decode(raw: RawSample, sizes: Sequence[int]) -> _Sample:
    """Captions, pixels at each size (uint8) and the embedding of a sample, as far as it has them.

    Raises: DataError for a sample without caption, with neither picture nor embedding, or with a broken one.
    """
    captions = read_captions(raw)
    image = next((raw.parts[extension] for extension in IMAGE_EXTENSIONS if extension in raw.parts), None)
    embedding = _embedding(raw.parts[EMBEDDING]) if EMBEDDING in raw.parts else None
    if image is None and embedding is None:
        raise DataError(f"it has no picture (.{', .'.join(IMAGE_EXTENSIONS)}) and no .{EMBEDDING}")
    pixels = {}
    if image is not None and sizes:
        try:
            picture = open_image(io.BytesIO(image), raw.key)
        except ImageError as error:
            raise DataError(str(error)) from error
        pixels = {size: square_pixels(picture, size) for size in sizes}
    return _Sample(raw.name, captions, pixels, embedding)


def read_captions(raw: RawSample) -> tuple[str, ...]:
    """Of .txt, or of .json with "captions" or "caption"; the plain one first.

    Raises: DataError when there is none.
    """
    try:
        if "json" in raw.parts:
            about = json.loads(raw.parts["json"])
            texts = about.get("captions") or [about.get("caption")] if isinstance(about, dict) else []
            good = tuple(text for text in texts if isinstance(text, str) and text.strip())
            if good:
                return good
        text = raw.parts.get("txt", b"").decode("utf-8").strip()
    except (ValueError, RecursionError, TypeError) as error:
        raise DataError(f"its caption cannot be read: {error}") from error
    if not text:
        raise DataError("it has no caption (.txt, or .json with caption or captions)")
    return (text,)


def _number(name: str) -> int:
    """The same for the same picture in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])


def _embedding(content: bytes) -> Tensor:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f".{EMBEDDING} cannot be read: {error}") from error
    if array.ndim != 1 or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise DataError(f".{EMBEDDING} is no list of finite numbers but {array.dtype} {array.shape}")
    return torch.from_numpy(array.astype(np.float32))
