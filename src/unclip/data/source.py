"""Sources of training batches: folders held in memory, or shards that are streamed."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from unclip.data.batches import NUM_WORKERS, Rows, ShardSource, choose_captions
from unclip.data.folder import MAX_SKIPPED_SHARE, USUAL_KEYS, CaptionedPictures, Keys, join, load_sizes
from unclip.data.shards import is_shards
from unclip.errors import DataError


class FolderSource:
    """Folders of captioned pictures in memory; they are sampled by their weights to the power of `weight_power`.

    The methods are those of `ShardSource`.
    """

    is_local = False
    """Every process draws the same full batch."""

    def __init__(
        self,
        folders: Sequence[Path],
        sizes: Sequence[int],
        *,
        weight_power: float = 1.0,
        include_held_out: bool = False,
        max_skipped_share: float = MAX_SKIPPED_SHARE,
        keys: Keys = USUAL_KEYS,
    ) -> None:
        self.sizes = tuple(sizes)
        read = [load_sizes(folder, self.sizes, keys=keys, max_skipped_share=max_skipped_share) for folder in folders]
        everything = [join(parts) for parts in zip(*read, strict=True)]
        split = [pictures.split(need_training=not include_held_out) for pictures in everything]
        self.pictures = everything if include_held_out else [training for training, _ in split]
        self.held_out = [held for _, held in split]
        self.records = self.pictures[0].records
        # Pictures of weight 0 are never sampled, even with the power 0, although 0**0 is 1.
        self.weights = torch.tensor([record.weight**weight_power if record.weight else 0.0 for record in self.records])
        self.counts: dict[str, int] = {}

    @property
    def skipped(self) -> dict[str, str]:
        return self.pictures[0].skipped

    def of_size(self, size_px: int) -> CaptionedPictures:
        """The pictures used for training."""
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

    def reading(self, should_stop: Callable[[], bool]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # all is in memory


def _folder_rows(pictures: list[CaptionedPictures], index: Tensor, captions: list[str]) -> Rows:
    return Rows(captions, {part.pixels.shape[-1]: part.images(index) for part in pictures}, index)


Source = FolderSource | ShardSource
"""A data set for training tasks."""


def open_source(
    data: str | Path | Sequence[str | Path],
    sizes: Sequence[int],
    *,
    seed: int,
    weight_power: float = 1.0,
    include_held_out: bool = False,
    max_skipped_share: float = MAX_SKIPPED_SHARE,
    num_workers: int = NUM_WORKERS,
    keys: Keys = USUAL_KEYS,
    rank: int = 0,
    world: int = 1,
) -> Source:
    """The data set at `data`: folders with metadata, or tar shards (a folder of them, a glob, URLs).

    Pictures or samples that cannot be read are skipped and named, up to `max_skipped_share` of all. A stream's samples
    are decoded by `num_workers` threads. `keys` name pictures and captions in the metadata of a folder, and captions in
    the .json of a shard's samples.

    Raises: DataError when it is neither, or cannot be read.
    """
    places = [data] if isinstance(data, str | Path) else list(data)
    if any(is_shards(place) for place in places):
        if len(places) > 1:
            raise DataError("shards must be in one place; put them into one folder, or name them with one pattern")
        return ShardSource(
            places[0],
            sizes,
            seed=seed,
            rank=rank,
            world=world,
            max_skipped_share=max_skipped_share,
            weight_power=weight_power,
            num_workers=num_workers,
            caption_key=keys.caption,
        )
    return FolderSource(
        [Path(place) for place in places],
        sizes,
        weight_power=weight_power,
        include_held_out=include_held_out,
        max_skipped_share=max_skipped_share,
        keys=keys,
    )
