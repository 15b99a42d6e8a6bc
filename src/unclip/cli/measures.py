"""What the commands of `unclip evaluate` share: their options, their models, and the report that they write.

Knows files and options; what is measured, and how, is the affair of `unclip.evaluation`. Called by `evaluate.py`.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unclip import __version__
from unclip.checkpoints.files import read_json
from unclip.checkpoints.hub import BUILT_IN_JUDGE, resolve
from unclip.cli import options
from unclip.cli.loading import Machine, call_settings, find_model, load, model_name, sampler_name
from unclip.errors import CheckpointError, MissingFileError, OutputExistsError

if TYPE_CHECKING:
    from unclip.evaluation.distances import FeatureSpace
    from unclip.evaluation.judge import Judge

HASHED = (".csv", ".json", ".jsonl", ".safetensors", ".txt")
"""The files that say which model or data set it is."""

Data = Annotated[Path, typer.Option(metavar="DIR", help="A data set: of unclip data emoji, or of unclip data compose.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The JSON file to write.")]
JudgeName = Annotated[
    str, typer.Option(metavar="DIR", help="A CLIP that had no part in the model: a folder, a hub id, or the built-in.")
]
NumSeen = Annotated[int, typer.Option(min=1, metavar="N", help="Captions to ask for that training knew.")]
NumHeldOut = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Captions to ask for that were held out.", show_default="all")
]
Sheet = Annotated[
    Path | None,
    typer.Option(
        metavar="PREFIX", help="Draw the pictures on PREFIX-seen.png and PREFIX-held-out.png.", show_default="no"
    ),
]
Features = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Inception weights of your own, for distances in its space: a safetensors file, or its folder.",
        show_default="none",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**32, metavar="N", help="Of the choice of captions, and of the noise.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the files if they are there.")]
PriorSteps = Annotated[int | None, options.steps("prior", "of the prior, which turns words into an idea")]
PriorGuidance = Annotated[float | None, options.guidance("prior", "idea is pushed towards the caption")]


def values(name: str, what: str) -> typer.models.OptionInfo:
    """The option for the values of one setting that are swept."""
    return typer.Option(
        f"--{name}", metavar="LIST", help=f"{what}, with commas between.", show_default="the model's own"
    )


@dataclass(frozen=True)
class Asked:
    """What every measure is told on the command line."""

    data: Path
    out: Path
    model: str
    num_seen: int
    num_held_out: int | None
    seed: int
    batch_size: int
    overwrite: bool
    judge: str | None = None
    sheet: Path | None = None

    def numbers(self) -> dict[str, Any]:
        """What the measure is told of them."""
        names = ("num_seen", "num_held_out", "batch_size", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Subject:
    """A model ready to be measured: its pipeline, the settings of its calls, and the judge, if one was asked for."""

    pipe: Any
    folder: Path
    settings: dict[str, Any]
    judge: "Judge | None"
    about: dict[str, Any]
    """What the report says of all this."""


def prepare(
    name: str,
    pipeline_class: type[Any],
    needed: Sequence[str],
    asked: Asked,
    machine: Machine,
    given: Mapping[str, Any],
    sampler: options.SamplerName | None,
    drawing: Mapping[str, Any] | None = None,
) -> Subject:
    """Load what a measure needs. `given` are the arguments of the pipeline's call, None for the model's own.

    `drawing` are those that only some priors have, left out where they are neither given nor the model's own.

    Raises: MissingFileError for a judge that is not there; CheckpointError for a model without the components `needed`,
        before anything is loaded.
    """
    judge_folder = None if asked.judge is None else find_judge(asked.judge)
    folder, index = find_model(asked.model, quiet=machine.quiet)
    for component in needed:
        if component not in index:
            raise CheckpointError(f"{asked.model} has no {component}, so it cannot be measured by its {name}")

    from unclip.evaluation.judge import Judge

    settings = call_settings(pipeline_class, folder, given, drawing)
    pipe = load(pipeline_class, folder, machine, sampler)
    pipe.set_progress_bar_config(disable=True)  # one bar for all is enough
    about: dict[str, Any] = {
        "unclip": __version__,
        "model": model_name(asked.model),
        "data": asked.data.resolve().name,
        "num_seen": asked.num_seen,
        "num_held_out": asked.num_held_out,
        "seed": asked.seed,
        "settings": {
            **settings,
            "sampler": sampler_name(pipe),
            "dtype": machine.dtype.value,
            "batch_size": asked.batch_size,
        },
    }
    judge = None
    if judge_folder is not None and asked.judge is not None:
        judge = Judge.load(judge_folder, pipe.device)
        about |= {
            "judge": model_name(asked.judge),
            "judge_saw_all_concepts": saw_all_concepts(asked.judge, judge_folder),
        }
    return Subject(pipe, folder, settings, judge, about)


def fingerprint(folder: Path, pattern: str = "**/*") -> str:
    """What tells one model's files, or a data set's list, from another's: a SHA-256 over names and contents.

    Raises: MissingFileError when no file fits the pattern.
    """
    digest = hashlib.sha256()
    files = sorted(path for path in folder.glob(pattern) if path.is_file() and path.suffix in HASHED)
    if not files:
        raise MissingFileError(f"{folder} has no {', '.join(HASHED)} files; is it the right folder?")
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def refuse_to_overwrite(paths: Iterable[Path], *, overwrite: bool) -> None:
    """Raises: OutputExistsError for a file that is there already, unless it may be replaced; and for a folder."""
    for path in paths:
        if path.is_dir() or (path.exists() and not overwrite):
            raise OutputExistsError(f"{path} is there already; give --overwrite, or name another file")


def refuse_outputs(asked: Asked) -> None:
    """Raises: OutputExistsError as `refuse_to_overwrite`, for the report and its sheets."""
    refuse_to_overwrite((asked.out, *sheet_paths(asked.sheet)), overwrite=asked.overwrite)


def write_report(asked: Asked, about: Mapping[str, Any], name: str, found: Mapping[str, Any]) -> None:
    """Write what was found, and beside it which sheets were drawn, named as seen from the report's folder."""
    from unclip.checkpoints.files import write_json

    drawn = [path for path in sheet_paths(asked.sheet) if path.is_file()]
    pictures = [Path(os.path.relpath(path, asked.out.parent)).as_posix() for path in drawn]
    write_json(asked.out, {**about, name: dict(found)} | ({"pictures": pictures} if pictures else {}))


def sheet_paths(prefix: Path | None) -> list[Path]:
    """The files of `--sheet PREFIX`."""
    from unclip.evaluation import GROUPS
    from unclip.evaluation.sheets import sheet_path

    return [] if prefix is None else [sheet_path(prefix, group) for group in GROUPS]


def bar(machine: Machine, **words: Any) -> Callable[..., Any]:
    """A progress bar for what it is called with, on a terminal alone."""
    from tqdm import tqdm

    return functools.partial(tqdm, disable=True if machine.quiet else None, **words)


def read_features(path: Path | None, device: Any) -> "FeatureSpace | None":
    """The feature space of `--features`."""
    if path is None:
        return None
    from unclip.evaluation.inception import InceptionFeatures

    return InceptionFeatures.load(path, device)


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
