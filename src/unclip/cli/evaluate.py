"""`unclip evaluate`: measures of the quality of a model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from unclip.checkpoints.hub import BUILT_IN_JUDGE
from unclip.cli import measures, options
from unclip.cli.measures import Asked
from unclip.cli.messages import note, warn

RETRIEVAL_EXAMPLES = options.examples(
    "unclip evaluate retrieval --data data/emoji --out report.json",
    "unclip evaluate retrieval --model models/mine --judge runs/judge/model \\",
    "  --data data/emoji --num-seen 100 --sheet sheets/mine --out report.json",
    "unclip evaluate retrieval --data data/composed --num-held-out 200 \\",
    "  --sheet sheets/composed --out composed.json",
    "unclip evaluate retrieval --data data/emoji --candidates 4 --out four.json",
)
WORDINGS_EXAMPLES = options.examples(
    "unclip evaluate wordings --data data/emoji --out wordings.json",
    "unclip evaluate wordings --model models/mine --data data/mine \\",
    "  --wordings mine.json --sheet sheet.png --out wordings.json",
)
VARIATIONS_EXAMPLES = options.examples(
    "unclip evaluate variations --data data/emoji --out variations.json",
    "unclip evaluate variations --model models/mine --data data/emoji \\",
    "  --sheet sheets/mine --out variations.json",
)
PRIOR_EXAMPLES = options.examples(
    "unclip evaluate prior --data data/emoji --out prior.json",
    "unclip evaluate prior --data data/emoji --prior-guidance 1 \\",
    "  --prior-steps 50 --out prior-1.json",
)
DECODER_EXAMPLES = options.examples(
    "unclip evaluate decoder --data data/emoji --out decoder.json",
    "unclip evaluate decoder --data data/emoji --captions \\",
    "  --sheet sheets/decoder --out decoder.json",
)
SWEEP_EXAMPLES = options.examples(
    "unclip evaluate sweep --data data/emoji --decoder-guidance 1,2,4,8 \\",
    "  --decoder-steps 5,10,20 --out sweep.json",
    "unclip evaluate sweep --data data/emoji --sampler ancestral,ddim,dpm \\",
    "  --decoder-steps 4,8,16,32 --num-seen 50 --out samplers.json",
)
REPORT_EXAMPLES = options.examples(
    "unclip evaluate report retrieval.json sweep.json --out report.html",
    "unclip evaluate report prior.json decoder.json --title mine --out mine.html",
)

evaluate = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@evaluate.callback()
def evaluate_group() -> None:
    """Measure the quality of a model."""


@dataclass(frozen=True)
class FewAsked(Asked):
    """Options of the slower measures, which use fewer captions."""

    num_seen: measures.NumSeen = 100


@dataclass(frozen=True)
class WordingsAsked(Asked):
    """Options of `wordings`, which takes its captions from a list."""

    num_seen: int = 0
    num_held_out: int | None = 0
    sheet: Path | None = None


@dataclass(frozen=True)
class PriorAsked(Asked):
    """Options of `prior`, which needs no judge."""

    judge: str = BUILT_IN_JUDGE
    sheet: Path | None = None
    batch_size: options.BatchSize = 64


@dataclass(frozen=True)
class SweepAsked(FewAsked):
    """Options of `sweep`."""

    num_held_out: Annotated[int, typer.Option(min=0, metavar="N", help="Number of held-out captions.")] = 0
    sheet: Path | None = None


@evaluate.command("retrieval", epilog=RETRIEVAL_EXAMPLES)
@options.expanded
def retrieval(
    *,
    asked: Asked,
    features: measures.Features = None,
    sampler: options.Sampler = None,
    sampling: options.Sampling,
    precision: options.Precision,
    quiet: options.Quiet = False,
) -> None:
    """Generate pictures of many captions; a judge retrieves the captions from them.

    The judge ranks the captions of all concepts for each picture, or of all composed pictures ("a cat left of a star").
    The report has the share of pictures whose caption comes first, or among the first five, separately for captions
    seen in training and held out, and for real pictures; the mean cosine of picture and caption (CLIP score); and the
    distance of generated pictures from real ones.
    """
    from unclip.evaluation.retrieval import retrieval as measure
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    measures.refuse_outputs(asked)
    kind, given = UnCLIPPipeline, sampling.given()
    subject = measures.prepare("retrieval", kind, ["prior"], asked, precision, given, sampler, quiet=quiet)
    space = measures.read_features(features, subject.pipe.device)
    found = measure(
        subject.pipe,
        subject.judge,  # pyright: ignore
        asked.data,
        **asked.numbers(),
        sheet=asked.sheet,
        features=space,
        progress=measures.bar(quiet, desc="generating", unit="batch"),
        **subject.settings,
    )
    about = subject.about | ({"features": space.name} if space is not None else {})
    finish(asked, about, "retrieval", found)


@evaluate.command("wordings", epilog=WORDINGS_EXAMPLES)
@options.expanded
def wordings(
    *,
    asked: WordingsAsked,
    listed: Annotated[
        Path | None,
        typer.Option(
            "--wordings",
            metavar="FILE",
            help="A JSON file: {kind: {wording: [accepted labels]}}.",
            show_default="the built-in list, for emoji",
        ),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a sheet of the pictures to FILE.", show_default="no")
    ] = None,
    sampler: options.Sampler = None,
    sampling: options.Sampling,
    precision: options.Precision,
    quiet: options.Quiet = False,
) -> None:
    """Generate pictures of free wordings ("a mug of hot coffee"); a judge names them.

    The judge ranks the captions of all concepts for each picture. The report has the share of pictures whose first
    caption, or one of the first five, is accepted for the wording: for all wordings and for each kind. A wording may
    accept several concepts.
    """
    from unclip.evaluation.wordings import read_wordings
    from unclip.evaluation.wordings import wordings as measure
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    texts = read_wordings(listed or measures.find_judge(BUILT_IN_JUDGE) / "wordings.json")
    measures.refuse_to_overwrite([asked.out] if sheet is None else [asked.out, sheet], overwrite=asked.overwrite)
    asked = replace(asked, num_seen=len(texts))
    kind, given = UnCLIPPipeline, sampling.given()
    subject = measures.prepare("wordings", kind, ["prior"], asked, precision, given, sampler, quiet=quiet)
    found = measure(
        subject.pipe,
        subject.judge,  # pyright: ignore
        asked.data,
        texts,
        batch_size=asked.batch_size,
        seed=asked.seed,
        sheet=sheet,
        progress=measures.bar(quiet, desc="generating", unit="batch"),
        **subject.settings,
    )
    finish(asked, subject.about, "wordings", found)


@evaluate.command("variations", epilog=VARIATIONS_EXAMPLES)
@options.expanded
def variations(
    *,
    asked: Asked,
    sampler: options.Sampler = None,
    decoding: options.Decoding,
    precision: options.Precision,
    quiet: options.Quiet = False,
) -> None:
    """Make variations of real pictures; a judge retrieves their captions.

    The report has the retrieval of captions, as for generated pictures, and the distance of each variation from its
    picture: in the judge's space and in pixels.
    """
    from unclip.evaluation.retrieval import variations as measure
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline

    measures.refuse_outputs(asked)
    kind, given = UnCLIPImageVariationPipeline, decoding.given()
    subject = measures.prepare("variations", kind, ["image_encoder"], asked, precision, given, sampler, quiet=quiet)
    found = measure(
        subject.pipe,
        subject.judge,  # pyright: ignore
        asked.data,
        **asked.numbers(),
        sheet=asked.sheet,
        progress=measures.bar(quiet, desc="generating", unit="batch"),
        **subject.settings,
    )
    finish(asked, subject.about, "variations", found)


@evaluate.command("prior", epilog=PRIOR_EXAMPLES)
@options.expanded
def prior(
    *,
    asked: PriorAsked,
    sampler: options.Sampler = None,
    sampling: options.PriorSampling,
    precision: options.Precision,
    quiet: options.Quiet = False,
) -> None:
    """Compare the prior's image embeddings with the true ones.

    The report has the cosine of the prior's sample for a caption and the picture's own embedding, the baselines (the
    caption's embedding, another picture's, the mean), and how closely the sample follows the caption.
    """
    from unclip.evaluation.retrieval import Judge
    from unclip.evaluation.stages import prior as measure
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    measures.refuse_outputs(asked)
    needed, given = ["prior", "image_encoder"], sampling.given()
    subject = measures.prepare(
        "prior", UnCLIPPipeline, needed, asked, precision, given, sampler, judged=False, quiet=quiet
    )
    found = measure(
        subject.pipe,
        Judge.load(subject.folder, subject.pipe.device),
        asked.data,
        **asked.numbers(),
        progress=measures.bar(quiet, desc="sampling", unit="batch"),
        **subject.settings,
    )
    finish(asked, subject.about, "prior", found)


@evaluate.command("decoder", epilog=DECODER_EXAMPLES)
@options.expanded
def decoder(
    *,
    asked: FewAsked,
    captions: Annotated[
        bool, typer.Option("--captions", help="Also give the decoder the caption, as in text to image.")
    ] = False,
    sampler: options.Sampler = None,
    decoding: options.Decoding,
    precision: options.Precision,
    quiet: options.Quiet = False,
) -> None:
    """Reconstruct real pictures from their true embeddings.

    The report has the similarity of the decoded and the real picture: by cosine in the model's own CLIP and in the
    judge's, and in pixels, before and after super-resolution. No prior can restore what is lost here.
    """
    from unclip.evaluation.retrieval import Judge
    from unclip.evaluation.stages import decoder as measure
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline

    measures.refuse_outputs(asked)
    kind, given = UnCLIPImageVariationPipeline, decoding.given()
    subject = measures.prepare("decoder", kind, ["image_encoder"], asked, precision, given, sampler, quiet=quiet)
    found = measure(
        subject.pipe,
        Judge.load(subject.folder, subject.pipe.device),
        subject.judge,  # pyright: ignore
        asked.data,
        **asked.numbers(),
        captions=captions,
        sheet=asked.sheet,
        progress=measures.bar(quiet, desc="decoding", unit="batch"),
        **subject.settings,
    )
    finish(asked, subject.about, "decoder", found)


@evaluate.command("sweep", epilog=SWEEP_EXAMPLES)
@options.expanded
def sweep(
    *,
    asked: SweepAsked,
    features: measures.Features = None,
    lists: measures.Lists,
    precision: options.Precision,
    quiet: options.Quiet = False,
) -> None:
    """Measure every combination of settings: quality and seconds.

    Each setting takes a list of values, separated by commas. Every combination uses the same captions and seeds. Charts
    of quality against seconds and against guidance (.svg) are written beside the JSON file if matplotlib is installed.
    The same command continues an interrupted sweep. Finished combinations are kept, and a longer list adds more.
    """
    found, charts = measures.run_sweep(lists, asked, precision, features, quiet=quiet)
    show("sweep", found)
    for path in charts:
        print(path, flush=True)


@evaluate.command("report", epilog=REPORT_EXAMPLES)
def report(
    reports: Annotated[list[Path], typer.Argument(metavar="FILE...", help="JSON reports of the other commands.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The HTML file to write.")],
    title: Annotated[str, typer.Option(metavar="TEXT", help="Title of the page.")] = "Evaluation",
    picture: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A picture to add; may be given several times.")
    ] = None,
    overwrite: measures.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Make one HTML page from several reports.

    The page is a single file with tables, charts of sweeps, and the sheets of the reports that are in the report's
    folder or below it. It runs no scripts and loads no other files.
    """
    from unclip.checkpoints.files import atomic_file, read_json
    from unclip.evaluation.report import page

    measures.refuse_to_overwrite([out], overwrite=overwrite)
    text, left_out = page([(path, read_json(path)) for path in reports], title=title, pictures=picture or [])
    with atomic_file(out) as draft:
        draft.write_text(text, encoding="utf-8")
    for why in left_out:
        warn(why)
    if not quiet:
        note(f"{out.stat().st_size / 1e6:.1f} MB")
    print(out, flush=True)


def finish(asked: Asked, about: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    """Write the report and print its tables."""
    measures.write_report(asked, about, name, found)
    show(name, found)


def show(name: str, found: dict[str, Any]) -> None:
    """Print the tables of a measure."""
    from unclip.evaluation.report import tables

    for place, each in enumerate(tables(name, found)):
        if place:
            print(f"\n{each.title}")
        print(each, flush=True)
