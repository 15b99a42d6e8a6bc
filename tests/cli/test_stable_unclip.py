"""The commands with a folder of Stable unCLIP."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from unclip.pipelines.session import read_texts

from ..stable_parts import DIM, reference, stable_parts

STEPS = ["--decoder-steps", "2", "--seed", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base, parts = tmp_path_factory.mktemp("stable"), stable_parts()
    for kind in ("text", "variation"):
        reference(kind, parts).save_pretrained(base / kind)
    index = json.loads((base / "text" / "model_index.json").read_text())
    for name in ("image_encoder", "feature_extractor"):
        shutil.copytree(base / "variation" / name, base / "text" / name)
        index[name] = json.loads((base / "variation" / "model_index.json").read_text())[name]
    (base / "text" / "model_index.json").write_text(json.dumps(index))
    return base


def test_generate(unclip, folder, tmp_path):
    done = unclip("generate", "a cat", "--model", folder / "text", "--prior-steps", "2", *STEPS, "--out", tmp_path,
                  "--candidates", "2", "--noise-level", "9", "--sampler", "dpm", "--size", "24")  # fmt: skip
    assert done.code == 2, done.out  # generate has no --noise-level
    done = unclip("generate", "a cat", "--model", folder / "text", "--prior-steps", "2", *STEPS, "--out", tmp_path,
                  "--candidates", "2", "--sampler", "dpm", "--size", "24")  # fmt: skip
    assert done.code == 0, done.err
    with Image.open(done.lines[0]) as image:
        assert image.size == (24, 24)
    again = unclip("rerun", done.lines[0], "--model", folder / "text", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert np.array_equal(np.asarray(Image.open(again.lines[0])), np.asarray(Image.open(done.lines[0])))


def test_vary_and_decode(unclip, folder, tmp_path):
    Image.new("RGB", (20, 16), "red").save(tmp_path / "red.png")
    vary = unclip("vary", tmp_path / "red.png", "--model", folder / "variation", "--noise-level", "300", *STEPS,
                  "--out", tmp_path, "-n", "2")  # fmt: skip
    assert vary.code == 0, vary.err
    assert len(vary.lines) == 2
    assert read_texts(tmp_path / vary.lines[0])["settings"]["noise_level"] == 300
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(2, DIM)).astype(np.float32))
    done = unclip("decode", tmp_path / "e.npy", "--model", folder / "variation", *STEPS, "--out", tmp_path / "d")
    assert done.code == 0, done.err
    assert len(done.lines) == 2
    refused = unclip("decode", tmp_path / "e.npy", "--model", folder / "variation", *STEPS, "--out", tmp_path / "x",
                     "--super-res-steps", "7,7")  # fmt: skip
    assert "2 values for 0 super-resolution stages" in refused.err


def test_interpolate_with_inversion(unclip, folder, tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (16, 16), name).save(tmp_path / f"{name}.png")
    done = unclip("interpolate", tmp_path / "red.png", tmp_path / "blue.png", "--model", folder / "variation",
                  "--decoder-steps", "3", "--frames", "3", "--out", tmp_path)  # fmt: skip
    assert done.code == 0, done.err


def test_info(unclip, folder, tmp_path):
    done = unclip("info", folder / "text")
    assert done.code == 0, done.err
    assert f"family: Stable unCLIP, text to image (of another size, width {DIM})" in done.out
    assert "AutoencoderKL" in done.out
    assert "missing" not in done.out
    index = json.loads((folder / "variation" / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "image_normalizer").mkdir()
    (tmp_path / "image_normalizer" / "config.json").write_text(json.dumps({"embedding_dim": 1024}))
    told = unclip("info", tmp_path)
    assert "Stable unCLIP, image variations (large, CLIP ViT-H/14, width 1024)" in told.out
    assert "missing: the folder" in told.out


def test_info_of_a_translator(unclip, tmp_path):
    draw = np.random.default_rng(0)
    for name, width in (("a", 7), ("b", 9)):
        np.save(tmp_path / f"{name}.npy", draw.normal(size=(40, width)).astype(np.float32))
    files = [tmp_path / "a.npy", tmp_path / "b.npy", "--out", tmp_path / "t.safetensors", "-q"]
    assert unclip("train", "translator", *files).code == 0
    told = unclip("info", tmp_path / "t.safetensors")
    assert "a translator of embeddings, from width 7 to width 9" in told.out, told.err
