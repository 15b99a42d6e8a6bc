"""Picture files, sheets and films: file names, metadata, and the loop that makes pictures in batches."""

import json
import os
import secrets
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.checkpoints.files import atomic_file, output_folder
from unclip.cli.messages import detail, error, note
from unclip.cli.options import MAX_SEED, Common, option
from unclip.cli.provenance import Replay, replay
from unclip.errors import InputError, MissingDependencyError, OutputExistsError, UnclipError
from unclip.pipelines.session import MADE_WITH, png_texts

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SLUG_CHARACTERS = 60
MAX_SLUG_BYTES = 120
SOME_FAILED = 3
"""The exit code when some pictures were made and others were not."""


def slug(text: str, *, empty: str = "picture") -> str:
    """A short file name from any text: letters and digits of every script, joined by hyphens."""
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


def check_free(*paths: Path, overwrite: bool) -> None:
    """Raises: OutputExistsError for an existing file, unless `overwrite` is set, and for a folder."""
    for path in paths:
        if path.is_dir() or (os.path.lexists(path) and not overwrite):
            raise OutputExistsError(f"{path} already exists: use --overwrite, or another name")


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


class PictureWriter:
    """Makes the pictures of a command, writes them into a folder or into one named file, and prints their paths.

    Args:
        common: the command's options. `out` is a folder; or, unless a folder has this name, a file name that ends in
            `suffix`.
        num_files: the smallest number of files that will be written, without the sheet.
        seed: of the first picture; None: a random one that is short enough to type. It is printed, unless `quiet`.
        film: whether a film will be made of the pictures.
        suffix: of the files, with a dot.

    Attributes:
        folder: where the files go.
        file: the file that `out` names, if it names one; files with another suffix go beside it.
        seed: of the first picture.
        num_saved: the number of written files.
        kept: the pictures so far, for a sheet or a film; None if they are not needed.

    Raises: InputError for a file name where several files will be written, or with the suffix of another kind of
        picture; OutputExistsError for an existing file, unless it may be replaced.
    """

    def __init__(
        self, common: Common, num_files: int, *, seed: int | None = None, film: bool = False, suffix: str = ".png"
    ) -> None:
        self.output = output = common.output
        out, self._suffix = output.out, suffix
        self.file = out if _names_file(out, suffix) else None
        self.folder = out if self.file is None else out.parent
        self.num_saved = 0
        self.kept: list[Image] | None = [] if output.grid or film else None
        if self.file is not None:
            self._check_one(num_files + output.grid)
            if not output.overwrite and os.path.lexists(out):
                raise OutputExistsError(f"{out} already exists: use --overwrite, or another --out")
        output_folder(self.folder)
        self.seed = secrets.randbelow(2**32) if seed is None else seed
        self._note = f"seed {self.seed}" if seed is None and not common.quiet else None

    def seed_of(self, index: int) -> int:
        """The seed of picture `index`: consecutive numbers; 0 follows the largest.

        When `unclip rerun` makes one picture again, its seed is the given one.
        """
        return self.seed if _again() is not None else (self.seed + index) % (MAX_SEED + 1)

    def make(self, jobs: Iterable[Job], draw: Callable[[list[Job]], "list[Image]"], facts: Mapping[str, Any]) -> None:
        """Make the pictures in batches, and save every batch at once.

        When `unclip rerun` makes one picture again, only that picture is saved: at the same place in a batch of the
        same size, with as many different prompts.

        Args:
            jobs: the pictures.
            draw: makes the pictures of a batch.
            facts: metadata of all pictures.

        Raises: what `draw` and `save` raise before the first file is written; typer.Exit(3), with the error printed,
            after that.
        """
        again, size = _again(), self.output.batch_size
        if again is not None:
            job = next((job for job in jobs if job.index == again.index), None)
            if job is None:
                raise InputError(f"the command makes no picture {again.index} of these inputs")
            jobs, size = _as_before(job, again), again.size
        jobs = iter(jobs)
        try:
            while batch := list(islice(jobs, size)):
                start = time.monotonic()
                with within_memory(len(batch)):
                    images = draw(batch)
                detail(f"batch of {len(batch)}: {time.monotonic() - start:.1f} s")
                self._save_batch(batch, images, facts)
        except UnclipError as problem:
            if not self.num_saved:
                raise
            error(problem)
            raise typer.Exit(SOME_FAILED) from problem

    def save(self, image: "Image", stem: str, facts: Mapping[str, Any]) -> Path:
        """Write `stem.png` with metadata, as `write`."""
        texts = png_texts(facts)
        return self.write(stem, ".png", lambda draft: image.save(draft, format="PNG", pnginfo=texts))

    def write(self, stem: str, suffix: str, writer: Callable[[Path], None]) -> Path:
        """Write the file `stem` + `suffix` atomically by `writer`, and return its path.

        Raises: OutputError when it cannot be written; InputError when `out` names one file and that is written already.
        """
        fixed = self.output.overwrite
        numbered = (self.folder / f"{stem}-{number}{suffix}" for number in count(2))
        paths: Iterator[Path] = chain([self.folder / f"{stem}{suffix}"], numbered)
        if self.file is not None and suffix == self._suffix:
            self._check_one(self.num_saved + 1)
            fixed, paths = True, iter([self.file])
        while True:
            path = next(paths)
            if not fixed and os.path.lexists(path):
                continue
            try:
                with atomic_file(path, overwrite=self.output.overwrite) as draft:
                    writer(draft)
            except OutputExistsError:
                if fixed:
                    raise
                continue  # another process has just made it
            self.num_saved += 1
            return path

    def announce(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Print the file's path on stdout, or a JSON object."""
        if self._note is not None:
            note(self._note)
            self._note = None
        print(json.dumps({"path": str(path), **facts}) if self.output.as_json else path, flush=True)

    def save_sheet(
        self, stem: str, facts: Mapping[str, Any], *, columns: int | None = None, labels: Sequence[str] | None = None
    ) -> None:
        """If requested, write the sheet of all pictures, with labels if given, and print its path."""
        from unclip.images import grid, labelled

        if self.kept and self.output.grid:
            facts, cards = {**facts, "seed": self.seed, "grid": len(self.kept)}, self.kept
            if labels is not None:
                cards = [labelled(image, label) for image, label in zip(cards, labels, strict=True)]
            self.announce(self.save(grid(cards, columns=columns), f"{stem}-{self.seed}-grid", facts), facts)

    def exit_if_failed(self, num_failed: int) -> None:
        """Exit with the right code when inputs failed; their errors were printed before."""
        if num_failed:
            raise typer.Exit(SOME_FAILED if self.num_saved else 1)

    def _save_batch(self, batch: list[Job], images: "list[Image]", all_facts: Mapping[str, Any]) -> None:
        """Write all files before the first path is printed, so that no picture is lost if stdout is closed."""
        saved, again = [], _again()
        prompts = [job.facts.get("prompt") for job in batch]
        rows = [prompts.index(prompt) for prompt in prompts] if again is None else again.prompts
        several = {"prompts": rows} if any(rows) else {}
        try:
            for place, (job, image) in enumerate(zip(batch, images, strict=True)):
                if again is not None and place != again.place:
                    continue
                made_with = {**all_facts[MADE_WITH], "index": job.index, "batch": [place, len(batch)], **several}
                facts = {**job.facts, **all_facts, "seed": job.seed, MADE_WITH: made_with}
                saved.append((self.save(image, f"{job.name}-{job.seed}", facts), facts))
                if self.kept is not None:
                    self.kept.append(image)
        finally:
            for path, facts in saved:
                self.announce(path, facts)

    def _check_one(self, num_files: int) -> None:
        if num_files > 1:
            raise InputError(
                f"--out {self.file} is the name of one file, but there are {num_files} or more files: name a folder"
            )


def _again() -> Replay | None:
    """The single picture that `unclip rerun` makes again."""
    picture = replay()
    return picture if picture is not None and picture.only else None


def _as_before(job: Job, again: Replay) -> list[Job]:
    """A batch with as many different prompts as before, because equal prompts are encoded only once.

    Spaces at the end of a prompt make a different prompt with the same tokens.
    """
    shifts = [(row - again.prompts[again.place]) % again.size for row in again.prompts] or [0] * again.size
    several = isinstance(job.given, str)
    return [replace(job, given=job.given + " " * shift) if shift and several else job for shift in shifts]


def _names_file(out: Path, suffix: str) -> bool:
    """Whether `--out` is a file's name. Raises: InputError for the name of a picture of another kind."""
    from unclip.images import PICTURE_SUFFIXES

    found = out.suffix.lower()
    if found not in (suffix, *PICTURE_SUFFIXES) or out.is_dir():
        return False
    if found != suffix:
        raise InputError(
            f"--out {out} ends in {found}, but the file has the type {suffix}: use {out.with_suffix(suffix)}"
        )
    return True


@contextmanager
def within_memory(batch_size: int) -> Iterator[None]:
    """Raises: InputError that says what to do when the device has too little memory for the block."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as problem:
        raise InputError(
            f"a batch of {batch_size} does not fit into the device's memory: reduce --batch-size, or try "
            "--dtype bfloat16 or --cpu-offload"
        ) from problem


class FilmKind(StrEnum):
    """File formats of films."""

    gif = "gif"
    webp = "webp"
    mp4 = "mp4"


@dataclass(frozen=True)
class Film:
    """Options of a film.

    Attributes:
        film: Also write the frames as a film: gif, webp or mp4 (needs PyAV).
        fps: Frames per second of the film.
    """

    film: Annotated[FilmKind | None, option("KIND", "--film")] = None
    fps: Annotated[float, option("N", "--fps", min=0.5, max=50)] = 10

    def check(self) -> None:
        """Raises: MissingDependencyError when this kind of film cannot be written."""
        if self.film is FilmKind.mp4:
            try:
                import av  # noqa: F401  # type: ignore[import-not-found]
            except ImportError as problem:
                raise MissingDependencyError(
                    "an MP4 film needs PyAV: pip install av; or use --film gif or --film webp"
                ) from problem

    def save(self, path: Path, frames: "list[Image]") -> None:
        """Write the frames forwards and backwards, as a loop that starts and ends at the first."""
        loop = [*frames, *frames[-2:0:-1]]
        if self.film is FilmKind.mp4:
            _save_mp4(path, loop, self.fps)
        else:
            first, *others = _in_one_palette(loop) if self.film is FilmKind.gif else loop
            settings = {"duration": round(1000 / self.fps), "loop": 0, "quality": 90}
            first.save(path, format=str(self.film), save_all=True, append_images=others, **settings)


def _in_one_palette(frames: "list[Image]") -> "list[Image]":
    """Give all frames one palette. With separate ones, parts that do not move would change their colours."""
    from PIL import Image

    strip = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
    for place, frame in enumerate(frames):
        strip.paste(frame, (0, place * frame.height))
    palette = strip.quantize(255)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def _save_mp4(path: Path, frames: "list[Image]", fps: float) -> None:
    from fractions import Fraction

    import av  # type: ignore[import-not-found]

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = (side - side % 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
