"""`unclip evaluate`: how good a model is, in numbers.

Knows files and options; what is measured, and how, is the affair of `unclip.evaluation`.
"""

import functools
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

evaluate = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@evaluate.callback()
def evaluate_group() -> None:
    """Measure how good a model is."""


@evaluate.command("retrieval", epilog=RETRIEVAL_EXAMPLES)
def retrieval(
    data: Annotated[Path, typer.Option(metavar="DIR", help="A data set of concepts, as of: unclip data emoji.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The JSON file to write.")],
    model: options.Model = "unclip-emoji",
    judge: Annotated[
        str, typer.Option(metavar="DIR", help="A CLIP that had no part in the model: a folder, or the built-in one.")
    ] = BUILT_IN_JUDGE,
    num_seen: Annotated[int, typer.Option(min=1, metavar="N", help="Concepts to ask for that training knew.")] = 200,
    sheet: Annotated[
        Path | None,
        typer.Option(
            metavar="PREFIX", help="Draw the pictures on PREFIX-seen.png and PREFIX-held-out.png.", show_default="no"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32, metavar="N", help="Of the choice of concepts, and of the pictures.")
    ] = 0,
    prior_steps: Annotated[int | None, options.steps("prior", "of the prior, which turns words into an idea")] = None,
    decoder_steps: options.DecoderSteps = None,
    super_res_steps: options.SuperResSteps = None,
    prior_guidance: Annotated[float | None, options.guidance("prior", "idea is pushed towards the caption")] = None,
    decoder_guidance: options.DecoderGuidance = None,
    sampler: options.Sampler = None,
    batch_size: options.BatchSize = 16,
    dtype: options.DtypeOption = options.Dtype.float32,
    device: options.Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files if they are there.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Ask for many concepts; see whether a judge finds each caption again.

    The judge looks at each picture and ranks the captions of all concepts. How often the right one comes first, and
    among the first five, is told for concepts that training knew and for those held out, with real pictures beside.
    """
    for path in (out, *_sheets(sheet)):
        if path.is_dir() or (path.exists() and not overwrite):
            raise OutputExistsError(f"{path} is there already; give --overwrite, or name another file")
    judge_folder = find_judge(judge)
    folder, index = find_model(model, quiet=quiet)
    if "prior" not in index:
        raise CheckpointError(f"{model} has no prior, so it draws no captions and cannot be measured so")

    from tqdm import tqdm

    from unclip.checkpoints.files import write_json
    from unclip.evaluation.retrieval import Judge
    from unclip.evaluation.retrieval import retrieval as measure
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    settings = call_settings(
        UnCLIPPipeline,
        folder,
        {
            "prior_num_inference_steps": prior_steps,
            "decoder_num_inference_steps": decoder_steps,
            "super_res_num_inference_steps": super_res_steps,
            "prior_guidance_scale": prior_guidance,
            "decoder_guidance_scale": decoder_guidance,
        },
    )
    asked = Judge.load(judge_folder)
    pipe = load(UnCLIPPipeline, folder, Machine(dtype, device, cpu_offload=False, quiet=quiet), sampler)
    pipe.set_progress_bar_config(disable=True)  # one bar for all is enough
    found = measure(
        pipe,
        asked,
        data,
        num_seen=num_seen,
        batch_size=batch_size,
        seed=seed,
        sheet=sheet,
        progress=functools.partial(tqdm, desc="drawing", unit="batch", disable=True if quiet else None),
        **settings,
    )
    about = {
        "unclip": __version__,
        "model": model_name(model),
        "judge": model_name(judge),
        "judge_saw_all_concepts": saw_all_concepts(judge, judge_folder),
        "data": data.resolve().name,
        "num_seen": num_seen,
        "seed": seed,
        "settings": {**settings, "sampler": sampler_name(pipe), "dtype": dtype.value, "batch_size": batch_size},
    }
    write_json(out, {**about, "retrieval": found})
    print(table(found), flush=True)


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
    lines = [f"{'':<20}{'number':>8}{'first':>9}{'in five':>9}"]
    for name in ("seen", "held_out"):
        for kind in ("generated", "real"):
            if kind in found[name]:
                rates = found[name][kind]
                what = f"{name.replace('_', ' ')}, {kind}"
                lines.append(f"{what:<20}{found[name]['num']:>8}{rates['at_1']:>9.1%}{rates['at_5']:>9.1%}")
    chances = found["chance_at_1"], found["chance_at_5"]
    lines.append(f"{'chance':<20}{found['num_captions']:>8}{chances[0]:>9.1%}{chances[1]:>9.1%}")
    return "\n".join(lines)


def _sheets(prefix: Path | None) -> list[Path]:
    return [] if prefix is None else [prefix.with_name(f"{prefix.name}-{group}.png") for group in ("seen", "held-out")]
