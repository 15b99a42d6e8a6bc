"""A batch as a data set gives it, and what every data set does.

Knows pixels and captions; knows neither folders nor shards. Called by both, and by the training tasks.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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
