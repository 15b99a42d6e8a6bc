"""The whole chain by the command line: pictures → CLIP → prior → decoder → super-resolution → a model that draws."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
STAGES = ("clip", "prior", "decoder", "super_res")


def unclip(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "unclip", *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    return done.stdout


@pytest.mark.slow
def test_from_pictures_to_a_picture(tmp_path, pictures):
    """Every stage by its tiny recipe, a last step's network and a second upsampler too, and what they make."""
    shutil.copytree(pictures, tmp_path / "runs" / "tiny" / "data")
    shutil.copytree(ROOT / "recipes" / "tiny", tmp_path / "recipes" / "tiny")
    runs = dict.fromkeys([*STAGES, "super_res_last", "super_res_2"], "")
    for stage in runs:
        out = runs[stage] = f"runs/tiny/{stage}"
        recipe = f"recipes/tiny/{stage}.toml"
        assert unclip(tmp_path, "train", recipe, "--out", out, "--steps", "30", "-q") == f"{out}/model\n"
        log = (tmp_path / out / "metrics.jsonl").read_text()
        losses = [json.loads(line)["loss"] for line in log.splitlines()]
        if stage != "super_res_last":  # whose input has hardly any noise to take away
            assert losses[-1] < losses[0], stage
    (tmp_path / "defaults.json").write_text(
        json.dumps({f"{stage}_num_inference_steps": 3 for stage in ("prior", "decoder", "super_res")})
    )
    parts = [word for stage in STAGES[:3] for word in (f"--{stage}", runs[stage])]
    parts += ["--super-res-first", runs["super_res"], "--super-res-last", runs["super_res_last"]]
    assert unclip(tmp_path, "assemble", *parts, "--defaults", "defaults.json", "--out", "model") == "model\n"
    large = [*parts, "--super-res-more", runs["super_res_2"], "--out", "large"]
    assert unclip(tmp_path, "assemble", *large) == "large\n"
    few = ["--prior-steps", "2", "--decoder-steps", "2", "--super-res-steps", "2,2", "--tile", "48"]
    made = unclip(tmp_path, "generate", "a red circle", "--model", "large", "--seed", "3", *few, "-q")
    with Image.open(tmp_path / made.strip()) as image:
        assert image.size == (64, 64)
    made = unclip(tmp_path, "generate", "a red circle", "--model", "model", "--seed", "3", "--out", "made", "-q")
    with Image.open(tmp_path / made.strip()) as image:
        assert image.format == "PNG"
        assert image.size == (32, 32)
    varied = unclip(tmp_path, "vary", made.strip(), "--model", "model", "--seed", "3", "--out", "made", "-q")
    assert (tmp_path / varied.strip()).is_file()
    judged = ["--judge", "runs/tiny/clip/model", "--data", "runs/tiny/data", "--out", "report.json", "-q"]
    assert "seen, generated" in unclip(tmp_path, "evaluate", "retrieval", "--model", "model", *judged)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["retrieval"]["seen"]["num"] == 10
    assert report["settings"]["prior_num_inference_steps"] == 3


@pytest.mark.slow
def test_the_other_prior_in_the_chain(tmp_path, pictures):
    """An autoregressive prior trained by its recipe, assembled with the other stages, draws and is reranked."""
    shutil.copytree(ROOT / "recipes" / "tiny", tmp_path / "recipes" / "tiny")
    shutil.copytree(pictures, tmp_path / "runs" / "tiny" / "data")
    for stage in ("clip", "prior_autoregressive", "decoder", "super_res"):
        out = f"runs/tiny/{stage}"
        unclip(tmp_path, "train", f"recipes/tiny/{stage}.toml", "--out", out, "--steps", "20", "-q")
    rows = (tmp_path / "runs" / "tiny" / "prior_autoregressive" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["loss"] < json.loads(rows[0])["loss"]
    runs = ["--clip", "runs/tiny/clip", "--prior", "runs/tiny/prior_autoregressive", "--decoder", "runs/tiny/decoder"]
    unclip(tmp_path, "assemble", *runs, "--super-res-first", "runs/tiny/super_res", "--out", "model")
    few = ["--decoder-steps", "2", "--super-res-steps", "2", "--model", "model", "--seed", "3", "-q"]
    more = ["--candidates", "2", "--prior-temperature", "0.8", "--prior-top-p", "0.9"]
    made = unclip(tmp_path, "generate", "a red circle", *few, *more, "--out", "made").strip()
    with Image.open(tmp_path / made) as image:
        settings = json.loads(image.text["settings"])
    assert settings["num_prior_candidates"] == 2
    assert settings["prior_temperature"] == 0.8
    assert "AutoregressivePrior" in unclip(tmp_path, "info", "model")


@pytest.mark.slow
def test_the_guides_own_unclip(tmp_path, pictures):
    """The section "Train your own unCLIP" of the guide, at a few steps: its data set, its recipes, its commands."""
    make = [sys.executable, ROOT / "examples" / "small_data_set.py", pictures, "runs/small/data", "--count", "8"]
    told = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    assert told.stdout == "8 pictures in runs/small/data\n"
    rows = [json.loads(line) for line in (tmp_path / "runs/small/data/metadata.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"file_name", "text"}] * 8
    assert len({row["text"] for row in rows}) == 8
    shutil.copytree(ROOT / "recipes" / "small", tmp_path / "recipes" / "small")
    guide = (ROOT / "docs" / "guides" / "training.md").read_text().replace("\\\n", "")
    section = guide.split("## Train your own unCLIP")[1].split("\n## ")[0]
    lines = [line.removeprefix("$ unclip ") for line in section.splitlines() if line.startswith("$ unclip ")]
    commands = [shlex.split(line) for line in lines if not line.startswith(("data emoji", "data caption"))]
    assert [words[0] for words in commands] == ["data", *["train"] * len(STAGES), "assemble", "generate"]
    for words in commands:
        made = unclip(tmp_path, *words, *(["--steps", "3"] if words[0] == "train" else []))
    with Image.open(tmp_path / made.strip()) as image:
        assert image.size == (64, 64)
        settings = json.loads(image.text["settings"])
    assert settings == settings | json.loads((ROOT / "recipes" / "small" / "defaults.json").read_text())
