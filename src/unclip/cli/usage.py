"""Print error messages about a wrong command line, in place of those of typer."""

import io
import os
import re
import sys
from typing import Any

import typer

from unclip.cli.defaults import config_file
from unclip.cli.messages import drop, printable

PLAIN = {
    **dict.fromkeys(("int_parsing", "int_from_float", "int_type"), "{input!r} is not a whole number"),
    "int_parsing_size": "{input} is too large",
    **dict.fromkeys(("float_parsing", "float_type"), "{input!r} is not a number"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "{input!r} is not true or false"),
    "greater_than_equal": "{input} is too small; it must be {ge} or more",
    "less_than_equal": "{input} is too large; it must be {le} or less",
    "finite_number": "{input!r} is not a finite number",
}
"""Messages by the validator's types of errors."""


def say_usage(problem: typer.TyperException) -> None:
    """Print the usage of the command and the error on stderr."""
    cause: Any = problem.__cause__
    if isinstance(problem, typer.BadParameter):
        if hasattr(cause, "errors"):
            problem.message = _plain(cause.errors()[0])
        problem.message += _source(problem)
    text = io.StringIO()
    try:
        problem.show(text)  # type: ignore[attr-defined]
        message = re.sub(r"^Error: ", "error: ", text.getvalue(), flags=re.MULTILINE)
        print(printable(message), file=sys.stderr, end="", flush=True)
    except OSError:
        drop(sys.stderr)


def _plain(found: dict[str, Any]) -> str:
    inner = found.get("ctx", {}).get("error")
    if hasattr(inner, "errors"):  # the error concerns one of several values
        return _plain(inner.errors()[0])
    if found["type"] in PLAIN:
        shown = str(found["input"])[:80]
        return PLAIN[found["type"]].format(**{**found.get("ctx", {}), "input": shown})
    return found["msg"].removeprefix("Value error, ").rstrip(".")


def _source(problem: typer.BadParameter) -> str:
    """The source of a wrong value, if it is not the command line."""
    context, option = problem.ctx, problem.param
    source = context.get_parameter_source(option.name) if context is not None and option is not None else None
    if source is None or option is None:
        return ""
    if source.name == "ENVIRONMENT":
        names = [option.envvar] if isinstance(option.envvar, str) else option.envvar or []
        return f" (from the environment variable {next((name for name in names if name in os.environ), '')})"
    return f" (from {config_file()})" if source.name == "DEFAULT_MAP" else ""
