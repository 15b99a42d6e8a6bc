"""Freed memory is kept: a tensor that is made again causes no page faults."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
from unclip.pipelines.session import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import torch
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(50):  # the first few find their places
    last = faults()
print(last)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of the GNU C library")
def test_freed_memory_is_kept():
    kept, fetched_anew = (
        int(subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "leave")
    )
    assert kept < 100
    assert fetched_anew > 20 * max(kept, 1)


def test_elsewhere_nothing_happens(monkeypatch):
    from unclip.pipelines import session

    monkeypatch.setattr(session.sys, "platform", "darwin")
    assert session.keep_freed_memory() is False
