"""`unclip evaluate`: how good a model is, in numbers.

Knows the commands' options; what they share is in `measures.py`, what is measured in `unclip.evaluation`.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from unclip.checkpoints.hub import BUILT_IN_JUDGE
from unclip.cli import measures, options
from unclip.cli.measures import Asked
from unclip.cli.messages import note, warn
from unclip.pipelines.session import Machine, decoder_settings, drawing_settings, stage_settings

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
    """Measure how good a model is."""


@evaluate.command("retrieval", epilog=RETRIEVAL_EXAMPLES)
def retrieval(
    data: measures.Data,
    out: measures.Out,
    model: options.Model = "unclip-emoji",
    judge: measures.JudgeName = BUILT_IN_JUDGE,
    num_seen: measures.NumSeen = 200,
    num_held_out: measures.NumHeldOut = None,
    sheet: measures.Sheet = None,
    features: measures.Features = None,
    seed: measures.Seed = 0,
    prior_steps: measures.PriorSteps = None,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    prior_guidance: measures.PriorGuidance = None,
    decoder_guidance: options.DecoderGuidance = None,
    candidates: options.Candidates = None,
    prior_temperature: options.PriorTemperature = None,
    prior_top_p: options.PriorTopP = None,
    sampler: options.Sampler = None,
    batch_size: options.BatchSize = 16,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    overwrite: measures.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Ask for many captions; see whether a judge finds each again.

    The judge looks at each picture and ranks the captions of all concepts, or of all composed pictures ("a cat left of
    a star"). How often the right one comes first, and among the first five, is told for captions that training knew
    and for those held out, with real pictures beside; so are the mean cosine of picture and caption (CLIP score) and
    how far the generated pictures are from the real.
    """
    from unclip.evaluation.retrieval import retrieval as measure
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    given = stage_settings(prior_steps, decoder_steps, super_res_steps, prior_guidance, decoder_guidance)
    machine = Machine(dtype, device, cpu_offload=False, quiet=quiet)
    asked = Asked(data, out, model, num_seen, num_held_out, seed, batch_size, overwrite, judge, sheet)
    measures.refuse_outputs(asked)
    drawing = drawing_settings(candidates, prior_temperature, prior_top_p)
    subject = measures.prepare("retrieval", UnCLIPPipeline, ["prior"], asked, machine, given, sampler, drawing)
    space = measures.read_features(features, subject.pipe.device)
    found = measure(
        subject.pipe,
        subject.judge,  # pyright: ignore
        data,
        **asked.numbers(),
        sheet=sheet,
        features=space,
        progress=measures.bar(machine, desc="drawing", unit="batch"),
        **subject.settings,
    )
    about = subject.about | ({"features": space.name} if space is not None else {})
    finish(asked, about, "retrieval", found)


@evaluate.command("wordings", epilog=WORDINGS_EXAMPLES)
def wordings(
    data: measures.Data,
    out: measures.Out,
    model: options.Model = "unclip-emoji",
    judge: measures.JudgeName = BUILT_IN_JUDGE,
    listed: Annotated[
        Path | None,
        typer.Option(
            "--wordings",
            metavar="FILE",
            help="JSON: {kind: {wording: [labels that are right]}}.",
            show_default="the built-in list, for emoji",
        ),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the pictures on FILE.", show_default="no")
    ] = None,
    seed: measures.Seed = 0,
    prior_steps: measures.PriorSteps = None,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    prior_guidance: measures.PriorGuidance = None,
    decoder_guidance: options.DecoderGuidance = None,
    candidates: options.Candidates = None,
    prior_temperature: options.PriorTemperature = None,
    prior_top_p: options.PriorTopP = None,
    sampler: options.Sampler = None,
    batch_size: options.BatchSize = 16,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    overwrite: measures.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Ask in free words ("a mug of hot coffee"); see what a judge finds.

    The judge ranks the captions of all concepts for each picture. How often the first one, and one of the first five,
    is right for the wording is reported, for all wordings and for each kind. Several concepts may be right for one.
    """
    from unclip.evaluation.wordings import read_wordings
    from unclip.evaluation.wordings import wordings as measure
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    asked_for = read_wordings(listed or measures.find_judge(BUILT_IN_JUDGE) / "wordings.json")
    given = stage_settings(prior_steps, decoder_steps, super_res_steps, prior_guidance, decoder_guidance)
    machine = Machine(dtype, device, cpu_offload=False, quiet=quiet)
    asked = Asked(data, out, model, len(asked_for), 0, seed, batch_size, overwrite, judge)
    measures.refuse_to_overwrite([out] if sheet is None else [out, sheet], overwrite=overwrite)
    drawing = drawing_settings(candidates, prior_temperature, prior_top_p)
    subject = measures.prepare("wordings", UnCLIPPipeline, ["prior"], asked, machine, given, sampler, drawing)
    found = measure(
        subject.pipe,
        subject.judge,  # pyright: ignore
        data,
        asked_for,
        batch_size=batch_size,
        seed=seed,
        sheet=sheet,
        progress=measures.bar(machine, desc="drawing", unit="batch"),
        **subject.settings,
    )
    finish(asked, subject.about, "wordings", found)


@evaluate.command("variations", epilog=VARIATIONS_EXAMPLES)
def variations(
    data: measures.Data,
    out: measures.Out,
    model: options.Model = "unclip-emoji",
    judge: measures.JudgeName = BUILT_IN_JUDGE,
    num_seen: measures.NumSeen = 200,
    num_held_out: measures.NumHeldOut = None,
    sheet: measures.Sheet = None,
    seed: measures.Seed = 0,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    decoder_guidance: options.DecoderGuidance = None,
    sampler: options.Sampler = None,
    batch_size: options.BatchSize = 16,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    overwrite: measures.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Vary real pictures; see whether a judge still finds what they show.

    Told are retrieval of the caption from the variation, as for generated pictures, how close a variation is to its
    picture in the judge's space, and how far in pixels.
    """
    from unclip.evaluation.retrieval import variations as measure
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline

    given = decoder_settings(decoder_steps, super_res_steps, decoder_guidance)
    machine = Machine(dtype, device, cpu_offload=False, quiet=quiet)
    asked = Asked(data, out, model, num_seen, num_held_out, seed, batch_size, overwrite, judge, sheet)
    measures.refuse_outputs(asked)
    kind = UnCLIPImageVariationPipeline
    subject = measures.prepare("variations", kind, ["image_encoder"], asked, machine, given, sampler)
    found = measure(
        subject.pipe,
        subject.judge,  # pyright: ignore
        data,
        **asked.numbers(),
        sheet=sheet,
        progress=measures.bar(machine, desc="drawing", unit="batch"),
        **subject.settings,
    )
    finish(asked, subject.about, "variations", found)


@evaluate.command("prior", epilog=PRIOR_EXAMPLES)
def prior(
    data: measures.Data,
    out: measures.Out,
    model: options.Model = "unclip-emoji",
    num_seen: measures.NumSeen = 200,
    num_held_out: measures.NumHeldOut = None,
    seed: measures.Seed = 0,
    prior_steps: measures.PriorSteps = None,
    prior_guidance: measures.PriorGuidance = None,
    candidates: options.Candidates = None,
    prior_temperature: options.PriorTemperature = None,
    prior_top_p: options.PriorTopP = None,
    sampler: options.Sampler = None,
    batch_size: options.BatchSize = 64,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    overwrite: measures.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare the prior's embeddings with the true ones.

    Told are the cosine of the prior's sample for a caption to the picture's own embedding, beside what it must beat
    (the caption's embedding, another picture's, the mean), and how far it follows the caption.
    """
    from unclip.evaluation.retrieval import Judge
    from unclip.evaluation.stages import prior as measure
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    given = {"prior_num_inference_steps": prior_steps, "prior_guidance_scale": prior_guidance}
    machine = Machine(dtype, device, cpu_offload=False, quiet=quiet)
    asked = Asked(data, out, model, num_seen, num_held_out, seed, batch_size, overwrite)
    measures.refuse_outputs(asked)
    drawing = drawing_settings(candidates, prior_temperature, prior_top_p)
    needed = ["prior", "image_encoder"]
    subject = measures.prepare("prior", UnCLIPPipeline, needed, asked, machine, given, sampler, drawing)
    found = measure(
        subject.pipe,
        Judge.load(subject.folder, subject.pipe.device),
        data,
        **asked.numbers(),
        progress=measures.bar(machine, desc="sampling", unit="batch"),
        **subject.settings,
    )
    finish(asked, subject.about, "prior", found)


@evaluate.command("decoder", epilog=DECODER_EXAMPLES)
def decoder(
    data: measures.Data,
    out: measures.Out,
    model: options.Model = "unclip-emoji",
    judge: measures.JudgeName = BUILT_IN_JUDGE,
    num_seen: measures.NumSeen = 100,
    num_held_out: measures.NumHeldOut = None,
    captions: Annotated[
        bool, typer.Option("--captions", help="Tell the decoder the caption too, as text to image does.")
    ] = False,
    sheet: measures.Sheet = None,
    seed: measures.Seed = 0,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    decoder_guidance: options.DecoderGuidance = None,
    sampler: options.Sampler = None,
    batch_size: options.BatchSize = 16,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    overwrite: measures.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Reconstruct real pictures from their true embeddings.

    Told is how like the decoded picture is to the real one: by cosine in the model's own CLIP and in the judge's, and
    in pixels, before and after super-resolution. What is lost here no prior can bring back.
    """
    from unclip.evaluation.retrieval import Judge
    from unclip.evaluation.stages import decoder as measure
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline

    given = decoder_settings(decoder_steps, super_res_steps, decoder_guidance)
    machine = Machine(dtype, device, cpu_offload=False, quiet=quiet)
    asked = Asked(data, out, model, num_seen, num_held_out, seed, batch_size, overwrite, judge, sheet)
    measures.refuse_outputs(asked)
    kind = UnCLIPImageVariationPipeline
    subject = measures.prepare("decoder", kind, ["image_encoder"], asked, machine, given, sampler)
    found = measure(
        subject.pipe,
        Judge.load(subject.folder, subject.pipe.device),
        subject.judge,  # pyright: ignore
        data,
        **asked.numbers(),
        captions=captions,
        sheet=sheet,
        progress=measures.bar(machine, desc="decoding", unit="batch"),
        **subject.settings,
    )
    finish(asked, subject.about, "decoder", found)


@evaluate.command("sweep", epilog=SWEEP_EXAMPLES)
def sweep(
    data: measures.Data,
    out: measures.Out,
    model: options.Model = "unclip-emoji",
    judge: measures.JudgeName = BUILT_IN_JUDGE,
    num_seen: measures.NumSeen = 100,
    num_held_out: Annotated[int, typer.Option(min=0, metavar="N", help="Captions that were held out.")] = 0,
    features: measures.Features = None,
    seed: measures.Seed = 0,
    prior_steps: Annotated[str | None, measures.values("prior-steps", "Steps of the prior")] = None,
    decoder_steps: Annotated[str | None, measures.values("decoder-steps", "Steps of the decoder")] = None,
    super_res_steps: Annotated[str | None, measures.values("super-res-steps", "Steps of super-resolution")] = None,
    prior_guidance: Annotated[str | None, measures.values("prior-guidance", "Guidance scales of the prior")] = None,
    decoder_guidance: Annotated[
        str | None, measures.values("decoder-guidance", "Guidance scales of the decoder")
    ] = None,
    candidates: Annotated[
        str | None, measures.values("candidates", "Ideas that the prior draws, the closest to the caption kept")
    ] = None,
    prior_temperature: Annotated[
        str | None, measures.values("prior-temperature", "Temperatures of an autoregressive prior")
    ] = None,
    prior_top_p: Annotated[str | None, measures.values("prior-top-p", "Of an autoregressive prior: top-p")] = None,
    sampler: Annotated[str | None, measures.values("sampler", "Samplers: ancestral, ddim, dpm")] = None,
    batch_size: options.BatchSize = 16,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    overwrite: measures.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure every combination of settings: quality, and seconds.

    Lists are given with commas; every combination is drawn from the same captions and seeds. Beside the JSON file
    stand charts of quality against seconds and against guidance (.svg). The same command, stopped and given again,
    goes on; finished combinations stay, and a longer list adds to them.
    """
    from unclip.cli.measures import Lists, run_sweep

    lists = Lists(
        prior_guidance=prior_guidance,
        decoder_guidance=decoder_guidance,
        prior_steps=prior_steps,
        decoder_steps=decoder_steps,
        super_res_steps=super_res_steps,
        candidates=candidates,
        prior_temperature=prior_temperature,
        prior_top_p=prior_top_p,
        sampler=sampler,
    )
    machine = Machine(dtype, device, cpu_offload=False, quiet=quiet)
    asked = Asked(data, out, model, num_seen, num_held_out, seed, batch_size, overwrite, judge)
    found, charts = run_sweep(lists, asked, machine, features)
    show("sweep", found)
    for path in charts:
        print(path, flush=True)


@evaluate.command("report", epilog=REPORT_EXAMPLES)
def report(
    reports: Annotated[list[Path], typer.Argument(metavar="FILE...", help="JSON reports of the other commands.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The HTML file to write.")],
    title: Annotated[str, typer.Option(metavar="TEXT", help="What stands at its head.")] = "Evaluation",
    picture: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A picture to add; may be given several times.")
    ] = None,
    overwrite: measures.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Make one readable page of several reports.

    The page holds everything in one file: tables, charts of sweeps, and the sheets that the reports name, if they lie
    in the report's folder or below it. It runs no scripts and loads nothing.
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
    """Write the report, and show its tables."""
    measures.write_report(asked, about, name, found)
    show(name, found)


def show(name: str, found: dict[str, Any]) -> None:
    """Print the tables of a measure."""
    from unclip.evaluation.report import tables

    for place, each in enumerate(tables(name, found)):
        if place:
            print(f"\n{each.title}")
        print(each, flush=True)
