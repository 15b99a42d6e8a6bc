"""Options, loading and reports shared by the commands of `unclip evaluate`."""

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
from unclip.cli.messages import warn
from unclip.errors import CheckpointError, InputError, MissingFileError, OutputExistsError
from unclip.pipelines.session import Session, model_name, sampler_name, sampler_switch
from unclip.settings import SAMPLERS, SETTINGS

if TYPE_CHECKING:
    from unclip.evaluation.measures import FeatureSpace
    from unclip.evaluation.retrieval import Judge

HASHED = (".csv", ".json", ".jsonl", ".safetensors", ".txt")
"""The files that identify a model or a data set."""

Data = Annotated[Path, typer.Option(metavar="DIR", help="A data set of unclip data emoji or unclip data compose.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The JSON file to write.")]
JudgeName = Annotated[
    str,
    typer.Option(
        metavar="DIR",
        help="A CLIP that the model was not trained with: a folder, a hub id, or the built-in one.",
    ),
]
NumSeen = Annotated[int, typer.Option(min=1, metavar="N", help="Number of captions seen in training.")]
NumHeldOut = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Number of held-out captions.", show_default="all")
]
Sheet = Annotated[
    Path | None,
    typer.Option(
        metavar="PREFIX",
        help="Write sheets of the pictures to PREFIX-seen.png and PREFIX-held-out.png.",
        show_default="no",
    ),
]
Features = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Inception weights, for distances in its feature space: a safetensors file or its folder.",
        show_default="none",
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32, metavar="N", help="Seed of the choice of captions and of the noise.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]


def values(name: str) -> typer.models.OptionInfo:
    """The option for the values of one setting in a sweep."""
    row = SETTINGS[name]
    return typer.Option(
        *options.names_of(row.option),
        metavar="LIST",
        help=f"Values of {row.label}, separated by commas.",
        show_default="the model's own",
    )


@dataclass(frozen=True)
class Asked:
    """Options of every measure."""

    data: Data
    out: Out
    model: options.Model = "unclip-emoji"
    judge: JudgeName = BUILT_IN_JUDGE
    num_seen: NumSeen = 200
    num_held_out: NumHeldOut = None
    sheet: Sheet = None
    seed: Seed = 0
    batch_size: options.BatchSize = 16
    overwrite: Overwrite = False

    def numbers(self) -> dict[str, Any]:
        """The options that are arguments of every measure."""
        names = ("num_seen", "num_held_out", "batch_size", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Subject:
    """A loaded model: its pipeline, the settings of its calls, and the judge, if the measure needs one."""

    pipe: Any
    folder: Path
    settings: dict[str, Any]
    judge: "Judge | None"
    about: dict[str, Any]
    """The facts for the report."""


def prepare(
    name: str,
    pipeline_class: type[Any],
    needed: Sequence[str],
    asked: Asked,
    precision: options.Precision,
    given: Mapping[str, Any],
    sampler: str | None,
    *,
    judged: bool = True,
    quiet: bool,
) -> Subject:
    """Load the model and the judge for a measure.

    Args:
        name: name of the measure.
        pipeline_class: class of the pipeline.
        needed: components that the model must have.
        asked, precision, sampler, quiet: options of the command.
        given: settings of the pipeline's call; None for the model's own.
        judged: whether a judge is needed.

    Raises: MissingFileError for a judge that does not exist; CheckpointError for a model without the components
        `needed`. Both are raised before anything is loaded.
    """
    judge_folder = find_judge(asked.judge) if judged else None
    session = Session(asked.model, precision, sampler=sampler, progress=not quiet)
    for component in needed:
        if component not in session.index:
            raise CheckpointError(f"{asked.model} has no {component}, so it cannot be measured by its {name}")

    from unclip.evaluation.retrieval import Judge

    settings = session.settings(pipeline_class, given)
    pipe = session.pipeline(pipeline_class)
    pipe.set_progress_bar_config(disable=True)
    about: dict[str, Any] = {
        "unclip": __version__,
        "model": session.name,
        "data": asked.data.resolve().name,
        "num_seen": asked.num_seen,
        "num_held_out": asked.num_held_out,
        "seed": asked.seed,
        "settings": {
            **settings,
            "sampler": sampler_name(pipe),
            "dtype": precision.dtype.value,
            "batch_size": asked.batch_size,
        },
    }
    judge = None
    if judge_folder is not None:
        judge = Judge.load(judge_folder, pipe.device)
        about |= {
            "judge": model_name(asked.judge),
            "judge_saw_all_concepts": saw_all_concepts(asked.judge, judge_folder),
        }
    return Subject(pipe, session.folder, settings, judge, about)


def fingerprint(folder: Path, pattern: str = "**/*") -> str:
    """The SHA-256 of the names and contents of a folder's files, to identify a model or a data set.

    Raises: MissingFileError if no file matches the pattern.
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
    """Raises: OutputExistsError for an existing file, unless `overwrite` is set, and for a folder."""
    for path in paths:
        if path.is_dir() or (path.exists() and not overwrite):
            raise OutputExistsError(f"{path} exists; give --overwrite, or use another name")


def refuse_outputs(asked: Asked) -> None:
    """Call `refuse_to_overwrite` for the report and its sheets."""
    refuse_to_overwrite((asked.out, *sheet_paths(asked.sheet)), overwrite=asked.overwrite)


def write_report(asked: Asked, about: Mapping[str, Any], name: str, found: Mapping[str, Any]) -> None:
    """Write the report, with the paths of its sheets relative to its folder."""
    from unclip.checkpoints.files import write_json

    drawn = [path for path in sheet_paths(asked.sheet) if path.is_file()]
    pictures = [Path(os.path.relpath(path, asked.out.parent)).as_posix() for path in drawn]
    write_json(asked.out, {**about, name: dict(found)} | ({"pictures": pictures} if pictures else {}))


def sheet_paths(prefix: Path | None) -> list[Path]:
    """The files of `--sheet PREFIX`."""
    from unclip.evaluation import GROUPS
    from unclip.evaluation.report import sheet_path

    return [] if prefix is None else [sheet_path(prefix, group) for group in GROUPS]


def bar(quiet: bool, **words: Any) -> Callable[..., Any]:
    """A progress bar that is shown only on a terminal."""
    from tqdm import tqdm

    return functools.partial(tqdm, disable=True if quiet else None, **words)


def read_features(path: Path | None, device: Any) -> "FeatureSpace | None":
    """Load the feature space of `--features`."""
    if path is None:
        return None
    from unclip.evaluation.inception import InceptionFeatures

    return InceptionFeatures.load(path, device)


def find_judge(name: str) -> Path:
    """The folder of a judge.

    Raises: MissingFileError if it does not exist, or the built-in judge is not installed.
    """
    try:
        return resolve(name)
    except MissingFileError as error:
        raise MissingFileError(f"{error}; or give the folder of another judge with --judge") from error


def saw_all_concepts(name: str, folder: Path) -> bool | None:
    """Whether the judge was trained on all concepts, including the held-out ones; None if unknown."""
    if name == BUILT_IN_JUDGE and not Path(name).is_dir():
        return True  # recipes/emoji/judge.toml
    recipe = folder.resolve().parent / "recipe.json"  # in the folder of a training run, which contains model/
    try:
        return bool(read_json(recipe)["clip"]["include_held_out"])
    except (CheckpointError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Lists:
    """Options of a sweep: comma-separated values of each setting; None for the model's own value."""

    prior_steps: Annotated[str | None, values("prior_num_inference_steps")] = None
    prior_guidance: Annotated[str | None, values("prior_guidance_scale")] = None
    candidates: Annotated[str | None, values("num_prior_candidates")] = None
    prior_temperature: Annotated[str | None, values("prior_temperature")] = None
    prior_top_p: Annotated[str | None, values("prior_top_p")] = None
    decoder_steps: Annotated[str | None, values("decoder_num_inference_steps")] = None
    super_res_steps: Annotated[str | None, values("super_res_num_inference_steps")] = None
    decoder_guidance: Annotated[str | None, values("decoder_guidance_scale")] = None
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"Samplers, separated by commas: {', '.join(SAMPLERS)}.",
            show_default="the model's own",
        ),
    ] = None

    def axes(self) -> dict[str, list[Any]]:
        """The given values of each setting by its argument name.

        Raises: InputError for a value that is not a number within the setting's limits, or an unknown sampler.
        """
        found: dict[str, list[Any]] = {}
        for row in SETTINGS.values():
            text = getattr(self, row.option.removeprefix("--").replace("-", "_"))
            if text is not None:
                found[row.name] = [row.parse(part.strip()) for part in text.split(",")]
        if self.sampler is not None:
            found["sampler"] = names = [part.strip() for part in self.sampler.split(",")]
            for name in names:
                if name not in SAMPLERS:
                    raise InputError(f"--sampler contains {name!r}; it must be one of {', '.join(SAMPLERS)}")
        return found


def run_sweep(
    lists: Lists, asked: Asked, precision: options.Precision, features: Path | None, *, quiet: bool
) -> tuple[dict[str, Any], list[Path]]:
    """Run a sweep and write the report after every point. Returns: the results, and the paths of the charts.

    Raises: OutputExistsError if the report exists and is not of a sweep with the same model, data set and numbers.
    """
    from unclip.evaluation import charts

    axes = lists.axes()
    if not asked.overwrite:  # checked before anything is loaded
        if asked.out.exists():
            _points_of(asked.out)
        else:
            refuse_to_overwrite([_chart_path(asked.out, name) for name in charts.NAMES], overwrite=False)

    from unclip.data.folder import read_records
    from unclip.evaluation.sweep import SAMPLER, grid_of, sweep
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    read_records(asked.data)
    with_charts = charts.can_draw()
    if not with_charts:
        warn("no charts will be written because matplotlib is not installed: pip install 'unclip[evaluation]'")
    own = dict.fromkeys(SETTINGS)
    subject = prepare("sweep", UnCLIPPipeline, ["prior"], asked, precision, own, None, quiet=quiet)
    assert subject.judge is not None
    defaults = {**subject.settings, SAMPLER: sampler_name(subject.pipe)}
    places = grid_of({name: [value] for name, value in defaults.items()} | axes)
    space = read_features(features, subject.pipe.device)
    about = _about(subject, asked, precision, space)
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
        progress=bar(quiet, desc="generating", unit="batch", leave=False),
        points_progress=bar(quiet, desc="settings", unit="point"),
    )
    keep(found)
    return found, write_charts(asked.out, found) if with_charts else []


def write_charts(out: Path, found: dict[str, Any]) -> list[Path]:
    """Write the charts beside the report `NAME.json`: `NAME-seconds.svg` and so on."""
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


def _about(subject: Subject, asked: Asked, precision: options.Precision, space: Any) -> dict[str, Any]:
    """The facts of the report, which an earlier report must share to be continued."""
    from unclip.data.folder import metadata_file

    about = {key: value for key, value in subject.about.items() if key != "settings"}
    about |= {
        "features": None if space is None else space.name,
        "dtype": precision.dtype.value,
        "batch_size": asked.batch_size,
        "device": subject.pipe.device.type,
        "model_sha256": fingerprint(subject.folder),
        "judge_sha256": fingerprint(find_judge(asked.judge)),
        "data_sha256": fingerprint(asked.data, metadata_file(asked.data).name),
    }
    return about


def _resumed(out: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished points of the sweep in `out`. Raises: OutputExistsError if the facts differ."""
    before = read_json(out)
    for key, value in about.items():
        if key not in ("unclip", "model", "judge", "data") and before.get(key) != value:
            raise OutputExistsError(
                f"{out} is of another sweep: its {key} is {before.get(key)!r}, now {value!r}; use another name, or "
                "give --overwrite to start again"
            )
    return _points_of(out)


def _points_of(out: Path) -> list[dict[str, Any]]:
    """The points in a report. Raises: OutputExistsError if the file is not a report of a sweep."""
    if not out.is_dir():
        try:
            found = read_json(out)["sweep"]["points"]
        except (CheckpointError, KeyError, TypeError):
            found = None
        if isinstance(found, list) and all(isinstance(each, dict) and "settings" in each for each in found):
            return found
    raise OutputExistsError(f"{out} exists and is not a report of a sweep; give --overwrite, or use another name")
