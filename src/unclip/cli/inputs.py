"""What commands are given: captions, files of prompts, pictures and latents."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.checkpoints.tensor_file import SUFFIX
from unclip.cli.messages import error
from unclip.cli.output import slug
from unclip.errors import CheckpointError, ImageError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from unclip.stages.manipulation import BipartiteLatent

PROMPTS_LIMIT_BYTES = 16 * 2**20
"""The most that is read of a file of prompts: some 300,000 captions."""


def read_prompts(path: Path) -> list[str]:
    """The lines of a file (or of stdin, for "-") that are not blank.

    Raises: InputError when it cannot be read, is no UTF-8 text, or is larger than 16 MiB; no more than that is read.
    """
    shown = "stdin" if str(path) == "-" else str(path)
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
            data = file.read(PROMPTS_LIMIT_BYTES + 1)
    except (OSError, ValueError) as problem:
        raise InputError(f"{shown} cannot be read: {getattr(problem, 'strerror', None) or problem}") from problem
    if len(data) > PROMPTS_LIMIT_BYTES:
        raise InputError(
            f"{shown} has more than {PROMPTS_LIMIT_BYTES:,} bytes, the limit of a file of prompts; "
            "if it is the right file, split it"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise InputError(f"{shown} is no UTF-8 text (at byte {problem.start}); save it as UTF-8") from problem
    if "\0" in text:
        raise InputError(f"{shown} is no text: it has NUL characters in it; give one prompt a line, as UTF-8")
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def plain(text: str) -> str:
    """`text` as valid Unicode: bytes from the command line that were none become replacement characters."""
    return text.encode("utf-8", "surrogateescape" if _escaped(text) else "replace").decode("utf-8", "replace")


def usable(texts: list[str]) -> dict[int, str]:
    """The prompts that can be used, by their place; each of the others is told of."""
    from unclip.clip.encoders import check_prompt

    good = {}
    for place, text in enumerate(texts):
        try:
            check_prompt(text)
            good[place] = text
        except InputError as problem:
            error(f"prompt {place + 1} of {len(texts)}: {problem}")
    return good


def _escaped(text: str) -> bool:
    """Whether every lone surrogate of `text` stands for a byte, as Python has it on the command line."""
    return all(not "\ud800" <= c <= "\udfff" or "\udc80" <= c <= "\udcff" for c in text)


UNREAD_SUFFIXES = (".heic", ".heif", ".svg", ".ico", ".psd")
"""Of pictures that are not read, but with which no caption ends either."""


@dataclass(frozen=True)
class Part:
    """One of the things that a person named: a picture's file, a latent's file, or a caption.

    Attributes:
        text: the path or the caption.
        kind: "picture", "latent" or "caption".
        weight: in a blend.
    """

    text: str
    kind: str
    weight: float = 1.0

    @property
    def name(self) -> str:
        """For file names and facts: of a path its last part alone."""
        return Path(self.text).name if self.kind != "caption" else self.text

    @property
    def stem(self) -> str:
        return slug(self.text if self.kind == "caption" else Path(self.text).name.split(".")[0])


def read_part(text: str, *, weighted: bool = False, caption: bool = False) -> Part:
    """Take an argument for a file that exists, or else for a caption.

    Args:
        text: a path, or a caption.
        weighted: a number after the last colon is its weight, as in `cat.png:0.5`, unless a file has that whole name.
        caption: take what is not a file for a caption, even if it looks like a path.

    Raises: InputError for what looks like the path of a file that does not exist, for a folder, or for a weight that is
        not finite.
    """
    weight = 1.0
    if weighted and not _is(Path.is_file, text):
        head, colon, tail = text.rpartition(":")
        if colon and head and _number(tail) is not None:
            text, weight = head, float(tail)
            if not abs(weight) < float("inf"):
                raise InputError(f"the weight {tail!r} of {text!r:.80} is not a finite number")
    if _is(Path.is_file, text):
        return Part(text, "latent" if is_latent(text) else "picture", weight)
    if not caption:
        if text and _is(Path.is_dir, text):
            raise InputError(f"{text!r} is a folder; name a file, or use --caption if it is a caption")
        if looks_like_path(text):
            raise InputError(f"{no_file(text)}; use --caption if it is a caption")
    return Part(plain(text), "caption", weight)


def looks_like_path(text: str) -> bool:
    """Whether a text is more likely a file's name than a caption.

    That is: it has the suffix of a picture or of latents, or one that is one typing error away; it begins as
    a path does; or it has a separator, and a suffix or an existing folder's name before the separator.
    """
    from unclip.images import PICTURE_SUFFIXES

    folder, _, name = text.replace("\\", "/").rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    suffix = suffix.lower() if dot and suffix.isascii() and suffix.isalnum() else ""
    known = [other[1:] for other in (*PICTURE_SUFFIXES, *UNREAD_SUFFIXES, SUFFIX)]
    if suffix and stem and any(_is_slip(suffix, other) for other in known):
        return True
    if re.match(r"[/\\~]|\.{1,2}[/\\]|[a-z]:[/\\]", text, re.IGNORECASE):
        return True
    return bool(folder) and (bool(re.fullmatch(r"[a-z][a-z0-9]{1,11}", suffix)) or _is(Path.is_dir, folder))


def _is_slip(word: str, other: str) -> bool:
    """Whether two words are equal, or differ by one letter or two swapped letters."""
    if word == other:
        return True
    if len(word) < 2 or len(other) < 3 or abs(len(word) - len(other)) > 1:
        return False
    if len(word) == len(other):
        differ = [place for place in range(len(word)) if word[place] != other[place]]
        swapped = len(differ) == 2 and word[differ[0]] == other[differ[1]] and word[differ[1]] == other[differ[0]]
        return swapped or len(differ) == 1
    short, long = sorted((word, other), key=len)
    return any(short == long[:place] + long[place + 1 :] for place in range(len(long)))


def is_latent(path: str | Path) -> bool:
    """Whether a file's name says that it holds latents."""
    return Path(path).suffix.lower() == SUFFIX


def _is(kind: Callable[[Path], bool], text: str) -> bool:
    try:
        return kind(Path(text))
    except (OSError, ValueError):  # no path at all: too long, or with a NUL
        return False


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


MAX_LISTED = 10_000
"""Files of a folder that are looked through for a name that is near."""


def open_picture(path: str | Path, *, keep_alpha: bool = False) -> "Image":
    """As `unclip.images.open_image`, with `check_exists`."""
    from unclip.images import open_image

    check_exists(path)
    return open_image(path, keep_alpha=keep_alpha)


def check_exists(path: str | Path) -> None:
    """Raises: ImageError for a file that does not exist; the message names the nearest one."""
    if not os.path.lexists(path):
        raise ImageError(no_file(str(path)))


def no_file(text: str) -> str:
    """The message for a file that does not exist; it suggests the file with the nearest name."""
    near = nearest_file(text)
    return f"there is no file {text!r:.200}" + (f"; did you mean {near!r}?" if near else "")


def nearest_file(text: str) -> str | None:
    """The picture or latent whose name is nearest to that of a path, in its folder; None where none is near."""
    from unclip.images import PICTURE_SUFFIXES

    try:
        path = Path(text).expanduser()
        if path.is_file():
            return str(path)
        kinds = (*PICTURE_SUFFIXES, SUFFIX)
        files = islice(path.parent.iterdir(), MAX_LISTED)
        names = [file.name for file in files if file.suffix.lower() in kinds]
    except (OSError, ValueError, RuntimeError):  # no such folder, no such home, no path at all
        return None
    found = difflib.get_close_matches(path.name, names, n=1)
    return str(path.parent / found[0]) if found else None


def check_has_prior(model: str, index: Mapping[str, object]) -> None:
    """Raises: CheckpointError when the model's folder has no prior."""
    if "prior" not in index:
        raise CheckpointError(f"{model} has no prior, so it only makes variations: unclip vary IMAGE --model {model}")


def check_can_vary(model: str, index: Mapping[str, object]) -> None:
    """Raises: CheckpointError when the model's folder has no image encoder."""
    lacking = [name for name in ("image_encoder", "feature_extractor") if name not in index]
    if lacking:
        raise CheckpointError(
            f"{model} has no {' and no '.join(lacking)}, so it cannot look at pictures. Make a folder that can: "
            f"unclip convert variation {model} --clip CLIP --out DIR (CLIP is the CLIP model that it was trained with)"
        )


@dataclass(frozen=True)
class Opened:
    """One thing that was named and could be read.

    Attributes:
        place: among all things that were named; each row of a latent's file counts.
        path: its file.
        given: a picture, or a latent of one row.
        row: of the latent, where its file has several.
    """

    place: int
    path: Path
    given: Any
    row: int | None = None


def opened(
    paths: list[Path], failed: list[Path], latent: "Callable[[Path], BipartiteLatent] | None" = None
) -> Iterator[Opened]:
    """What can be read; the others are told of and put into `failed`, unless they are there already.

    With `latent`, which reads files of `unclip invert`, these may stand for pictures.
    """
    place = 0
    for path in paths:
        if latent is None or not is_latent(path):
            try:
                yield Opened(place, path, open_picture(path))
            except ImageError as problem:
                error(problem)
                failed.append(path)
        elif path not in failed:
            try:
                rows = latent(path)
            except CheckpointError as problem:
                error(problem)
                failed.append(path)
            else:
                for row in range(len(rows)):
                    yield Opened(place + row, path, rows.select([row]), row if len(rows) > 1 else None)
                place += len(rows) - 1
        place += 1
