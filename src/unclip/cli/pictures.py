"""Pictures on disk: safe names, what is written into each file, the sheet, and no file ever replaced unasked.

Knows files and PNG texts; knows no model. Called by `batches.py`.
"""

import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip import __version__
from unclip.checkpoints.files import atomic_file
from unclip.errors import InputError, OutputExistsError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

MAX_SLUG_CHARACTERS = 60
MAX_SLUG_BYTES = 120


def slug(text: str, *, empty: str = "picture") -> str:
    """A short file name out of any text: letters and digits of every script, hyphens between them, nothing else."""
    kept: list[str] = []
    for character in unicodedata.normalize("NFKC", text[:1000]).lower():
        on_letter = bool(kept) and kept[-1] != "-"
        if character.isalnum() or (on_letter and unicodedata.category(character) in ("Mn", "Mc")):
            kept.append(character)
        elif on_letter:
            kept.append("-")
    name = "".join(kept).strip("-")
    if len(name) > MAX_SLUG_CHARACTERS:
        head = name[:MAX_SLUG_CHARACTERS]
        name = head.rpartition("-")[0] if "-" in head[MAX_SLUG_CHARACTERS // 2 :] else head
    name = name.encode()[:MAX_SLUG_BYTES].decode(errors="ignore")
    files = sys.getfilesystemencoding()  # ASCII in a bare C locale
    return name.encode(files, errors="ignore").decode(files).strip("-") or empty


def png_texts(facts: Mapping[str, Any]) -> "PngInfo":
    """What a picture file says of its making: a text a fact, settings as JSON, and the software."""
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    for name, value in facts.items():
        if value is None:
            continue
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else str(value)
        text = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
        if text.isascii():
            texts.add_text(name, text)
        else:
            texts.add_itxt(name, text)
    texts.add_text("Software", f"unclip {__version__}")
    return texts


class Album:
    """Writes pictures into one folder and tells of each on stdout: its path, or a JSON object."""

    def __init__(self, folder: Path, *, overwrite: bool, as_json: bool, keep: bool):
        self.folder, self.overwrite, self.as_json = folder, overwrite, as_json
        self.num_saved = 0
        self.kept: list[Image] | None = [] if keep else None
        """The pictures so far, for a sheet."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as problem:
            raise InputError(f"--out {folder} cannot be made: {_reason(problem)}") from problem

    def save(self, image: "Image", stem: str, facts: Mapping[str, Any]) -> Path:
        """Write `stem.png`, whole or not at all, and return its path.

        Raises: InputError when it cannot be written (a full disk, say).
        """
        texts = png_texts(facts)
        return self.write(stem, ".png", lambda draft: image.save(draft, format="PNG", pnginfo=texts))

    def write(self, stem: str, suffix: str, writer: Callable[[Path], None]) -> Path:
        """Have `writer` write the file `stem` + `suffix`, whole or not at all, and return its path.

        Raises: InputError when it cannot be written.
        """
        for path in self._free_names(stem, suffix):
            try:
                with atomic_file(path, overwrite=self.overwrite) as draft:
                    writer(draft)
            except OutputExistsError:
                if self.overwrite:
                    raise
                continue  # it came into being meanwhile
            except OSError as problem:
                raise InputError(f"{path} cannot be written: {_reason(problem)}") from problem
            self.num_saved += 1
            return path
        raise AssertionError("there is always a free name")

    def tell(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Say on stdout that a file is there."""
        print(json.dumps({"path": str(path), **facts}) if self.as_json else path, flush=True)

    def save_sheet(
        self,
        stem: str,
        facts: Mapping[str, Any],
        *,
        columns: int | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        """Write the sheet of all kept pictures, above their labels if there are any, as `stem-grid.png`; tell of it."""
        from unclip.images import grid, labelled

        if self.kept:
            facts, cards = {**facts, "grid": len(self.kept)}, self.kept
            if labels is not None:
                cards = [labelled(image, label) for image, label in zip(cards, labels, strict=True)]
            self.tell(self.save(grid(cards, columns=columns), f"{stem}-grid", facts), facts)

    def _free_names(self, stem: str, suffix: str) -> Iterator[Path]:
        """The paths to try: the plain name, then with a number."""
        if self.overwrite:
            yield self.folder / f"{stem}{suffix}"
            return
        for number in count(1):
            path = self.folder / (f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}")
            if not path.exists() and not path.is_symlink():
                yield path


def _reason(problem: OSError | ValueError) -> str:
    return getattr(problem, "strerror", None) or str(problem)
