"""What a model's makers recommend for its calls, steps and guidance scales say, in a file beside its components.

Knows the file and its keys; knows no pipeline. Called by pipelines, assembling and the command line.
"""

from collections.abc import Mapping
from pathlib import Path

from unclip.checkpoints.files import read_json, safe_join, write_json
from unclip.errors import ConfigError
from unclip.numbers import plain, several

FILE = "generation_defaults.json"
COUNTS = (
    "prior_num_inference_steps",
    "decoder_num_inference_steps",
    "super_res_num_inference_steps",
    "num_prior_candidates",
)
PER_STAGE = "super_res_num_inference_steps"
SCALES = ("prior_guidance_scale", "decoder_guidance_scale")
DRAWING = ("prior_temperature", "prior_top_p")
KEYS = (*COUNTS, *SCALES, *DRAWING)
OF_VARIATIONS = tuple(key for key in KEYS if "prior" not in key)
"""Of the stages that are there without a prior too."""

Number = int | float
Recommended = Number | list[int]
"""A number; or, for a count of super-resolution's steps, a list with one for each of its stages."""


def read_recommended(folder: Path) -> dict[str, Recommended]:
    """What the model in `folder` recommends, by argument name; empty without the file.

    Raises: ConfigError for an unknown key or a value that is no number; CheckpointError for a broken file.
    """
    path = safe_join(folder, FILE)
    return check_recommended(read_json(path), str(path)) if path.exists() else {}


def write_recommended(folder: Path, recommended: Mapping[str, Recommended]) -> None:
    """Write the file, unless there is nothing to say. Raises: ConfigError as `read_recommended`."""
    if recommended:
        write_json(folder / FILE, check_recommended(recommended, FILE))


def check_recommended(found: Mapping[str, Recommended], where: str) -> dict[str, Recommended]:
    """The settings in Python's own numbers. Raises: ConfigError for an unknown key, or a value that is not a number."""
    checked: dict[str, Recommended] = {}
    for key, value in found.items():
        if key not in KEYS:
            raise ConfigError(f"{where} has the unknown key {key!r}; it may have {', '.join(KEYS)}")
        each = several(value) if key == PER_STAGE else None
        numbers = [plain(number) for number in ([value] if each is None else each)]
        if not numbers or not all(type(number) in ((int,) if key in COUNTS else (int, float)) for number in numbers):
            raise ConfigError(f"{where}: {key} is {value!r}; it must be a {'whole ' if key in COUNTS else ''}number")
        checked[key] = numbers[0] if each is None else numbers
    return checked
