"""A pipeline of Karlo's full size loads from disk and makes a picture, in the memory that the weights need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "karlo_size.py"


@pytest.mark.slow
def test_karlo_size_draws_in_bfloat16():
    done = subprocess.run([sys.executable, SCRIPT, "--steps", "2"], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["parameters"] > 3.4e9
    assert report["picture"] == [1, 3, 256, 256]
    assert report["finite"]
    # bfloat16 weights are 6.5 GiB: no second copy of them may ever exist.
    assert report["peak_memory_gib"] < 9.5
