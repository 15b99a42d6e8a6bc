"""`unclip generate`: make pictures from captions."""

from dataclasses import fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unclip.cli import options
from unclip.cli.bulk import Bulk, exit_if_failed, run_bulk
from unclip.cli.inputs import check_has_prior, plain, read_prompts, usable
from unclip.cli.options import argument, option
from unclip.cli.output import Job, PictureWriter, slug
from unclip.cli.provenance import metadata
from unclip.pipelines.samplers import sampler_name
from unclip.pipelines.session import Compute, Session

if TYPE_CHECKING:
    from PIL.Image import Image


class BulkFormat(StrEnum):
    """What a bulk run writes."""

    pictures = "pictures"
    webdataset = "webdataset"


def generate(
    *,
    prompts: Annotated[list[str] | None, argument("PROMPT")] = None,
    model: options.Model = "unclip-emoji",
    num_images: options.NumImagesOfEach = 1,
    seed: options.Seed = None,
    prompts_file: Annotated[Path | None, option("FILE", allow_dash=True)] = None,
    negative: options.Negative = None,
    size: options.Size,
    sampler: options.Sampler = None,
    sampling: options.Sampling,
    bulk: Bulk,
    bulk_format: Annotated[BulkFormat, option("KIND", "--format")] = BulkFormat.pictures,
    per_shard: Annotated[int, option("N", min=1)] = 1000,
    common: options.Common,
) -> None:
    """Make pictures from captions.

    Each picture becomes a PNG file named after its caption and seed. The file also records how it was made, so that
    `unclip rerun` can make it again. The paths are printed to stdout, one on each line.

    With --from, the captions are the rows of a table, and --out is a folder with an index. A run that was stopped or
    killed continues when the same command is run again.

    Args:
        prompts: Captions of the pictures. - reads captions from stdin, one on each line.
        prompts_file: Read more captions, one on each line; - is stdin.
        bulk_format: With --from: pictures, or webdataset for tar shards.
        per_shard: Pictures in one shard.

    Examples:
        unclip generate "a red apple"
        unclip generate "a cat" "a dog" -n 4 --seed 1 --grid --out pictures
        unclip generate "a castle" --negative "people" --decoder-guidance 6
        unclip generate "a boat" --sampler dpm --decoder-steps 12
        unclip generate "a lion" --candidates 4
        unclip generate "a lion" --preset fast
        unclip generate --prompts-file captions.txt --json > made.jsonl
        unclip generate --from prompts.csv --out pictures --processes 2
    """
    if bulk.table is not None:
        if prompts or prompts_file is not None or common.output.grid or common.output.overwrite:
            raise typer.BadParameter("--from takes no prompts, --prompts-file, --grid or --overwrite")
        _generate_rows(bulk, model, num_images, seed, negative, size, sampler, sampling, bulk_format, per_shard, common)
        return
    texts = []
    for text in prompts or []:
        texts += read_prompts(Path("-")) if text == "-" else [plain(text)]
    if prompts_file is not None:
        texts += read_prompts(prompts_file)
    if not texts:
        raise typer.BadParameter('give a prompt, as in: unclip generate "a red apple"; or --prompts-file')

    good = usable(texts)
    if not good:
        raise typer.Exit(1)
    session = Session(model, common.compute, sampler=sampler, preset=sampling.preset, progress=not common.quiet)
    check_has_prior(model, session.parts)

    from unclip.pipelines.text_to_image import UnCLIPPipeline

    settings = session.settings(UnCLIPPipeline, sampling.given()) | size.sides
    writer = PictureWriter(common, len(good) * num_images, seed=seed)
    pipe = session.pipeline(UnCLIPPipeline)
    negative = None if negative is None else plain(negative)

    def draw(batch: list[Job]) -> "list[Image]":
        captions, seeds = [job.given for job in batch], [job.seed for job in batch]
        return pipe(captions, negative_prompt=negative, seed=seeds, **settings).images  # type: ignore[union-attr, return-value]

    about = {"negative": negative, **metadata(session, pipe, {**settings, "sampler": sampler_name(pipe)})}
    jobs = (
        Job(text, writer.seed_of(place * num_images + copy), slug(text), {"prompt": text})
        for place, text in good.items()
        for copy in range(num_images)
    )
    writer.make(jobs, draw, about)
    columns = num_images if len(good) > 1 and num_images > 1 else None
    name = slug(texts[0]) if len(texts) == 1 else "pictures"
    labels = [text for text in good.values() for _ in range(num_images)]
    writer.save_sheet(name, {"prompt": "\n".join(good.values()), **about}, columns=columns, labels=labels)
    writer.exit_if_failed(len(texts) - len(good))


def _generate_rows(
    bulk: Bulk,
    model: str,
    num_images: int,
    seed: int | None,
    negative: str | None,
    size: options.Size,
    sampler: str | None,
    sampling: options.Sampling,
    bulk_format: BulkFormat,
    per_shard: int,
    common: options.Common,
) -> None:
    from unclip.data.tables import read_table
    from unclip.pipelines.bulk import (
        INDEX,
        PictureWork,
        Results,
        model_fingerprint,
        picture_rows,
        write_webdataset,
    )
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    table = read_table(bulk.table)  # type: ignore[arg-type]
    session = Session(model, common.compute, sampler=sampler, preset=sampling.preset, progress=False)
    sampler = session.sampler
    check_has_prior(model, session.parts)
    settings = session.settings(UnCLIPPipeline, sampling.given()) | size.sides
    of_model = [model_fingerprint(session), sampler, common.compute.facts]
    negative = None if negative is None else plain(negative)
    rows = picture_rows(table, settings, of_model=of_model, negative=negative, seed=seed, num_images=num_images)
    shards = bulk_format is BulkFormat.webdataset
    out = common.output.out
    results = Results(out, ".tar", write_webdataset, per_shard) if shards else Results(out, ".png")
    # The workers have the type of this machine, so that a row does not depend on the machine that computes it.
    compute = Compute(**{each.name: getattr(common.compute, each.name) for each in fields(Compute)})
    compute = replace(compute, dtype=compute.weights_type)
    work = PictureWork(str(session.folder) if bulk.ray is None else model, compute, sampler)
    with results.opened():
        num_failed = run_bulk(
            bulk, rows, results, work, batch_size=common.output.batch_size, quiet=common.quiet, unit="picture"
        )
    print(out / INDEX)
    exit_if_failed(num_failed, len(rows))
