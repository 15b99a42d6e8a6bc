"""Training batches, and the data source that streams shards."""

import contextlib
import copy
import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unclip.data.folder import MAX_SKIPPED_SHARE, some_of
from unclip.data.samples import Sample, decode, read_captions, recaptioned
from unclip.data.shards import Prefetch, RawSample, ShardStream, expand
from unclip.errors import DataError

PLAIN_SHARE = 0.5


@dataclass(frozen=True)
class Rows:
    """A batch of a data source.

    Attributes:
        captions: one per row.
        images: by size in pixels, float32 [batch, 3, size, size] in [-1, 1]; empty if a row has no picture.
        index: [batch]; rows with the same number show the same picture.
        embeddings: CLIP image embeddings [batch, width] from the data; None if a row has none.
        clips: fingerprints of the CLIP models of the embeddings, where the data state them.
    """

    captions: list[str]
    images: dict[int, Tensor]
    index: Tensor
    embeddings: Tensor | None = None
    clips: frozenset[str] = frozenset()

    def pictures(self, size_px: int) -> Tensor:
        """The images of one size.

        Raises: DataError when a row has none.
        """
        if size_px in self.images:
            return self.images[size_px]
        others = ", others have no embedding" if self.embeddings is None else ""
        raise DataError(
            f"some samples have no picture{others}, but pictures are needed here: if unclip data embed made the "
            "shards, create them again with --keep-pictures; otherwise leave out the samples without a picture"
        )


def choose_captions(choices: Sequence[Sequence[str]], generator: torch.Generator) -> list[str]:
    """A caption for each row: the first (plain) one with probability `PLAIN_SHARE`, otherwise any of them."""
    chances = torch.rand(2, len(choices), generator=generator).tolist()
    return [
        texts[0] if is_plain < PLAIN_SHARE else texts[int(which * len(texts))]
        for texts, is_plain, which in zip(choices, *chances, strict=True)
    ]


MIN_JUDGED = 200
"""The share of broken samples is computed of at least this many samples."""
MAX_DAMAGED_SHARDS = 0.5
"""Largest share of damaged shards. A damaged shard still gives the samples before the damage."""
NUM_WORKERS = 2
"""Threads that decode the samples of a stream."""


class ShardSource:
    """Tar shards that are streamed and decoded in the background.

    Step n takes the n-th batch of an endless shuffled order, so a resumed run continues with the same batches. A row
    that cannot be decoded is replaced by another row of its batch, or by the next readable sample in the order.

    Args:
        shards: see `shards.expand`.
        sizes: pictures are padded to squares with white and resized to each of these.
        seed: the seed of the order.
        block: see `ShardStream`.
        rank, world: the number of this process and the number of processes; each reads its own shards.
        max_skipped_share: largest share of broken samples. At least half of the shards may be damaged.
        weight_power: samples are used in proportion to their weight to this power.
        num_workers: threads that decode.
        caption_key: the key of the caption in a sample's .json; None for the usual keys.

    Raises: DataError when `shards` names none.
    """

    is_local = True
    """A batch holds only the rows of this process."""

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
        # The same for every process.
        self._examples = ShardStream(self.stream.shards, seed=seed, block=1, counts=self.stream.counts)
        self._decoders = ThreadPoolExecutor(num_workers, thread_name_prefix="unclip-decode")
        self._prefetch: Prefetch[list[Sample]] | None = None
        self._next = (-1, 0)  # position and size of the prefetched batch
        self._should_stop: Callable[[], bool] | None = None
        self._num_warned = 0

    @property
    def skipped(self) -> dict[str, str]:
        """Samples and shards that could not be read so far, with the reasons."""
        return self.stream.damage.broken

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples of each shard that was read completely. A resumed run may set them."""
        return self.stream.counts

    def draw(self, step: int, count: int, generator: torch.Generator) -> Rows:
        """The rows of one step."""
        position = step * count
        if self._prefetch is None or self._next != (position, count):
            self._stop_prefetch()
            self._prefetch = Prefetch(self._batches(position, count), self._is_to_stop)
        try:
            samples = next(self._prefetch)
        except BaseException:
            self._stop_prefetch()
            raise
        self._next = (position + count, count)
        self._warn_of_skipped()
        captions = choose_captions([sample.captions for sample in samples], generator)
        return self._rows(samples, captions)

    def examples(self, count: int, *, held_out: bool = False) -> Rows:
        """At most `count` rows with their plain captions, always the same ones.

        With `held_out`, rows that are kept out of training; shards have none.
        """
        if held_out:
            return Rows([], {size: torch.zeros(0, 3, size, size) for size in self.sizes}, torch.zeros(0).long())
        return next(self.examples_in_parts(count, count))

    def examples_in_parts(self, count: int, size: int) -> Iterator[Rows]:
        """The rows of `examples`, `size` at a time."""
        with contextlib.closing(Prefetch(self._examples.one_epoch(), self._is_to_stop)) as samples:
            decoded = (self._decode(raw) for raw in samples)
            good = itertools.islice((sample for sample in decoded if isinstance(sample, Sample)), count)
            part = list(itertools.islice(good, size))
            if not part:
                raise DataError(f"no sample can be read: {some_of(self.skipped)}")
            while part:
                yield self._rows(part, [sample.captions[0] for sample in part])
                part = list(itertools.islice(good, size))

    def all_captions(self, limit: int = 200_000) -> Iterator[str]:
        """All captions (of the first samples), for training a tokenizer."""
        for raw in itertools.islice(self._examples.one_epoch(), limit):
            try:
                yield from read_captions(recaptioned(raw, self.caption_key))
            except DataError:
                continue  # reported when it is used

    @contextlib.contextmanager
    def reading(self, should_stop: Callable[[], bool]) -> Iterator[None]:
        """A context in which waiting for data raises Cancelled when `should_stop` returns true.

        Prefetching stops when it ends. Later draws are not affected.
        """
        self._should_stop = should_stop
        try:
            yield
        finally:
            self._should_stop = None
            self._stop_prefetch()

    def close(self) -> None:
        """End the threads, without waiting for a thread that a server blocks."""
        self._stop_prefetch()
        self._decoders.shutdown(cancel_futures=True)

    def _stop_prefetch(self) -> None:
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None

    def _is_to_stop(self) -> bool:
        return self._should_stop is not None and self._should_stop()

    def _batches(self, position: int, count: int) -> Iterator[list[Sample]]:
        (samples,) = itertools.tee(self.stream.read_from(position), 1)
        while True:
            yield self._batch(samples, count)

    def _batch(self, samples: Iterator[RawSample], count: int) -> list[Sample]:
        raw = list(itertools.islice(samples, count))
        found = list(self._decoders.map(self._decode, raw))
        self._check_damage(raw, found)
        good = [sample for sample in found if isinstance(sample, Sample)] or [self._next_good(copy.copy(samples))]
        return [s if isinstance(s, Sample) else good[place % len(good)] for place, s in enumerate(found)]

    def _check_damage(self, raw: Sequence[RawSample], found: Sequence[Sample | DataError]) -> None:
        """Record what could not be read.

        Raises: DataError when it exceeds the allowed share.
        """
        damage, share = self.stream.damage, self.max_skipped_share
        for sample, reason in zip(raw, found, strict=True):
            if not isinstance(reason, Sample):
                damage.broken[sample.name] = str(reason)
        damage.check(share, max(MAX_DAMAGED_SHARDS, share), MIN_JUDGED)

    def _next_good(self, samples: Iterator[RawSample]) -> Sample:
        """The next readable sample.

        Raises: DataError when there is none, or too many before it cannot be read.
        """
        met: set[str] = set()
        for count, raw in enumerate(samples):
            found = self._decode(raw)
            if isinstance(found, Sample):
                return found
            self._check_damage([raw], [found])
            met.add(raw.name)
            # Enough samples to span a whole epoch, although a block sampled by weight repeats some.
            if count >= 3 * len(met) + 2 * self.stream.block:
                break
        raise DataError(f"none of {len(met)} samples can be read: {some_of(self.skipped)}")

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
        embeddings = [sample.embedding for sample in samples if sample.embedding is not None]
        if len(embeddings) < len(samples):
            return Rows(captions, images, index)
        clips = frozenset(sample.clip for sample in samples if sample.clip is not None)
        return Rows(captions, images, index, torch.stack(embeddings), clips)

    def _warn_of_skipped(self) -> None:
        new = list(self.skipped.items())[self._num_warned :]
        self._num_warned += len(new)
        for name, why in new:
            warnings.warn(f"skipped {name}: {why}", stacklevel=3)


def _number(name: str) -> int:
    """A hash of a name that is the same in every process. Names in a tar may not be UTF-8."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:7])
