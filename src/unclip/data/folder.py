"""A folder of captioned pictures (`metadata.jsonl`, the imagefolder convention), held in memory.

Knows files and pixels; knows no network. Called by `unclip.training` and `unclip.evaluation`.
"""

import json
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor

from unclip.checkpoints.files import safe_join
from unclip.errors import DataError, ImageError, UnsafeFileError
from unclip.images import MAX_PIXELS, open_image

MAX_SKIPPED_SHARE = 0.01
"""How much of a data set may be broken, unless said otherwise."""


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
        skipped: files that could not be read, by their path, with the reason.
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

    def split(self, *, need_training: bool = True) -> tuple["CaptionedPictures", "CaptionedPictures"]:
        """The pictures to train on and those of held-out concepts (maybe none).

        Raises: DataError when there is none to train on, unless `need_training` is false.
        """
        training, held_out = (self.where([r.held_out is held for r in self.records]) for held in (False, True))
        if need_training and not any(r.weight for r in training.records):
            raise DataError(
                f"none of {len(self)} pictures is there to train on: all are held out, or of weight 0 (see held_out "
                "and weight in metadata.jsonl)"
            )
        return training, held_out

    def images(self, indices: Tensor | Sequence[int] | None = None) -> Tensor:
        """float32 [batch, 3, size, size] in [-1, 1]."""
        chosen = self.pixels if indices is None else self.pixels[indices]
        return chosen.float() / 127.5 - 1


def join(parts: Sequence[CaptionedPictures]) -> CaptionedPictures:
    """Pictures of several data sets, of one size, as one."""
    records = [record for part in parts for record in part.records]
    skipped = {name: why for part in parts for name, why in part.skipped.items()}
    return CaptionedPictures(records, torch.cat([part.pixels for part in parts]), skipped)


def read_records(folder: Path) -> list[Record]:
    """The lines of `metadata.jsonl`. Unknown keys are passed over, as the imagefolder convention wants.

    Raises: DataError for a missing file, a broken line, or a line without a picture or a caption.
    """
    path = Path(folder) / "metadata.jsonl"
    if not path.is_file():
        raise DataError(
            f"{folder} is no data set: it has no metadata.jsonl (make one with: unclip data emoji --out {folder})"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            records.append(_record(line, f"{path}, line {number}"))
    if not records:
        raise DataError(f"{path} is empty")
    return records


def _record(line: str, where: str) -> Record:
    try:
        entry: dict[str, Any] = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise DataError(f"{where} is no JSON object but a {type(entry).__name__}")
    texts = entry.get("captions") or ([entry["text"]] if entry.get("text") else [])
    is_texts = isinstance(texts, list) and all(isinstance(text, str) and text.strip() for text in texts)
    if not isinstance(entry.get("file_name"), str) or not texts or not is_texts:
        raise DataError(f"{where} needs a file_name, and captions (a list of texts that are not blank) or text")
    known = {k: entry[k] for k in ("file_name", "concept", "label", "style", "weight", "held_out") if k in entry}
    for key in ("concept", "label", "style"):
        if not isinstance(known.get(key, ""), str):
            raise DataError(f"{where}: {key} is {known[key]!r}; it must be a text")
    try:
        "".join([*texts, *(known.get(key, "") for key in ("concept", "label", "style"))]).encode()
    except UnicodeEncodeError as error:  # JSON can say half a character, which no text may hold
        raise DataError(f"{where} has a text that is no Unicode text: {error}") from error
    weight = known.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise DataError(f"{where}: weight is {weight!r}; it must be a number from 0 up")
    if not isinstance(known.get("held_out", False), bool):
        raise DataError(f"{where}: held_out is {known['held_out']!r}; it must be true or false")
    return Record(captions=tuple(texts), **known)


def load_pictures(folder: Path, size_px: int, *, max_skipped_share: float = MAX_SKIPPED_SHARE) -> CaptionedPictures:
    """Read every picture of a data set at one size: `load_sizes` for one."""
    return load_sizes(folder, [size_px], max_skipped_share=max_skipped_share)[0]


def load_sizes(
    folder: Path, sizes_px: Sequence[int], *, max_skipped_share: float = MAX_SKIPPED_SHARE
) -> list[CaptionedPictures]:
    """Read every picture of a data set once, at several sizes.

    Args:
        folder: has `metadata.jsonl` and the files it names.
        sizes_px: pictures are made square by padding with white, then resized (antialiased) to each.
        max_skipped_share: broken pictures are skipped and named, up to this share of all.

    Returns: the same records for each size.

    Raises: DataError when more are broken, or a name leads out of the folder. A warning names what was skipped.
    """
    folder = Path(folder)
    kept: list[Record] = []
    pixels: dict[int, list[Tensor]] = {size: [] for size in sizes_px}
    broken: dict[str, str] = {}
    for record in read_records(folder):
        try:
            path = safe_join(folder, record.file_name)
        except UnsafeFileError as error:
            raise DataError(f"{folder / 'metadata.jsonl'} names a file outside the data set: {error}") from error
        try:
            found = read_pixels(path, str(path), sizes_px)
        except ImageError as error:
            broken[record.file_name] = str(error)
            continue
        kept.append(record)
        for size in pixels:
            pixels[size].append(found[size])
    if not kept or len(broken) > max_skipped_share * (len(kept) + len(broken)):
        first = next(iter(broken.items()))
        raise DataError(
            f"{len(broken)} of {len(kept) + len(broken)} pictures in {folder} cannot be read, "
            f"{f'more than the {in_percent(max_skipped_share)} allowed' if kept else 'so there is none'}; "
            f"the first: {first[0]}: {first[1]}"
        )
    if broken:
        some = "; ".join(f"{name}: {why}" for name, why in list(broken.items())[:3])
        warnings.warn(f"{len(broken)} pictures in {folder} cannot be read and are skipped: {some}", stacklevel=3)
    skipped = {str(folder / name): why for name, why in broken.items()}
    return [CaptionedPictures(kept, torch.stack(pixels[size]), skipped) for size in sizes_px]


def in_percent(share: float) -> str:
    """0.005 as "0.5%"."""
    return f"{100 * share:.4g}%"


def read_pixels(file: Path | IO[bytes], name: str, sizes_px: Iterable[int]) -> dict[int, Tensor]:
    """`square_pixels` of a picture file at several sizes.

    Raises: ImageError when it cannot be read, or does not fit into memory.
    """
    image = open_image(file, name)
    try:
        return {size: square_pixels(image, size) for size in sizes_px}
    except MemoryError as error:
        width, height = image.size
        raise ImageError(f"{name} is {width}×{height} pixels: there is not enough memory to resize it") from error


def square_pixels(image: Image.Image, size_px: int) -> Tensor:
    """uint8 [3, size_px, size_px] of an RGB picture: as if padded to a square with white, then resized (antialiased).

    The longer side is resized before the shorter one is padded, so a thin picture never becomes a large square. Pillow
    resizes rows before columns, so this changes no pixel of a wide picture; a tall one is padded first while it can be.
    """
    side = max(image.size)
    filter_ = Image.Resampling.BOX if side % size_px == 0 else Image.Resampling.LANCZOS
    width = height = side
    if image.width == side:
        width, image = size_px, image.resize((size_px, image.height), filter_)
    elif side * side > MAX_PIXELS:
        height, image = size_px, image.resize((image.width, size_px), filter_)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    canvas = canvas.resize((size_px, size_px), filter_)
    return torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(size_px, size_px, 3).permute(2, 0, 1)
