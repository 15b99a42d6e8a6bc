"""Sheets of pictures for people: what was made, beside what it was made from.

Knows pictures; knows nothing of how they were made. Called by the measures and the command line.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from unclip.checkpoints.files import atomic_file
from unclip.images import grid, labelled

MAX_CARDS = 200
"""Of a sheet with captions: more cannot be looked at."""


def sheet_path(prefix: Path, group: str) -> Path:
    """`PREFIX-seen.png` and `PREFIX-held-out.png`."""
    return prefix.with_name(f"{prefix.name}-{group.replace('_', '-')}.png")


def draw_pairs(real: Sequence[Image.Image], made: Sequence[Image.Image], path: Path, *, columns: int = 12) -> None:
    """Rows of real pictures, each above what was made of it."""
    size = made[0].size
    blank = Image.new("RGB", size, "white")
    cells = []
    for start in range(0, len(made), columns):
        for row in ([image.resize(size) for image in real[start : start + columns]], made[start : start + columns]):
            cells += [*row, *([blank] * (min(columns, len(made)) - len(row)))]
    _save(grid(cells, columns=min(columns, len(made))), path)


def draw_cards(
    real: Sequence[Image.Image], made: Sequence[Image.Image], captions: Sequence[str], path: Path, *, columns: int = 4
) -> None:
    """The real picture at the left of the made one, the caption below: the first 200, four in a row."""
    size = made[0].size
    cards = [
        labelled(grid([one.resize(size, Image.Resampling.LANCZOS), other], columns=2, gap=2), caption)
        for one, other, caption in list(zip(real, made, captions, strict=True))[:MAX_CARDS]
    ]
    _save(grid(cards, columns=columns, gap=12), path)


def draw_told(made: Sequence[Image.Image], captions: Sequence[str], path: Path, *, columns: int = 8) -> None:
    """Pictures with a caption below each, all of them."""
    cards = [labelled(image, caption) for image, caption in zip(made, captions, strict=True)]
    _save(grid(cards, columns=columns, gap=8), path)


def _save(sheet: Image.Image, path: Path) -> None:
    with atomic_file(path) as draft:
        sheet.save(draft, "PNG")
