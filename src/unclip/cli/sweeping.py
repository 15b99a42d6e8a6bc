"""A sweep on the command line: lists of values read, finished points found again, charts written.

Knows the sweep's file; what is measured is the affair of `unclip.evaluation.sweep`. Called by `unclip evaluate sweep`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclip.checkpoints.files import read_json
from unclip.cli import measures
from unclip.cli.loading import Machine, drawing_settings, sampler_name, sampler_switch
from unclip.cli.measures import Asked, Subject
from unclip.cli.options import MAX_STEPS, SamplerName
from unclip.errors import CheckpointError, InputError, OutputExistsError

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
            measures.refuse_to_overwrite([_chart_path(asked.out, name) for name in CHARTS], overwrite=False)

    from unclip.data.folder import read_records
    from unclip.evaluation.sweep import SAMPLER, grid_of, sweep
    from unclip.pipelines.text_to_image import UnCLIPPipeline

    read_records(asked.data)
    own = {name: None for name in ("prior_guidance_scale", "decoder_guidance_scale")}
    own |= {f"{stage}_num_inference_steps": None for stage in ("prior", "decoder", "super_res")}
    subject = measures.prepare("sweep", UnCLIPPipeline, ["prior"], asked, machine, own, None, drawing_settings())
    assert subject.judge is not None
    defaults = {**subject.settings, SAMPLER: sampler_name(subject.pipe)}
    places = grid_of({name: [value] for name, value in defaults.items()} | axes)
    space = measures.read_features(features, subject.pipe.device)
    about = _about(subject, asked, machine, space)
    finished = [] if asked.overwrite or not asked.out.exists() else _resumed(asked.out, about)

    def keep(found: dict[str, Any]) -> None:
        measures.write_report(asked, about, "sweep", found)

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
        progress=measures.bar(machine, desc="drawing", unit="batch", leave=False),
        points_progress=measures.bar(machine, desc="settings", unit="point"),
    )
    keep(found)
    return found, write_charts(asked.out, found)


def write_charts(out: Path, found: dict[str, Any]) -> list[Path]:
    """`NAME-seconds.svg` and its like beside the report `NAME.json`."""
    from unclip.checkpoints.files import atomic_file
    from unclip.evaluation.curves import curves

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
        "model_sha256": measures.fingerprint(subject.folder),
        "judge_sha256": measures.fingerprint(measures.find_judge(asked.judge)),
        "data_sha256": measures.fingerprint(asked.data, metadata_file(asked.data).name),
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
    from unclip.stages.prior_autoregressive import check_drawing

    value = _number(text, option)
    check_drawing(value, 1.0)
    return value


def _top_p(text: str, option: str) -> float:
    from unclip.stages.prior_autoregressive import check_drawing

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
