"""Picture files, sheets and films: file names, metadata, and the loop that makes pictures in batches."""

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
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.checkpoints.files import atomic_file
from unclip.cli.messages import detail, error, note
from unclip.cli.options import MAX_SEED, Output
from unclip.cli.provenance import replay
from unclip.errors import InputError, MissingDependencyError, OutputExistsError, UnclipError
from unclip.pipelines.session import MADE_WITH, png_texts

if TYPE_CHECKING:
    from PIL.Image import Image

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


class PictureWriter:
    """Writes files into one folder, or one file under a given name, and prints their paths.

    Args:
        out: a folder; or, unless a folder has this name, a file name that ends in `suffix`.
        num_files: how many files will be written at least.
        keep: whether to keep the pictures for a sheet or a film.
        suffix: of the files, with a dot.

    Attributes:
        folder: where the files go.
        file: the file that `out` names, if it names one; files with another suffix go beside it.
        num_saved: how many files have been written.
        seed_note: printed on stderr before the first path; None: nothing.
        kept: the pictures so far; None: they are not kept.

    Raises: InputError for a file name where several files will be written, or with the suffix of another kind of
        picture; OutputExistsError for an existing file, unless it may be replaced.
    """

    def __init__(
        self, out: Path, *, overwrite: bool, as_json: bool, keep: bool, num_files: int = 1, suffix: str = ".png"
    ) -> None:
        self.overwrite, self.as_json = overwrite, as_json
        self.num_saved = 0
        self.seed_note: str | None = None
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

    @classmethod
    def of(cls, output: Output, num_pictures: int, *, film: bool = False) -> "PictureWriter":
        """The writer that a command's options describe.

        Args:
            output: the options.
            num_pictures: how many pictures the command makes at least, without the sheet.
            film: whether a film will be made of them.
        """
        return cls(
            output.out,
            overwrite=output.overwrite,
            as_json=output.as_json,
            keep=output.grid or film,
            num_files=num_pictures + output.grid,
        )

    def save(self, image: "Image", stem: str, facts: Mapping[str, Any]) -> Path:
        """Write `stem.png`, atomically, and return its path.

        Raises: InputError when it cannot be written (a full disk, say).
        """
        texts = png_texts(facts)
        return self.write(stem, ".png", lambda draft: image.save(draft, format="PNG", pnginfo=texts))

    def write(self, stem: str, suffix: str, writer: Callable[[Path], None]) -> Path:
        """Have `writer` write the file `stem` + `suffix`, atomically, and return its path.

        Raises: InputError when it cannot be written, or when `out` names one file and that is written already.
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
                continue  # another process has just made it
            except OSError as problem:
                raise InputError(f"{path} cannot be written: {_reason(problem)}") from problem
            self.num_saved += 1
            return path
        raise AssertionError("there is always a free name")

    def announce(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Print the file's path on stdout, or a JSON object."""
        if self.seed_note is not None:
            note(self.seed_note)
            self.seed_note = None
        print(json.dumps({"path": str(path), **facts}) if self.as_json else path, flush=True)

    def save_sheet(
        self,
        stem: str,
        facts: Mapping[str, Any],
        *,
        columns: int | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        """Write the sheet of all kept pictures as `stem-grid.png`, with labels if given, and print its path."""
        from unclip.images import grid, labelled

        if self.kept:
            facts, cards = {**facts, "grid": len(self.kept)}, self.kept
            if labels is not None:
                cards = [labelled(image, label) for image, label in zip(cards, labels, strict=True)]
            self.announce(self.save(grid(cards, columns=columns), f"{stem}-grid", facts), facts)

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
class Job:
    """One picture to make.

    Attributes:
        given: a caption, a picture, a latent or a row number; None: nothing.
        seed: of this picture.
        name: the first part of its file name.
        facts: metadata of this picture alone. The seed and the metadata of all pictures are added.
        index: number of the picture among those that the command makes of one seed.
    """

    given: Any
    seed: int
    name: str
    facts: Mapping[str, Any]
    index: int = 0


def chosen_seed(seed: int | None, writer: PictureWriter, *, quiet: bool) -> int:
    """The given seed, or a random one that is short enough to type; the writer prints it unless `quiet`."""
    if seed is not None:
        return seed
    fresh = secrets.randbelow(2**32)
    if not quiet:
        writer.seed_note = f"seed {fresh}"
    return fresh


def picture_seed(first: int, index: int) -> int:
    """The seed of picture `index`: consecutive numbers; 0 follows the largest."""
    return (first + index) % (MAX_SEED + 1)


def batched(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Batches of `size`; the last may be smaller."""
    jobs = iter(jobs)
    while batch := list(islice(jobs, size)):
        yield batch


def run_jobs(
    batches: Iterable[list[Job]],
    draw: Callable[[list[Job]], "list[Image]"],
    writer: PictureWriter,
    metadata: Mapping[str, Any],
) -> None:
    """Make the pictures of every batch and save them at once.

    When `unclip rerun` makes one picture again, only that picture is saved: at the same place in a batch of the same
    size.

    Args:
        batches: the jobs.
        draw: makes the pictures of a batch.
        writer: saves them.
        metadata: of all pictures.

    Raises: what `draw` and the writer raise before the first file is written; typer.Exit(3), with the error printed,
        after that.
    """
    picture = replay()
    if picture is not None and picture.only:
        job = next((job for batch in batches for job in batch if job.index == picture.index), None)
        if job is None:
            raise InputError(f"the command makes no picture {picture.index} of these inputs")
        batches = [[job] * picture.size]
    try:
        for batch in batches:
            start = time.monotonic()
            with within_memory(len(batch)):
                images = draw(batch)
            detail(f"batch of {len(batch)}: {time.monotonic() - start:.1f} s")
            _save(batch, images, writer, metadata)
    except UnclipError as problem:
        if not writer.num_saved:
            raise
        error(problem)
        raise typer.Exit(SOME_FAILED) from problem


def exit_if_failed(writer: PictureWriter, num_failed: int) -> None:
    """Exit with the right code when inputs failed, whose errors are printed already."""
    if num_failed:
        raise typer.Exit(SOME_FAILED if writer.num_saved else 1)


@contextmanager
def within_memory(batch_size: int) -> Iterator[None]:
    """Raises: InputError that says what to do when the device has too little memory for the block."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as problem:
        raise InputError(
            f"the device's memory does not hold a batch of {batch_size}: make --batch-size smaller, or try "
            "--dtype bfloat16 or --cpu-offload"
        ) from problem


def _save(batch: list[Job], images: "list[Image]", writer: PictureWriter, metadata: Mapping[str, Any]) -> None:
    """Write all files before the first path is printed: a reader that closes stdout costs no picture."""
    saved = []
    try:
        picture = replay()
        for place, (job, image) in enumerate(zip(batch, images, strict=True)):
            if picture is not None and picture.only and place != picture.place:
                continue
            made_with = {**metadata[MADE_WITH], "index": job.index, "batch": [place, len(batch)]}
            facts = {**job.facts, **metadata, "seed": job.seed, MADE_WITH: made_with}
            saved.append((writer.save(image, f"{job.name}-{job.seed}", facts), facts))
            if writer.kept is not None:
                writer.kept.append(image)
    finally:
        for path, facts in saved:
            writer.announce(path, facts)


class FilmKind(StrEnum):
    """File formats of films."""

    gif = "gif"
    webp = "webp"
    mp4 = "mp4"


@dataclass(frozen=True)
class Film:
    """Options of a film."""

    film: Annotated[
        FilmKind | None,
        typer.Option("--film", metavar="KIND", help="Also write the frames as a film: gif, webp or mp4 (needs PyAV)."),
    ] = None
    fps: Annotated[
        float, typer.Option("--fps", min=0.5, max=50, metavar="N", help="Frames per second of the film.")
    ] = 10


def check_film_kind(kind: FilmKind | None) -> None:
    """Raises: MissingDependencyError when nothing here writes this kind."""
    if kind is FilmKind.mp4:
        try:
            import av  # noqa: F401  # type: ignore[import-not-found]
        except ImportError as problem:
            raise MissingDependencyError(
                "an MP4 film needs PyAV: pip install av; or use --film gif or --film webp, which need nothing"
            ) from problem


def film_writer(kind: FilmKind, frames: "list[Image]", fps: float) -> Callable[[Path], None]:
    """A function that writes the frames forwards and backwards, as a loop that starts and ends at the first."""
    loop = [*frames, *frames[-2:0:-1]]
    return {FilmKind.gif: _gif, FilmKind.webp: _webp, FilmKind.mp4: _mp4}[kind](loop, fps)


def _gif(frames: "list[Image]", fps: float) -> Callable[[Path], None]:
    from PIL import Image

    # One palette for all frames: with a palette for each, parts that do not move would change their colours.
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
