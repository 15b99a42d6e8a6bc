"""A folder of captioned pictures (`metadata.jsonl`, the imagefolder convention), held in memory.

Knows files and pixels; knows no network. Called by `unclip.training` and `unclip.evaluation`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from unclip.errors import DataError


@dataclass(frozen=True)
class Record:
    """One picture of a data set: its file, its captions (the first is the plain one) and how often it is drawn."""

    file_name: str
    captions: tuple[str, ...]
    concept: str = ""
    label: str = ""
    style: str = ""
    weight: float = 1.0
    held_out: bool = False


@dataclass
class CaptionedPictures:
    """Pictures at one size with their records.

    Attributes:
        records: one a picture.
        pixels: uint8 [num_pictures, 3, size_px, size_px], on white where the file is transparent.
        skipped: names of files that could not be read, with the reason.
    """

    records: list[Record]
    pixels: Tensor
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def where(self, keep: Sequence[bool]) -> "CaptionedPictures":
        """The pictures for which `keep` is true."""
        chosen = [i for i, kept in enumerate(keep) if kept]
        return CaptionedPictures([self.records[i] for i in chosen], self.pixels[chosen], self.skipped)

    def split(self) -> tuple["CaptionedPictures", "CaptionedPictures"]:
        """The pictures to train on and those of held-out concepts."""
        return self.where([not r.held_out for r in self.records]), self.where([r.held_out for r in self.records])

    def images(self, indices: Tensor | Sequence[int] | None = None) -> Tensor:
        """float32 [batch, 3, size, size] in [-1, 1]."""
        chosen = self.pixels if indices is None else self.pixels[indices]
        return chosen.float() / 127.5 - 1

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Indices [batch_size] drawn with replacement by the records' weights."""
        weights = torch.tensor([r.weight for r in self.records], dtype=torch.float64)
        return torch.multinomial(weights, batch_size, replacement=True, generator=generator)

    def draw_captions(self, indices: Tensor, generator: torch.Generator, *, plain: float = 0.5) -> list[str]:
        """A caption for each picture: the plain one with probability `plain`, else any."""
        chances = torch.rand(2, len(indices), generator=generator).tolist()
        texts = []
        for index, is_plain, which in zip(indices.tolist(), *chances, strict=True):
            choices = self.records[index].captions
            texts.append(choices[0] if is_plain < plain else choices[int(which * len(choices))])
        return texts


def read_records(folder: Path) -> list[Record]:
    """The lines of `metadata.jsonl`. Unknown keys are passed over, as the imagefolder convention wants.

    Raises: DataError for a missing file, a broken line, or a line without a picture or a caption.
    """
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file():
        raise DataError(f"{folder} is no data set: it has no metadata.jsonl (make one with: unclip data emoji --out {folder})")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            records.append(_record(line, f"{path}, line {number}"))
    if not records:
        raise DataError(f"{path} is empty")
    return records


def _record(line: str, where: str) -> Record:
    try:
        entry: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    texts = entry.get("captions") or ([entry["text"]] if entry.get("text") else [])
    if not isinstance(entry.get("file_name"), str) or not texts:
        raise DataError(f"{where} needs a file_name and captions (a list) or text")
    if Path(entry["file_name"]).is_absolute() or ".." in Path(entry["file_name"]).parts:
        raise DataError(f"{where} names {entry['file_name']!r}, outside the data set's folder")
    known = {k: entry[k] for k in ("file_name", "concept", "label", "style", "weight", "held_out") if k in entry}
    return Record(captions=tuple(str(t) for t in texts), **known)


def load_pictures(folder: Path, size_px: int, *, max_skipped_share: float = 0.01) -> CaptionedPictures:
    """Read every picture of a data set at one size.

    Args:
        folder: has `metadata.jsonl` and the files it names.
        size_px: pictures are made square by padding with white, then resized (antialiased) to this.
        max_skipped_share: broken pictures are skipped and named, up to this share of all.

    Raises: DataError when more are broken.
    """
    folder = Path(folder)
    kept, pixels, skipped = [], [], {}
    for record in read_records(folder):
        try:
            with Image.open(folder / record.file_name) as image:
                pixels.append(_square_pixels(image, size_px))
            kept.append(record)
        except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
            skipped[record.file_name] = str(error)
    if len(skipped) > max_skipped_share * (len(kept) + len(skipped)):
        first = next(iter(skipped.items()))
        raise DataError(
            f"{len(skipped)} of {len(kept) + len(skipped)} pictures in {folder} cannot be read, more than the "
            f"{max_skipped_share:.0%} allowed; the first: {first[0]}: {first[1]}"
        )
    return CaptionedPictures(kept, torch.stack(pixels), skipped)


def _square_pixels(image: Image.Image, size_px: int) -> Tensor:
    rgba = image.convert("RGBA")
    side = max(rgba.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(rgba, ((side - rgba.width) // 2, (side - rgba.height) // 2))
    rgb = canvas.convert("RGB")
    if side != size_px:
        rgb = rgb.resize((size_px, size_px), Image.Resampling.BOX if side % size_px == 0 else Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(size_px, size_px, 3).permute(2, 0, 1)
