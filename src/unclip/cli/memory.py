"""How this process gets its memory: what networks free is kept for their next step.

Knows the C library's settings; knows nothing of networks. Called by the commands that run them, and by nothing else: a
library must not change its host's process.
"""

import ctypes
import sys

# <malloc.h> of the GNU C library.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
MAX_INT = 2**31 - 1
GROW_BY = 64 * 2**20
"""Bytes by which the heap grows at a time."""


def keep_freed_memory() -> bool:
    """Have the GNU C library keep large freed blocks, where it would give each back to the kernel and fetch it anew.

    A tensor of 32 MiB and more is otherwise mapped afresh at every step, and the kernel fills its pages with zeros
    first: a fifth of a training step on two cores. The process's memory stays at its peak until it ends.

    Returns: whether it took; elsewhere than under that library nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, MAX_INT), (M_TOP_PAD, GROW_BY))
    return all(mallopt(name, value) for name, value in settings)
