"""The benchmarks and examples start: what they import exists under the names they use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVED = ("dalle2_pytorch_worker.py",)  # spoken to by another script, in an environment of its own
SCRIPTS = [path for folder in ("benchmarks", "examples") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.slow
@pytest.mark.parametrize("script", [pytest.param(path, id=path.name) for path in SCRIPTS if path.name not in SERVED])
def test_a_script_tells_its_options(script, tmp_path):
    told = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr[-2000:]
    assert told.stdout.startswith("usage: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_benchmark_of_kandinsky_at_a_tiny_size():
    command = [sys.executable, ROOT / "benchmarks" / "kandinsky.py", "--size", "tiny", "--side", "64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["largest_difference"] < 2e-3  # diffusers' schedule is in float32
    assert found["unclip"]["picture"] == found["diffusers"]["picture"] == [1, 64, 64, 3]
