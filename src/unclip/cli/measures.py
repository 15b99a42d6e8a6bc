"""Options, loading and reports shared by the commands of `unclip evaluate`."""

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer.models import OptionInfo

from unclip import __version__
from unclip.checkpoints.files import atomic_file, read_json, write_json
from unclip.checkpoints.hub import BUILT_IN_JUDGE, resolve
from unclip.cli import options
from unclip.cli.messages import bar, warn
from unclip.cli.options import flag, option
from unclip.cli.output import check_free
from unclip.errors import CheckpointError, InputError, MissingFileError, OutputExistsError
from unclip.pipelines.samplers import sampler_name, sampler_switch
from unclip.pipelines.session import (
    PRIOR_SAMPLING,
    Session,
    model_name,
    pick_device,
)
from unclip.settings import SAMPLERS, SETTINGS

if TYPE_CHECKING:
    from unclip.evaluation.inception import InceptionFeatures
    from unclip.evaluation.retrieval import Judge, Plan

HASHED = (".csv", ".json", ".jsonl", ".safetensors", ".txt")
"""The files that identify a model or a data set."""

JUDGE = "A CLIP that the model was not trained with: a folder, a hub id, or the built-in one."
FEATURES = "Inception weights, for distances in its feature space: a safetensors file or its folder."
SHEETS = "Write sheets of the pictures to PREFIX-seen.png and PREFIX-held-out.png."
Overwrite = Annotated[bool, flag("--overwrite", help="Replace existing files.")]
Features = Annotated[Path | None, option("PATH", help=FEATURES, default="none")]


@dataclass(frozen=True)
class MeasureOptions:
    """Options of every measure.

    Attributes:
        data: A data set of unclip data emoji or unclip data compose.
        out: The JSON file to write.
        judge: A CLIP that the model was not trained with: a folder, a hub id, or the built-in one.
        num_seen: Number of captions seen in training.
        num_held_out: Number of held-out captions.
        sheet: Write sheets of the pictures to PREFIX-seen.png and PREFIX-held-out.png.
        seed: Seed of the choice of captions and of the noise.
    """

    data: Annotated[Path, option("DIR")]
    out: Annotated[Path, option("FILE", "--out", "-o")]
    model: options.Model = "unclip-emoji"
    judge: Annotated[str, option("DIR")] = BUILT_IN_JUDGE
    num_seen: Annotated[int, option("N", min=1)] = 200
    num_held_out: Annotated[int | None, option("N", default="all", min=0)] = None
    sheet: Annotated[Path | None, option("PREFIX", default="not written")] = None
    seed: Annotated[int, option("N", min=0, max=2**32)] = 0
    batch_size: options.BatchSize = 16
    overwrite: Overwrite = False


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Options of the computation and of the output."""

    sampler: options.Sampler = None
    precision: options.Precision
    quiet: options.Quiet = False


@dataclass(frozen=True)
class PreparedMeasure:
    """A loaded model: its pipeline, the settings of its calls, the judge, and the plan of the measure."""

    name: str
    request: MeasureOptions
    pipe: Any
    folder: Path
    settings: dict[str, Any]
    judge: "Judge"
    plan: "Plan"
    features: "InceptionFeatures | None"
    about: dict[str, Any]
    """The facts for the report."""

    def finish(self, found: dict[str, Any]) -> None:
        """Write the report and print its tables."""
        write_report(self.request, self.about, self.name, found)
        show(self.name, found)


def prepare(
    name: str,
    kind: type[Any],
    needed: Sequence[str],
    request: MeasureOptions,
    compute: ComputeOptions,
    given: Mapping[str, Any],
    *,
    features: Path | None = None,
    judged: bool = True,
    task: str = "generating",
    preset: str | None = None,
) -> PreparedMeasure:
    """Load the model and the judge for a measure.

    Args:
        name: name of the measure.
        kind: class of the pipeline.
        needed: components that the model must have.
        request, compute: options of the command.
        given: settings of the pipeline's call; None for the model's own.
        features: Inception weights.
        judged: whether a judge is needed; otherwise it is the model's own CLIP.
        task: the word beside the progress bar.
        preset: of the model.

    Raises: OutputExistsError for files that exist; MissingFileError for a judge that does not exist; CheckpointError
        for a model without the components `needed`. All are raised before anything is loaded.
    """
    if name != "sweep":
        check_free(request.out, *sheet_paths(request.sheet), overwrite=request.overwrite)
    judge_folder = find_judge(request.judge) if judged else None
    session = Session(
        request.model, compute.precision, sampler=compute.sampler, preset=preset, progress=not compute.quiet
    )
    for component in needed:
        if component not in session.parts:
            raise CheckpointError(f"{request.model} has no {component}, which this measure ({name}) needs")

    from unclip.evaluation.inception import InceptionFeatures
    from unclip.evaluation.retrieval import Judge, Plan

    settings = session.settings(kind, given)
    pipe = session.pipeline(kind)
    pipe.set_progress_bar_config(disable=True)
    numbers: dict[str, Any] = {"num_seen": request.num_seen, "num_held_out": request.num_held_out, "seed": request.seed}
    about = {"unclip": __version__, "model": session.name, "data": request.data.resolve().name, **numbers}
    dtype, size = compute.precision.weights_type, request.batch_size
    about["settings"] = {**settings, "sampler": sampler_name(pipe), "dtype": dtype, "batch_size": size}
    if judge_folder is not None:
        about |= {
            "judge": model_name(request.judge),
            "judge_saw_all_concepts": saw_all_concepts(request.judge, judge_folder),
        }
    judge = Judge.load(judge_folder or session.folder, pipe.device)
    space = None if features is None else InceptionFeatures.load(features, pipe.device)
    if space is not None:
        about["features"] = space.name
    progress = bar(compute.quiet, desc=task, unit="batch", leave=name != "sweep")
    plan = Plan(request.data, batch_size=size, sheet=request.sheet, progress=progress, **numbers)
    return PreparedMeasure(name, request, pipe, session.folder, settings, judge, plan, space, about)


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


def of_condition(
    condition: Sequence[Path], request: MeasureOptions, sampling: options.PriorSampling, compute: ComputeOptions
) -> None:
    """Measure a prior on vectors or tokens, write the report, and print it."""
    given = sampling.given()
    for name in PRIOR_SAMPLING:
        if given.get(name) is not None:
            raise InputError(f"--condition measures one sample for each row: leave out {SETTINGS[name].option}")
    check_free(request.out, overwrite=request.overwrite)
    from unclip.evaluation.stages import conditioned_prior

    names = {"prior_num_inference_steps": "num_inference_steps", "prior_guidance_scale": "guidance_scale"}
    settings = {ours: given[name] for name, ours in names.items() if given.get(name) is not None}
    found = conditioned_prior(
        resolve(request.model),
        condition,
        request.data,
        num_rows=request.num_held_out,
        seed=request.seed,
        batch_size=request.batch_size,
        progress=bar(compute.quiet, desc="sampling", unit="batch"),
        device=pick_device(compute.precision.device),
        **settings,
    )
    about = {"unclip": __version__, "model": model_name(request.model), "data": request.data.name}
    files = [path.name for path in condition]
    write_report(request, {**about, "condition": files, "seed": request.seed, "settings": settings}, "prior", found)
    print(json.dumps(found), flush=True)


def write_report(request: MeasureOptions, about: Mapping[str, Any], name: str, found: Mapping[str, Any]) -> None:
    """Write the report, with the paths of its sheets relative to its folder."""
    drawn = [path for path in sheet_paths(request.sheet) if path.is_file()]
    pictures = [Path(os.path.relpath(path, request.out.parent)).as_posix() for path in drawn]
    write_json(request.out, {**about, name: dict(found)} | ({"pictures": pictures} if pictures else {}))


def sheet_paths(prefix: Path | None) -> list[Path]:
    """The files of `--sheet PREFIX`."""
    from unclip.evaluation import GROUPS
    from unclip.evaluation.report import sheet_path

    return [] if prefix is None else [sheet_path(prefix, group) for group in GROUPS]


def show(name: str, found: dict[str, Any]) -> None:
    """Print the tables of a measure."""
    from unclip.evaluation.report import tables

    for place, each in enumerate(tables(name, found)):
        if place:
            print(f"\n{each.title}")
        print(each, flush=True)


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


def values_option(name: str) -> OptionInfo:
    """The option for the values of one setting in a sweep."""
    text = f"Values of {SETTINGS[name].label}, separated by commas."
    return option("LIST", *options.names_of(SETTINGS[name]), help=text, default="the model's own")


@dataclass(frozen=True)
class SweepValues:
    """Options of a sweep: comma-separated values of each setting; None for the model's own value."""

    prior_steps: Annotated[str | None, values_option("prior_num_inference_steps")] = None
    prior_guidance: Annotated[str | None, values_option("prior_guidance_scale")] = None
    candidates: Annotated[str | None, values_option("num_prior_candidates")] = None
    prior_temperature: Annotated[str | None, values_option("prior_temperature")] = None
    prior_top_p: Annotated[str | None, values_option("prior_top_p")] = None
    decoder_steps: Annotated[str | None, values_option("decoder_num_inference_steps")] = None
    super_res_steps: Annotated[str | None, values_option("super_res_num_inference_steps")] = None
    decoder_guidance: Annotated[str | None, values_option("decoder_guidance_scale")] = None
    noise_level: Annotated[str | None, values_option("noise_level")] = None
    decoder_guidance_low: Annotated[str | None, values_option("decoder_guidance_low")] = None
    decoder_guidance_high: Annotated[str | None, values_option("decoder_guidance_high")] = None
    decoder_reuse: Annotated[str | None, values_option("decoder_reuse")] = None
    super_res_reuse: Annotated[str | None, values_option("super_res_reuse")] = None
    sampler: Annotated[
        str | None,
        option("LIST", help=f"Samplers, separated by commas: {', '.join(SAMPLERS)}.", default="the model's own"),
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


def run_sweep(values: SweepValues, request: MeasureOptions, compute: ComputeOptions, features: Path | None) -> None:
    """Run a sweep, write the report after every point, and print the tables and the paths of the charts.

    Raises: OutputExistsError if the report exists and is not of a sweep with the same model, data set and numbers.
    """
    from unclip.evaluation import charts

    axes = values.axes()
    resumed = request.out.exists() and not request.overwrite
    if resumed:  # checked before anything is loaded
        _points_of(request.out)
    else:
        check_free(*(_chart_path(request.out, name) for name in charts.NAMES), overwrite=request.overwrite)

    from unclip.data.folder import metadata_file, read_records
    from unclip.evaluation.sweep import SAMPLER, grid_of, sweep
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    read_records(request.data)
    with_charts = charts.can_draw()
    if not with_charts:
        warn("no charts will be written because matplotlib is not installed: pip install 'unclip[evaluation]'")
    prepared = prepare("sweep", UnCLIPPipeline, ["prior"], request, compute, dict.fromkeys(SETTINGS), features=features)
    defaults = {**prepared.settings, SAMPLER: sampler_name(prepared.pipe)}
    places = grid_of({name: [value] for name, value in defaults.items()} | axes)
    about = {
        "features": None,
        **{key: value for key, value in prepared.about.items() if key != "settings"},
        "dtype": compute.precision.weights_type,
        "batch_size": request.batch_size,
        "device": prepared.pipe.device.type,
        "model_sha256": fingerprint(prepared.folder),
        "judge_sha256": fingerprint(find_judge(request.judge)),
        "data_sha256": fingerprint(request.data, metadata_file(request.data).name),
    }
    keep = functools.partial(write_report, request, about, "sweep")
    found = sweep(
        prepared.pipe,
        prepared.judge,
        prepared.plan,
        places,
        use_sampler=sampler_switch(prepared.pipe),
        finished=_resumed(request.out, about) if resumed else [],
        on_point=keep,
        features=prepared.features,
        points_progress=bar(compute.quiet, desc="settings", unit="point"),
    )
    keep(found)
    show("sweep", found)
    for name, text in charts.curves(found).items() if with_charts else ():
        with atomic_file(_chart_path(request.out, name)) as draft:
            draft.write_text(text, encoding="utf-8")
        print(_chart_path(request.out, name), flush=True)


def _chart_path(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}-{name}.svg")


def _resumed(out: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished points of the sweep in `out`. Raises: OutputExistsError if the facts differ."""
    before = read_json(out)
    for key, value in about.items():
        if key not in ("unclip", "model", "judge", "data") and before.get(key) != value:
            raise OutputExistsError(
                f"{out} contains another sweep: its {key} is {before.get(key)!r}, not {value!r}; use another name, or "
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
