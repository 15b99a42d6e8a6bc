"""Messages of the commands on stderr; stdout has only the results."""

import contextlib
import functools
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

_MORE: list[bool] = [False]


def note(text: str) -> None:
    """Print information."""
    _say(text)


def say_more() -> None:
    """Make `detail` print until the command ends (`--verbose`)."""
    _MORE[0] = True


def says_more() -> bool:
    """Whether `--verbose` was given."""
    return _MORE[0]


def detail(text: str) -> None:
    """Print information only with `--verbose`."""
    if says_more():
        _say(text)


class _Details(logging.Handler):
    """Passes log messages of the library to `detail`."""

    def emit(self, record: logging.LogRecord) -> None:
        detail(record.getMessage())


logging.getLogger("unclip").setLevel(logging.INFO)
logging.getLogger("unclip").addHandler(_Details())


def warn(text: str) -> None:
    """Print a warning."""
    _say(f"warning: {text}")


def error(text: object) -> None:
    """Print an error."""
    _say(f"error: {text}")


def say_traceback() -> None:
    """Print the traceback of the current error."""
    _say(traceback.format_exc().rstrip("\n"))


def bar(quiet: bool, **words: Any) -> Callable[..., Any]:
    """A progress bar (tqdm) that is shown only on a terminal."""
    from tqdm import tqdm

    return functools.partial(tqdm, disable=True if quiet else None, **words)


def printable(text: str) -> str:
    """`text` with "?" for control characters except line breaks, because terminals interpret them."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


@contextlib.contextmanager
def shown_warnings() -> Iterator[None]:
    """A context that prints each Python warning once as a line `warning: …`, and resets `--verbose` at its end."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            warn(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        try:
            yield
        finally:
            _MORE[0] = False


def open_standard_streams() -> None:
    """Prepare stdin, stdout and stderr that are closed or have an encoding without some characters.

    A closed stream becomes the null device. Otherwise the next file to be opened would get the number of the closed
    stream, and messages would be written into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        out = sys.stdout
        buffering = {"line_buffering": out.line_buffering, "write_through": out.write_through}
        sys.stdout = sys.__stdout__ = Output(out.detach(), out.encoding, out.errors, **buffering)  # type: ignore[misc]


class Output(io.TextIOWrapper):
    """stdout that remembers a write error: its buffer is lost then, and later flushes report no error."""

    problem: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text and remember an error."""
        with self._remembered():
            return super().write(text)

    def flush(self) -> None:
        """Flush the buffer and remember an error."""
        with self._remembered():
            super().flush()

    @contextlib.contextmanager
    def _remembered(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            self.problem = problem
            raise


def flush(stream: TextIO) -> OSError | None:
    """Flush `stream`. Returns: the error, after which everything written to it is dropped."""
    try:
        stream.flush()
    except OSError as problem:
        drop(stream)
        return problem
    return stream.problem if isinstance(stream, Output) else None


def drop(stream: TextIO) -> None:
    """Redirect a closed or full stream to the null device, so that the exit does not fail either."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _say(text: str) -> None:
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:  # stderr is closed, or the disk is full: the command continues without messages
        drop(sys.stderr)
