"""Sections of a TOML file as dataclasses. The annotations of their fields contain types, limits and marks.

A `Range` of a list limits the number of its entries.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from unclip.checkpoints.hub import is_name
from unclip.data.shards import check_ranges
from unclip.errors import ConfigError, DataError
from unclip.limits import Range
from unclip.numbers import shown

FREE = "free"
"""Marks a setting that may change when a run is resumed."""
MODEL = "model"
"""Marks the folder or the name of a model."""
DATA = "data"
"""Marks one or several places of a data set."""


@dataclass(frozen=True)
class Section:
    """A section of a TOML file. `SECTION` is its name.

    Raises: ConfigError for a value outside its limits.
    """

    SECTION: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "") -> None:
        cls.SECTION = name

    def __post_init__(self) -> None:
        for name, hint in self.hints().items():
            value = getattr(self, name)
            size, what = (len(value), "the number of entries in ") if isinstance(value, tuple) else (value, "")
            for limits in marks_of(hint):
                if value is not None and isinstance(limits, Range) and size not in limits:
                    where = f"{self.SECTION}.{name}".removeprefix(".")
                    raise ConfigError(f"{what}{where} is {shown(size)}; it must be {limits}")

    @classmethod
    def hints(cls) -> dict[str, Any]:
        """The annotations of the fields, with their limits and marks."""
        hints = typing.get_type_hints(cls, include_extras=True)
        return {field.name: hints[field.name] for field in dataclasses.fields(cls)}

    @classmethod
    def marked(cls, mark: str) -> set[str]:
        """The names of the fields with this mark."""
        return {name for name, hint in cls.hints().items() if mark in marks_of(hint)}

    @classmethod
    def read(cls, table: Mapping[str, Any], base: Path, where: str = "") -> Self:
        """A section from a TOML table.

        Args:
            table: from `unclip.checkpoints.files.read_toml`.
            base: the folder of relative paths.
            where: the section's name with a dot at its end, for messages.

        Raises: ConfigError for an unknown or missing key, or a value of a wrong type or outside its limits.
        """
        hints = cls.hints()
        for key in table.keys() - hints.keys():
            raise ConfigError(f"unknown key {where}{key:.80}; supported: {', '.join(sorted(hints))}")
        values = {key: _value(hints[key], value, base, f"{where}{key}") for key, value in table.items()}
        for field in dataclasses.fields(cls):
            is_needed = field.default is MISSING and field.default_factory is MISSING
            refuse(is_needed and field.name not in table, f"the setting {where}{field.name} is missing")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The section as JSON data, without settings that are None."""
        stated = dataclasses.asdict(self, dict_factory=lambda items: {k: v for k, v in items if v is not None})
        return json.loads(json.dumps(stated, default=str))


def refuse(applies: object, message: str) -> None:
    """Raises: ConfigError with this message if it applies."""
    if applies:
        raise ConfigError(message)


def marks_of(hint: Any) -> tuple[Any, ...]:
    """The limits and marks of an annotation."""
    return getattr(hint, "__metadata__", ())


def _value(hint: Any, value: Any, base: Path, where: str) -> Any:
    """A setting from its value in a file."""
    marks = marks_of(hint)
    while (origin := typing.get_origin(hint)) in (Annotated, typing.Union, types.UnionType):
        hint = typing.get_args(hint)[0]  # the other types of a union are not in files
    choices, is_section = typing.get_args(hint), dataclasses.is_dataclass(hint)
    if DATA in marks and isinstance(value, list) and value:
        return tuple(_path(part, base, where, marks) for part in value)
    if hint is Path:
        return _path(value, base, where, marks)
    if is_section and isinstance(value, dict):
        return hint.read(value, base, f"{where}.")
    if origin is tuple and isinstance(value, list):
        return tuple(_value(choices[0], part, base, where) for part in value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) in (hint, origin) or (origin is Literal and value in choices):
        return value
    names = {dict: f"a section [{where}]", tuple: "a list", Literal: f"one of {', '.join(map(repr, choices))}"}
    wanted = names.get(dict if is_section else origin) or hint.__name__
    raise ConfigError(f"{where} is {value!r:.80}; it must be {wanted}")


def _path(value: Any, base: Path, where: str, marks: tuple[Any, ...]) -> Path | str:
    """A path, or the text of a URL or of a model's name."""
    if not isinstance(value, str) or "\0" in value:
        raise ConfigError(f"{where} is {value!r:.80}; it must be a path in quotes")
    try:
        path = base / Path(value).expanduser()
        if DATA in marks:
            check_ranges(value)
    except (RuntimeError, DataError) as error:
        raise ConfigError(f"{where} is {value!r:.80}: {error}") from error
    return value if "://" in value or (MODEL in marks and is_name(value) and not path.exists()) else path


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table with dotted keys."""
    single: dict[str, Any] = {}
    for key, value in table.items():
        single |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return single
