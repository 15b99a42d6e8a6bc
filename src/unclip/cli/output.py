"""Picture files: safe names, the texts in each file, sheets. No file is replaced unless asked."""

import json
import os
import secrets
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip import __version__
from unclip.checkpoints.files import atomic_file
from unclip.cli.messages import detail, error, note
from unclip.cli.options import MAX_SEED
from unclip.cli.provenance import MADE_WITH, again
from unclip.errors import InputError, MissingDependencyError, OutputExistsError, UnclipError

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
    """Writes pictures into one folder, or one picture into the file of that name, and prints where.

    Args:
        out: a folder; or, unless there is such a folder, a file's name that ends in `suffix`.
        num_files: how many files are to be written, as far as that is known.
        suffix: of the files, with a dot.

    Attributes:
        preface: printed on stderr before the first path; None: nothing.
        kept: the pictures so far, for a sheet; None: they are not kept.
        folder: where the files go.
        file: the one file with `suffix`, where `out` is its name; other files go beside it.

    Raises: InputError for a file's name where several files are to be written, or for a picture of another kind;
        OutputExistsError for an existing file, unless it may be replaced.
    """

    def __init__(
        self, out: Path, *, overwrite: bool, as_json: bool, keep: bool, num_files: int = 1, suffix: str = ".png"
    ) -> None:
        self.overwrite, self.as_json = overwrite, as_json
        self.num_saved = 0
        self.preface: str | None = None
        self.kept: list[Image] | None = [] if keep else None
        self.file = out if _names_file(out, suffix) else None
        self._suffix = suffix
        self.folder = out if self.file is None else out.parent
        if self.file is not None and num_files > 1:
            raise InputError(_too_many(out, num_files))
        if self.file is not None and not overwrite and os.path.lexists(out):
            raise OutputExistsError(f"{out} exists already: use --overwrite, or another --out")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as problem:
            raise InputError(f"--out {out} cannot be made: {_reason(problem)}") from problem

    def save(self, image: "Image", stem: str, facts: Mapping[str, Any]) -> Path:
        """Write `stem.png`, whole or not at all, and return its path.

        Raises: InputError when it cannot be written (a full disk, say).
        """
        texts = png_texts(facts)
        return self.write(stem, ".png", lambda draft: image.save(draft, format="PNG", pnginfo=texts))

    def write(self, stem: str, suffix: str, writer: Callable[[Path], None]) -> Path:
        """Have `writer` write the file `stem` + `suffix`, whole or not at all, and return its path.

        Raises: InputError when it cannot be written, or the album is a file that is written already.
        """
        if self.file is not None and suffix == self._suffix and self.num_saved:
            raise InputError(_too_many(self.file, self.num_saved + 1))
        for path in self._free_names(stem, suffix):
            try:
                with atomic_file(path, overwrite=self.overwrite) as draft:
                    writer(draft)
            except OutputExistsError:
                if self.overwrite or path == self.file:
                    raise
                continue  # it came into being meanwhile
            except OSError as problem:
                raise InputError(f"{path} cannot be written: {_reason(problem)}") from problem
            self.num_saved += 1
            return path
        raise AssertionError("there is always a free name")

    def tell(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Print the file's path on stdout, or a JSON object."""
        if self.preface is not None:
            note(self.preface)
            self.preface = None
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
        if self.file is not None and suffix == self._suffix:
            yield self.file
            return
        if self.overwrite:
            yield self.folder / f"{stem}{suffix}"
            return
        for number in count(1):
            path = self.folder / (f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}")
            if not path.exists() and not path.is_symlink():
                yield path


def _names_file(out: Path, suffix: str) -> bool:
    """Whether `--out` is a file's name. Raises: InputError for the name of a picture of another kind."""
    from unclip.images import PICTURE_SUFFIXES

    found = out.suffix.lower()
    if found not in (suffix, *PICTURE_SUFFIXES) or out.is_dir():
        return False
    if found != suffix:
        raise InputError(f"--out {out} ends in {found}, and the file will be {suffix}: use {out.with_suffix(suffix)}")
    return True


def _too_many(out: Path, num_files: int) -> str:
    return f"--out {out} is the name of one file, and there are {num_files} to write or more: name a folder"


def _reason(problem: OSError | ValueError) -> str:
    return getattr(problem, "strerror", None) or str(problem)


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
        index: of the picture, among those that the command makes of one seed.
    """

    given: Any
    seed: int
    name: str
    facts: Mapping[str, Any]
    index: int = 0


def chosen_seed(seed: int | None, album: Album, *, quiet: bool) -> int:
    """The given seed, or a random one that is short enough to be typed; the album prints it unless `quiet`."""
    if seed is not None:
        return seed
    fresh = secrets.randbelow(2**32)
    if not quiet:
        album.preface = f"seed {fresh}"
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

    When a picture is made again, only that one is saved: it is drawn at the same place of a batch of the same size.

    Raises: what `draw` and the album raise while nothing is made yet; typer.Exit(3), with the error told, after that.
    """
    picture = again()
    if picture is not None and picture.only:
        wish = next((wish for batch in batches for wish in batch if wish.index == picture.index), None)
        if wish is None:
            raise InputError(f"the command makes no picture {picture.index} of these inputs")
        batches = [[wish] * picture.size]
    try:
        for batch in batches:
            start = time.monotonic()
            with within_memory(len(batch)):
                images = draw(batch)
            detail(f"batch of {len(batch)}: {time.monotonic() - start:.1f} s")
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
        picture = again()
        for place, (wish, image) in enumerate(zip(batch, images, strict=True)):
            if picture is not None and picture.only and place != picture.place:
                continue
            made = {**about[MADE_WITH], "index": wish.index, "batch": [place, len(batch)]}
            facts = {**wish.facts, **about, "seed": wish.seed, MADE_WITH: made}
            saved.append((album.save(image, f"{wish.name}-{wish.seed}", facts), facts))
            if album.kept is not None:
                album.kept.append(image)
    finally:
        for path, facts in saved:
            album.tell(path, facts)


class FilmKind(StrEnum):
    """What a film may be."""

    gif = "gif"
    webp = "webp"
    mp4 = "mp4"


Film = Annotated[
    FilmKind | None,
    typer.Option("--film", metavar="KIND", help="Also write the frames as a film: gif, webp or mp4 (needs PyAV)."),
]
FPS = Annotated[float, typer.Option("--fps", min=0.5, max=50, metavar="N", help="Frames a second of the film.")]


def check_writer(kind: FilmKind | None) -> None:
    """Raises: MissingDependencyError when there is nothing that writes this kind, before anything is computed."""
    if kind is FilmKind.mp4:
        try:
            import av  # noqa: F401  # type: ignore[import-not-found]
        except ImportError as problem:
            raise MissingDependencyError(
                "an MP4 film needs PyAV: pip install av; or take --film gif or --film webp, which need nothing"
            ) from problem


def film_writer(kind: FilmKind, frames: "list[Image]", fps: float) -> Callable[[Path], None]:
    """Writes the frames, there and back again, as a loop that begins and ends at the first."""
    loop = [*frames, *frames[-2:0:-1]]
    return {FilmKind.gif: _gif, FilmKind.webp: _webp, FilmKind.mp4: _mp4}[kind](loop, fps)


def _gif(frames: "list[Image]", fps: float) -> Callable[[Path], None]:
    from PIL import Image

    # One palette for all frames: with one each, still parts would change their colours from frame to frame.
    strip = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
    for place, frame in enumerate(frames):
        strip.paste(frame, (0, place * frame.height))
    palette = strip.quantize(255)
    drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    return lambda path: drawn[0].save(
        path, format="GIF", save_all=True, append_images=drawn[1:], duration=round(1000 / fps), loop=0
    )


def _webp(frames: "list[Image]", fps: float) -> Callable[[Path], None]:
    return lambda path: frames[0].save(
        path, format="WEBP", save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, quality=90
    )


def _mp4(frames: "list[Image]", fps: float) -> Callable[[Path], None]:
    from fractions import Fraction

    def write(path: Path) -> None:
        import av  # type: ignore[import-not-found]

        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1000))
            stream.width, stream.height = (side - side % 2 for side in frames[0].size)
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())

    return write
