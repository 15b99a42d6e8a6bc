"""Inputs of commands: captions, files of captions, pictures and latents."""

import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Container, Iterator
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
"""Largest file of prompts: about 300,000 captions."""


def read_prompts(path: Path) -> list[str]:
    """The lines of a file (or of stdin, for "-") that are not blank.

    Raises: InputError when it cannot be read, is not UTF-8 text, or is larger than 16 MiB.
    """
    shown = "stdin" if str(path) == "-" else str(path)
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
            data = file.read(PROMPTS_LIMIT_BYTES + 1)
    except (OSError, ValueError) as problem:
        raise InputError(f"{shown} cannot be read: {getattr(problem, 'strerror', None) or problem}") from problem
    if len(data) > PROMPTS_LIMIT_BYTES:
        raise InputError(
            f"{shown} has more than {PROMPTS_LIMIT_BYTES:,} bytes, the limit of a file of prompts; split it"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{shown} is not UTF-8 text with one prompt on each line")
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def plain(text: str) -> str:
    """`text` as valid Unicode: invalid bytes from the command line become replacement characters."""
    return text.encode("utf-8", "surrogateescape" if _escaped(text) else "replace").decode("utf-8", "replace")


def usable(texts: list[str]) -> dict[int, str]:
    """The valid prompts by their position; errors of the others are printed."""
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
    """Whether every lone surrogate of `text` represents a byte, as in Python's command-line arguments."""
    return all(not "\ud800" <= c <= "\udfff" or "\udc80" <= c <= "\udcff" for c in text)


UNREAD_SUFFIXES = (".heic", ".heif", ".svg", ".ico", ".psd")
"""Suffixes of pictures that cannot be read; a caption does not end with them either."""


@dataclass(frozen=True)
class Part:
    """One input: a picture's file, a latent's file, or a caption.

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
        """For file names and metadata: a path without its folders."""
        return Path(self.text).name if self.kind != "caption" else self.text

    @property
    def stem(self) -> str:
        return slug(self.text if self.kind == "caption" else Path(self.text).name.split(".")[0])


def read_part(text: str, *, weighted: bool = False, caption: bool = False) -> Part:
    """Read an argument as an existing file, or else as a caption.

    Args:
        text: a path, or a caption.
        weighted: a number after the last colon is its weight, as in `cat.png:0.5`, unless a file has that whole name.
        caption: read everything that is not a file as a caption, even if it looks like a path.

    Raises: InputError for what looks like the path of a file that does not exist, for a folder, or for a weight that is
        not finite.
    """
    weight = 1.0
    found = re.fullmatch(r"(.+):([^:]+)", text, re.DOTALL) if weighted and not _is(Path.is_file, text) else None
    if found and (number := _number(found[2])) is not None:
        text, weight = found[1], number
        if not math.isfinite(weight):
            raise InputError(f"the weight {found[2]!r} of {text!r:.80} is not a finite number")
    if _is(Path.is_file, text):
        return Part(text, "latent" if is_latent(text) else "picture", weight)
    if not caption and text and _is(Path.is_dir, text):
        raise InputError(f"{text!r} is a folder; name a file, or use --caption if it is a caption")
    if not caption and looks_like_path(text):
        raise InputError(f"{no_file(text)} (if it is a caption, use --caption)")
    return Part(plain(text), "caption", weight)


def looks_like_path(text: str) -> bool:
    """Whether a text is more likely a file's name than a caption.

    It does if its suffix is that of a picture or of latents, or similar; if it begins like a path; or if it has a
    separator, and either a suffix, or an existing folder before the separator.
    """
    from unclip.images import PICTURE_SUFFIXES

    folder, _, name = text.replace("\\", "/").rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    suffix = suffix.lower() if dot and suffix.isascii() and suffix.isalnum() else ""
    known = [other[1:] for other in (*PICTURE_SUFFIXES, *UNREAD_SUFFIXES, SUFFIX)]
    if stem and difflib.get_close_matches(suffix, known, n=1, cutoff=0.66):  # "pgn" and "png" have 0.67
        return True
    if re.match(r"[/\\~]|\.{1,2}[/\\]|[a-z]:[/\\]", text, re.IGNORECASE):
        return True
    return bool(folder) and (bool(re.fullmatch(r"[a-z][a-z0-9]{1,11}", suffix)) or _is(Path.is_dir, folder))


def is_latent(path: str | Path) -> bool:
    """Whether a file's name is that of a file of latents."""
    return Path(path).suffix.lower() == SUFFIX


def _is(kind: Callable[[Path], bool], text: str) -> bool:
    try:
        return kind(Path(text))
    except (OSError, ValueError):  # not a valid path: too long, or with a NUL
        return False


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


MAX_LISTED = 10_000
"""The largest number of files of a folder that are compared with a missing name."""


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
    return f"the file {text!r:.200} does not exist" + (f"; did you mean {near!r}?" if near else "")


def nearest_file(text: str) -> str | None:
    """The picture or latent in a path's folder with the most similar name; None if no name is similar."""
    from unclip.images import PICTURE_SUFFIXES

    try:
        path = Path(text).expanduser()
        files = list(islice(path.parent.iterdir(), MAX_LISTED))
    except (OSError, ValueError, RuntimeError):  # the folder or the home does not exist, or the path is not valid
        return None
    names = [file.name for file in files if file.suffix.lower() in (*PICTURE_SUFFIXES, SUFFIX)]
    found = difflib.get_close_matches(path.name, names, n=1)
    return str(path.parent / found[0]) if found else None


def check_has_prior(model: str, parts: Container[str]) -> None:
    """Raises: CheckpointError when the model's folder has no prior."""
    if "prior" not in parts:
        raise CheckpointError(f"{model} has no prior, so it only makes variations: unclip vary IMAGE --model {model}")


def check_can_vary(model: str, parts: Container[str]) -> None:
    """Raises: CheckpointError when the model's folder has no image encoder."""
    lacking = [name for name in ("image_encoder", "feature_extractor") if name not in parts]
    if lacking:
        raise CheckpointError(
            f"{model} has no {' and no '.join(lacking)}, so it cannot encode pictures. Make a folder that can: "
            f"unclip convert variation {model} --clip CLIP --out DIR (CLIP is the CLIP model used in its training)"
        )


@dataclass(frozen=True)
class Opened:
    """One input that could be read.

    Attributes:
        place: position among all inputs; each row of a latent's file counts.
        path: its file.
        given: a picture, or a latent of one row.
        row: the row of the latent, if its file has several.
    """

    place: int
    path: Path
    given: Any
    row: int | None = None


def opened(
    paths: list[Path], failed: list[Path], latent: "Callable[[Path], BipartiteLatent] | None" = None
) -> Iterator[Opened]:
    """The inputs that can be read; errors of the others are printed, and they are added to `failed`.

    Args:
        paths: the inputs.
        failed: latents in it are skipped, because their errors are printed already.
        latent: reads files of `unclip invert`, which may be given instead of pictures.
    """
    place = 0
    for path in paths:
        found: list[Any] = []
        try:
            if latent is None or not is_latent(path):
                found = [open_picture(path)]
            elif path not in failed:
                rows = latent(path)
                found = [rows.select([row]) for row in range(len(rows))]
        except (CheckpointError, ImageError) as problem:
            error(problem)
            failed.append(path)
        for row, given in enumerate(found):
            yield Opened(place + row, path, given, row if len(found) > 1 else None)
        place += max(1, len(found))
