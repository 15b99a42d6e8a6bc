"""From a list of wishes to files: cut into batches, draw each, save each at once.

Knows neither captions nor pictures given, only what a wish is called. Called by `generate` and `vary`.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from unclip.cli.messages import error, note
from unclip.cli.options import MAX_SEED
from unclip.cli.pictures import Album
from unclip.errors import InputError, UnclipError

if TYPE_CHECKING:
    from PIL.Image import Image

SOME_FAILED = 3
"""The exit code when some pictures were made and others were not."""


@dataclass(frozen=True)
class Wish:
    """One picture to be made.

    Attributes:
        given: a caption, or a picture.
        seed: of this picture.
        name: the first part of its file name.
        facts: what its file alone says of it; the seed and what all files say are added.
    """

    given: Any
    seed: int
    name: str
    facts: Mapping[str, Any]


def chosen_seed(seed: int | None, *, quiet: bool) -> int:
    """The seed that was given, or a fresh one, short enough to be typed, which is told on stderr unless `quiet`."""
    if seed is not None:
        return seed
    fresh = secrets.randbelow(2**32)
    if not quiet:
        note(f"seed {fresh}")
    return fresh


def picture_seed(first: int, index: int) -> int:
    """The seed of picture `index`: one after another, and round from the largest to 0."""
    return (first + index) % (MAX_SEED + 1)


def cut(wishes: Iterable[Wish], size: int) -> Iterator[list[Wish]]:
    """Batches of `size`, the last maybe smaller."""
    batch: list[Wish] = []
    for wish in wishes:
        batch.append(wish)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def make_all(
    batches: Iterable[list[Wish]], draw: Callable[[list[Wish]], "list[Image]"], album: Album, about: Mapping[str, Any]
) -> None:
    """Draw every batch and save it at once; `about` is what every file says.

    Raises: what `draw` and the album raise while nothing is made yet; typer.Exit(3), with the error told, after that.
    """
    try:
        for batch in batches:
            with within_memory(len(batch)):
                images = draw(batch)
            _save(batch, images, album, about)
    except UnclipError as problem:
        if not album.num_saved:
            raise
        error(problem)
        raise typer.Exit(SOME_FAILED) from problem


def finish(album: Album, num_failed: int) -> None:
    """Leave with the right code when inputs failed that were told of already."""
    if num_failed:
        raise typer.Exit(SOME_FAILED if album.num_saved else 1)


@contextmanager
def within_memory(batch_size: int) -> Iterator[None]:
    """Raises: InputError that says what to do, when the device's memory does not hold what is done within."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as problem:
        raise InputError(
            f"the device's memory does not hold a batch of {batch_size}: make --batch-size smaller, or try "
            "--dtype bfloat16 or --cpu-offload"
        ) from problem


def _save(batch: list[Wish], images: "list[Image]", album: Album, about: Mapping[str, Any]) -> None:
    """All files first, then the talk: a reader that goes away costs no picture."""
    saved = []
    try:
        for wish, image in zip(batch, images, strict=True):
            facts = {**wish.facts, **about, "seed": wish.seed}
            saved.append((album.save(image, f"{wish.name}-{wish.seed}", facts), facts))
            if album.kept is not None:
                album.kept.append(image)
    finally:
        for path, facts in saved:
            album.tell(path, facts)
