"""`unclip probe`: principal components of image embeddings, and pictures from some of them."""

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from unclip.checkpoints.hub import resolve
from unclip.checkpoints.layout import PROBE_FILE
from unclip.checkpoints.tensor_file import SUFFIX
from unclip.cli import options
from unclip.cli.inputs import no_file, read_part
from unclip.cli.latents import ManipulationRun, one_row
from unclip.cli.messages import error, note
from unclip.cli.options import argument, command, flag, option
from unclip.cli.output import SOME_FAILED, PictureWriter, check_free
from unclip.cli.provenance import RecordedCommand
from unclip.errors import DataError, ImageError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from unclip.models.pca import PrincipalComponents

T = TypeVar("T")


probe = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@probe.callback()
def probe_group() -> None:
    """Show what the principal components of the image embeddings contain."""


@command(probe, "fit")
def fit(
    *,
    data: Annotated[str, argument("DATA")],
    out: Annotated[Path | None, option("FILE", "--out", "-o", default=f"{PROBE_FILE} in the model's folder")] = None,
    model: options.Model = "unclip-emoji",
    num_components: Annotated[int | None, option("N", default="all", min=1)] = None,
    num_pictures: Annotated[int | None, option("N", default="all", min=2)] = None,
    batch_size: options.BatchSize = 64,
    overwrite: Annotated[bool, flag("--overwrite")] = False,
    precision: options.ExactPrecision,
    quiet: options.Quiet = False,
) -> None:
    """Fit principal components to the embeddings of a data set's pictures.

    DATA is the folder of a data set (held-out samples are not used), any folder with picture files, or tar
    shards: a folder, a pattern, or URLs. Without --out the components are written into the model's folder, and `unclip
    probe show` finds them there. The path is printed to stdout.

    Args:
        data: A data set: a folder, such as that of unclip data emoji, or tar shards.
        out: The .safetensors file to write.
        num_components: Components to keep.
        num_pictures: Use only N pictures, chosen at random.
        overwrite: Replace an existing FILE.

    Examples:
        unclip probe fit data/emoji --out pca.safetensors
        unclip probe fit data/emoji --model DIR             into DIR
        unclip probe fit data/emoji --num-pictures 2000 --out pca.safetensors
    """
    out = own_file(model) if out is None else out
    if out.suffix != SUFFIX:
        raise InputError(f"--out {out} must end in {SUFFIX}")
    check_free(out, overwrite=overwrite)
    broken: dict[str, str] = {}
    pictures, count = pictures_of(data, num_pictures, broken), 0
    common = options.Common(options.Output(), options.Compute(precision.dtype, precision.device), quiet)
    run = ManipulationRun.open(model, common, {})

    def batches() -> "Iterator[list[Image]]":
        nonlocal count
        while batch := list(itertools.islice(pictures, batch_size)):
            count += len(batch)
            yield batch

    components = run.manipulator.fit_components(batches(), num_components)
    about = {"model": run.metadata["model"], "data": Path(data).resolve().name, "num_pictures": str(count)}
    run.manipulator.save_components(components, out, about=about, overwrite=overwrite)
    for name, why in broken.items():
        error(why if name in why else f"{name}: {why}")
    if not quiet:
        halves = int((components.explained < 0.5).sum()) + 1
        note(f"{count} pictures; the first {halves} of {components.dim} dimensions have half of the variance")
    print(out, flush=True)
    if broken:
        raise typer.Exit(SOME_FAILED)


@command(probe, "show", cls=RecordedCommand)
def show(
    *,
    image: Annotated[str, argument("IMAGE")],
    pca: Annotated[Path | None, option("FILE", "--pca", default="the model's own")] = None,
    model: options.Model = "unclip-emoji",
    dims: Annotated[str | None, option("N,N,…", default="0, 1, 2, 4, … all")] = None,
    seed: Annotated[int, option("N", min=0, max=options.MAX_SEED)] = 0,
    decoding: options.InversionDecoding,
    common: options.Common,
) -> None:
    """Decode a picture from a growing number of principal components of its embedding.

    The picture is inverted and keeps its own noise throughout. Without components, the embedding is the mean of all
    pictures; with all components, it is that of the picture. The paths are printed to stdout, one
    on each line.

    Args:
        image: A picture file, or a file of `unclip invert`.
        pca: Components from `unclip probe fit`.
        dims: Numbers of components, one for each picture.
        seed: Seed of super-resolution's noise.

    Examples:
        unclip probe show cat.png --pca pca.safetensors --grid
        unclip probe show cat.png --pca pca.safetensors --dims 1,4,16,64,256
    """
    from unclip.models.pca import PrincipalComponents

    part = read_part(image, caption=True)
    if part.kind == "caption":
        raise InputError(f"{no_file(image)}; give a picture to probe")
    if pca is None:
        pca = resolve(model) / PROBE_FILE
        if not pca.exists():
            raise InputError(f"{model} has no {PROBE_FILE}: give --pca, or fit components first: unclip probe fit DATA")
    counts = dimensions(dims, PrincipalComponents.load(pca))
    writer = PictureWriter(common, len(counts), seed=seed)
    run = ManipulationRun.open(model, common, decoding.given(), parts=[part])
    components = run.manipulator.load_components(pca)

    from unclip.stages.manipulation import probe as reduced

    latent = reduced(one_row(run.latent(part, seed=seed), part), components, counts)
    about, labels = {"image": part.name, "pca": pca.name}, [str(count) for count in counts]
    facts = [{**about, "dimensions": count} for count in counts]
    whole = {**about, "dimensions": ",".join(labels)}
    run.decode_rows(latent, facts, f"{part.stem}-dims", writer, whole, labels=labels)


def own_file(model: str) -> Path:
    """The file of components in a model's folder. Raises: InputError for a model that is not a writable folder."""
    if not os.path.isdir(model) or not os.access(model, os.W_OK):
        raise InputError(f"{model} is not a writable folder: give --out FILE")
    return Path(model) / PROBE_FILE


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


def sampled(items: Iterable[T], most: int | None) -> Iterable[T]:
    """A uniform random sample of `most` items, the same in every run, in no particular order; all items for None.

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


def pictures_of(data: str, most: int | None, broken: dict[str, str]) -> "Iterator[Image]":
    """The pictures of a data set, of shards, or of a folder, once each.

    Args:
        data: as `unclip.data.samples.raw_samples` takes it, or a folder without records.
        most: how many are chosen at random; None for all.
        broken: receives the reasons for the unreadable ones, by name.

    Raises: DataError when there are none.
    """
    from unclip.data.folder import METADATA
    from unclip.data.samples import raw_samples, read_picture
    from unclip.data.shards import Damage, is_shards
    from unclip.images import PICTURE_SUFFIXES, open_image

    folder = Path(data)
    if is_shards(data) or any((folder / name).exists() for name in METADATA):
        items, read = raw_samples(data, Damage(broken)), read_picture
    else:
        items, read = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES), open_image
        if not items:
            raise DataError(f"{data} is not a data set and contains no pictures")
    return _readable(sampled(items, most), read, broken)


def _readable(items: Iterable[Any], read: "Callable[[Any], Image]", broken: dict[str, str]) -> "Iterator[Image]":
    for item in items:
        try:
            yield read(item)
        except (DataError, ImageError) as problem:
            broken[item.name] = str(problem)
