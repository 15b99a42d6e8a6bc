"""A run is asked to stop by a signal, and may take its time.

Knows signals alone. Called by the trainer.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def first_signal(ask: Callable[[int], None]) -> Iterator[None]:
    """Within it, the first SIGINT or SIGTERM calls `ask` with its number; a second one does what it did before.

    Does nothing in a thread other than the main one, which alone may take signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: Any) -> None:
        ask(number)
        signal.signal(number, old[signal.Signals(number)])

    for number in old:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
