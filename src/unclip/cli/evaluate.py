"""`unclip evaluate`: measures of the quality of a model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from unclip.checkpoints.files import atomic_file, read_json
from unclip.checkpoints.hub import BUILT_IN_JUDGE
from unclip.cli import measures, options
from unclip.cli.measures import ComputeOptions, MeasureOptions, prepare
from unclip.cli.messages import note, warn
from unclip.cli.options import argument, command, flag, option
from unclip.cli.output import check_free

evaluate = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@evaluate.callback()
def evaluate_group() -> None:
    """Measure the quality of a model."""


@dataclass(frozen=True)
class FewerCaptionsOptions(MeasureOptions):
    """Options of the slower measures, which use fewer captions.

    Attributes:
        num_seen: Number of captions seen in training.
    """

    num_seen: Annotated[int, option("N", min=1)] = 100


@dataclass(frozen=True)
class WordingsOptions(MeasureOptions):
    """Options of `wordings`, which takes its captions from a list."""

    num_seen: int = 0
    num_held_out: int | None = 0
    sheet: Path | None = None


@dataclass(frozen=True)
class PriorOptions(MeasureOptions):
    """Options of `prior`, which needs no judge."""

    judge: str = BUILT_IN_JUDGE
    sheet: Path | None = None
    batch_size: options.BatchSize = 64


@dataclass(frozen=True)
class SweepOptions(FewerCaptionsOptions):
    """Options of `sweep`.

    Attributes:
        num_held_out: Number of held-out captions.
    """

    num_held_out: Annotated[int, option("N", min=0)] = 0
    sheet: Path | None = None


@command(evaluate, "retrieval")
def retrieval(
    *,
    request: MeasureOptions,
    features: measures.Features = None,
    sampling: options.Sampling,
    compute: ComputeOptions,
) -> None:
    r"""Generate pictures of many captions, and let a judge retrieve the captions.

    The judge ranks the captions of all concepts for each picture, or of all composed pictures ("a cat left of a star").
    The report has the share of pictures whose caption comes first, or among the first five, separately for captions
    seen in training and held out, and for real pictures; the mean cosine of picture and caption (CLIP score); and the
    distance of generated pictures from real ones.

    Examples:
        unclip evaluate retrieval --data data/emoji --out report.json
        unclip evaluate retrieval --model models/mine --judge runs/judge/model \
          --data data/emoji --num-seen 100 --sheet sheets/mine --out report.json
        unclip evaluate retrieval --data data/composed --num-held-out 200 \
          --sheet sheets/composed --out composed.json
        unclip evaluate retrieval --data data/emoji --candidates 4 --out four.json
        unclip evaluate retrieval --data data/emoji --preset fast --out fast.json
    """
    from unclip.evaluation.retrieval import retrieval as measure
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    needed, given, preset = ["prior"], sampling.given(), sampling.preset
    prepared = prepare("retrieval", UnCLIPPipeline, needed, request, compute, given, features=features, preset=preset)
    prepared.finish(
        measure(prepared.pipe, prepared.judge, prepared.plan, features=prepared.features, **prepared.settings)
    )


@command(evaluate, "wordings")
def wordings(
    *,
    request: WordingsOptions,
    listed: Annotated[Path | None, option("FILE", "--wordings", default="the built-in list, for emoji")] = None,
    sheet: Annotated[Path | None, option("FILE", default="not written")] = None,
    sampling: options.Sampling,
    compute: ComputeOptions,
) -> None:
    r"""Generate pictures of free wordings ("a mug of hot coffee"), which a judge recognises.

    The judge ranks the captions of all concepts for each picture. The report has the share of pictures whose first
    caption, or one of the first five, is accepted for the wording: for all wordings and for each kind. A wording may
    accept several concepts.

    Args:
        listed: A JSON file: {kind: {wording: [accepted labels]}}.
        sheet: Write a sheet of the pictures to FILE.

    Examples:
        unclip evaluate wordings --data data/emoji --out wordings.json
        unclip evaluate wordings --model models/mine --data data/mine \
          --wordings mine.json --sheet sheet.png --out wordings.json
    """
    from unclip.evaluation.wordings import read_wordings
    from unclip.evaluation.wordings import wordings as measure
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    texts = read_wordings(listed or measures.find_judge(BUILT_IN_JUDGE) / "wordings.json")
    check_free(*([] if sheet is None else [sheet]), overwrite=request.overwrite)
    request = replace(request, num_seen=sum(bool(text.accepted) for text in texts))
    needed, given, preset = ["prior"], sampling.given(), sampling.preset
    prepared = prepare("wordings", UnCLIPPipeline, needed, request, compute, given, preset=preset)
    more = {"batch_size": request.batch_size, "seed": request.seed, "sheet": sheet, "progress": prepared.plan.progress}
    prepared.finish(measure(prepared.pipe, prepared.judge, request.data, texts, **more, **prepared.settings))


@command(evaluate, "variations")
def variations(
    *,
    request: MeasureOptions,
    decoding: options.Decoding,
    compute: ComputeOptions,
) -> None:
    r"""Make variations of real pictures, and let a judge retrieve their captions.

    The report has the retrieval of captions, as for generated pictures, and the distance of each variation from its
    picture: in the judge's space and in pixels.

    Examples:
        unclip evaluate variations --data data/emoji --out variations.json
        unclip evaluate variations --model models/mine --data data/emoji \
          --sheet sheets/mine --out variations.json
    """
    from unclip.evaluation.retrieval import variations as measure
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline as Pipeline

    prepared = prepare("variations", Pipeline, ["image_encoder"], request, compute, decoding.given())
    prepared.finish(measure(prepared.pipe, prepared.judge, prepared.plan, **prepared.settings))


@command(evaluate, "prior")
def prior(
    *,
    request: PriorOptions,
    condition: Annotated[list[Path] | None, option("FILE", default="captions")] = None,
    sampling: options.PriorSampling,
    compute: ComputeOptions,
) -> None:
    r"""Compare the prior's image embeddings with the true ones.

    The report has the cosine of the prior's sample for a caption and the picture's own embedding, the baselines (the
    caption's embedding, another picture's, the mean), and how closely the sample follows the caption.

    With --condition, the prior is one on vectors or tokens: --model is the model/ folder of its run, and --data the
    file of the true embeddings. The report has the cosine with the true embedding and how often it is identified.
    --num-held-out N measures the last N rows.

    Args:
        condition: The conditions, with the rows of --data; several times for several conditions.

    Examples:
        unclip evaluate prior --data data/emoji --out prior.json
        unclip evaluate prior --data data/emoji --prior-guidance 1 \
          --prior-steps 50 --out prior-1.json
        unclip evaluate prior --condition voxels.npy --data embeddings.npy \
          --model runs/voxels/prior/model --num-held-out 160 --out voxels.json
    """
    if condition:
        return measures.of_condition(condition, request, sampling, compute)
    from unclip.evaluation.stages import prior as measure
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    needed, given = ["prior", "image_encoder"], sampling.given()
    prepared = prepare("prior", UnCLIPPipeline, needed, request, compute, given, judged=False, task="sampling")
    prepared.finish(measure(prepared.pipe, prepared.judge, prepared.plan, **prepared.settings))


@command(evaluate, "decoder")
def decoder(
    *,
    request: FewerCaptionsOptions,
    captions: Annotated[bool, flag("--captions")] = False,
    decoding: options.Decoding,
    compute: ComputeOptions,
) -> None:
    r"""Reconstruct real pictures from their true embeddings.

    The report has the similarity of the decoded and the real picture: by cosine in the model's own CLIP and in the
    judge's, and in pixels, before and after super-resolution. A prior cannot restore what the decoder loses.

    Args:
        captions: Also condition the decoder on the caption, as in text to image.

    Examples:
        unclip evaluate decoder --data data/emoji --out decoder.json
        unclip evaluate decoder --data data/emoji --captions \
          --sheet sheets/decoder --out decoder.json
    """
    from unclip.evaluation.retrieval import Judge
    from unclip.evaluation.stages import decoder as measure
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline as Pipeline

    prepared = prepare("decoder", Pipeline, ["image_encoder"], request, compute, decoding.given(), task="decoding")
    own = Judge.load(prepared.folder, prepared.pipe.device)
    prepared.finish(measure(prepared.pipe, own, prepared.judge, prepared.plan, captions=captions, **prepared.settings))


@command(evaluate, "sweep")
def sweep(
    *,
    request: SweepOptions,
    features: measures.Features = None,
    values: measures.SweepValues,
    precision: options.Precision,
    quiet: options.Quiet = False,
) -> None:
    r"""Measure every combination of settings: quality and seconds.

    Each setting takes a list of values, separated by commas. Every combination uses the same captions and seeds. Charts
    of quality against seconds and against guidance (.svg) are written beside the JSON file if matplotlib is installed.
    The same command continues an interrupted sweep. Finished combinations are kept, and a longer list adds more.

    Examples:
        unclip evaluate sweep --data data/emoji --decoder-guidance 1,2,4,8 \
          --decoder-steps 5,10,20 --out sweep.json
        unclip evaluate sweep --data data/emoji --sampler ancestral,ddim,dpm \
          --decoder-steps 4,8,16,32 --num-seen 50 --out samplers.json
    """
    measures.run_sweep(values, request, ComputeOptions(precision=precision, quiet=quiet), features)


@command(evaluate, "report")
def report(
    reports: Annotated[list[Path], argument("FILE...")],
    out: Annotated[Path, option("FILE", "--out", "-o")],
    title: Annotated[str, option("TEXT")] = "Evaluation",
    picture: Annotated[list[Path] | None, option("FILE")] = None,
    overwrite: measures.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Make one HTML page from several reports.

    The page is a single file with tables, charts of sweeps, and the sheets of the reports that are in the report's
    folder or below it. It runs no scripts and loads no other files.

    Args:
        reports: JSON reports of the other commands.
        out: The HTML file to write.
        title: Title of the page.
        picture: A picture to add; may be given several times.

    Examples:
        unclip evaluate report retrieval.json sweep.json --out report.html
        unclip evaluate report prior.json decoder.json --title mine --out mine.html
    """
    from unclip.evaluation.report import page

    check_free(out, overwrite=overwrite)
    text, left_out = page([(path, read_json(path)) for path in reports], title=title, pictures=picture or [])
    with atomic_file(out) as draft:
        draft.write_text(text, encoding="utf-8")
    for why in left_out:
        warn(why)
    if not quiet:
        note(f"{out.stat().st_size / 1e6:.1f} MB")
    print(out, flush=True)
