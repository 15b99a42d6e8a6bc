"""Limits of settings as type annotations, the check of a value against them, and their description."""

import math
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from unclip.errors import ConfigError
from unclip.numbers import plain, shown


@dataclass(frozen=True)
class Range:
    """The range of a number, for `Annotated[int, Range(1, 256)]`; both ends are included unless `above` or `below`."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, number: float) -> bool:
        is_inside = self.low <= number <= self.high  # not true of NaN
        return is_inside and not (self.above and number == self.low) and not (self.below and number == self.high)

    def __str__(self) -> str:
        low, high = (f"{end:g}" if isinstance(end, float) else f"{end:,}" for end in (self.low, self.high))
        return f"{'above' if self.above else 'from'} {low} to {'below ' if self.below else ''}{high}"


Share = Annotated[float, Range(0, 1, below=True)]


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of a kind.

    Args:
        value: anything. An int is a float too, but a bool is neither.
        kind: a class, None, a union, a Literal, a tuple (not empty), or one of these annotated with a `Range`.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return fits(value, parts[0]) and all(value in limits for limits in parts[1:])
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        kinds = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and 0 < len(value) == len(kinds) and all(map(fits, value, kinds))
    return type(value) in ((int, float) if kind is float else (kind,))


def described(kind: Any) -> str:
    """A kind in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return " ".join(map(str, (described(parts[0]), *parts[1:])))
    if origin in (Union, UnionType):
        return " or ".join(map(described, parts))
    if origin is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(repr, parts))
    if origin is tuple:
        return (
            f"a list, each {described(parts[0])}"
            if parts[-1] is ...
            else f"{len(parts)} values, each {described(parts[0])}"
        )
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "None"}[kind]


def check_fields(settings: Any, *names: str) -> None:
    """Check fields of a dataclass against their annotations; numbers of any kind become Python's, and lists tuples.

    Args:
        settings: an instance, which may be frozen.
        names: of the fields; all by default.

    Raises: ConfigError for a value that does not fit.
    """
    kinds = get_type_hints(type(settings), include_extras=True)
    for name in names or [field.name for field in fields(settings)]:
        value = getattr(settings, name)
        value = tuple(map(plain, value)) if isinstance(value, list | tuple) else plain(value)
        object.__setattr__(settings, name, value)
        check(value, kinds[name], f"{type(settings).__name__}: {name}")


def check(value: object, kind: Any, name: str) -> None:
    """Raises: ConfigError unless a value is of a kind."""
    if not fits(value, kind):
        raise ConfigError(f"{name} is {shown(value)}; it must be {described(kind)}")
