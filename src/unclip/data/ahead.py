"""Items made in a thread of their own while the one before is used.

Knows threads; knows nothing of what the items are. Called where shards are read and batches are made of them.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from unclip.errors import Cancelled

POLL_S = 0.1
"""How often somebody who waits for an item looks whether to stop."""
PARTING_S = 0.5
"""How long a thread that is no longer needed is waited for."""

T = TypeVar("T")


class Ahead(Iterator[T]):
    """What `items` gives, in its order: while one is used the next one is made, and no further one.

    The thread that makes them may hang for long (a server's answer that does not come): it holds up neither whoever
    asks `should_stop`, nor the end of the process.

    Args:
        items: only the thread takes them from now on.
        should_stop: asked while an item is waited for.

    Raises: by `next`, what making the item raised; Cancelled when it was to stop.
    """

    def __init__(self, items: Iterator[T], should_stop: Callable[[], bool] = lambda: False) -> None:
        self._should_stop = should_stop
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        # The thread knows the queues alone, so that one who is forgotten ends it.
        about = (items, self._asked, self._made)
        self._thread = threading.Thread(target=_make, args=about, name="unclip-read", daemon=True)
        self._thread.start()
        self._asked.put(True)

    def __next__(self) -> T:
        item, error = self._wait()
        if error is not None:
            self._made.put((None, error))  # whoever asks again is told again
            raise error
        self._asked.put(True)
        return item

    def _wait(self) -> tuple[Any, BaseException | None]:
        while True:
            try:
                return self._made.get(timeout=POLL_S)
            except queue.Empty:
                if self._should_stop():
                    raise Cancelled("stopped while waiting for data") from None

    def close(self) -> None:
        """Let the thread end, and with it `items`; one that hangs is left to itself."""
        self._asked.put(False)
        self._thread.join(PARTING_S)

    def __del__(self) -> None:
        self._asked.put(False)


def _make(
    items: Iterator[Any], asked: "queue.SimpleQueue[bool]", made: "queue.SimpleQueue[tuple[Any, BaseException | None]]"
) -> None:
    while asked.get():
        try:
            made.put((next(items), None))
        except BaseException as error:  # that it is at its end is one of them
            made.put((None, error))
            return
