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
from unclip.cli.options import MAX_STEPS
from unclip.errors import CheckpointError, InputError, MissingFileError, OutputExistsError
from unclip.pipelines.session import (
    Machine,
    SamplerName,
    call_settings,
    drawing_settings,
    find_model,
    load,
    model_name,
    sampler_name,
    sampler_switch,
)

if TYPE_CHECKING:
    from unclip.evaluation.measures import FeatureSpace
    from unclip.evaluation.retrieval import Judge

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
        *options.names_of(name), metavar="LIST", help=f"{what}, with commas between.", show_default="the model's own"
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

    from unclip.evaluation.retrieval import Judge

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
    from unclip.evaluation.report import sheet_path

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


CHARTS = ("seconds", "prior-guidance", "decoder-guidance")
"""What the charts of a sweep are called, after the report's own name."""


@dataclass(frozen=True)
class Lists:
    """The values to sweep over as they were given, with commas between; None for the model's own."""

    prior_guidance: str | None
    decoder_guidance: str | None
    prior_steps: str | None
    decoder_steps: str | None
    super_res_steps: str | None
    candidates: str | None
    prior_temperature: str | None
    prior_top_p: str | None
    sampler: str | None

    def axes(self) -> dict[str, list[Any]]:
        """The values of each setting that was given, by its name in a call.

        Raises: InputError for a value that is none, or out of its limits.
        """
        kinds: dict[str, tuple[str, Callable[[str, str], Any]]] = {
            "prior_guidance": ("prior_guidance_scale", _scale),
            "decoder_guidance": ("decoder_guidance_scale", _scale),
            "prior_steps": ("prior_num_inference_steps", _count),
            "decoder_steps": ("decoder_num_inference_steps", _count),
            "super_res_steps": ("super_res_num_inference_steps", _count),
            "candidates": ("num_prior_candidates", _count),
            "prior_temperature": ("prior_temperature", _temperature),
            "prior_top_p": ("prior_top_p", _top_p),
            "sampler": ("sampler", _sampler),
        }
        found: dict[str, list[Any]] = {}
        for field, (name, read) in kinds.items():
            text = getattr(self, field)
            if text is not None:
                option = f"--{field.replace('_', '-')}"
                found[name] = [read(part.strip(), option) for part in text.split(",")]
        return found


def run_sweep(lists: Lists, asked: Asked, machine: Machine, features: Path | None) -> tuple[dict[str, Any], list[Path]]:
    """Sweep, writing the report after every point. Returns: what was found, and the charts' paths.

    Raises: OutputExistsError when the report is there and is no sweep, or one of another model, data set or number.
    """
    axes = lists.axes()
    if not asked.overwrite:  # what cannot be is refused before anything is loaded
        if asked.out.exists():
            _points_of(asked.out)
        else:
            refuse_to_overwrite([_chart_path(asked.out, name) for name in CHARTS], overwrite=False)

    from unclip.data.folder import read_records
    from unclip.evaluation.sweep import SAMPLER, grid_of, sweep
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    read_records(asked.data)
    own = {name: None for name in ("prior_guidance_scale", "decoder_guidance_scale")}
    own |= {f"{stage}_num_inference_steps": None for stage in ("prior", "decoder", "super_res")}
    subject = prepare("sweep", UnCLIPPipeline, ["prior"], asked, machine, own, None, drawing_settings())
    assert subject.judge is not None
    defaults = {**subject.settings, SAMPLER: sampler_name(subject.pipe)}
    places = grid_of({name: [value] for name, value in defaults.items()} | axes)
    space = read_features(features, subject.pipe.device)
    about = _about(subject, asked, machine, space)
    finished = [] if asked.overwrite or not asked.out.exists() else _resumed(asked.out, about)

    def keep(found: dict[str, Any]) -> None:
        write_report(asked, about, "sweep", found)

    found = sweep(
        subject.pipe,
        subject.judge,
        asked.data,
        places,
        use_sampler=sampler_switch(subject.pipe),
        finished=finished,
        on_point=keep,
        **asked.numbers(),
        features=space,
        progress=bar(machine, desc="drawing", unit="batch", leave=False),
        points_progress=bar(machine, desc="settings", unit="point"),
    )
    keep(found)
    return found, write_charts(asked.out, found)


def write_charts(out: Path, found: dict[str, Any]) -> list[Path]:
    """`NAME-seconds.svg` and its like beside the report `NAME.json`."""
    from unclip.checkpoints.files import atomic_file
    from unclip.evaluation.charts import curves

    written = []
    for name, text in curves(found).items():
        path = _chart_path(out, name)
        with atomic_file(path) as draft:
            draft.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _chart_path(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}-{name}.svg")


def _about(subject: Subject, asked: Asked, machine: Machine, space: Any) -> dict[str, Any]:
    """What the report says, and what an earlier one must have said the same to be gone on with."""
    from unclip.data.folder import metadata_file

    assert asked.judge is not None
    about = {key: value for key, value in subject.about.items() if key != "settings"}
    about |= {
        "features": None if space is None else space.name,
        "dtype": machine.dtype.value,
        "batch_size": asked.batch_size,
        "device": subject.pipe.device.type,
        "model_sha256": fingerprint(subject.folder),
        "judge_sha256": fingerprint(find_judge(asked.judge)),
        "data_sha256": fingerprint(asked.data, metadata_file(asked.data).name),
    }
    return about


def _resumed(out: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished points of the sweep in `out`."""
    before = read_json(out)
    for key, value in about.items():
        if key not in ("unclip", "model", "judge", "data") and before.get(key) != value:
            raise OutputExistsError(
                f"{out} is of another sweep: its {key} is {before.get(key)!r}, now {value!r}; name another file, or "
                "give --overwrite to begin anew"
            )
    return _points_of(out)


def _points_of(out: Path) -> list[dict[str, Any]]:
    """Raises: OutputExistsError when the file is no report of a sweep."""
    if not out.is_dir():
        try:
            found = read_json(out)["sweep"]["points"]
        except (CheckpointError, KeyError, TypeError):
            found = None
        if isinstance(found, list) and all(isinstance(each, dict) and "settings" in each for each in found):
            return found
    raise OutputExistsError(f"{out} is there already and is no sweep; give --overwrite, or name another file")


def _scale(text: str, option: str) -> float:
    from unclip.diffusion.guidance import check_scale

    return check_scale(_number(text, option), option)


def _temperature(text: str, option: str) -> float:
    from unclip.stages.prior import check_drawing

    value = _number(text, option)
    check_drawing(value, 1.0)
    return value


def _top_p(text: str, option: str) -> float:
    from unclip.stages.prior import check_drawing

    value = _number(text, option)
    check_drawing(1.0, value)
    return value


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option} has {text!r} in it; give numbers with commas between, as 1,2,4") from None


def _count(text: str, option: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_STEPS:
        raise InputError(f"{option} has {text!r} in it; give whole numbers from 1 to {MAX_STEPS}, as 5,10,20")
    return int(text)


def _sampler(text: str, option: str) -> str:
    if text not in list(SamplerName):
        raise InputError(f"{option} has {text!r} in it; there are {', '.join(SamplerName)}")
    return text
