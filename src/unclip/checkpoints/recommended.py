"""Read and write the recommended settings of a model and its presets: generation_defaults.json in its folder.

The file has the settings, and under "presets" named sets of values that replace some of them, for faster or better
pictures. A preset may also have "sampler".
"""

import re
from collections.abc import Mapping
from pathlib import Path

from unclip.checkpoints.files import read_json, safe_join, write_json
from unclip.errors import ConfigError, InputError
from unclip.numbers import plain, several
from unclip.settings import SAMPLERS, SETTINGS

FILE = "generation_defaults.json"
OF_VARIATIONS = tuple(name for name, setting in SETTINGS.items() if not setting.of_prior)
"""The settings of a pipeline without a prior."""

Number = int | float
Recommended = Number | list[int]
"""A number; or a list with one number for each super-resolution stage, where the setting allows it."""


Preset = dict[str, Recommended | str]
"""Settings by argument name, and the name of a sampler under `SAMPLER`."""
SAMPLER = "sampler"
PRESETS = "presets"
EXACT = "exact"
"""The preset that every model has: the recommended settings themselves."""


def read_recommended(folder: Path) -> dict[str, Recommended]:
    """The recommended settings of the model in `folder` by argument name; empty without the file.

    Raises: ConfigError for an unknown key or a value outside its limits; CheckpointError for a broken file.
    """
    return _read(folder)[0]


def read_presets(folder: Path) -> dict[str, Preset]:
    """The presets of the model in `folder` by name; each has all recommended settings. The first is `EXACT`.

    Raises: as `read_recommended`.
    """
    recommended, presets = _read(folder)
    return {EXACT: dict(recommended), **{name: {**recommended, **preset} for name, preset in presets.items()}}


def write_recommended(
    folder: Path, recommended: Mapping[str, Recommended], presets: Mapping[str, Preset] | None = None
) -> None:
    """Write the file, unless there is nothing to write.

    Args:
        folder: of the model.
        recommended: the recommended settings.
        presets: as `read_presets` returns them; values that are recommended too are left out.

    Raises: ConfigError as `read_recommended`.
    """
    content: dict[str, object] = dict(check_recommended(recommended, FILE))
    own = {
        name: {key: value for key, value in preset.items() if recommended.get(key) != value}
        for name, preset in (presets or {}).items()
        if name != EXACT
    }
    if own:
        content[PRESETS] = _checked_presets(own, FILE)
    if content:
        write_json(folder / FILE, content)


def _read(folder: Path) -> tuple[dict[str, Recommended], dict[str, Preset]]:
    path = safe_join(folder, FILE)
    content = read_json(path) if path.exists() else {}
    presets = content.pop(PRESETS, {})
    return check_recommended(content, str(path)), _checked_presets(presets, str(path))


def _checked_presets(found: object, where: str) -> dict[str, Preset]:
    """Raises: ConfigError for what is not presets, and as `check_recommended`."""
    checked: dict[str, Preset] = {}
    for name, preset in found.items() if isinstance(found, Mapping) else [("", found)]:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,39}", name) or name == EXACT or not isinstance(preset, Mapping):
            raise ConfigError(
                f"{where}: {PRESETS} must be an object of settings for each name; a name has small letters, digits and "
                f"hyphens, and is not {EXACT!r}, which is the recommended settings themselves"
            )
        sampler = preset.get(SAMPLER)
        if sampler is not None and sampler not in list(SAMPLERS):
            raise ConfigError(f"{where}: {name} has the sampler {sampler!r}; it must be one of {', '.join(SAMPLERS)}")
        settings = {key: value for key, value in preset.items() if key != SAMPLER}
        checked[name] = {**check_recommended(settings, f"{where}: {name}")}
        checked[name] |= {} if sampler is None else {SAMPLER: sampler}
    return checked


def chosen_preset(presets: Mapping[str, Preset], name: str) -> Preset:
    """The settings of a preset. Raises: InputError for a name that the model does not have."""
    if not isinstance(name, str) or name not in presets:
        raise InputError(f"preset is {name!r:.60}; this model has {', '.join(presets)}")
    return presets[name]


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
