"""`unclip data …`: make, caption, inspect, pack and embed data sets of captioned pictures."""

import functools
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.checkpoints.files import read_json
from unclip.cli import options
from unclip.cli.messages import note, warn
from unclip.cli.options import argument, command, flag, option
from unclip.errors import OutputExistsError

if TYPE_CHECKING:
    from unclip.data.folder import Keys
    from unclip.data.shards import Damage


class Origin(StrEnum):
    """Where captions come from."""

    texts = "texts"
    names = "names"
    folders = "folders"


Data = Annotated[str, argument("DATA", "A folder with metadata.jsonl or metadata.csv, or shards: a folder, glob, URL.")]
ImageKey = Annotated[
    str | None,
    option(
        "NAME",
        "The key or column that names the picture.",
        "--image-key",
        default="file_name, image, image_path, path or filename",
    ),
]
CaptionKey = Annotated[
    str | None,
    option("NAME", "The key or column with the caption.", "--caption-key", default="captions, text, caption or prompt"),
]
PerShard = Annotated[int, option("N", "Samples in one shard.", min=1)]
MaxSkipped = Annotated[
    float, option("SHARE", "Of samples, and of shards, that may be broken and left out.", min=0.0, max=1.0)
]

data = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@data.callback()
def data_group() -> None:
    """Make a data set to train on, look into one, change its form."""


@command(data, "emoji")
def emoji(
    out: options.NewFolder,
    packages: Annotated[
        Path | None, option("DIR", "Folder with the four source tarballs.", default="fetched with npm")
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Render the emoji data set: three open designs, with captions.

    Needs the extra packages of training; in a checkout: pip install '.[train]'

    Examples:
        unclip data emoji --out data/emoji
        unclip data emoji --out data/emoji --packages downloads
    """
    from tqdm import tqdm

    from unclip.data.emoji.build import build_emoji

    counts = build_emoji(out, packages=packages, progress=None if quiet else functools.partial(tqdm, disable=None))
    if not quiet:
        note(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
    print(out, flush=True)


@command(data, "language")
def language(
    source: Annotated[Path, argument("DATA", "The folder of unclip data emoji.")],
    out: Annotated[Path, option("FILE", "The file to write, one phrase a line.", "--out", "-o")],
    count: Annotated[int, option("N", "Phrases to write.", min=1)] = 1_200_000,
    seed: Annotated[int, option("N", "Random seed.", min=0, max=2**32)] = 0,
    packages: Annotated[
        Path | None, option("DIR", "Folder with the four source tarballs.", default="fetched with npm")
    ] = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace an existing FILE.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Write many wordings of what the emoji show, for a teacher to read.

    The phrases are made of labels, keywords and the nouns of WordNet. They train a CLIP's text encoder, a prior and a
    decoder whose recipe has a section [teacher]. The wordings of unclip evaluate wordings are left out.

    Examples:
        unclip data language data/emoji --out data/language.jsonl
        unclip data language data/emoji --out small.jsonl --count 20000
    """
    from unclip.checkpoints.hub import BUILT_IN_JUDGE, resolve
    from unclip.data.emoji.language import build_language

    if out.exists() and not overwrite:
        raise OutputExistsError(f"{out} exists already; give --overwrite, or name another file")
    listed = read_json(resolve(BUILT_IN_JUDGE) / "wordings.json")
    left_out = [wording for wordings in listed.values() for wording in wordings]
    written = build_language(source, out, count=count, seed=seed, left_out=left_out, packages=packages)
    if not quiet:
        note(f"{written:,} phrases")
    print(out, flush=True)


@command(data, "caption")
def caption(
    folder: Annotated[Path, argument("FOLDER", "A folder of pictures; folders in it count too.")],
    origin: Annotated[
        Origin | None,
        option(
            "WHERE",
            "texts: NAME.txt beside a picture, one caption a line; names: the words of file names; folders: "
            "the name of a picture's folder.",
            "--from",
            default="texts where they exist, else names",
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        option(
            "FILE",
            "Take captions from a CSV (or JSON lines) with named columns; several rows of a picture are "
            "several captions.",
            "--csv",
        ),
    ] = None,
    image_key: ImageKey = None,
    caption_key: CaptionKey = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace an existing metadata.jsonl.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the captions of your own pictures into FOLDER/metadata.jsonl.

    Training and the other data commands read that file. Pictures that get no caption are named and left out. Check the
    captions of file names: a number at the end is dropped where it only tells pictures apart.

    Examples:
        unclip data caption photos                     cat.txt of cat.jpg, else cat
        unclip data caption photos --from names        red_apple-02.png: red apple
        unclip data caption photos --from folders      cats/001.jpg: cats
        unclip data caption photos --csv captions.csv  columns: file_name, text
        unclip data caption photos --csv a.csv --image-key photo --caption-key title
        unclip data inspect photos --sheet sheet.png   look at the result
    """
    from unclip.data.captions import write_captions

    if csv is None and (image_key, caption_key) != (None, None):
        raise typer.BadParameter("--image-key and --caption-key name columns of --csv FILE")
    if csv is not None and origin is not None:
        raise typer.BadParameter("give --from or --csv, not both")
    found = write_captions(
        folder,
        origin=None if origin is None else origin.value,
        csv=csv,
        keys=_keys(image_key, caption_key),
        overwrite=overwrite,
    )
    for name, why in list(found.left_out.items())[:10]:
        warn(f"{name}: {why}")
    if not quiet:
        if len(found.left_out) > 10:
            note(f"… and {len(found.left_out) - 10:,} more that are left out")
        sources = ", ".join(f"{count:,} from {where}" for where, count in found.counts.items())
        first = found.records[0]
        note(f"captions of {len(found.records):,} pictures: {sources}")
        note(f"the first one, of {first.file_name}: {first.captions[0]}")
    print(found.file, flush=True)


@command(data, "inspect")
def inspect(
    source: Data,
    sheet: Annotated[Path | None, option("FILE", "Draw some pictures with captions.")] = None,
    num_shown: Annotated[int, option("N", "Pictures on the sheet.", min=1, max=1000)] = 48,
    overwrite: Annotated[bool, flag("--overwrite", "Replace an existing FILE.")] = False,
    image_key: ImageKey = None,
    caption_key: CaptionKey = None,
    quiet: options.Quiet = False,
) -> None:
    """Read a whole data set: count, name what is broken, draw a sheet.

    Examples:
        unclip data inspect data/emoji
        unclip data inspect "shards/{00000..00007}.tar" --sheet sheet.png
    """
    from unclip.checkpoints.files import atomic_file
    from unclip.data.samples import inspect as look

    if sheet is not None and sheet.exists() and not overwrite:
        raise OutputExistsError(f"{sheet} is there already; give --overwrite, or name another file")
    found = look(source, num_shown=num_shown, keys=_keys(image_key, caption_key), progress=_bar(quiet))
    rows = {"samples": found.num_samples, "captions": found.num_captions, "with an embedding": found.num_embeddings}
    for name, number in (rows | {"broken": len(found.broken)}).items():
        print(f"{name:<18}{number:>12,}", flush=True)
    for name, why in list(found.broken.items())[:10]:
        warn(f"{name}: {why}")
    if sheet is not None and found.sheet is not None:
        with atomic_file(sheet) as draft:
            found.sheet.save(draft, "PNG")
        print(sheet, flush=True)
    if not found.num_samples:
        raise typer.Exit(1)


@command(data, "compose")
def compose(
    source: Annotated[Path, argument("DATA", "A folder of single objects: unclip data emoji.")],
    out: options.NewFolder,
    count: Annotated[int, option("N", "Pictures to make.", min=1)] = 30_000,
    seed: Annotated[int, option("N", "Random seed.", min=0, max=2**32)] = 0,
    weight: Annotated[float, option("W", "Of each picture in training.", min=0.0)] = 0.05,
    quiet: options.Quiet = False,
) -> None:
    """Make pictures that show how captions compose.

    Objects in other colours, on backgrounds, and two to a scene, with captions that say so. One combination in twenty
    is held out.

    Examples:
        unclip data compose data/emoji --out data/composed
        unclip data inspect data/composed --sheet sheet.png
    """
    from unclip.data.emoji.compose import compose as make

    counts = make(source, out, count=count, seed=seed, weight=weight, progress=_bar(quiet))
    if not quiet:
        note(", ".join(f"{number} {name}" for name, number in counts.items()))
    print(out, flush=True)


@command(data, "pack")
def pack(
    source: Data,
    out: options.NewFolder,
    per_shard: PerShard = 10_000,
    max_skipped: MaxSkipped = 0.01,
    image_key: ImageKey = None,
    caption_key: CaptionKey = None,
    quiet: options.Quiet = False,
) -> None:
    """Write a data set as tar shards, to be streamed.

    The layout is that of webdataset and img2dataset. Held-out pictures are left out, and so are broken ones, which
    DIR.skipped.json lists.

    Examples:
        unclip data pack data/emoji --out shards
    """
    from unclip.data.samples import pack as write

    damage = write(
        source,
        out,
        per_shard=per_shard,
        max_skipped_share=max_skipped,
        keys=_keys(image_key, caption_key),
        progress=_bar(quiet),
    )
    tell(damage, out, quiet)
    print(out, flush=True)


@command(data, "embed")
def embed(
    source: Data,
    clip: Annotated[Path, option("MODEL", "A folder with image_encoder: of a CLIP run, or a model.")],
    out: options.NewFolder,
    keep_pictures: Annotated[bool, flag("--keep-pictures", "Copy the pictures too, for a decoder.")] = False,
    per_shard: PerShard = 10_000,
    max_skipped: MaxSkipped = 0.01,
    image_key: ImageKey = None,
    caption_key: CaptionKey = None,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Compute CLIP embeddings once, into shards to train a prior on.

    Broken samples are left out; DIR.skipped.json lists them. Until all is done the shards lie in DIR.unfinished; after
    Ctrl-C the same command goes on from there.

    Examples:
        unclip data embed data/emoji --clip runs/clip/model --out embedded
        unclip data embed shards --clip models/mine --out embedded --keep-pictures
    """
    from unclip.data.shard_writer import STATE, unfinished_folder
    from unclip.pipelines.session import pick_device, silence
    from unclip.training.embedding import embed as write

    silence(downloads=True)
    where = pick_device(device)
    unfinished = unfinished_folder(out)
    if (unfinished / STATE).is_file() and not quiet:
        note(f"going on from the {len(list(unfinished.glob('*.tar')))} shards in {unfinished}")
    damage = write(
        source,
        clip,
        out,
        keep_pictures=keep_pictures,
        per_shard=per_shard,
        max_skipped_share=max_skipped,
        keys=_keys(image_key, caption_key),
        device=where,
        progress=_bar(quiet),
    )
    tell(damage, out, quiet)
    print(out, flush=True)


def tell(damage: "Damage", out: Path, quiet: bool) -> None:
    """What was read for `out`, and what could not be."""
    from unclip.data.samples import skipped_file

    for name, why in list(damage.broken.items())[:10]:
        warn(f"{name}: {why}")
    if not quiet:
        note(f"{damage.num_read:,} samples read, {len(damage.broken):,} samples or shards broken")
        if damage.broken:
            note(f"all that is broken is listed in {skipped_file(out)}")


def _keys(image: str | None, caption: str | None) -> "Keys":
    from unclip.data.folder import Keys

    return Keys(image, caption)


def _bar(quiet: bool) -> Any:
    from tqdm import tqdm

    return None if quiet else functools.partial(tqdm, disable=None)
