"""Read a folder of captioned pictures (metadata.jsonl or metadata.csv, the imagefolder convention) into memory."""

import contextlib
import csv
import functools
import io
import itertools
import json
import os
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image
from torch import Tensor

from unclip.checkpoints.files import safe_join
from unclip.errors import DataError, ImageError, UnsafeFileError
from unclip.images import MAX_PIXELS, PICTURE_SUFFIXES, open_image

MAX_SKIPPED_SHARE = 0.01
"""Default largest share of broken samples in a data set."""
METADATA = ("metadata.jsonl", "metadata.csv")
WEIGHT_LIMITS = (1e-12, 1e12)
"""The smallest and the largest weight besides 0."""


@dataclass(frozen=True)
class Keys:
    """The keys under which metadata name a picture and its captions.

    Attributes:
        image: the key of the picture's file; None: the first present of file_name, image, image_path, path, filename.
        caption: the key of the caption, or of a list of captions; None means the first of captions, text, caption and
            prompt that has one.
    """

    image: str | None = None
    caption: str | None = None

    @property
    def images(self) -> tuple[str, ...]:
        """The keys for a picture, in order of precedence."""
        return ("file_name", "image", "image_path", "path", "filename") if self.image is None else (self.image,)

    @property
    def captions(self) -> tuple[str, ...]:
        """The keys for captions, in order of precedence."""
        return ("captions", "text", "caption", "prompt") if self.caption is None else (self.caption,)

    def in_lower_case(self) -> "Keys":
        """The same in lower case, without white space around them."""
        return Keys(*(key and key.strip().lower() for key in (self.image, self.caption)))


USUAL_KEYS = Keys()


@dataclass(frozen=True)
class Record:
    """One picture of a data set: its file, its captions (the first is the plain one) and its sampling weight."""

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
        records: one per picture.
        pixels: uint8 [num_pictures, 3, size_px, size_px], on white where the file is transparent.
        skipped: files that could not be read, by path, with the reasons.
    """

    records: list[Record]
    pixels: Tensor
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.records)

    def split(self, *, need_training: bool = True) -> tuple["CaptionedPictures", "CaptionedPictures"]:
        """The pictures to train on and those of held-out concepts, which may be none.

        Raises: DataError when there are none to train on, unless `need_training` is false.
        """
        if need_training and not any(record.weight for record in self.records if not record.held_out):
            raise DataError(
                f"none of {len(self)} pictures can be used for training: all are held out or have weight 0 (see "
                "held_out and weight in the metadata)"
            )
        parts = ([i for i, r in enumerate(self.records) if r.held_out is held] for held in (False, True))
        training, held_out = (
            CaptionedPictures([self.records[i] for i in part], self.pixels[part], self.skipped) for part in parts
        )
        return training, held_out

    def images(self, indices: Tensor | Sequence[int] | None = None) -> Tensor:
        """float32 [batch, 3, size, size] in [-1, 1]."""
        chosen = self.pixels if indices is None else self.pixels[indices]
        return chosen.float() / 127.5 - 1


def join(parts: Sequence[CaptionedPictures]) -> CaptionedPictures:
    """Join the pictures of several data sets at one size."""
    records = [record for part in parts for record in part.records]
    skipped = {name: why for part in parts for name, why in part.skipped.items()}
    return CaptionedPictures(records, torch.cat([part.pixels for part in parts]), skipped)


def metadata_file(folder: Path) -> Path:
    """The file that describes the pictures of `folder`: metadata.jsonl or, without one, metadata.csv.

    Raises: DataError when there is neither; the message explains how to create one.
    """
    folder = Path(folder)
    for name in METADATA:
        if (folder / name).is_file():
            return folder / name
    if folder.is_file():
        raise DataError(f"{folder} is a file; name a folder with a {METADATA[0]}, or tar shards")
    first = next(picture_files(folder), None)
    what = "is not a data set" if folder.is_dir() else "does not exist"
    line = json.dumps({"file_name": first or "cat.png", "text": "a black cat"}, ensure_ascii=False)
    remedy = f"unclip data caption {folder}" if first else f"unclip data emoji --out {folder}"
    raise DataError(
        f"{folder} {what}: it has no {METADATA[0]} (or {METADATA[1]}) with one line for each picture, such as {line}; "
        f"to make one: {remedy}"
    )


def picture_files(folder: Path) -> Iterator[str]:
    """Names of the picture files in `folder` and below it, relative to it and in order; hidden files are skipped."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(PICTURE_SUFFIXES):
                yield Path(root, name).relative_to(folder).as_posix()


def read_records(folder: Path) -> list[Record]:
    """The records of a folder's metadata; lines that cannot be used are skipped with a warning.

    Raises: DataError for a missing or unreadable file, or when more than one line in a hundred cannot be used.
    """
    records, broken = read_metadata(metadata_file(folder), Path(folder))
    _settle(Path(folder), len(records), broken, MAX_SKIPPED_SHARE)
    return records


def read_metadata(path: Path, folder: Path, keys: Keys = USUAL_KEYS) -> tuple[list[Record], dict[str, str]]:
    """The records of a metadata file, and its unusable lines with the reasons.

    Each line describes one picture: a JSON object or, in a file named .csv, a row under the names of the columns.
    Unknown keys are ignored, following the imagefolder convention. A key whose value is null or an empty field counts
    as absent.

    Args:
        path: the file.
        folder: the folder to which names of pictures are relative.
        keys: the keys of the picture and its captions. Names of columns are not case-sensitive.

    Raises: DataError for a file that cannot be read, or is empty.
    """
    records: list[Record] = []
    broken: dict[str, str] = {}
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    is_csv = path.suffix.lower() == ".csv"
    keys = keys.in_lower_case() if is_csv else keys
    for number, entry_of in _csv_rows(path, text, keys) if is_csv else _json_lines(text):
        try:
            records.append(_record(entry_of(), folder, keys))
        except DataError as error:
            broken[f"{path.name}, line {number}"] = str(error)
    if not records and not broken:
        raise DataError(f"{path} is empty")
    return records, broken


def texts_of(entry: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    """The captions under the first of `keys` that has any: a text, or a list without its blank texts.

    Raises: DataError for a text with an unpaired surrogate, which JSON can express and UTF-8 cannot.
    """
    for key in keys:
        value = entry.get(key)
        listed = value if isinstance(value, list) else [value]
        if texts := tuple(text for text in listed if isinstance(text, str) and text.strip()):
            _check_unicode(*texts)
            return texts
    return ()


def weight_in(entry: Mapping[str, Any]) -> float:
    """How often a picture is used relative to others: `weight`, by default 1.

    Raises: DataError unless it is 0 or a number within `WEIGHT_LIMITS`, whose squares and sums fit into float32.
    """
    weight = entry.get("weight")
    if weight is None:
        return 1.0
    low, high = WEIGHT_LIMITS
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not (weight == 0 or low <= weight <= high):
        shown = f"a number of {len(str(weight))} digits" if isinstance(weight, int) and weight > high else repr(weight)
        raise DataError(f"weight is {shown[:80]}; it must be 0 or a number from {low:g} to {high:g}")
    return weight


_Rows = Iterator[tuple[int, Callable[[], dict[str, Any]]]]
"""The number of each line that is not blank, and a function that parses it and raises DataError."""


def _json_lines(text: str) -> _Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, functools.partial(_json_entry, line)


def _json_entry(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"it is not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise DataError(f"it is not a JSON object but a {type(entry).__name__}")
    return entry


def _csv_rows(path: Path, text: str, keys: Keys) -> _Rows:
    """The number of a row is that of its last line."""
    for separator in ",;\t":  # the one with which the header names a picture and a caption
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
        try:
            header = [name.strip().lower() for name in next(reader, [])]
            if set(header) & set(keys.images) and set(header) & set(keys.captions):
                for fields in reader:
                    if any(field.strip() for field in fields):
                        yield reader.line_num, functools.partial(_csv_entry, header, fields)
                return
        except csv.Error as error:
            raise DataError(f"{path} cannot be read as CSV: line {reader.line_num}: {error}") from error
    first = text.partition("\n")[0].strip()
    raise DataError(
        f"the first line of {path} is {first[:200]!r}; it must name a column for the "
        f"picture ({' or '.join(keys.images)}) and one for the caption ({' or '.join(keys.captions)}). Columns of "
        "other names are chosen with --image-key and --caption-key, or image_key and caption_key in a recipe"
    )


def _csv_entry(header: list[str], fields: list[str]) -> dict[str, Any]:
    if len(fields) != len(header):
        raise DataError(
            f"it has {len(fields)} columns, but the first line has {len(header)}; a caption with the separator "
            "must be in double quotes"
        )
    entry: dict[str, Any] = {name: field for name, field in zip(header, fields, strict=True) if field.strip()}
    if "weight" in entry:
        with contextlib.suppress(ValueError):  # `weight_in` refuses a text
            entry["weight"] = float(entry["weight"])
    if "held_out" in entry:
        text = entry["held_out"].strip().lower()
        entry["held_out"] = {"true": True, "1": True, "false": False, "0": False}.get(text, text)
    return entry


def _record(entry: Mapping[str, Any], folder: Path, keys: Keys) -> Record:
    name = next((entry[key] for key in keys.images if entry.get(key) not in (None, "")), None)
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"it needs the name of a picture under {' or '.join(keys.images)}")
    texts = texts_of(entry, keys.captions)
    if not texts:
        raise DataError(
            f"it needs a caption under {' or '.join(keys.captions)}: a text that is not blank, or a list of such texts"
        )
    labels = {key: entry[key] for key in ("concept", "label", "style") if entry.get(key) is not None}
    for key, label in labels.items():
        if not isinstance(label, str):
            raise DataError(f"{key} is {label!r}; it must be a text")
    _check_unicode(*labels.values())
    held_out = entry.get("held_out")
    if not isinstance(held_out, bool | None):
        raise DataError(f"held_out is {held_out!r}; it must be true or false")
    return Record(_spelled(folder, name), texts, **labels, weight=weight_in(entry), held_out=bool(held_out))


def _check_unicode(*texts: str) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"it contains text that is not valid Unicode: {error}") from error


def _spelled(folder: Path, name: str) -> str:
    """The name with /, in the Unicode form of the existing file (NFC or NFD).

    Raises: DataError for an unpaired surrogate.
    """
    name = name.replace("\\", "/")
    if name.isascii():
        return name
    _check_unicode(name)
    found = ""
    for part in name.split("/"):
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        found += next((form for form in forms if os.path.exists(folder / (found + form))), part) + "/"
    return found.removesuffix("/")


def load_sizes(
    folder: Path, sizes_px: Sequence[int], *, keys: Keys = USUAL_KEYS, max_skipped_share: float = MAX_SKIPPED_SHARE
) -> list[CaptionedPictures]:
    """Read every picture of a data set once, at several sizes.

    Args:
        folder: a folder with `metadata.jsonl` or `metadata.csv` and the pictures.
        sizes_px: pictures are padded to squares with white, then resized (antialiased) to each size.
        keys: the keys of the picture and its captions in the metadata.
        max_skipped_share: broken pictures and lines are skipped and reported, up to this share of all.

    Returns: the same records for each size.

    Raises: DataError when more are broken, or a name leads out of the folder. A warning lists what was skipped.
    """
    folder = Path(folder)
    path = metadata_file(folder)
    records, broken = read_metadata(path, folder, keys)
    kept: list[Record] = []
    pixels: dict[int, list[Tensor]] = {size: [] for size in sizes_px}
    for record in records:
        try:
            picture = safe_join(folder, record.file_name)
        except UnsafeFileError as error:
            raise DataError(f"{path} names a file outside the data set: {error}") from error
        try:
            found = read_pixels(picture, str(picture), sizes_px)
        except ImageError as error:
            broken[record.file_name] = str(error)
            continue
        kept.append(record)
        for size in pixels:
            pixels[size].append(found[size])
    _settle(folder, len(kept), broken, max_skipped_share)
    skipped = {str(folder / name): why for name, why in broken.items()}
    return [CaptionedPictures(kept, torch.stack(pixels[size]), skipped) for size in sizes_px]


def _settle(folder: Path, num_kept: int, broken: Mapping[str, str], max_skipped_share: float) -> None:
    """Warn of broken pictures.

    Raises: DataError when they exceed the allowed share, or no picture is left.
    """
    what = f"pictures in {folder}"
    if not num_kept:
        raise DataError(f"none of {len(broken)} {what} can be read: {some_of(broken)}")
    check_share(broken, len(broken), num_kept + len(broken), max_skipped_share, what)
    if broken:
        warnings.warn(f"{len(broken)} {what} cannot be read and are skipped: {some_of(broken)}", stacklevel=4)


def check_share(
    broken: Mapping[str, str], num_broken: int, num_all: int, share: float, what: str = "samples", at_least: int = 0
) -> None:
    """Raises: DataError when more than a share of all (or of `at_least`, where there are fewer) cannot be read.

    Args:
        broken: the reasons, by name; the message has the first three.
        num_broken, num_all: numbers of `what`.
    """
    if num_broken > share * max(num_all, at_least):
        raise DataError(
            f"{num_broken:,} of {num_all:,} {what} cannot be read, more than the {100 * share:.4g}% allowed: "
            f"{some_of(broken)}"
        )


def some_of(broken: Mapping[str, str]) -> str:
    """The first three broken things with their reasons, for a message."""
    return "; ".join(f"{name}: {why}" for name, why in itertools.islice(broken.items(), 3))


def read_pixels(file: Path | IO[bytes], name: str, sizes_px: Iterable[int]) -> dict[int, Tensor]:
    """`square_pixels` of a picture file at several sizes.

    Raises: ImageError when it cannot be read, or there is not enough memory.
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
