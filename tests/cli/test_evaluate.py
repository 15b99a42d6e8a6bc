"""`unclip evaluate retrieval`: what it writes and prints, and what it refuses before it computes."""

import json
import shutil

import pytest
from PIL import Image

from unclip.checkpoints import hub
from unclip.evaluation import retrieval as measured

FEW = ["--prior-steps", "2", "--decoder-steps", "2", "--super-res-steps", "2"]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (16, 16), colour).save(folder / f"{colour}.png")
        rows.append(
            {"file_name": f"{colour}.png", "captions": [colour], "concept": colour, "held_out": colour == "red"}
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def ask(unclip, model, data, tmp_path):
    """Runs the command; the model's own CLIP is the judge, which is no fair one, but a judge."""

    def run(*more, out="report.json", judge=model, **named):
        where = ["--model", named.get("model", model), "--data", data, "--out", tmp_path / out, *FEW]
        return unclip("evaluate", "retrieval", *where, *(["--judge", judge] if judge else []), *more)

    return run


def test_a_report(ask, tmp_path, model):
    done = ask("--seed", 5, "--num-seen", 9, "--sheet", tmp_path / "sheets" / "s", "-q")
    assert done.code == 0, done.err
    assert done.err == ""
    report = json.loads((tmp_path / "report.json").read_text())
    found = report["retrieval"]
    assert (found["num_captions"], found["seen"]["num"], found["held_out"]["num"]) == (3, 2, 1)
    assert (report["model"], report["seed"], report["num_seen"]) == ("tiny", 5, 9)
    assert report["settings"]["prior_guidance_scale"] == 4.0
    assert report["settings"]["sampler"] == "ancestral"
    assert report["settings"]["batch_size"] == 16
    assert report["judge_saw_all_concepts"] is None
    assert (found["held_out"]["num_in_all"], found["held_out"]["num_without_plain_style"]) == (1, 0)
    assert str(tmp_path) not in json.dumps(report)
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["s-held-out.png", "s-seen.png"]
    lines = done.lines
    assert lines[0].split() == ["number", "first", "in", "five", "score"]
    assert [line.split()[0] for line in lines[1:6]] == ["seen,", "seen,", "held", "held", "chance"]
    assert lines[5].split() == ["chance", "3", "33.3%", "100.0%"]
    assert lines[6:8] == ["", "Distance from the real pictures"]
    assert lines[9].startswith("seen, in the judge's image embeddings")
    assert report["pictures"] == ["sheets/s-seen.png", "sheets/s-held-out.png"]


def test_defaults_of_the_model_and_options(ask, tmp_path, model, monkeypatch):
    copied = shutil.copytree(model, tmp_path / "copy")
    defaults = {"prior_guidance_scale": 1.5, "decoder_guidance_scale": 2.5, "decoder_num_inference_steps": 9}
    (copied / "generation_defaults.json").write_text(json.dumps(defaults))
    asked = {}
    rates = {"at_1": 0.5, "at_5": 1.0, "clip_score": 0.3}
    found = {"num_captions": 3, "chance_at_1": 0.3, "chance_at_5": 1.0, "held_out": {"num": 0}}
    found["seen"] = {"num": 2, "generated": rates, "real": rates}
    monkeypatch.setattr(measured, "retrieval", lambda *them, **named: asked.update(named) or found)
    done = ask("--decoder-guidance", "3", "--sampler", "dpm", "--batch-size", "4", model=copied)
    assert done.code == 0, done.err
    assert asked["prior_guidance_scale"] == 1.5
    assert asked["decoder_guidance_scale"] == 3.0
    assert asked["decoder_num_inference_steps"] == 2
    assert (asked["num_seen"], asked["batch_size"], asked["seed"], asked["sheet"]) == (200, 4, 0, None)
    assert len(done.lines) == 4
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["sampler"] == "dpm"


@pytest.mark.parametrize("name", ["report.json", "s-seen.png"])
def test_nothing_is_overwritten_unasked(ask, tmp_path, name):
    (tmp_path / name).write_text("mine")
    sheet = ("--sheet", tmp_path / "s") if name != "report.json" else ()
    done = ask(*sheet, "-q")
    assert (done.code, done.out) == (1, "")
    assert f"{name} is there already; give --overwrite" in done.err
    assert (tmp_path / name).read_text() == "mine"
    done = ask(*sheet, "--overwrite", "-q")
    assert done.code == 0, done.err
    assert (tmp_path / name).read_bytes() != b"mine"


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """The folder that stands for the assets of this installation."""
    folder = tmp_path / "unclip" / "assets"
    folder.mkdir(parents=True)
    monkeypatch.setattr(hub.importlib.resources, "files", lambda name: tmp_path / name)
    return folder


def test_without_a_judge(ask, installed):
    done = ask(judge=None)
    assert (done.code, done.out) == (1, "")
    assert "unclip-emoji-judge is not part of this installation" in done.err
    assert "--judge" in done.err
    assert ask(judge="nothing").code == 1


def test_the_built_in_judge(ask, installed, tmp_path, model):
    for name in ("text_encoder", "tokenizer", "image_encoder", "feature_extractor"):  # no pipeline
        shutil.copytree(model / name, installed / "emoji-judge" / name)
    done = ask("-q", judge=None)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["judge"], report["judge_saw_all_concepts"]) == ("unclip-emoji-judge", True)


@pytest.mark.parametrize("include_held_out", [True, False])
def test_a_judge_of_ones_own(ask, tmp_path, model, include_held_out):
    judge = shutil.copytree(model, tmp_path / "run" / "model")
    (judge.parent / "recipe.json").write_text(json.dumps({"clip": {"include_held_out": include_held_out}}))
    done = ask("-q", judge=judge)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "report.json").read_text())["judge_saw_all_concepts"] is include_held_out


def test_a_model_without_a_prior(ask, variation):
    done = ask(model=variation)
    assert (done.code, done.out) == (1, "")
    assert "has no prior" in done.err


@pytest.mark.parametrize(
    ("options", "words"), [(("--decoder-guidance", "nan"), "guidance"), (("--device", "abacus"), "abacus")]
)
def test_bad_options(ask, tmp_path, options, words):
    done = ask(*options)
    assert (done.code, done.out) == (1, "")
    assert words in done.err
    assert not (tmp_path / "report.json").exists()


def test_no_data(unclip, model, tmp_path):
    named = ["--model", model, "--judge", model, "--data", tmp_path, "--out", tmp_path / "r.json"]
    done = unclip("evaluate", "retrieval", *named, "-q")
    assert (done.code, done.out) == (1, "")
    assert "unclip data emoji" in done.err


def test_variations_by_the_command_line(unclip, model, data, tmp_path):
    few = ["--decoder-steps", "2", "--super-res-steps", "2", "--judge", model, "-q"]
    out = tmp_path / "variations.json"
    done = unclip("evaluate", "variations", "--model", model, "--data", data, "--out", out, *few)
    assert done.code == 0, done.err
    assert done.lines[0].split() == ["number", "first", "in", "five", "score"]
    title = done.lines.index("Cosine to the picture")
    assert done.lines[title + 1].split() == ["its", "own", "another's", "pixels", "apart"]
    assert [line.split()[0] for line in done.lines[title + 2 : title + 4]] == ["seen", "held"]
    report = json.loads(out.read_text())
    assert report["variations"]["seen"]["num"] == 2
    assert 0 < report["variations"]["seen"]["pixel_difference"] < 1
    assert report["settings"]["decoder_num_inference_steps"] == 2
    again = unclip("evaluate", "variations", "--model", model, "--data", data, "--out", out, *few)
    assert again.code == 1
    assert "is there already" in again.err
