"""Write the metadata.jsonl of a folder of pictures: captions from file names, from texts beside them, or from a CSV."""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote

from unclip.checkpoints.files import atomic_file, safe_join
from unclip.data.folder import METADATA, USUAL_KEYS, Keys, Record, picture_files, read_metadata
from unclip.errors import DataError, OutputExistsError, UnsafeFileError

Origin = Literal["texts", "names", "folders"]

_NUMBER = re.compile(r"(?P<rest>.*?)[\s_.-]*(\((?P<copy>\d+)\)|(?P<number>\d+))", re.DOTALL)
_SERIAL_WORDS = {
    *("am", "at", "copy", "dcim", "dsc", "dscf", "dscn", "edited", "file", "frame", "gopr", "image", "img", "mvi", "p"),
    *("photo", "pic", "picture", "pm", "pxl", "sam", "screen", "screenshot", "shot", "untitled", "vid", "wa"),
}
"""Words of names that a camera or a program gives; a person's have others."""
_HASH = re.compile(r"(?=.*\d)[0-9a-f-]{12,}", re.IGNORECASE)


@dataclass
class Captioned:
    """The captions that were written.

    Attributes:
        file: the metadata.
        records: one for each picture with a caption.
        counts: how many of them have their captions from which origin.
        left_out: pictures without a caption, and lines of a CSV without a picture, with the reason.
    """

    file: Path
    records: list[Record] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, str] = field(default_factory=dict)


def write_captions(
    folder: Path,
    *,
    origin: Origin | None = None,
    csv: Path | None = None,
    keys: Keys = USUAL_KEYS,
    overwrite: bool = False,
) -> Captioned:
    """Write metadata.jsonl into a folder, for the pictures in it and in folders below it. Hidden files are ignored.

    Args:
        folder: of the pictures.
        origin: "texts" for the file NAME.txt (or NAME.jpg.txt) beside a picture, one caption a line; "names" for the
            picture's file name (see `captions_of_names`); "folders" for the name of the folder that it lies in. None
            takes the text where a picture has one, else the file name.
        csv: a file like metadata.csv or metadata.jsonl to take the captions from instead. It names pictures relative to
            `folder` or to the folder of the file itself, with or without their extension, or by absolute paths. Several
            lines of one picture are its captions, in their order.
        keys: names of its columns.
        overwrite: replace an existing metadata.jsonl.

    Raises:
        DataError: the folder or the CSV cannot be read, or no picture has a caption.
        OutputExistsError: the folder has metadata already, unless `overwrite`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name a folder of pictures")
    for existing in (folder / name for name in METADATA):
        if existing.exists() and not overwrite and not (csv is not None and existing.resolve() == csv.resolve()):
            raise OutputExistsError(
                f"{existing} exists already; give --overwrite to have a new {METADATA[0]} read in its place"
            )
    found = Captioned(folder / METADATA[0])
    pictures = list(_usable(folder, found))
    if not pictures:
        raise DataError(f"{folder} has no pictures that can be used{_some(found)}")
    if csv is not None:
        _read_csv(csv, folder, pictures, keys, found)
    else:
        _read_files(folder, pictures, origin, found)
    if not found.records:
        raise DataError(f"no picture in {folder} has a caption{_some(found)}")
    with atomic_file(found.file, overwrite=overwrite) as draft:
        draft.write_text("".join(map(_line, found.records)), encoding="utf-8")
    return found


def captions_of_names(names: Sequence[str]) -> list[str | None]:
    """The caption that each file name gives: its words. None for a name without words.

    Underscores become spaces; in a name with neither spaces nor underscores, so do hyphens, dots and plus signs. A
    number at the end is dropped where it only tells pictures apart: in brackets, with a leading zero, or where the
    folder has another picture whose name differs in that number alone. So "red_apple-02.png" gives "red apple", and
    "boeing_747.jpg" keeps its number unless there is a "boeing_737.jpg". Names that a camera or a program gives, such
    as IMG_2041, 00017 and 3f9a04b1c2d4, have no words.

    Args:
        names: of all pictures, with the folders before them.
    """
    paths = [PurePosixPath(name) for name in names]
    stems = [unquote(path.stem) for path in paths]
    numbers = [_NUMBER.fullmatch(stem) for stem in stems]
    shared = Counter(
        (path.parent, match["rest"]) for path, match in zip(paths, numbers, strict=True) if match and match["rest"]
    )
    captions: list[str | None] = []
    for path, stem, match in zip(paths, stems, numbers, strict=True):
        if _is_serial(stem):
            captions.append(None)
            continue
        if match and (match["copy"] or match["number"].startswith("0") or shared[path.parent, match["rest"]] > 1):
            stem = match["rest"]
        separators = r"[\s_]+" if re.search(r"[\s_]", stem) else r"[-.+]+"
        captions.append(" ".join(re.split(separators, stem)).strip() or None)
    return captions


def _is_serial(stem: str) -> bool:
    words = re.findall(r"[^\W\d_]+", stem)
    has_digit = any(letter.isdigit() for letter in stem)
    is_serial = has_digit and {word.lower() for word in words} <= _SERIAL_WORDS
    return not words or is_serial or _HASH.fullmatch(stem) is not None


def _usable(folder: Path, found: Captioned) -> Iterator[str]:
    for name in picture_files(folder):
        try:
            name.encode()
            safe_join(folder, name)
        except UnicodeEncodeError:
            found.left_out[name] = "its name is not Unicode text; rename it"
        except UnsafeFileError as error:
            found.left_out[name] = str(error)
        else:
            yield name


def _read_files(folder: Path, pictures: Sequence[str], origin: Origin | None, found: Captioned) -> None:
    for name, named in zip(pictures, captions_of_names(pictures), strict=True):
        texts: list[str] = []
        source = "names"
        beside = [folder / f"{stem}.txt" for stem in (os.path.splitext(name)[0], name)]
        text = next((path for path in beside if path.is_file()), None) if origin in (None, "texts") else None
        if text is not None:
            source = "texts"
            try:
                lines = text.read_bytes().decode("utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                found.left_out[name] = f"{text.name} cannot be read as UTF-8 text: {error}"
                continue
            texts = [line.strip() for line in lines if line.strip()]
            why = f"{text.name} is empty"
        elif origin == "texts":
            why = f"{beside[0].name} is missing"
        elif origin == "folders":
            source = "folders"
            texts = [text for text in captions_of_names([f"{(folder / name).resolve().parent.name}.d"]) if text]
            why = "the name of its folder has no words"
        else:
            texts = [named] if named else []
            why = "its name has no words"
        if texts:
            found.records.append(Record(name, tuple(texts)))
            found.counts[source] += 1
        else:
            found.left_out[name] = why


def _read_csv(csv: Path, folder: Path, pictures: Sequence[str], keys: Keys, found: Captioned) -> None:
    records, broken = read_metadata(csv, folder, keys)
    found.left_out.update(broken)
    stems: dict[str, list[str]] = defaultdict(list)
    for picture in pictures:
        stems[os.path.splitext(picture)[0]].append(picture)
    known = set(pictures)
    merged: dict[str, Record] = {}
    for record in records:
        places = [record.file_name, os.path.relpath(csv.parent / record.file_name, folder)]
        names = [Path(place).as_posix() for place in places]
        names += [only[0] for name in names if len(only := stems.get(name, [])) == 1]
        name = next((name for name in names if name in known), None)
        if name is None:
            found.left_out[f"{csv.name}: {record.file_name}"] = f"{folder} has no such picture"
        elif name in merged:
            captions = dict.fromkeys((*merged[name].captions, *record.captions))
            merged[name] = replace(merged[name], captions=tuple(captions))
        else:
            merged[name] = replace(record, file_name=name)
    found.records.extend(merged.values())
    found.counts[csv.name] = len(merged)
    for picture in pictures:
        if picture not in merged and picture not in found.left_out:
            found.left_out[picture] = f"{csv.name} does not name it"


def _line(record: Record) -> str:
    told = {key: value for key, value in asdict(record).items() if value != getattr(Record("", ()), key)}
    if len(record.captions) == 1:
        told["text"] = told.pop("captions")[0]
    return json.dumps(told, ensure_ascii=False) + "\n"


def _some(found: Captioned) -> str:
    some = "; ".join(f"{name}: {why}" for name, why in list(found.left_out.items())[:3])
    return f": {some}" if some else ""
