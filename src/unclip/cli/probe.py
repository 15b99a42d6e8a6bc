"""`unclip probe`: principal components of image embeddings, and pictures from some of them."""

import itertools
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from unclip.checkpoints.hub import resolve
from unclip.checkpoints.layout import PROBE_FILE
from unclip.cli import options
from unclip.cli.inputs import no_file, read_part
from unclip.cli.latents import NO_GUIDANCE, ManipulationRun, one_row
from unclip.cli.messages import error, note
from unclip.cli.output import SOME_FAILED, PictureWriter
from unclip.cli.provenance import RecordedCommand
from unclip.errors import DataError, ImageError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from unclip.data.shards import Damage
    from unclip.models.pca import PrincipalComponents

T = TypeVar("T")

FIT_EXAMPLES = options.examples(
    "unclip probe fit data/emoji --out pca.safetensors",
    "unclip probe fit data/emoji --model DIR             into DIR",
    "unclip probe fit data/emoji --num-pictures 2000 --out pca.safetensors",
)
SHOW_EXAMPLES = options.examples(
    "unclip probe show cat.png --pca pca.safetensors --grid",
    "unclip probe show cat.png --pca pca.safetensors --dims 1,4,16,64,256",
)

probe = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@probe.callback()
def probe_group() -> None:
    """See what the principal components of the image embeddings contain."""


@probe.command("fit", epilog=FIT_EXAMPLES)
@options.expanded
def fit(
    *,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A data set: a folder, as of unclip data emoji, or tar shards.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The .safetensors file to write.",
            show_default=f"{PROBE_FILE} in the model's folder",
        ),
    ] = None,
    model: options.Model = "unclip-emoji",
    num_components: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Components to keep.", show_default="all")
    ] = None,
    num_pictures: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Use only N pictures, chosen at random.", show_default="all"),
    ] = None,
    batch_size: options.BatchSize = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing FILE.")] = False,
    precision: options.Precision,
    quiet: options.Quiet = False,
) -> None:
    """Fit principal components to the embeddings of a data set's pictures.

    DATA is the folder of a data set (without the samples that it holds out), any folder with picture files, or tar
    shards: a folder, a pattern, or URLs. Without --out the components are written into the model's folder, and `unclip
    probe show` finds them there. The path is printed to stdout.
    """
    from unclip.checkpoints.tensor_file import SUFFIX
    from unclip.errors import OutputExistsError

    out = own_file(model) if out is None else out
    if out.suffix != SUFFIX:
        raise InputError(f"--out {out} must end in {SUFFIX}")
    if out.exists() and not overwrite:
        raise OutputExistsError(f"{out} exists already; use --overwrite, or another name")
    pictures = Pictures.of(data, num_pictures)
    run = ManipulationRun.open(model, precision, {}, guidance=NO_GUIDANCE, quiet=quiet)
    components = run.manipulator.fit_components(pictures.batches(batch_size), num_components)
    count = pictures.num_read
    about = {"model": run.metadata["model"], "data": Path(data).resolve().name, "num_pictures": str(count)}
    run.manipulator.save_components(components, out, about=about, overwrite=overwrite)
    if not quiet:
        halves = int((components.explained < 0.5).sum()) + 1
        note(f"{count} pictures; the first {halves} of {components.dim} dimensions have half of the variance")
    print(out, flush=True)
    if pictures.num_failed:
        raise typer.Exit(SOME_FAILED)


@probe.command("show", cls=RecordedCommand, epilog=SHOW_EXAMPLES)
@options.expanded
def show(
    *,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture file, or a file of `unclip invert`.")],
    pca: Annotated[
        Path | None,
        typer.Option(
            "--pca", metavar="FILE", help="Components from `unclip probe fit`.", show_default="the model's own"
        ),
    ] = None,
    model: options.Model = "unclip-emoji",
    dims: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="Number of dimensions of each picture.", show_default="0, 1, 2, 4, … all"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=options.MAX_SEED, metavar="N", help="Seed of super-resolution's noise.")
    ] = 0,
    decoding: options.InversionDecoding,
    output: options.Output,
    compute: options.Compute,
    quiet: options.Quiet = False,
) -> None:
    """Decode a picture from growing numbers of its embedding's principal components.

    The picture is inverted and keeps its own noise throughout. Without components the embedding is the mean of all
    pictures; with as many as the embedding has dimensions it is the picture's own. The paths are printed to stdout, one
    on each line.
    """
    from unclip.models.pca import PrincipalComponents

    part = read_part(image, caption=True)
    if part.kind == "caption":
        raise InputError(f"{no_file(image)}; probing starts from a picture")
    if pca is None:
        pca = resolve(model) / PROBE_FILE
        if not pca.exists():
            raise InputError(f"{model} has no {PROBE_FILE}: give --pca, or fit components first: unclip probe fit DATA")
    counts = dimensions(dims, PrincipalComponents.load(pca))
    writer = PictureWriter.of(output, len(counts))
    run = ManipulationRun.open(model, compute, decoding.given(), parts=[part], guidance=NO_GUIDANCE, quiet=quiet)
    components = run.manipulator.load_components(pca)

    from unclip.stages.manipulation import probe as reduced

    latent = reduced(one_row(run.latent(part, seed=seed), part), components, counts)
    about = {"image": part.name, "pca": pca.name}
    shown = [str(count) for count in counts]
    run.decode_rows(
        latent,
        [{**about, "dimensions": count} for count in counts],
        f"{part.stem}-dims",
        writer,
        output,
        seed=seed,
        whole={**about, "dimensions": ",".join(shown)},
        labels=shown,
    )


def own_file(model: str) -> Path:
    """The file of components in a model's folder. Raises: InputError for a model that is not a writable folder."""
    folder = Path(model)
    if not folder.is_dir():
        raise InputError(f"{model} is not a folder, so components cannot be written into it: give --out FILE")
    if not os.access(folder, os.W_OK):
        raise InputError(f"the folder {model} cannot be written to: give --out FILE")
    return folder / PROBE_FILE


def dimensions(text: str | None, components: "PrincipalComponents") -> list[int]:
    """The counts that `--dims` names; by default 0, then powers of two, then all.

    Raises: InputError for something that is not a number of these components.
    """
    most = components.num_components
    if text is None:
        return [0, *(2**power for power in range(most.bit_length()) if 2**power < most), most]
    counts = []
    for word in text.split(","):
        if not word.strip().isdecimal() or int(word) > most:
            raise InputError(f"--dims has {word.strip()!r:.40}; each must be a number from 0 to {most}")
        counts.append(int(word))
    return counts


def drawn(items: Iterable[T], most: int | None) -> Iterable[T]:
    """A uniform random sample of `most` items, in no particular order; the same one in every run. None: all items.

    Source: Vitter 1985, "Random sampling with a reservoir", algorithm R.
    """
    if most is None:
        return items
    chance, kept = random.Random(0), list[T]()
    for count, item in enumerate(items):
        if count < most:
            kept.append(item)
        elif (place := chance.randrange(count + 1)) < most:
            kept[place] = item
    return kept


@dataclass
class Pictures:
    """The pictures of a data set, of shards, or of a folder, once each; errors of unreadable ones are printed.

    Attributes:
        data: as `unclip.data.samples.raw_samples` takes it; None for a folder without records.
        files: of such a folder.
        most: how many are chosen at random; None for all.
        num_read, num_failed: so far.
    """

    data: str | None
    files: list[Path]
    most: int | None = None
    num_read: int = 0
    num_failed: int = 0

    @classmethod
    def of(cls, data: str, most: int | None = None) -> "Pictures":
        """Raises: DataError when there are none."""
        from unclip.data.folder import METADATA
        from unclip.data.shards import is_shards
        from unclip.images import PICTURE_SUFFIXES

        folder = Path(data)
        if is_shards(data) or any((folder / name).exists() for name in METADATA):
            return cls(data, [], most)
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
        if not files:
            raise DataError(f"{data} is not a data set and has no pictures in it")
        return cls(None, files, most)

    def batches(self, size: int) -> "Iterator[list[Image]]":
        """Batches of `size`; the last may be smaller."""
        from unclip.data.shards import Damage

        damage = Damage()
        found = self._opened() if self.data is None else self._streamed(self.data, damage)
        while batch := list(itertools.islice(found, size)):
            self.num_read += len(batch)
            yield batch
        for name, why in damage.broken.items():
            error(f"{name}: {why}")
        self.num_failed += len(damage.broken)

    def _opened(self) -> "Iterator[Image]":
        from unclip.images import open_image

        for path in drawn(self.files, self.most):
            try:
                yield open_image(path)
            except ImageError as problem:
                error(problem)
                self.num_failed += 1

    def _streamed(self, data: str, damage: "Damage") -> "Iterator[Image]":
        from unclip.data.samples import raw_samples, read_picture

        for raw in drawn(raw_samples(data, damage), self.most):
            try:
                yield read_picture(raw)
            except DataError as problem:
                damage.broken[raw.name] = str(problem)
