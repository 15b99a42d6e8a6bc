"""`unclip probe`: what the dimensions of CLIP's space hold, the most telling first.

Knows data sets, files and options; principal components are another module's affair.
"""

import itertools
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from unclip.checkpoints.layout import PROBE_FILE
from unclip.cli import options
from unclip.cli.inputs import no_file, read_part
from unclip.cli.latents import NO_GUIDANCE, Workbench, one_row
from unclip.cli.messages import error, note
from unclip.cli.output import SOME_FAILED, Album
from unclip.cli.provenance import Recorded
from unclip.errors import DataError, ImageError, InputError
from unclip.pipelines.session import Machine, decoder_settings, find_model

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
    """See what the principal components of the image embeddings hold."""


@probe.command("fit", epilog=FIT_EXAMPLES)
def fit(
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
        int | None, typer.Option(min=1, metavar="N", help="How many to keep.", show_default="all")
    ] = None,
    num_pictures: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Look at this many, drawn at random: faster.", show_default="all"),
    ] = None,
    batch_size: options.BatchSize = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it is there.")] = False,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Fit principal components to the embeddings of a data set's pictures.

    DATA is a data set's folder (what it holds out is left out), any folder with picture files in it, or tar shards: a
    folder of them, a pattern, URLs. Without --out the components become a part of
    the model, if that is a folder of yours, and `unclip probe show` finds them there. The path is printed on stdout.
    """
    from unclip.checkpoints.tensor_file import SUFFIX
    from unclip.errors import OutputExistsError

    out = own_file(model) if out is None else out
    if out.suffix != SUFFIX:
        raise InputError(f"--out {out} must end in {SUFFIX}")
    if out.exists() and not overwrite:
        raise OutputExistsError(f"{out} exists already; use --overwrite, or another name")
    pictures = Pictures.of(data, num_pictures)
    bench = Workbench.open(model, Machine(dtype, device, False, quiet), {}, guidance=NO_GUIDANCE)
    components = bench.tool.fit_components(pictures.batches(batch_size), num_components)
    count = pictures.num_read
    about = {"model": bench.about["model"], "data": Path(data).resolve().name, "num_pictures": str(count)}
    bench.tool.save_components(components, out, about=about, overwrite=overwrite)
    if not quiet:
        halves = int((components.explained < 0.5).sum()) + 1
        note(f"{count} pictures; the first {halves} of {components.dim} dimensions hold half of the variance")
    print(out, flush=True)
    if pictures.num_failed:
        raise typer.Exit(SOME_FAILED)


@probe.command("show", cls=Recorded, epilog=SHOW_EXAMPLES)
def show(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture file, or a latent of: unclip invert.")],
    pca: Annotated[
        Path | None,
        typer.Option(
            "--pca", metavar="FILE", help="The components, of: unclip probe fit.", show_default="the model's own"
        ),
    ] = None,
    model: options.Model = "unclip-emoji",
    dims: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="How many dimensions each picture has.", show_default="0, 1, 2, 4, … all"),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=options.MAX_SEED, metavar="N", help="Of super-resolution's noise.")
    ] = 0,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    decoder_guidance: options.KeptGuidance = None,
    out: options.OutFolder = Path("."),
    grid: options.Grid = False,
    overwrite: options.OverwritePictures = False,
    as_json: options.Json = False,
    batch_size: options.BatchSize = 8,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    cpu_offload: options.CpuOffload = False,
    tile: options.Tile = None,
    quiet: options.Quiet = False,
) -> None:
    """Draw a picture from ever more of its embedding's principal components.

    The noise is the picture's own throughout, found by inversion. With no component it is what the mean of all pictures
    makes of that noise; with as many as the embedding has dimensions, the picture itself. The paths are printed on
    stdout, one a line.
    """
    from unclip.models.pca import PrincipalComponents

    part = read_part(image, caption=True)
    if part.kind == "caption":
        raise InputError(f"{no_file(image)}; probing starts from a picture")
    if pca is None:
        pca = find_model(model, quiet=quiet)[0] / PROBE_FILE
        if not pca.exists():
            raise InputError(f"{model} has no {PROBE_FILE}: give --pca, or fit components first: unclip probe fit DATA")
    counts = dimensions(dims, PrincipalComponents.load(pca))
    album = Album(out, overwrite=overwrite, as_json=as_json, keep=grid, num_files=len(counts) + grid)
    given = decoder_settings(decoder_steps, super_res_steps, decoder_guidance)
    machine = Machine(dtype, device, cpu_offload, quiet, tile)
    bench = Workbench.open(model, machine, given, parts=[part], guidance=NO_GUIDANCE)
    components = bench.tool.load_components(pca)

    from unclip.stages.manipulation import probe as reduced

    latent = reduced(one_row(bench.latent(part, seed=seed), part), components, counts)
    about = {"image": part.name, "pca": pca.name}
    shown = [str(count) for count in counts]
    bench.draw(
        latent,
        [{**about, "dimensions": count} for count in counts],
        album,
        f"{part.stem}-dims",
        seed=seed,
        batch_size=batch_size,
        sheet=grid,
        whole={**about, "dimensions": ",".join(shown)},
        labels=shown,
    )


def own_file(model: str) -> Path:
    """Where a model keeps its components. Raises: InputError for a model that is no folder, or one that is not ours."""
    folder = Path(model)
    if not folder.is_dir():
        raise InputError(f"{model} is no folder of yours to write components into: give --out FILE")
    if not os.access(folder, os.W_OK):
        raise InputError(f"the folder {model} cannot be written to: give --out FILE")
    return folder / PROBE_FILE


def dimensions(text: str | None, components: "PrincipalComponents") -> list[int]:
    """The counts that `--dims` names; by default 0, then powers of two, then all.

    Raises: InputError for something that is no count of these components.
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
    """`most` of all items, each as likely as any other, in no order, however many there are; always the same ones.

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
    """The pictures of a data set, of shards, or of a folder, once each; those that cannot be read are told of.

    Attributes:
        data: as `unclip.data.samples.raw_samples` takes it; None for a folder without records.
        files: of such a folder.
        most: how many are drawn at random, always the same; None for all.
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
            raise DataError(f"{data} is no data set and has no pictures in it")
        return cls(None, files, most)

    def batches(self, size: int) -> "Iterator[list[Image]]":
        """As many at once; the last may be fewer."""
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
