"""What the commands say to people, always on stderr: stdout is for results alone.

Knows streams and warnings; knows no command and no model. Called by every command.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any


def note(text: str) -> None:
    """Something worth knowing."""
    _say(text)


def warn(text: str) -> None:
    """Something that went on, but perhaps not as meant."""
    _say(f"warning: {text}")


def error(text: object) -> None:
    """Something that did not work."""
    _say(f"error: {text}")


def printable(text: str) -> str:
    """`text` with every control character (a terminal obeys them) but the line break shown as "?"."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


@contextlib.contextmanager
def shown_warnings() -> Iterator[None]:
    """Within it, Python's warnings become `warning: …` lines, each of them once."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            warn(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
