"""Read and write the recommended settings of a model: generation_defaults.json in its folder."""

from collections.abc import Mapping
from pathlib import Path

from unclip.checkpoints.files import read_json, safe_join, write_json
from unclip.errors import ConfigError, InputError
from unclip.numbers import plain, several
from unclip.settings import SETTINGS

FILE = "generation_defaults.json"
OF_VARIATIONS = tuple(name for name, setting in SETTINGS.items() if not setting.of_prior)
"""The settings of a pipeline without a prior."""

Number = int | float
Recommended = Number | list[int]
"""A number; or a list with one number for each super-resolution stage, where the setting allows it."""


def read_recommended(folder: Path) -> dict[str, Recommended]:
    """The recommended settings of the model in `folder` by argument name; empty without the file.

    Raises: ConfigError for an unknown key or a value outside its limits; CheckpointError for a broken file.
    """
    path = safe_join(folder, FILE)
    return check_recommended(read_json(path), str(path)) if path.exists() else {}


def write_recommended(folder: Path, recommended: Mapping[str, Recommended]) -> None:
    """Write the file, unless `recommended` is empty. Raises: ConfigError as `read_recommended`."""
    if recommended:
        write_json(folder / FILE, check_recommended(recommended, FILE))


def check_recommended(found: Mapping[str, Recommended], where: str) -> dict[str, Recommended]:
    """The settings as Python numbers. Raises: ConfigError for an unknown key or a value outside its limits."""
    checked: dict[str, Recommended] = {}
    for key, value in found.items():
        if key not in SETTINGS:
            raise ConfigError(f"{where} has the unknown key {key!r}; it may have {', '.join(SETTINGS)}")
        setting = SETTINGS[key]
        each = several(value) if setting.per_stage else None
        if each == []:
            raise ConfigError(f"{where}: {key} is an empty list")
        try:
            for number in [value] if each is None else each:
                setting.check(number, f"{where}: {key}")
        except InputError as problem:
            raise ConfigError(str(problem)) from problem
        checked[key] = plain(value) if each is None else [plain(number) for number in each]
    return checked
