"""`unclip info` and `unclip convert`."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from .conftest import FEW_DECODER_STEPS, FEW_STEPS


def test_info_as_tables(unclip, model):
    done = unclip("info", model)
    assert (done.code, done.err) == (0, "")
    assert "PriorTransformer" in done.out
    assert "learned_range" in done.out
    assert "\x1b" not in done.out
    assert all(line == line.rstrip() for line in done.lines)


def test_info_counts_what_is_there(unclip, model):
    about = json.loads(unclip("info", model, "--json").out)
    parts = about["components"]
    assert set(parts) == {key for key in json.loads((model / "model_index.json").read_text()) if key[0] != "_"}
    weights = load_file(model / "prior" / "diffusion_pytorch_model.safetensors")
    assert parts["prior"]["parameters"] == sum(weight.numel() for weight in weights.values())
    assert parts["prior"]["size_bytes"] == (model / "prior" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert parts["image_encoder"]["dtype"] == "float32"
    assert parts["prior"]["sizes"]["embedding_dim"] == 32
    assert parts["prior_scheduler"]["settings"]["clip_sample_range"] == 5.0
    assert about["licence"] is None


def test_info_papers_and_defaults(unclip, text_to_image, tmp_path):
    folder = shutil.copytree(text_to_image, tmp_path / "m")
    (folder / "README.md").write_text("---\ntags: x\nlicense: apache-2.0\n---\n# Hello\n")
    (folder / "generation_defaults.json").write_text('{"decoder_num_inference_steps": 9}')
    about = json.loads(unclip("info", folder, "--json").out)
    assert (about["licence"], about["model_card"]) == ("apache-2.0", "README.md")
    assert about["generation_defaults"] == {"decoder_num_inference_steps": 9}
    (folder / "LICENSE").write_text("…")
    assert "licence: LICENSE" in unclip("info", folder).out


def test_info_of_one_component_and_of_a_training_run(unclip, text_to_image, tmp_path):
    assert list(json.loads(unclip("info", text_to_image / "decoder", "--json").out)["components"]) == ["decoder"]
    shutil.copytree(text_to_image / "decoder", tmp_path / "model" / "decoder")
    shutil.copytree(text_to_image / "decoder_scheduler", tmp_path / "model" / "decoder_scheduler")
    parts = json.loads(unclip("info", tmp_path / "model", "--json").out)["components"]
    assert {name: part["class_name"] for name, part in parts.items()} == {
        "decoder": "UNet2DConditionModel",
        "decoder_scheduler": "UnCLIPScheduler",
    }


def test_info_of_a_variant(unclip, text_to_image, tmp_path):
    folder = shutil.copytree(text_to_image, tmp_path / "m")
    (folder / "prior" / "diffusion_pytorch_model.safetensors").rename(
        folder / "prior" / "diffusion_pytorch_model.fp16.safetensors"
    )
    assert json.loads(unclip("info", folder, "--json").out)["components"]["prior"]["parameters"] > 0


def test_info_of_a_broken_model_shows_the_rest(unclip, text_to_image, tmp_path):
    folder = shutil.copytree(text_to_image, tmp_path / "m")
    weights = folder / "decoder" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = unclip("info", folder)
    assert done.code == 1
    assert done.err.startswith("error: component 'decoder'")
    assert "PriorTransformer" in done.out
    assert "cannot be read" in done.out


def test_info_of_nothing(unclip, tmp_path):
    assert unclip("info", tmp_path / "none").code == 1
    done = unclip("info", tmp_path)
    assert (done.code, done.out) == (1, "")
    assert "model_index.json" in done.err


def test_convert_variation(unclip, text_to_image, model, tmp_path):
    out = tmp_path / "variation"
    done = unclip("convert", "variation", text_to_image, "--clip", model, "--out", out)
    assert (done.code, done.lines) == (0, [str(out)])
    assert "image_encoder" in json.loads((out / "model_index.json").read_text())
    assert json.loads((out / "feature_extractor" / "preprocessor_config.json").read_text())["do_center_crop"] is False
    again = unclip("convert", "variation", text_to_image, "--clip", model, "--out", out)
    assert again.code == 1
    assert "already exists" in again.err
    picture = unclip("generate", "a cat", "--model", text_to_image, *FEW_STEPS, "--out", tmp_path).lines[0]
    done = unclip("vary", picture, "--model", out, *FEW_DECODER_STEPS, "--out", tmp_path)
    assert done.code == 0, done.err


def test_convert_pickle(unclip, text_to_image, tmp_path):
    source = shutil.copytree(text_to_image, tmp_path / "old")
    weights = source / "prior" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    weights.unlink()
    torch.save(state, source / "prior" / "diffusion_pytorch_model.bin")
    refused = unclip("generate", "a cat", "--model", source, *FEW_STEPS, "--out", tmp_path)
    assert refused.code == 1
    assert "unclip convert pickle" in refused.err
    done = unclip("convert", "pickle", source, "--out", tmp_path / "new")
    assert done.lines == [str(tmp_path / "new")]
    made = load_file(tmp_path / "new" / "prior" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(made[name], state[name]) for name in state)


def test_convert_karlo_passes_its_options_on(unclip, tmp_path, monkeypatch):
    from unclip.pipelines import convert

    asked = {}
    monkeypatch.setattr(convert, "convert_karlo", lambda **named: asked.update(named) or named["out"])
    files = {"--prior": "p.ckpt", "--decoder": "d.ckpt", "--super-res": "s.ckpt", "--stats": "t.th", "--clip": "c"}
    options = [word for pair in files.items() for word in pair]
    out = tmp_path / "karlo"
    done = unclip("convert", "karlo", *options, "--out", out, "--dtype", "float16", "--variant", "fp16", "--overwrite")
    assert done.lines == [str(out)]
    assert {name: str(asked[name]) for name in ("prior", "decoder", "super_res", "stats", "clip")} == {
        "prior": "p.ckpt", "decoder": "d.ckpt", "super_res": "s.ckpt", "stats": "t.th", "clip": "c",
    }  # fmt: skip
    assert (asked["dtype"], asked["variant"], asked["overwrite"]) == (torch.float16, "fp16", True)
    assert asked["prior_clip_range"] == 10.0
    unclip("convert", "karlo", *options, "--out", out, "--prior-clip-range", "5")
    assert asked["prior_clip_range"] == 5.0


def test_convert_karlo_needs_its_files(unclip, tmp_path):
    assert unclip("convert", "karlo", "--out", tmp_path / "k").code == 2
    options = [word for name in ("prior", "decoder", "super-res", "stats") for word in (f"--{name}", tmp_path / name)]
    done = unclip("convert", "karlo", *options, "--clip", tmp_path / "none", "--out", tmp_path / "k")
    assert done.code == 1
    assert not (tmp_path / "k").exists()


def test_a_prior_of_dalle2_pytorch_is_recognised_and_converted(unclip, tmp_path):
    fixture = Path(__file__).parents[1] / "fixtures" / "dalle2" / "1.15.6.safetensors"
    state = {name.removeprefix("weights/"): value for name, value in load_file(fixture).items() if "weights/" in name}
    file, out = tmp_path / "prior.pth", tmp_path / "prior"
    torch.save(state, file)
    shown = unclip("info", file)
    assert shown.code == 0
    assert "family: DALLE2-pytorch: a prior (state dict)" in shown.out
    assert "missing: the version of DALLE2-pytorch" in shown.out
    asked = unclip("convert", "dalle2-prior", file, "--out", out)
    assert asked.code == 1
    assert "Which one was it? Give it with --package-version" in asked.err
    done = unclip("convert", "dalle2-prior", file, "--out", out, "--package-version", "1.15.6")
    assert (done.code, done.lines) == (0, [str(out)])
    about = json.loads(unclip("info", out, "--json").out)
    assert about["components"]["prior"]["class_name"] == "EmbeddingPriorNetwork"
    assert about["family"]["next"].startswith("in Python: EmbeddingPrior.from_pretrained(")
    assert unclip("info", fixture.with_name("make_fixtures.py")).code == 1


def test_info_of_a_prior_of_eclipse(unclip, text_to_image, tmp_path):
    prior = shutil.copytree(text_to_image / "prior", tmp_path / "eclipse")
    config = json.loads((prior / "config.json").read_text()) | {"additional_embeddings": 3, "embedding_dim": 768}
    (prior / "config.json").write_text(json.dumps(config))
    family = json.loads(unclip("info", prior, "--json").out)["family"]
    assert family["name"] == "ECLIPSE: a prior for Karlo's (CLIP ViT-L/14) decoder, width 768"
    assert family["missing"] == ["a decoder"]
    assert "UnCLIPPipeline.from_pretrained(KARLO, prior=" in family["next"]


def test_info_of_an_incomplete_folder(unclip, text_to_image, tmp_path):
    folder = shutil.copytree(text_to_image, tmp_path / "m")
    assert json.loads(unclip("info", folder, "--json").out)["family"]["missing"] == []
    shutil.rmtree(folder / "decoder")
    done = unclip("info", folder)
    assert "missing: the folder decoder" in done.out
    assert done.code == 1
