"""Defaults of the shared options from a configuration file.

The command line has precedence over environment variables, these over the file, and the file over built-in defaults.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from unclip.checkpoints.files import read_toml
from unclip.errors import ConfigError

VARIABLE = "UNCLIP_CONFIG"
"""The environment variable with the path of another file."""
EPILOG = """\
Defaults:
  Options that several commands share take their defaults from environment
  variables (UNCLIP_MODEL, UNCLIP_OUT, UNCLIP_BATCH_SIZE, …: UNCLIP_ and the
  option's name), and these from config.toml in the configuration folder
  (~/.config/unclip on Linux; UNCLIP_CONFIG names another file):

    model = "models/mine"
    out = "pictures"
    decoder-steps = 20"""


def config_file() -> Path:
    """The configuration file; it need not exist."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(typer.get_app_dir("unclip")) / "config.toml"


def defaults_for(command: TyperGroup) -> dict[str, Any] | None:
    """Defaults of every command's options, as typer's `default_map`; None without a file.

    Raises: ConfigError for a file that cannot be read, is not TOML, or has a key that is not a shared option, or a
        value that no option can have.
    """
    path = config_file()
    if str(path) == os.devnull or not (path.exists() or os.environ.get(VARIABLE)):
        return None
    settings = read_toml(path)
    known = {name for option in _shared(command) for name in _keys(option)}
    for key, value in settings.items():
        if key.replace("_", "-") not in known:
            near = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it may have {', '.join(sorted(known))}"
            raise ConfigError(f"{path} has the unknown key {key!r}; {hint}")
        if not isinstance(value, str | int | float | bool | list):
            raise ConfigError(f"{path}: {key} is {value!r:.80}; it must be a text, a number, true or false")
    return _map_of(command, {key.replace("_", "-"): _text(value) for key, value in settings.items()})


def _text(value: Any) -> str | bool:
    """A value as on the command line."""
    if isinstance(value, bool):
        return value
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _map_of(command: TyperGroup, settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, each in command.commands.items():
        if isinstance(each, TyperGroup):
            found[name] = _map_of(each, settings)
        else:
            options = (option for option in each.params if option.envvar)
            given = ((option.name, [settings[key] for key in _keys(option) if key in settings]) for option in options)
            found[name] = {option: values[0] for option, values in given if values}
    return found


def _shared(command: TyperGroup) -> Iterator[Any]:
    for each in command.commands.values():
        if isinstance(each, TyperGroup):
            yield from _shared(each)
        else:
            yield from (option for option in each.params if option.envvar)


def _keys(option: Any) -> list[str]:
    return [name.removeprefix("--") for name in option.opts if name.startswith("--")]
