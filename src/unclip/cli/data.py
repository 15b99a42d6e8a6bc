"""`unclip data …`: make, caption, inspect, pack and embed data sets of captioned pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.checkpoints.files import atomic_file, read_json
from unclip.cli import options
from unclip.cli.messages import bar, note, warn
from unclip.cli.options import argument, command, flag, option
from unclip.cli.output import check_free

if TYPE_CHECKING:
    from unclip.data.folder import Keys
    from unclip.data.shards import Damage

MAX_NAMED = 10
"""Broken or left out pictures that are named on stderr."""
COLUMNS = "Take captions from a CSV (or JSON lines) with named columns; a picture may have several rows."
ORIGINS = (
    "texts: NAME.txt beside a picture, one caption on each line; names: the words of file names; folders: the name of "
    "a picture's folder."
)


class Origin(StrEnum):
    """The source of captions."""

    texts = "texts"
    names = "names"
    folders = "folders"


Data = Annotated[
    str, argument("DATA", help="A folder with metadata.jsonl or metadata.csv, or shards: a folder, pattern or URL.")
]
Overwrite = Annotated[bool, flag("--overwrite", help="Replace an existing FILE.")]
Packages = Annotated[
    Path | None, option("DIR", help="Folder with the four source tarballs.", default="fetched with npm")
]
Seed = Annotated[int, option("N", help="Random seed.", min=0, max=2**32)]


@dataclass(frozen=True)
class Columns:
    """The names of keys or columns.

    Attributes:
        image_key: Key or column of the picture.
        caption_key: Key or column of the caption.
    """

    image_key: Annotated[str | None, option("NAME", default="file_name, image, image_path, path or filename")] = None
    caption_key: Annotated[str | None, option("NAME", default="captions, text, caption or prompt")] = None

    @property
    def keys(self) -> "Keys":
        """The same, for the readers of data sets."""
        from unclip.data.folder import Keys

        return Keys(self.image_key, self.caption_key)


@dataclass(frozen=True)
class Sharding(Columns):
    """Options of the commands that write shards.

    Attributes:
        per_shard: Samples in one shard.
        max_skipped: Share of samples, and of shards, that may be broken and left out.
    """

    per_shard: Annotated[int, option("N", min=1)] = 10_000
    max_skipped: Annotated[float, option("SHARE", min=0, max=1)] = 0.01

    def arguments(self, quiet: bool) -> dict[str, Any]:
        """The arguments of the functions that write shards."""
        numbers = {"per_shard": self.per_shard, "max_skipped_share": self.max_skipped}
        return {**numbers, "keys": self.keys, "progress": bar(quiet)}


data = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@data.callback()
def data_group() -> None:
    """Make, inspect or convert a data set for training."""


@command(data, "emoji")
def emoji(*, out: options.NewFolder, packages: Packages = None, quiet: options.Quiet = False) -> None:
    """Render the emoji data set: three open designs, with captions.

    This needs the extra packages of training; in a checkout: pip install '.[train]'

    Examples:
        unclip data emoji --out data/emoji
        unclip data emoji --out data/emoji --packages downloads
    """
    from unclip.data.emoji.build import build_emoji

    counts = build_emoji(out, packages=packages, progress=bar(quiet))
    if not quiet:
        note(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))
    print(out, flush=True)


@command(data, "language")
def language(
    *,
    source: Annotated[Path, argument("DATA")],
    out: Annotated[Path, option("FILE", "--out", "-o")],
    count: Annotated[int, option("N", min=1)] = 1_200_000,
    seed: Seed = 0,
    languages: Annotated[str, option("CODE,…")] = "",
    packages: Packages = None,
    overwrite: Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Write many phrases about the emoji, as input of a teacher.

    The phrases consist of labels, keywords and nouns of WordNet. Recipes for CLIP's text encoder, a prior or a decoder
    use them in a section [teacher]. The built-in wordings of unclip evaluate wordings are left out.

    Args:
        source: The folder of unclip data emoji.
        out: The file to write, one phrase on each line.
        count: Phrases to write.
        languages: Further languages, such as de,fr, for names and keywords from Unicode.

    Examples:
        unclip data language data/emoji --out data/language.jsonl
        unclip data language data/emoji --out small.jsonl --count 20000
    """
    from unclip.checkpoints.hub import BUILT_IN_JUDGE, resolve
    from unclip.data.emoji.language import build_language

    check_free(out, overwrite=overwrite)
    listed = read_json(resolve(BUILT_IN_JUDGE) / "wordings.json")
    left_out = [wording for wordings in listed.values() for wording in wordings]
    codes = [code for code in languages.split(",") if code]
    written = build_language(source, out, count=count, seed=seed, left_out=left_out, languages=codes, packages=packages)
    if not quiet:
        note(f"{written:,} phrases")
    print(out, flush=True)


@command(data, "caption")
def caption(
    *,
    folder: Annotated[Path, argument("FOLDER")],
    origin: Annotated[Origin | None, option("WHERE", "--from", default="texts where they exist, else names")] = None,
    csv: Annotated[Path | None, option("FILE", "--csv")] = None,
    columns: Columns,
    overwrite: Annotated[bool, flag("--overwrite")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the captions of your own pictures to FOLDER/metadata.jsonl.

    Training and the other data commands read that file. Pictures without a caption are named and left out. A number at
    the end of a file name is removed if it only distinguishes pictures. Check these captions.

    Args:
        folder: A folder of pictures; its subfolders are read too.
        origin: texts: NAME.txt beside a picture, one caption on each line; names: the words of file names; folders: the
            name of a picture's folder.
        csv: Take captions from a CSV (or JSON lines) with named columns; a picture may have several rows.
        overwrite: Replace an existing metadata.jsonl.

    Examples:
        unclip data caption photos                     cat.txt of cat.jpg, else cat
        unclip data caption photos --from names        red_apple-02.png: red apple
        unclip data caption photos --from folders      cats/001.jpg: cats
        unclip data caption photos --csv captions.csv  columns: file_name, text
        unclip data caption photos --csv a.csv --image-key photo --caption-key title
        unclip data inspect photos --sheet sheet.png   look at the result
    """
    from unclip.data.captions import write_captions

    if csv is None and columns != Columns():
        raise typer.BadParameter("--image-key and --caption-key need --csv FILE")
    if csv is not None and origin is not None:
        raise typer.BadParameter("give --from or --csv, not both")
    where = None if origin is None else origin.value
    found = write_captions(folder, origin=where, csv=csv, keys=columns.keys, overwrite=overwrite)
    name_some(found.left_out)
    if not quiet:
        if len(found.left_out) > MAX_NAMED:
            note(f"… and {len(found.left_out) - MAX_NAMED:,} more are left out")
        sources = ", ".join(f"{count:,} from {where}" for where, count in found.counts.items())
        first = found.records[0]
        note(f"captions of {len(found.records):,} pictures: {sources}")
        note(f"the first one, of {first.file_name}: {first.captions[0]}")
    print(found.file, flush=True)


@command(data, "inspect")
def inspect(
    *,
    source: Data,
    sheet: Annotated[Path | None, option("FILE")] = None,
    num_shown: Annotated[int, option("N", min=1, max=1000)] = 48,
    overwrite: Overwrite = False,
    columns: Columns,
    quiet: options.Quiet = False,
) -> None:
    """Read a whole data set; count its samples and name the broken ones.

    Args:
        sheet: Write a sheet of some pictures with captions.
        num_shown: Pictures on the sheet.

    Examples:
        unclip data inspect data/emoji
        unclip data inspect "shards/{00000..00007}.tar" --sheet sheet.png
    """
    from unclip.data.samples import inspect as look

    if sheet is not None:
        check_free(sheet, overwrite=overwrite)
    found = look(source, num_shown=num_shown, keys=columns.keys, progress=bar(quiet))
    rows = {"samples": found.num_samples, "captions": found.num_captions, "with an embedding": found.num_embeddings}
    for name, number in (rows | {"broken": len(found.broken)}).items():
        print(f"{name:<18}{number:>12,}", flush=True)
    name_some(found.broken)
    if sheet is not None and found.sheet is not None:
        with atomic_file(sheet) as draft:
            found.sheet.save(draft, "PNG")
        print(sheet, flush=True)
    if not found.num_samples:
        raise typer.Exit(1)


@command(data, "compose")
def compose(
    *,
    source: Annotated[Path, argument("DATA")],
    out: options.NewFolder,
    count: Annotated[int, option("N", min=1)] = 30_000,
    seed: Seed = 0,
    weight: Annotated[float, option("W", min=0)] = 0.05,
    quiet: options.Quiet = False,
) -> None:
    """Make pictures that combine concepts, with captions that describe them.

    The pictures show objects in other colours, on backgrounds, and in pairs. One combination in twenty is held out.

    Args:
        source: A folder of single objects, such as that of unclip data emoji.
        count: Pictures to make.
        weight: Weight of each picture in training.

    Examples:
        unclip data compose data/emoji --out data/composed
        unclip data inspect data/composed --sheet sheet.png
    """
    from unclip.data.emoji.compose import compose as make

    counts = make(source, out, count=count, seed=seed, weight=weight, progress=bar(quiet))
    if not quiet:
        note(", ".join(f"{number} {name}" for name, number in counts.items()))
    print(out, flush=True)


@command(data, "pack")
def pack(*, source: Data, out: options.NewFolder, sharding: Sharding, quiet: options.Quiet = False) -> None:
    """Write a data set as tar shards, which can be streamed.

    The layout is that of webdataset and img2dataset. Held-out and broken pictures are left out; the broken ones are
    listed in DIR.skipped.json.

    Examples:
        unclip data pack data/emoji --out shards
    """
    from unclip.data.samples import pack as write

    finish(write(source, out, **sharding.arguments(quiet)), out, quiet)


@command(data, "embed")
def embed(
    *,
    source: Data,
    clip: Annotated[Path, option("MODEL")],
    out: options.NewFolder,
    keep_pictures: Annotated[bool, flag("--keep-pictures")] = False,
    sharding: Sharding,
    device: options.Device = "auto",
    quiet: options.Quiet = False,
) -> None:
    """Compute CLIP embeddings once, and write them as shards for training.

    Broken samples are left out; DIR.skipped.json lists them. The shards are in DIR.unfinished until all are complete;
    after Ctrl-C the same command continues.

    Args:
        clip: A folder with an image_encoder, such as model/ of a CLIP run, or a whole model.
        keep_pictures: Also copy the pictures, which a decoder needs for training.

    Examples:
        unclip data embed data/emoji --clip runs/clip/model --out embedded
        unclip data embed shards --clip models/mine --out embedded --keep-pictures
    """
    from unclip.data.shard_writer import STATE, unfinished_folder
    from unclip.pipelines.session import pick_device, silence
    from unclip.training.embedding import embed as write

    silence(downloads=True)
    where, unfinished = pick_device(device), unfinished_folder(out)
    if (unfinished / STATE).is_file() and not quiet:
        note(f"continuing after the {len(list(unfinished.glob('*.tar')))} shards in {unfinished}")
    more = sharding.arguments(quiet)
    finish(write(source, clip, out, keep_pictures=keep_pictures, device=where, **more), out, quiet)


def finish(damage: "Damage", out: Path, quiet: bool) -> None:
    """Print the numbers of read and broken samples, and the path."""
    from unclip.data.samples import skipped_file

    name_some(damage.broken)
    if not quiet:
        note(f"{damage.num_read:,} samples read, {len(damage.broken):,} samples or shards broken")
        if damage.broken:
            note(f"the broken ones are listed in {skipped_file(out)}")
    print(out, flush=True)


def name_some(broken: Mapping[str, str]) -> None:
    """Print the first names, with the reasons."""
    for name, why in list(broken.items())[:MAX_NAMED]:
        warn(f"{name}: {why}")


@command(data, "statistics")
def statistics(
    *,
    source: Annotated[Path, argument("DATA")],
    model: options.Model = "unclip-emoji",
    out: Annotated[Path | None, option("DIR", "--out", "-o", default="the model's folder")] = None,
    overwrite: Annotated[bool, flag("--overwrite")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the statistics of a model's image embeddings.

    The file embedding_statistics.safetensors has their mean, standard deviation and norm. unclip decode compares
    embeddings with it, and --rescale and --noise-level need it, unless the model has a prior with statistics. The
    path is printed to stdout.

    Args:
        source: The folder of a data set (held-out samples are not used), or a file or folder of embeddings.
        out: The folder to write into.
        overwrite: Replace an existing file.

    Examples:
        unclip data statistics data/mine --model models/mine
        unclip data statistics embeddings.npy --model models/mine
    """
    import torch

    from unclip.checkpoints.hub import resolve
    from unclip.clip.statistics import EmbeddingStatistics
    from unclip.data.embeddings import read_embeddings
    from unclip.data.folder import METADATA, load_sizes
    from unclip.training.conditions import FrozenClip

    folder = resolve(model)
    if any((source / name).exists() for name in METADATA):
        clip = FrozenClip(folder)
        pictures = load_sizes(source, [clip.image_size])[0]
        used = torch.tensor([bool(record.weight) and not record.held_out for record in pictures.records])
        found = EmbeddingStatistics.of(clip.embeddings_of(pictures, bar(quiet))[used])
    else:
        found = EmbeddingStatistics.of_batches(read_embeddings(source).batches())
    if not quiet:
        note(f"embeddings with a norm of {found.norm_mean:.3g} ± {found.norm_std:.2g}")
    print(found.write(out or folder, overwrite=overwrite), flush=True)
