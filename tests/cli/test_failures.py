"""What stays, and what is said, when a run is stopped in its middle."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unclip.checkpoints import files
from unclip.errors import ConfigError
from unclip.pipelines.text_to_image import UnCLIPPipeline

from .conftest import FEW_STEPS


@pytest.fixture
def failing(unclip, text_to_image, tmp_path, monkeypatch):
    """A run of three batches whose second raises what is given."""

    def run(problem: BaseException, *more, at: int = 2):
        calls = []
        whole = UnCLIPPipeline.__call__

        def call(self, *arguments, **named):
            calls.append(1)
            if len(calls) == at:
                raise problem
            return whole(self, *arguments, **named)

        call.__wrapped__ = whole  # for the defaults in its signature
        monkeypatch.setattr(UnCLIPPipeline, "__call__", call)
        arguments = ["a cat", "-n", 3, "--batch-size", 1, "--seed", 0, "--model", text_to_image, *FEW_STEPS]
        return unclip(*more, "generate", *arguments, "--out", tmp_path)

    return run


def test_stopped_by_hand(failing, tmp_path):
    done = failing(KeyboardInterrupt())
    assert done.code == 130
    assert done.lines == [str(tmp_path / "a-cat-0.png")]
    assert Path(done.lines[0]).is_file()
    assert "are kept" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["a-cat-0.png"]


def test_error_in_the_middle(failing):
    done = failing(ConfigError("too bad"))
    assert done.code == 3
    assert len(done.lines) == 1
    assert done.err == "error: too bad\n"


def test_error_at_the_start(failing):
    done = failing(ConfigError("too bad"), at=1)
    assert (done.code, done.out, done.err) == (1, "", "error: too bad\n")


def test_debug_shows_where(failing):
    done = failing(ConfigError("too bad"), "--debug", at=1)
    assert done.code == 1
    assert "Traceback" in done.err
    assert done.err.endswith("error: too bad\n")


def test_control_characters_do_not_reach_the_terminal(failing):
    assert failing(ConfigError("a\x1b[31mb"), at=1).err == "error: a?[31mb\n"


def test_out_of_memory_names_the_remedies(failing):
    done = failing(torch.OutOfMemoryError("full"), at=1)
    assert done.code == 1
    assert "--batch-size" in done.err
    assert "Traceback" not in done.err


def test_what_should_not_happen(failing):
    done = failing(ZeroDivisionError("oops"), at=1)
    assert done.code == 1
    assert "Traceback" in done.err
    assert "please report" in done.err


def test_full_disk(unclip, text_to_image, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    done = unclip("generate", "a cat", "--model", text_to_image, *FEW_STEPS, "--out", tmp_path, "-q")
    assert (done.code, done.out) == (1, "")
    assert "No space left" in done.err
    assert not list(tmp_path.iterdir())


def test_full_disk_while_converting(unclip, text_to_image, tmp_path, monkeypatch):
    """Nobody's bug: said in a line, without a request to report it."""

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    source = shutil.copytree(text_to_image, tmp_path / "model")
    torch.save({"weight": torch.zeros(1)}, source / "prior" / "diffusion_pytorch_model.fp16.bin")
    monkeypatch.setattr(files, "sync", full)
    done = unclip("convert", "pickle", source, "--out", tmp_path / "out")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert "No space left on device" in done.err
    assert "report" not in done.err
    assert not (tmp_path / "out").exists()


def start(text_to_image: Path, folder: Path) -> subprocess.Popen:
    arguments = ["generate", "a cat", "-n", "100", "--batch-size", "2", "--seed", "0", "-q", "--out", str(folder)]
    return subprocess.Popen(
        [sys.executable, "-m", "unclip", *arguments, "--model", str(text_to_image), *FEW_STEPS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_control_c_in_a_real_process(text_to_image, tmp_path):
    with start(text_to_image, tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, err = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130
    assert err == "stopped; finished results are kept\n"
    assert {path.name for path in tmp_path.iterdir()} >= {Path(line).name for line in rest.splitlines()}
    assert all(path.suffix == ".png" and path.name.startswith("a-cat-") for path in tmp_path.iterdir())


@pytest.mark.slow
def test_reader_that_goes_away(text_to_image, tmp_path):
    with start(text_to_image, tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 141
    assert err == ""
    assert len(list(tmp_path.glob("*.png"))) % 2 == 0  # no picture of a batch is lost if its paths cannot be printed


WAITING = """
import sys, time
from unclip.checkpoints.files import atomic_file, atomic_folder
from unclip.cli import main

@main.app.command("wait")
def wait() -> None:
    with atomic_file(place) as draft, atomic_folder(place + ".d") as folder:
        draft.touch()
        (folder / "part").touch()
        print("ready", flush=True)
        time.sleep(60)

place, sys.argv = sys.argv[1], ["unclip", "wait"]
main.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_leave_no_temporary_file(tmp_path, name, code):
    command = [sys.executable, "-c", WAITING, str(tmp_path / "file.png")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(getattr(signal, name))
        if name != "SIGINT":  # a second Ctrl-C is a person's word
            process.send_signal(getattr(signal, name))
        err = process.stderr.read()
    assert process.returncode == code
    assert err == "stopped; finished results are kept\n"
    assert not list(tmp_path.iterdir())
