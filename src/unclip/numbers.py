"""Checks numeric arguments of any kind (Python, NumPy, torch) against limits."""

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any

from unclip.errors import InputError, UnclipError


def plain(value: Any) -> Any:
    """A number of any kind as a Python int or float; other values, including booleans, are returned unchanged.

    A number is anything with `__index__` or `__float__`, or an array or tensor with one such element.
    """
    try:
        if callable(item := getattr(value, "item", None)):  # arrays, tensors and NumPy scalars
            value = item()
        if isinstance(value, bool | str):
            return value
        if hasattr(value, "__index__"):
            return int(operator.index(value))
        return float(value) if hasattr(value, "__float__") else value
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return value


def several(value: Any) -> list[Any] | None:
    """The elements of a sequence, or of an array or tensor with dimensions; None for one value."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return list(value) if is_list or getattr(value, "ndim", 0) else None


def whole(
    value: object,
    name: str,
    low: int = 1,
    high: int | None = None,
    *,
    unit: str = "whole number",
    error: type[UnclipError] = InputError,
) -> int:
    """`value` as an int.

    Args:
        value: an integer of any kind. Floats and booleans are refused, even floats without a fraction.
        name: the name in the error message.
        low, high: the limits, both included.
        unit: the noun in the error message.
        error: the class of the error.

    Raises: `error` if it is not an integer, or is outside the limits.
    """
    number = plain(value)
    if type(number) is not int or number < low or (high is not None and number > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise error(f"{name} is {shown(value)}; it must be a {unit} {limits}")
    return number


def real(
    value: object,
    name: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    error: type[UnclipError] = InputError,
) -> float:
    """`value` as a finite float. Arguments as in `whole`.

    Args:
        above, below: whether the lower and the upper limit are excluded.

    Raises: `error` if it is not a number, is NaN or infinite, or outside the limits.
    """
    number = plain(value)
    is_number = type(number) in (int, float) and abs(number) <= sys.float_info.max
    if not is_number or not low <= number <= high or (above and number == low) or (below and number == high):
        raise error(f"{name} is {shown(value)}; it must be a {_wanted(low, high, above, below)}")
    return float(number)


def reals(values: object, name: str, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """One or more numbers as a list of finite floats. Arguments as in `real`; `name` is a plural noun.

    Raises: InputError if the list is empty, or an element is not such a number.
    """
    each = several(values)
    try:
        found = [real(value, name, low, high) for value in ([values] if each is None else each)]
    except InputError:
        found = []
    if not found:
        raise InputError(f"{name} are {shown(values)}; give one or more, each a {_wanted(low, high)}")
    return found


def _wanted(low: float, high: float, above: bool = False, below: bool = False) -> str:
    """A description of the limits."""
    first = "" if low == -math.inf else f" above {low:g}" if above else f" from {low:g}"
    last = "" if high == math.inf else f" to below {high:g}" if below else f" to {high:g}"
    return f"number{first}{last}" if first or last else "finite number"


def shown(value: object) -> str:
    """The representation of a value for an error message: one line, at most 100 characters."""
    try:
        return " ".join(repr(value).split())[:100]
    except Exception:  # an integer with thousands of digits, or a faulty __repr__
        return f"a value of type {type(value).__name__}"
