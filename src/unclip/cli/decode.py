"""`unclip decode`: make pictures of image embeddings from a file."""

import hashlib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip.cli import options
from unclip.cli.inputs import no_file, open_picture, plain
from unclip.cli.messages import note, warn
from unclip.cli.options import argument, flag, option
from unclip.cli.output import Job, PictureWriter, slug
from unclip.cli.provenance import metadata, replay
from unclip.errors import InputError, OutputExistsError
from unclip.pipelines.samplers import sampler_name
from unclip.pipelines.session import Session, read_texts

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MAX_CHECKED = 10_000
"""Rows from which the scale is reported, at most."""


class Rescaling(StrEnum):
    """How embeddings are brought to the model's scale."""

    norm = "norm"
    dimensions = "dimensions"
    unwhiten = "unwhiten"


def decode(
    *,
    embeddings: Annotated[Path, argument("EMBEDDINGS")],
    model: options.Model = "unclip-emoji",
    key: Annotated[str | None, option("NAME", default="image_embeds or embedding, else the only one")] = None,
    rows: Annotated[str | None, option("A:B", default="all")] = None,
    translator: Annotated[Path | None, option("FILE", default="none")] = None,
    rescale: Annotated[Rescaling | None, option("HOW", default="as they are")] = None,
    num_images: options.NumImagesOfEach = 1,
    seed: Annotated[int, option("N", min=0, max=options.MAX_SEED)] = 0,
    one_noise: Annotated[bool, flag("--one-noise")] = False,
    prompt: Annotated[str | None, option("TEXT")] = None,
    negative: options.Negative = None,
    label_column: Annotated[str | None, option("NAME")] = None,
    size: options.Size,
    sampler: options.Sampler = None,
    decoding: options.NoisyDecoding,
    common: options.Common,
) -> None:
    """Make pictures of image embeddings.

    EMBEDDINGS is a .npy, .npz, .safetensors or .parquet file with one embedding in each row, or a folder of .npy files
    as clip-retrieval writes it. They must be of the model's CLIP, and not normalised; the command warns of others. Each
    picture becomes a PNG file named after the file, the row and the seed. If the command is stopped, the same command
    makes only the pictures that are missing. The paths of new pictures are printed to stdout, one on each line.

    Args:
        embeddings: A file of embeddings, or a folder of such files.
        key: The array of the file, or the column; emb_* are columns with one dimension each.
        rows: Only the rows from A to before B, counted from 0.
        translator: A file of `unclip train translator`, for embeddings of another CLIP.
        rescale: norm: give every embedding the model's mean norm; dimensions: give every dimension the model's mean and
            standard deviation; unwhiten: undo the whitening of a prior.
        seed: Seed of the first picture. The next one has N+1, and so on.
        one_noise: Use the same noise for all rows, so that only their embeddings differ.
        prompt: A caption for the decoder, in addition to the embedding.
        label_column: Column with a label for each row, for the metadata and the sheet of --grid.

    Examples:
        unclip decode embeddings.npy --out pictures
        unclip decode regressed.npy --rescale dimensions --one-noise --grid
        unclip decode index.parquet --label-column caption --rows 0:16 --grid
        unclip decode embeddings.npy --noise-level 200 -n 4
        unclip decode other.npy --translator translator.safetensors
    """
    if not embeddings.exists():
        raise InputError(no_file(str(embeddings)))
    prompt, negative = (None if text is None else plain(text) for text in (prompt, negative))
    session = Session(model, common.compute, sampler=sampler, preset=decoding.preset, progress=not common.quiet)

    import numpy as np
    import torch

    from unclip.clip.statistics import EmbeddingStatistics
    from unclip.data.embeddings import read_embeddings
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
    from unclip.pipelines.text_to_image import UnCLIPPipeline
    from unclip.pipelines.translator import Translator

    translate = None if translator is None else Translator.read(translator)
    table = read_embeddings(embeddings, key)
    table = table if rows is None else table.select(*_range(rows))
    for _ in table.batches():  # rows with NaN are named before anything is computed
        pass
    labels = None if label_column is None else list(map(plain, table.column(label_column)))
    kind = UnCLIPImageVariationPipeline if "image_encoder" in session.parts else UnCLIPPipeline
    settings = session.settings(kind, decoding.given()) | size.sides
    writer = PictureWriter(common, len(table) * num_images, seed=seed)
    pipe = session.pipeline(kind)
    given_width, width = table.width, pipe.embedding_dim
    if translate is not None:
        if given_width != translate.source_dim:
            takes = f"{translator} translates embeddings of width {translate.source_dim}"
            raise InputError(f"{embeddings} has embeddings of width {given_width}, but {takes}")
        given_width = translate.target_dim
    if given_width != width:
        file = embeddings if translate is None else translator
        raise InputError(f"{file} has embeddings of width {given_width}, but the model needs width {width}")

    def translated(rows: Any) -> "Tensor":
        rows = torch.from_numpy(rows)
        return rows if translate is None else translate(rows)

    given = None
    if rescale is Rescaling.dimensions:
        given = EmbeddingStatistics.of_batches(map(translated, table.batches()))
    own = pipe.statistics if rescale is None else pipe.statistics_for("rescale")

    def read(place: int) -> "Tensor":
        row = translated(table[place : place + 1])
        return row if rescale is None or own is None else own.rescaled(row, rescale, given)

    if own is not None and replay() is None:
        sample = np.unique(np.linspace(0, len(table) - 1, min(len(table), MAX_CHECKED)).astype(int))
        if message := own.report(torch.cat([read(int(place)) for place in sample])):
            warn(message)
    about = {"embeddings": plain(embeddings.name), "prompt": prompt, "negative": negative}
    about |= {} if translator is None else {"translator": plain(translator.name)}
    about |= metadata(session, pipe, {**settings, "sampler": sampler_name(pipe)})
    stem = slug(plain(embeddings.stem))
    paths: list[Path] = []

    def all_jobs() -> Iterator[Job]:
        for place in range(len(table)):
            row = table.first + place
            embedding = read(place)
            digest = hashlib.sha256(embedding.numpy().tobytes()).hexdigest()[:16]
            facts: dict[str, Any] = {"row": row, "embedding": digest}
            if labels is not None:
                facts["label"] = labels[place]
            for copy in range(num_images):
                job_seed = writer.seed_of(copy if one_noise else row * num_images + copy)
                job = Job(embedding, job_seed, f"{stem}-{row:06d}", facts, row)
                paths.append(writer.file or writer.folder / f"{job.name}-{job_seed}.png")
                if common.output.overwrite or replay() is not None or not _exists(paths[-1], {**facts, **about}):
                    yield job

    def draw(batch: list[Job]) -> "list[Image]":
        settings_of_batch = {**settings, "prompt": prompt, "negative_prompt": negative, "seed": [j.seed for j in batch]}
        return pipe.decode(torch.cat([job.given for job in batch]), check_scale=False, **settings_of_batch).images  # type: ignore[union-attr, return-value]

    writer.make(all_jobs(), draw, about)
    if not common.quiet and (kept := len(paths) - writer.num_saved) and replay() is None:
        note(f"{kept} of {len(paths)} pictures existed already")
    if common.output.grid and replay() is None:
        writer.kept = [open_picture(path) for path in paths]
        labels = None if labels is None else [label for label in labels for _ in range(num_images)]
        writer.save_sheet(stem, about, columns=num_images if num_images > 1 else None, labels=labels)


def _range(text: str) -> tuple[int, int | None]:
    """ "0:16" as (0, 16), "8:" as (8, None). Raises: BadParameter for anything else."""
    first, colon, last = text.partition(":")
    if not colon or not all(part.isdecimal() or not part for part in (first, last)):
        raise typer.BadParameter(f"--rows is {text!r}; it must be A:B with row numbers, such as 0:16 or 100:")
    return int(first or 0), int(last) if last else None


def _exists(path: Path, facts: dict[str, Any]) -> bool:
    """Whether a picture exists that was made of the same embedding with the same settings.

    Raises: OutputExistsError for a picture that was made otherwise.
    """
    if not path.exists():
        return False
    texts = read_texts(path)
    names = ("embedding", "prompt", "negative", "model", "settings")
    for name in names:
        if texts.get(name) != facts.get(name):
            raise OutputExistsError(
                f"{path} was made with another {name} ({texts.get(name)!s:.100}, now {facts.get(name)!s:.100}): use "
                "--overwrite, or another --out"
            )
    return True
