"""`unclip evaluate`: what it writes and prints, and what it refuses before it computes."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import EmbeddingPrior, EmbeddingPriorNetwork, PriorTransformer, VectorPrior
from unclip.checkpoints import hub
from unclip.evaluation import retrieval as measured
from unclip.pipelines.component import write_component
from unclip.pipelines.samplers import sampler_name, sampler_switch
from unclip.pipelines.vector_prior import vector_model

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
    """Runs the command with the model's own CLIP as the judge, which is enough for a test."""

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
    monkeypatch.setattr(
        measured, "retrieval", lambda pipe, judge, plan, **named: asked.update(named, plan=plan) or found
    )
    done = ask("--decoder-guidance", "3", "--sampler", "dpm", "--batch-size", "4", model=copied)
    assert done.code == 0, done.err
    assert asked["prior_guidance_scale"] == 1.5
    assert asked["decoder_guidance_scale"] == 3.0
    assert asked["decoder_num_inference_steps"] == 2
    plan = asked["plan"]
    assert (plan.num_seen, plan.batch_size, plan.seed, plan.sheet) == (200, 4, 0, None)
    assert len(done.lines) == 4
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["sampler"] == "dpm"


@pytest.mark.parametrize("name", ["report.json", "s-seen.png"])
def test_nothing_is_overwritten_unasked(ask, tmp_path, name):
    (tmp_path / name).write_text("mine")
    sheet = ("--sheet", tmp_path / "s") if name != "report.json" else ()
    done = ask(*sheet, "-q")
    assert (done.code, done.out) == (1, "")
    assert f"{name} already exists: use --overwrite" in done.err
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


def test_candidates_are_the_models_own_unless_given(ask, model, tmp_path):
    assert ask("-q").code == 0
    plain = json.loads((tmp_path / "report.json").read_text())
    own = tmp_path / "own"
    shutil.copytree(model, own)
    (own / "generation_defaults.json").write_text('{"num_prior_candidates": 6}')
    assert ask("-q", "--overwrite", model=own).code == 0
    several = json.loads((tmp_path / "report.json").read_text())
    assert "num_prior_candidates" not in plain["settings"]
    assert several["settings"]["num_prior_candidates"] == 6
    assert several["retrieval"]["seen"]["generated"] != plain["retrieval"]["seen"]["generated"]
    assert ask("-q", "--overwrite", "--candidates", "2", model=own).code == 0
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["num_prior_candidates"] == 2


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
    assert "already exists: use --overwrite" in again.err


def test_broken_pictures_by_the_command_line(unclip, model, data, tmp_path):
    rows = [{"file_name": "green.png", "captions": [f"green {n}"], "held_out": n > 0} for n in range(101)]
    rows[50]["file_name"] = "gone.png"
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "prior.json"
    done = unclip("evaluate", "prior", "--model", model, "--data", data, "--out", out, "--prior-steps", "2", "-q")
    assert done.code == 0, done.err
    assert "warning: 1 of 101 chosen pictures" in done.err
    assert "gone.png" in done.err
    report = json.loads(out.read_text())["prior"]
    assert (report["num_skipped"], list(report["skipped"])) == (1, ["gone.png"])
    assert report["held_out"]["num"] == 99


# -- composed captions ---------------------------------------------------------------------------------------------


def test_composed_captions(ask, data, tmp_path):
    rows = [
        ("red", "a red cat", False),
        ("green", "a cat left of a star on a green background", False),
        ("blue", "a dog on a blue background", True),
        ("red", "a blue dog", True),
    ]
    lines = [
        json.dumps({"file_name": f"{colour}.png", "captions": [caption], "style": "composed", "held_out": held_out})
        for colour, caption, held_out in rows
    ]
    (data / "metadata.jsonl").write_text("\n".join(lines))
    done = ask("--num-held-out", 1, "--sheet", tmp_path / "s", "-q")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "report.json").read_text())
    found = report["retrieval"]
    assert (found["captions"], found["num_captions"], found["chance_at_1"]) == ("composed", 4, 0.25)
    assert (found["seen"]["num"], found["held_out"]["num"], found["held_out"]["num_in_all"]) == (2, 1, 2)
    assert {kind: each["num"] for kind, each in found["seen"]["kinds"].items()} == {
        "colour": 1,
        "scene on background": 1,
    }
    assert set(found["seen"]["kinds"]["colour"]) == {"num", "generated", "real"}
    assert report["num_held_out"] == 1
    assert "By kind of caption" in done.lines
    with Image.open(tmp_path / "s-seen.png") as sheet:
        assert sheet.width > 2 * 2 * 32  # two cards, each the real picture beside the generated one


# -- prior and decoder ---------------------------------------------------------------------------------------------


def test_prior(unclip, model, data, tmp_path, variation):
    out = tmp_path / "prior.json"
    where = ["--data", data, "--out", out, "--prior-steps", "2", "--prior-guidance", "3", "--sampler", "ddim", "-q"]
    done = unclip("evaluate", "prior", "--model", model, *where)
    assert done.code == 0, done.err
    assert (done.err, done.lines[0].split()[:2]) == ("", ["number", "prior"])
    report = json.loads(out.read_text())
    assert report["prior"]["seen"]["num"] == 2
    wanted = {"prior_num_inference_steps": 2, "prior_guidance_scale": 3.0, "sampler": "ddim"}
    assert wanted.items() <= report["settings"].items()
    assert "decoder_guidance_scale" not in report["settings"]
    assert "judge" not in report
    again = unclip("evaluate", "prior", "--model", model, *where)
    assert (again.code, again.out) == (1, "")
    assert "already exists: use --overwrite" in again.err
    done = unclip("evaluate", "prior", "--model", variation, *where, "--overwrite")
    assert "has no prior" in done.err


def test_prior_of_several_candidates(unclip, model, data, tmp_path):
    """The one that is kept is measured: closer to its caption than the first."""
    out = tmp_path / "prior.json"
    own = shutil.copytree(model, tmp_path / "own")
    (own / "generation_defaults.json").write_text('{"num_prior_candidates": 6}')
    where = ["--data", data, "--out", out, "--prior-steps", "2", "-q", "--overwrite"]

    def ask(*more):
        done = unclip("evaluate", "prior", *where, *more)
        assert done.code == 0, done.err
        report = json.loads(out.read_text())
        return report["settings"].get("num_prior_candidates"), report["prior"]["seen"]["text_dot"]["prior"]

    dots = {}
    for wanted, more in ((None, ["--model", model]), (6, ["--model", own]), (2, ["--model", own, "--candidates", 2])):
        found, dots[wanted] = ask(*more)
        assert found == wanted
    assert dots[None] < dots[6]
    assert dots[2] <= dots[6]
    for option, value in (("--prior-temperature", 0.5), ("--prior-top-p", 0.9)):
        done = unclip("evaluate", "prior", *where, "--model", model, option, value)
        assert (done.code, "a diffusion prior samples no codes" in done.err) == (1, True)


def test_prior_needs_an_image_encoder(unclip, text_to_image, data, tmp_path):
    done = unclip("evaluate", "prior", "--model", text_to_image, "--data", data, "--out", tmp_path / "x.json", "-q")
    assert (done.code, done.out) == (1, "")
    assert "has no image_encoder" in done.err


def test_decoder(unclip, model, data, tmp_path):
    out = tmp_path / "decoder.json"
    few = ["--decoder-steps", "2", "--super-res-steps", "2", "--judge", model, "-q"]
    where = ["--model", model, "--data", data, "--sheet", tmp_path / "d", "--out", out]
    done = unclip("evaluate", "decoder", *where, "--captions", *few)
    assert done.code == 0, done.err
    report = json.loads(out.read_text())
    seen = report["decoder"]["seen"]
    assert report["decoder"]["captions"] is True
    assert seen["own"] == seen["judge"]  # one CLIP is both here
    assert (seen["small"]["size_px"], seen["large"]["size_px"]) == (16, 32)
    assert report["pictures"] == ["d-seen.png", "d-held-out.png"]
    assert "Cosine of a picture and its decode" not in done.lines  # the first table needs no title
    assert "Pixels" in done.lines


# -- sweep ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def swept(unclip, model, data, tmp_path):
    def run(*more, out=tmp_path / "sweep.json", model=model, judge=model):
        few = ["--prior-steps", "2", "--super-res-steps", "1", "--num-seen", "2", "-q"]
        return unclip(
            "evaluate", "sweep", "--model", model, "--judge", judge, "--data", data, "--out", out, *few, *more
        )

    return run


def points(path):
    return [point["settings"] for point in json.loads(path.read_text())["sweep"]["points"]]


def test_a_sweep_goes_on_where_it_stopped(swept, tmp_path, monkeypatch):
    out = tmp_path / "sweep.json"
    first = swept("--decoder-guidance", "1,2", "--decoder-steps", "2")
    assert first.code == 0, first.err
    assert [each["decoder_guidance_scale"] for each in points(out)] == [1.0, 2.0]
    assert {each["sampler"] for each in points(out)} == {"ancestral"}
    charts = sorted(path.name for path in tmp_path.glob("sweep-*.svg"))
    assert charts == ["sweep-decoder-guidance.svg", "sweep-seconds.svg"]
    assert [line for line in first.lines if line.endswith(".svg")]

    seconds = [point["seconds_per_picture"] for point in json.loads(out.read_text())["sweep"]["points"]]
    longer = swept("--decoder-guidance", "1,2", "--decoder-steps", "2", "--sampler", "ancestral, ddim")
    assert longer.code == 0, longer.err
    found = json.loads(out.read_text())["sweep"]["points"]
    assert [(each["decoder_guidance_scale"], each["sampler"]) for each in points(out)] == [
        (1.0, "ancestral"), (1.0, "ddim"), (2.0, "ancestral"), (2.0, "ddim"),
    ]  # fmt: skip
    assert [point["seconds_per_picture"] for point in found[::2]] == seconds


def test_a_sweep_without_matplotlib_writes_no_charts(unclip, swept, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = swept("--decoder-steps", "1,2")
    assert done.code == 0, done.err
    assert done.err.count("warning: no charts will be written because matplotlib is not installed") == 1
    assert [each["decoder_num_inference_steps"] for each in points(tmp_path / "sweep.json")] == [1, 2]
    assert not list(tmp_path.glob("*.svg"))
    assert unclip("evaluate", "report", tmp_path / "sweep.json", "--out", tmp_path / "page.html").code == 0
    text = (tmp_path / "page.html").read_text()
    assert "The charts are left out because matplotlib is not installed." in text
    assert "<svg" not in text


def test_candidates_are_swept(swept, tmp_path):
    done = swept("--candidates", "1,3", "--decoder-steps", "2")
    assert done.code == 0, done.err
    assert [each["num_prior_candidates"] for each in points(tmp_path / "sweep.json")] == [1, 3]
    assert "candidates" in done.out


def test_a_sweep_of_something_else_is_not_gone_on_with(swept, tmp_path, model):
    out = tmp_path / "sweep.json"
    assert swept("--decoder-steps", "1").code == 0
    before = out.read_bytes()
    done = swept("--decoder-steps", "1", "--seed", "9")
    assert (done.code, done.out) == (1, "")
    assert "its seed is 0, not 9" in done.err
    other = shutil.copytree(model, tmp_path / "tiny")
    (other / "generation_defaults.json").write_text('{"decoder_guidance_scale": 3.0}')
    assert "its model_sha256 is" in swept("--decoder-steps", "1", model=other).err
    assert out.read_bytes() == before
    assert swept("--decoder-steps", "1", "--seed", "9", "--overwrite").code == 0
    assert json.loads(out.read_text())["seed"] == 9


def test_samplers_are_switched_and_put_back(own_pipeline):
    own = dict(own_pipeline.components)
    use = sampler_switch(own_pipeline)
    for name in ("ddim", "dpm", "ddim"):
        use(name)
        assert sampler_name(own_pipeline) == name
    assert own_pipeline.prior_scheduler.config["prediction_type"] == "sample"
    use("ancestral")
    assert all(own_pipeline.components[name] is part for name, part in own.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--decoder-steps", "2,,3"), "--decoder-steps is ''; it must be a whole number"),
        (("--decoder-steps", "0"), "whole number from 1 to 1000"),
        (("--decoder-steps", "1.5"), "'1.5'"),
        (("--prior-guidance", "1,two"), "--prior-guidance is 'two'; it must be a number"),
        (("--prior-guidance", "nan"), "--prior-guidance is nan"),
        (("--candidates", "1,0"), "--candidates is 0; it must be"),
        (("--prior-temperature", "1,-1"), "--prior-temperature is -1"),
        (("--prior-top-p", "0.5,2"), "--prior-top-p is 2"),
        (("--prior-temperature", "1,warm"), "--prior-temperature is 'warm'"),
        (("--prior-temperature", "0.5"), "diffusion prior"),
        (("--sampler", "ddim,euler"), "--sampler contains 'euler'; it must be one of ancestral, ddim, dpm"),
        (("--decoder-steps", ",".join(map(str, range(1, 1001))), "--sampler", "ddim,dpm"), "2000 combinations"),
    ],
)
def test_lists_that_are_none(swept, tmp_path, options, words):
    done = swept(*options)
    assert (done.code, done.out) == (1, "")
    assert words in done.err
    assert not (tmp_path / "sweep.json").exists()


@pytest.mark.parametrize("content", ["mine", '{"retrieval": {}}', '{"sweep": {"points": 3}}'])
def test_a_sweep_replaces_nothing_else(swept, tmp_path, content):
    out = tmp_path / "sweep.json"
    out.write_text(content)
    done = swept()
    assert (done.code, done.out) == (1, "")
    assert "is not a report of a sweep" in done.err
    assert out.read_text() == content


def test_a_sweep_replaces_no_charts_of_another(swept, tmp_path):
    (tmp_path / "sweep-seconds.svg").write_text("mine")
    done = swept()
    assert (done.code, done.out) == (1, "")
    assert "sweep-seconds.svg already exists" in done.err


# -- a user's own Inception, and the page ------------------------------------------------------------------------------


def test_features_that_could_run_code(ask, tmp_path):
    (tmp_path / "inception.pt").write_bytes(b"PK")
    done = ask("--features", tmp_path / "inception.pt", "-q")
    assert (done.code, done.out) == (1, "")
    assert "only safetensors are read" in done.err


def test_a_feature_space_of_ones_own(ask, tmp_path, monkeypatch):
    from unclip.evaluation.inception import InceptionFeatures

    class Space:
        name, is_fid = "a space", True

        def look(self, images):
            import torch

            return torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images]).float()

    monkeypatch.setattr(InceptionFeatures, "load", classmethod(lambda cls, path, device: Space()))
    done = ask("--features", tmp_path, "-q")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["features"] == report["retrieval"]["seen"]["feature_distance"]["space"] == "a space"
    assert any("FID" in line for line in done.lines)


def test_a_page_of_reports(unclip, ask, swept, tmp_path):
    assert ask("--sheet", tmp_path / "s", "-q").code == 0
    assert swept("--decoder-steps", "1,2").code == 0
    reports = [tmp_path / "report.json", tmp_path / "sweep.json"]
    out = tmp_path / "page.html"
    done = unclip("evaluate", "report", *reports, "--out", out, "--title", "mine & others")
    assert done.code == 0, done.err
    assert done.out.strip() == str(out)
    text = out.read_text()
    assert text.count("data:image/png;base64,") == 2
    assert text.count("<svg") == 1
    assert "<h1>mine &amp; others</h1>" in text
    again = unclip("evaluate", "report", *reports, "--out", out)
    assert again.code == 1
    (tmp_path / "s-seen.png").unlink()
    done = unclip("evaluate", "report", *reports, "--out", out, "--overwrite", "-q")
    assert done.code == 0
    assert "warning: a picture of" in done.err
    assert out.read_text().count("data:image/png;base64,") == 1


def test_a_page_of_nothing(unclip, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    done = unclip("evaluate", "report", tmp_path / "x.json", "--out", tmp_path / "x.html")
    assert (done.code, done.out) == (1, "")
    assert "not a report of unclip evaluate" in done.err
    assert not (tmp_path / "x.html").exists()
    assert unclip("evaluate", "report", tmp_path / "missing.json", "--out", tmp_path / "x.html").code == 1


def test_wordings(unclip, model, data, tmp_path):
    (tmp_path / "list.json").write_text('{"words": {"blood": ["red"], "grass": ["green", "blue"]}}')
    where = ["--model", model, "--judge", model, "--data", data, "--out", tmp_path / "report.json", *FEW]
    done = unclip("evaluate", "wordings", *where, "--wordings", tmp_path / "list.json", "--sheet", tmp_path / "s.png")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "report.json").read_text())["wordings"]
    assert (found["num"], found["kinds"]["words"]["num"], found["num_captions"]) == (2, 2, 3)
    assert found["at_5"] == 1.0
    assert (tmp_path / "s.png").is_file()
    assert [line.split()[0] for line in done.lines] == ["number", "all", "words", "chance"]
    again = unclip("evaluate", "wordings", *where, "--wordings", tmp_path / "list.json")
    assert again.code == 1
    assert "already exists: use --overwrite" in again.err


def test_a_prior_on_vectors_and_one_on_tokens(unclip, tmp_path):
    draw = torch.Generator().manual_seed(0)
    network = PriorTransformer(**vector_model(7, 6), num_attention_heads=2, attention_head_dim=8, num_layers=1)
    parts = VectorPrior(network.initialize_for_training(draw))
    write_component(parts.prior, tmp_path / "vectors" / "prior", variant=None)
    write_component(parts.scheduler, tmp_path / "vectors" / "prior_scheduler", variant=None)
    grid = {"embedding_dim": 6, "num_tokens": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    EmbeddingPrior(EmbeddingPriorNetwork(**grid).initialize_for_training(draw)).save_pretrained(tmp_path / "tokens")
    shapes = {"a": (9, 3), "b": (9, 4), "true": (9, 6), "grid": (9, 4, 6), "true_grid": (9, 4, 6), "few": (8, 6)}
    for name, shape in shapes.items():
        np.save(tmp_path / f"{name}.npy", torch.randn(shape, generator=draw).numpy())

    def measure(model, data, *conditions, more=()):
        named = [word for name in conditions for word in ("--condition", tmp_path / f"{name}.npy")]
        out = tmp_path / f"{model}.json"
        where = ("--model", tmp_path / model, "--data", tmp_path / f"{data}.npy", "--out", out, "--overwrite")
        return unclip("evaluate", "prior", *where, *named, "--prior-steps", "2", "-q", *more), out

    for case in (("vectors", "true", "a", "b"), ("tokens", "true_grid", "grid")):
        done, out = measure(*case, more=("--num-held-out", "5"))
        assert (done.code, done.err) == (0, "")
        found = json.loads(out.read_text())["prior"]
        assert found == json.loads(done.out)
        assert (found["rows"], found["chance"]["top_1"]) == (5, 0.2)
        assert measure(*case, more=("--num-held-out", "5"))[0].out == done.out
    assert json.loads(measure("vectors", "true", "a", "b")[0].out)["rows"] == 9
    assert "must be [batch, 7]" in measure("vectors", "true", "a")[0].err
    assert "has 9 rows, but" in measure("vectors", "few", "a", "b")[0].err
    assert "leave out --candidates" in measure("vectors", "true", "a", "b", more=("--candidates", "2"))[0].err
