"""`unclip evaluate`: how good a model is, in numbers.

Knows files and options; what is measured, and how, is the affair of `unclip.evaluation`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from unclip import __version__
from unclip.checkpoints.files import read_json
from unclip.checkpoints.hub import BUILT_IN_JUDGE, resolve
from unclip.cli import options
from unclip.cli.loading import Machine, call_settings, find_model, load, model_name, sampler_name
from unclip.errors import CheckpointError, MissingFileError, OutputExistsError

RETRIEVAL_EXAMPLES = options.examples(
    "unclip evaluate retrieval --data data/emoji --out report.json",
    "unclip evaluate retrieval --model models/mine --judge runs/judge/model \\",
    "  --data data/emoji --num-seen 100 --sheet sheets/mine --out report.json",
)

VARIATIONS_EXAMPLES = options.examples(
    "unclip evaluate variations --data data/emoji --out variations.json",
    "unclip evaluate variations --model models/mine --data data/emoji \\",
    "  --sheet sheets/mine --out variations.json",
)

Data = Annotated[Path, typer.Option(metavar="DIR", help="A data set of concepts, as of: unclip data emoji.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The JSON file to write.")]
JudgeName = Annotated[
    str, typer.Option(metavar="DIR", help="A CLIP that had no part in the model: a folder, or the built-in one.")
]
NumSeen = Annotated[int, typer.Option(min=1, metavar="N", help="Concepts to ask for that training knew.")]
Sheet = Annotated[
    Path | None,
    typer.Option(
        metavar="PREFIX", help="Draw the pictures on PREFIX-seen.png and PREFIX-held-out.png.", show_default="no"
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32, metavar="N", help="Of the choice of concepts, and of the pictures.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the files if they are there.")]

evaluate = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@evaluate.callback()
def evaluate_group() -> None:
    """Measure how good a model is."""


@evaluate.command("retrieval", epilog=RETRIEVAL_EXAMPLES)
def retrieval(
    data: Data,
    out: Out,
    model: options.Model = "unclip-emoji",
    judge: JudgeName = BUILT_IN_JUDGE,
    num_seen: NumSeen = 200,
    sheet: Sheet = None,
    seed: Seed = 0,
    prior_steps: Annotated[int | None, options.steps("prior", "of the prior, which turns words into an idea")] = None,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    prior_guidance: Annotated[float | None, options.guidance("prior", "idea is pushed towards the caption")] = None,
    decoder_guidance: options.DecoderGuidance = None,
    sampler: options.Sampler = None,
    batch_size: options.BatchSize = 16,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    overwrite: Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Ask for many concepts; see whether a judge finds each caption again.

    The judge looks at each picture and ranks the captions of all concepts. How often the right one comes first, and
    among the first five, is told for concepts that training knew and for those held out, with real pictures beside;
    so are the mean cosine of picture and caption (CLIP score) and how far the generated pictures are from the real.
    """
    from unclip.evaluation.retrieval import retrieval as measure
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    given = {
        "prior_num_inference_steps": prior_steps,
        "decoder_num_inference_steps": decoder_steps,
        "super_res_num_inference_steps": super_res_steps,
        "prior_guidance_scale": prior_guidance,
        "decoder_guidance_scale": decoder_guidance,
    }
    machine = Machine(dtype, device, cpu_offload=False, quiet=quiet)
    asked = Asked(data, out, model, judge, num_seen, sheet, seed, batch_size, overwrite)
    found = run("retrieval", measure, UnCLIPPipeline, "prior", asked, machine, given, sampler)
    print(table(found), flush=True)


@evaluate.command("variations", epilog=VARIATIONS_EXAMPLES)
def variations(
    data: Data,
    out: Out,
    model: options.Model = "unclip-emoji",
    judge: JudgeName = BUILT_IN_JUDGE,
    num_seen: NumSeen = 200,
    sheet: Sheet = None,
    seed: Seed = 0,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    decoder_guidance: options.DecoderGuidance = None,
    sampler: options.Sampler = None,
    batch_size: options.BatchSize = 16,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    overwrite: Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Vary real pictures; see whether a judge still finds what they show.

    Told are retrieval of the caption from the variation, as for generated pictures, how close a variation is to its
    picture in the judge's space, and how far in pixels.
    """
    from unclip.evaluation.variations import variations as measure
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline

    given = {
        "decoder_num_inference_steps": decoder_steps,
        "super_res_num_inference_steps": super_res_steps,
        "decoder_guidance_scale": decoder_guidance,
    }
    machine = Machine(dtype, device, cpu_offload=False, quiet=quiet)
    asked = Asked(data, out, model, judge, num_seen, sheet, seed, batch_size, overwrite)
    found = run("variations", measure, UnCLIPImageVariationPipeline, "image_encoder", asked, machine, given, sampler)
    print(table(found), flush=True)


@dataclass(frozen=True)
class Asked:
    """What every measure is told on the command line."""

    data: Path
    out: Path
    model: str
    judge: str
    num_seen: int
    sheet: Path | None
    seed: int
    batch_size: int
    overwrite: bool


def run(
    name: str,
    measure: Callable[..., dict[str, Any]],
    pipeline_class: type[Any],
    needed: str,
    asked: Asked,
    machine: Machine,
    given: dict[str, Any],
    sampler: options.SamplerName | None,
) -> dict[str, Any]:
    """Measure, and write the report.

    Raises: OutputExistsError before anything is loaded; CheckpointError for a model without component `needed`.
    """
    for path in (asked.out, *_sheets(asked.sheet)):
        if path.is_dir() or (path.exists() and not asked.overwrite):
            raise OutputExistsError(f"{path} is there already; give --overwrite, or name another file")
    judge_folder = find_judge(asked.judge)
    folder, index = find_model(asked.model, quiet=machine.quiet)
    if needed not in index:
        raise CheckpointError(f"{asked.model} has no {needed}, so it cannot be measured by its {name}")

    from tqdm import tqdm

    from unclip.checkpoints.files import write_json
    from unclip.evaluation.retrieval import Judge

    settings = call_settings(pipeline_class, folder, given)
    judge = Judge.load(judge_folder)
    pipe = load(pipeline_class, folder, machine, sampler)
    pipe.set_progress_bar_config(disable=True)  # one bar for all is enough
    found = measure(
        pipe,
        judge,
        asked.data,
        num_seen=asked.num_seen,
        batch_size=asked.batch_size,
        seed=asked.seed,
        sheet=asked.sheet,
        progress=functools.partial(tqdm, desc="drawing", unit="batch", disable=True if machine.quiet else None),
        **settings,
    )
    about = {
        "unclip": __version__,
        "model": model_name(asked.model),
        "judge": model_name(asked.judge),
        "judge_saw_all_concepts": saw_all_concepts(asked.judge, judge_folder),
        "data": asked.data.resolve().name,
        "num_seen": asked.num_seen,
        "seed": asked.seed,
        "settings": {
            **settings,
            "sampler": sampler_name(pipe),
            "dtype": machine.dtype.value,
            "batch_size": asked.batch_size,
        },
    }
    write_json(asked.out, {**about, name: found})
    return found


def find_judge(name: str) -> Path:
    """The folder of a judge.

    Raises: MissingFileError when there is none of that name, or this installation has no built-in one.
    """
    try:
        return resolve(name)
    except MissingFileError as error:
        raise MissingFileError(f"{error}; or name the folder of another judge with --judge") from error


def saw_all_concepts(name: str, folder: Path) -> bool | None:
    """Whether the judge was trained on pictures of every concept, the held-out ones too; None where nobody can tell."""
    if name == BUILT_IN_JUDGE and not Path(name).is_dir():
        return True  # recipes/emoji/judge.toml
    recipe = folder.resolve().parent / "recipe.json"  # of a run's folder, which holds model/
    try:
        return bool(read_json(recipe)["clip"]["include_held_out"])
    except (CheckpointError, KeyError, TypeError):
        return None


def table(found: dict[str, Any]) -> str:
    """The rates as a table for people."""
    lines = [f"{'':<20}{'number':>8}{'first':>9}{'in five':>9}{'score':>8}"]
    for name in ("seen", "held_out"):
        for kind in ("generated", "variations", "real"):
            if kind in found[name]:
                rates, number = found[name][kind], found[name]["num"]
                what = f"{name.replace('_', ' ')}, {kind}"
                figures = f"{rates['at_1']:>9.1%}{rates['at_5']:>9.1%}{rates['clip_score']:>8.3f}"
                lines.append(f"{what:<20}{number:>8}{figures}")
    if "chance_at_1" in found:
        chances = found["chance_at_1"], found["chance_at_5"]
        lines.append(f"{'chance':<20}{found['num_captions']:>8}{chances[0]:>9.1%}{chances[1]:>9.1%}")
    for name in ("seen", "held_out"):
        group, called = found[name], name.replace("_", " ")
        if "similarity" in group:
            near, others, apart = (group[key] for key in ("similarity", "similarity_of_others", "pixel_difference"))
            lines.append(
                f"{called}: cosine to its picture {near:.3f}, to others {others:.3f}; pixels apart {apart:.3f}"
            )
        if "distance" in group:
            space, frechet, kernel = (group["distance"][key] for key in ("space", "frechet", "kernel"))
            lines.append(f"{called}: Fréchet distance {frechet:.4f}, kernel distance {kernel:.6f} in {space}")
    return "\n".join(lines)


def _sheets(prefix: Path | None) -> list[Path]:
    return [] if prefix is None else [prefix.with_name(f"{prefix.name}-{group}.png") for group in ("seen", "held-out")]
