"""Closed and full streams, and signals: the picture is made, and no temporary file stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import FEW_STEPS

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
UNCLIP = f"'{sys.executable}' -m unclip"


def shell(command: str, folder: Path) -> subprocess.CompletedProcess:
    """Run in a shell, which can close streams; `err` collects stderr of the whole."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["sh", "-c", command.replace("unclip", UNCLIP, 1)], cwd=folder, capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize(
    ("streams", "code", "err"),
    [
        ("2>&-", 0, ""),
        pytest.param("2>/dev/full", 0, "", marks=pytest.mark.slow),
        pytest.param(">&-", 0, "", marks=pytest.mark.slow),
        (">/dev/full", 1, "error: stdout cannot be written: No space left on device\n"),
        pytest.param(">&- 2>&-", 0, "", marks=pytest.mark.slow),
        ("<&- >&- 2>&-", 0, ""),
        pytest.param(">/dev/full 2>/dev/full", 1, "", marks=pytest.mark.slow),
    ],
)
def test_the_picture_is_made(text_to_image, tmp_path, streams, code, err):
    options = " ".join(["--model", str(text_to_image), *FEW_STEPS])
    done = shell(f"unclip generate 'a cat' {options} --out cat.png {streams}", tmp_path)
    assert done.returncode == code
    assert [line for line in done.stderr.splitlines(keepends=True) if not line.startswith("seed ")] == [err] * bool(err)
    assert [path.name for path in tmp_path.iterdir()] == ["cat.png"]


@pytest.mark.parametrize("command", ["--version", "--help", "info", "info --json", "generate --help", "help vary"])
def test_results_that_nobody_can_read(tmp_path, command):
    full = "error: stdout cannot be written: No space left on device\n"
    for streams, code, err in ((">&-", 0, ""), (">/dev/full", 1, full), (">/dev/full 2>&-", 1, "")):
        done = shell(f"unclip {command} {streams}", tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (code, "", err)


@pytest.mark.parametrize("command", ["generate", "train none.toml", "generate x --seed y", "nonsense"])
def test_errors_that_nobody_can_read(tmp_path, command):
    expected = shell(f"unclip {command}", tmp_path)
    for streams in ("2>&-", "2>/dev/full"):
        done = shell(f"unclip {command} {streams}", tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (expected.returncode, "", "")


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGHUP", "SIGINT"))]
)
def test_a_signal_in_the_middle_of_a_file(text_to_image, tmp_path, name):
    """The file is half written when the signal comes."""
    code = """
import sys, time
from PIL.Image import Image
whole = Image.save
def save(self, path, *rest, **named):
    whole(self, path, *rest, **named)
    print("written", flush=True)
    time.sleep(60)
Image.save = save
from unclip.cli.main import main
main()
"""
    command = [sys.executable, "-c", code, "generate", "a cat", "--model", str(text_to_image), *FEW_STEPS, "-q"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "written\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + getattr(signal, name), "")
    assert err == "stopped; finished results are kept\n"
    assert not list(tmp_path.iterdir())


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As under nohup."""
    code = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from unclip.cli.main import main
try:
    main()
except SystemExit:
    print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert done.stdout.splitlines()[1] == "True False"
