"""Messages of the commands to people, on stderr: stdout holds the results alone."""

import contextlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

_MORE: list[bool] = [False]


def note(text: str) -> None:
    """Something worth knowing."""
    _say(text)


def say_more() -> None:
    """Let `detail` print, until the command ends (`--verbose`)."""
    _MORE[0] = True


def says_more() -> bool:
    """Whether `--verbose` was given."""
    return _MORE[0]


def detail(text: str) -> None:
    """Something that only `--verbose` prints."""
    if says_more():
        _say(text)


class _Details(logging.Handler):
    """Passes log messages of the library to `detail`."""

    def emit(self, record: logging.LogRecord) -> None:
        detail(record.getMessage())


logging.getLogger("unclip").setLevel(logging.INFO)
logging.getLogger("unclip").addHandler(_Details())


def warn(text: str) -> None:
    """Something that went on, but perhaps not as meant."""
    _say(f"warning: {text}")


def error(text: object) -> None:
    """Something that did not work."""
    _say(f"error: {text}")


def say_traceback() -> None:
    """Where the error that is being handled came from."""
    _say(traceback.format_exc().rstrip("\n"))


def printable(text: str) -> str:
    """`text` with every control character (a terminal obeys them) but the line break shown as "?"."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


@contextlib.contextmanager
def shown_warnings() -> Iterator[None]:
    """Within it, Python's warnings become `warning: …` lines, each of them once; at its end `--verbose` is over."""
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
    """Make stdin, stdout and stderr ready for anything: closed by the caller, in an encoding that lacks characters.

    A closed one becomes the null device. Otherwise the next file that is opened takes the number of the closed stream,
    and messages land in it.
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
    """stdout, which remembers that it could not be written: what it held is lost then, and no later flush tells."""

    problem: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text, or remember why not."""
        with self._remembered():
            return super().write(text)

    def flush(self) -> None:
        """Write what it holds, or remember why not."""
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
    """Write what `stream` holds. Returns the problem, after which all that is written to it is dropped."""
    try:
        stream.flush()
    except OSError as problem:
        drop(stream)
        return problem
    return stream.problem if isinstance(stream, Output) else None


def drop(stream: TextIO) -> None:
    """Write nothing more to a stream that is closed or full, at exit either."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _say(text: str) -> None:
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:  # nobody reads it, or the disk is full: results matter more than messages
        drop(sys.stderr)
