"""A batch as a data set gives it, and what every data set does.

Knows pixels and captions; knows neither folders nor shards. Called by both, and by the training tasks.
"""

import contextlib
import hashlib
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from unclip.data.folder import MAX_SKIPPED_SHARE, in_percent
from unclip.data.samples import Sample, decode, read_captions, recaptioned
from unclip.data.shards import Ahead, RawSample, ShardStream, expand
from unclip.errors import DataError

PLAIN_SHARE = 0.5


@dataclass(frozen=True)
class Rows:
    """A batch as a data set gives it.

    Attributes:
        captions: one a row.
        images: by size in pixels, float32 [batch, 3, size, size] in [-1, 1]; none where a row has no picture.
        index: [batch]; rows of one number show one picture.
        embeddings: CLIP image embeddings [batch, width] that lay in the data, if they did.
        clips: fingerprints of the CLIPs that these are of, as far as the data say it.
    """

    captions: list[str]
    images: dict[int, Tensor]
    index: Tensor
    embeddings: Tensor | None = None
    clips: frozenset[str] = frozenset()

    def pictures(self, size_px: int) -> Tensor:
        """The images of a size, where they are needed.

        Raises: DataError when a row has none.
        """
        if size_px in self.images:
            return self.images[size_px]
        others = ", others have no embedding" if self.embeddings is None else ""
        raise DataError(
            f"some samples of the data have no picture{others}, and pictures are needed here: if unclip data embed "
            "made the shards, make them again with --keep-pictures, else leave out the samples without a picture"
        )


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

    def reading(self, should_stop: Callable[[], bool]) -> contextlib.AbstractContextManager[None]:
        """Within it a wait for data ends with Cancelled once `should_stop`; after it nothing is read ahead.

        What is drawn later is the same.
        """
        ...


def choose_captions(choices: Sequence[Sequence[str]], generator: torch.Generator) -> list[str]:
    """A caption for each row: the first, plain one half the time, else any."""
    chances = torch.rand(2, len(choices), generator=generator).tolist()
    return [
        texts[0] if is_plain < PLAIN_SHARE else texts[int(which * len(texts))]
        for texts, is_plain, which in zip(choices, *chances, strict=True)
    ]


MIN_JUDGED = 200
"""Samples that must have been read before a share of broken ones says anything."""
MAX_DAMAGED_SHARDS = 0.5
"""Of all shards; a damaged one gives the samples before its damage."""
NUM_WORKERS = 2
"""Threads that decode the samples of a stream."""


class ShardSource:
    """Tar shards, streamed and decoded ahead of the step that needs them.

    Step number n takes the n-th batch of an endless shuffled order, so a run that goes on sees what it would have seen.
    A row that cannot be decoded is replaced by another of its batch, and where that has none, by the next of the order.

    Args:
        shards: as `shards.expand` takes them.
        sizes: pictures are made square with white and resized to each of these.
        seed: of the order.
        rank, world: this process's number, and how many there are: each reads its own shards.
        max_skipped_share: of the samples that may be broken; of the shards at least half may be.
        weight_power: of a sample's weight, in how often it is drawn.
        num_workers: threads that decode.
        caption_key: of the caption in a sample's .json; None for the usual ones.

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
        weight_power: float = 1.0,
        num_workers: int = NUM_WORKERS,
        caption_key: str | None = None,
    ) -> None:
        self.caption_key = caption_key
        self.sizes, self.max_skipped_share = tuple(sizes), max_skipped_share
        self.stream = ShardStream(
            expand(shards), seed=seed, block=block, rank=rank, world=world, weight_power=weight_power
        )
        self._examples = ShardStream(self.stream.shards, seed=seed, block=1)  # the same for every process
        self._examples.counts = self.stream.counts
        self._decoders = ThreadPoolExecutor(num_workers, thread_name_prefix="unclip-decode")
        self._ahead: Ahead[list[Sample]] | None = None
        self._next = (-1, 0)  # where the batch ahead begins, and its size
        self._should_stop: Callable[[], bool] | None = None
        self._told = 0

    @property
    def skipped(self) -> dict[str, str]:
        return self.stream.damage.broken

    @property
    def counts(self) -> dict[str, int]:
        return self.stream.counts

    def draw(self, step: int, count: int, generator: torch.Generator) -> Rows:
        position = step * count
        if self._ahead is None or self._next != (position, count):
            self._read_no_further()
            self._ahead = Ahead(self._batches(position, count), self._is_to_stop)
        try:
            samples = next(self._ahead)
        except BaseException:
            self._read_no_further()
            raise
        self._next = (position + count, count)
        self._tell()
        captions = choose_captions([sample.captions for sample in samples], generator)
        return self._rows(samples, captions)

    def examples(self, count: int, *, held_out: bool = False) -> Rows:
        if held_out:  # shards of their own would have to say so
            return Rows([], {size: torch.zeros(0, 3, size, size) for size in self.sizes}, torch.zeros(0).long())
        return next(self.examples_in_parts(count, count))

    def examples_in_parts(self, count: int, size: int) -> Iterator[Rows]:
        with contextlib.closing(Ahead(self._examples.one_epoch(), self._is_to_stop)) as samples:
            decoded = (self._decode(raw) for raw in samples)
            good = itertools.islice((sample for sample in decoded if isinstance(sample, Sample)), count)
            part = list(itertools.islice(good, size))
            if not part:
                raise DataError(f"no sample can be read: {self._some()}")
            while part:
                yield self._rows(part, [sample.captions[0] for sample in part])
                part = list(itertools.islice(good, size))

    def all_captions(self, limit: int = 200_000) -> Iterator[str]:
        for raw in itertools.islice(self._examples.one_epoch(), limit):
            try:
                yield from read_captions(recaptioned(raw, self.caption_key))
            except DataError:
                continue  # named when it is drawn

    @contextlib.contextmanager
    def reading(self, should_stop: Callable[[], bool]) -> Iterator[None]:
        self._should_stop = should_stop
        try:
            yield
        finally:
            self._should_stop = None
            self._read_no_further()

    def close(self) -> None:
        """Let the threads end; one that hangs in a server's answer is not waited for."""
        self._read_no_further()
        self._decoders.shutdown(cancel_futures=True)

    def _read_no_further(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _is_to_stop(self) -> bool:
        return self._should_stop is not None and self._should_stop()

    def _batches(self, position: int, count: int) -> Iterator[list[Sample]]:
        samples = _Order(self.stream.read_from(position))
        while True:
            yield self._batch(samples, count)

    def _batch(self, samples: "_Order", count: int) -> list[Sample]:
        raw = list(itertools.islice(samples, count))
        found = list(self._decoders.map(self._decode, raw))
        self._judge(raw, found)
        good = [sample for sample in found if isinstance(sample, Sample)] or [self._next_good(samples)]
        return [s if isinstance(s, Sample) else good[place % len(good)] for place, s in enumerate(found)]

    def _judge(self, raw: Sequence[RawSample], found: Sequence[Sample | DataError]) -> None:
        """Note what could not be read.

        Raises: DataError when that is too much by now.
        """
        damage = self.stream.damage
        for sample, reason in zip(raw, found, strict=True):
            if not isinstance(reason, Sample):
                damage.broken[sample.name] = str(reason)
        broken, shards = damage.num_broken_samples, damage.num_broken_shards
        if broken / max(damage.num_read, MIN_JUDGED) > self.max_skipped_share:
            raise DataError(
                f"{broken} of {damage.num_read} samples cannot be read, more than the "
                f"{in_percent(self.max_skipped_share)} allowed; {self._some()}"
            )
        if shards > max(MAX_DAMAGED_SHARDS, self.max_skipped_share) * len(self.stream.shards):
            raise DataError(f"{shards} of {len(self.stream.shards)} shards are damaged; {self._some()}")

    def _next_good(self, samples: "_Order") -> Sample:
        """The next sample of the order that can be read; it keeps its turn.

        Raises: DataError when there is none, or too many before it cannot be read.
        """
        met: set[str] = set()
        for count, raw in enumerate(samples.ahead()):
            found = self._decode(raw)
            if isinstance(found, Sample):
                return found
            self._judge([raw], [found])
            met.add(raw.name)
            # Three times as many as there are, so a whole epoch lies between; a block drawn by weight repeats some.
            if count >= 3 * len(met) + 2 * self.stream.block:
                break
        raise DataError(f"of {len(met)} samples none can be read: {self._some()}")

    def _decode(self, raw: RawSample) -> Sample | DataError:
        try:
            return decode(recaptioned(raw, self.caption_key), self.sizes)
        except DataError as error:
            return error

    def _rows(self, samples: list[Sample], captions: list[str]) -> Rows:
        index = torch.tensor([_number(sample.name) for sample in samples])
        images = {
            size: torch.stack([s.pixels[size] for s in samples]).float() / 127.5 - 1
            for size in self.sizes
            if all(size in s.pixels for s in samples)
        }
        found = [sample.embedding for sample in samples]
        embeddings = torch.stack([e for e in found if e is not None]) if all(e is not None for e in found) else None
        clips = frozenset(sample.clip for sample in samples if sample.clip is not None)
        return Rows(captions, images, index, embeddings, clips if embeddings is not None else frozenset())

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


def _number(name: str) -> int:
    """The same for the same picture in every process; a name in a tar need not be UTF-8."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:7])
