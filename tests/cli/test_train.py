"""`unclip data`, `unclip train` and `unclip assemble`: what is passed on, and one real run."""

import json
import os
import re
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

RECIPE = """
stage = "clip"
data = "pictures"
steps = 3
batch_size = 2
precision = "no"
sample_every_steps = 100
log_every_steps = 1

[clip]
projection_dim = 16
vocabulary_size = 520
context_length = 8
text_layers = 1
text_heads = 2
image_size = 16
image_width = 16
image_layers = 1
image_heads = 2
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for place, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (16, 16), colour).save(folder / f"{colour}.png")
        rows.append({"file_name": f"{colour}.png", "captions": [f"a {colour} tile"], "concept": str(place)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path / "recipe.toml"


@pytest.mark.filterwarnings("default")
def test_train_clip_and_go_on(unclip, recipe, tmp_path):
    run = tmp_path / "run"
    done = unclip("train", recipe, "--out", run, "--steps", 1, "-q")
    assert done.code == 0, done.err
    assert done.lines == [str(run / "model")]
    assert json.loads((run / "state" / "state.json").read_text())["step"] == 1
    done = unclip("train", recipe, "--out", run)
    assert done.code == 0, done.err
    assert "continuing from step 1 of 3" in done.err
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    about = unclip("info", run / "model", "--json")
    assert json.loads(about.out)["components"]["image_encoder"]["parameters"] > 0


def test_a_dry_run_tells_what_the_run_takes(unclip, recipe, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = unclip("train", recipe, "--dry-run")
    assert done.code == 0, done.err
    told = dict(line.split("  ", 1) for line in done.lines)
    told = {name: value.strip() for name, value in told.items()}
    assert list(told)[-7:] == [
        "pictures read at",
        "pictures in a batch",
        "parameters trained",
        "weights, gradients, optimizer, average",
        "peak memory of a step",
        "a step",
        "the run",
    ]
    assert told["pictures read at"] == told["pictures in a batch"] == "16×16 px"
    assert int(told["parameters trained"].replace(",", "")) > 1000
    assert told["peak memory of a step"].endswith(" MiB")
    assert told["a step"].endswith(" pictures/s")
    assert told["the run"].startswith("3 steps, 6 pictures, ")
    assert sorted(tmp_path.rglob("*")) == before


def test_of_several_processes_one_tells_the_cost(unclip, recipe, monkeypatch):
    from unclip.training import dry_run

    cost = dry_run.Cost({"text": 5}, 5, 2**20, 2**21, (16,), (16,), 1.0, 3, 2, is_sharded=True)
    measured = []
    monkeypatch.setattr(dry_run, "measure_cost", lambda task, recipe: measured.append(recipe) or cost)
    monkeypatch.setenv("RANK", "1")
    done = unclip("train", recipe, "--dry-run")
    assert (done.code, done.out) == (0, "")
    assert len(measured) == 1  # all must take the steps
    monkeypatch.setenv("RANK", "0")
    assert "weights, gradients, optimizer, average, of all shards  1 MiB" in unclip("train", recipe, "--dry-run").lines


@pytest.mark.filterwarnings("default")
def test_without_a_terminal_a_line_an_interval(unclip, recipe, tmp_path):
    done = unclip("train", recipe, "--out", tmp_path / "run")
    number = r"[\d.]+"
    for step, line in zip((1, 2, 3), done.err.splitlines()[-3:], strict=True):
        assert re.fullmatch(rf"step {step} of 3: loss {number}, {number} pictures/s, \d+ s left", line), line
    assert done.err.splitlines()[-1].endswith(" 0 s left")
    again = unclip("train", recipe, "--out", tmp_path / "quiet", "-q")
    assert "step" not in again.err


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_training(unclip, recipe, tmp_path, monkeypatch, number, code):
    from unclip.training.clip import ClipTask

    batch = ClipTask.batch

    def stopped(self, *arguments):
        os.kill(os.getpid(), number)
        return batch(self, *arguments)

    monkeypatch.setattr(ClipTask, "batch", stopped)
    done = unclip("train", recipe, "--out", tmp_path / "run")
    assert (done.code, done.out) == (code, "")
    assert "stopped and saved at step 1 of 3; repeat the command to continue" in done.err
    assert json.loads((tmp_path / "run" / "state" / "state.json").read_text())["step"] == 1
    assert not list(tmp_path.rglob(".unclip-tmp*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [("stage = 1", "stage"), ("stage = ", "cannot be read as TOML"), (RECIPE + "depth = 3", "unknown key clip.depth")],
)
def test_bad_recipes(unclip, tmp_path, text, words):
    (tmp_path / "bad.toml").write_text(text)
    done = unclip("train", tmp_path / "bad.toml", "--out", tmp_path / "run")
    assert (done.code, done.out) == (1, "")
    assert words in done.err
    assert not (tmp_path / "run").exists()


def test_missing_recipe(unclip, tmp_path):
    done = unclip("train", tmp_path / "none.toml", "--out", tmp_path / "run")
    assert done.code == 1
    assert "does not exist" in done.err


def test_data_emoji(unclip, tmp_path, monkeypatch):
    from unclip.data.emoji import build

    asked = []
    counts = {"pictures": 3, "held_out_concepts": 1}
    monkeypatch.setattr(build, "build_emoji", lambda out, **more: asked.append((out, more)) or counts)
    done = unclip("data", "emoji", "--out", tmp_path / "emoji", "--packages", tmp_path)
    assert done.lines == [str(tmp_path / "emoji")]
    assert done.err == "3 pictures, 1 held out concepts\n"
    assert asked[0][0] == tmp_path / "emoji"
    assert asked[0][1]["packages"] == tmp_path
    assert asked[0][1]["progress"] is not None


def test_data_emoji_without_its_packages(unclip, tmp_path):
    pytest.importorskip("resvg_py")
    done = unclip("data", "emoji", "--out", tmp_path / "emoji", "--packages", tmp_path)
    assert (done.code, done.out) == (1, "")
    assert "npm pack" in done.err


def test_assemble_passes_its_options_on(unclip, tmp_path, monkeypatch):
    asked = {}
    module = types.ModuleType("unclip.training.assemble")
    module.assemble = lambda **named: asked.update(named)
    monkeypatch.setitem(sys.modules, "unclip.training.assemble", module)
    names = ("clip", "prior", "decoder", "super-res-first", "super-res-last")
    options = [word for name in names for word in (f"--{name}", tmp_path / name)]
    options += ["--super-res-more", tmp_path / "second", "--super-res-more", "unclip-emoji:512"]
    done = unclip("assemble", *options, "--out", tmp_path / "model", "--dtype", "float16")
    assert done.lines == [str(tmp_path / "model")], done.err
    runs = {name.replace("-", "_"): tmp_path / name for name in names}
    runs["super_res_more"] = [tmp_path / "second", (Path("unclip-emoji"), 512)]
    assert asked == {**runs, "out": tmp_path / "model", "dtype": torch.float16, "defaults": None, "overwrite": False}
