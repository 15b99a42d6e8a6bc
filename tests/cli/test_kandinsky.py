"""Commands with a Kandinsky folder as the model."""

import json

import numpy as np
import pytest
from PIL import Image

from unclip import KandinskyV22CombinedPipeline, KandinskyV22Pipeline, KandinskyV22PriorPipeline

from ..kandinsky_parts import decoder_parts, prior_parts

FEW = ["--decoder-steps", "2", "--quiet"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "kandinsky"
    prior, decoder = KandinskyV22PriorPipeline(**prior_parts()), KandinskyV22Pipeline(**decoder_parts("2.2"))
    KandinskyV22CombinedPipeline.from_pipes(prior, decoder).save_pretrained(folder)
    prior.save_pretrained(folder.with_name("prior"))
    decoder.save_pretrained(folder.with_name("decoder"))
    return folder


def test_generate(unclip, model, tmp_path):
    done = unclip("generate", "a cat", "--model", model, "--seed", 1, "--out", tmp_path, "--prior-steps", 2, *FEW)
    assert done.code == 0, done.err
    with Image.open(done.lines[0]) as image:
        assert image.size == (16, 16)
        settings = json.loads(image.info["settings"])
    assert settings["decoder_guidance_scale"] == 4.0  # Kandinsky's default
    assert settings["sampler"] == "ancestral"
    again = unclip("rerun", done.lines[0], "--model", model, "--out", tmp_path / "again.png")
    assert again.code == 0, again.err
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), np.asarray(Image.open(done.lines[0])))


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_samplers(unclip, model, tmp_path, sampler):
    done = unclip(
        *("generate", "a cat", "--model", model, "--out", tmp_path, "--prior-steps", 2), "--sampler", sampler, *FEW
    )
    assert done.code == 0, done.err


def test_vary_invert_and_edit(unclip, model, tmp_path):
    Image.new("RGB", (20, 16), (200, 60, 20)).save(tmp_path / "photo.png")
    for command in (
        ["vary", tmp_path / "photo.png"],
        ["vary", tmp_path / "photo.png", "--keep-structure"],
        ["edit", tmp_path / "photo.png", "--from", "a cat", "--to", "an apple"],
        ["interpolate", tmp_path / "photo.png", tmp_path / "photo.png", "--frames", "2"],
    ):
        done = unclip(*command, "--model", model, "--out", tmp_path / command[0], *FEW)
        assert done.code == 0, (command, done.err)


def test_decode(unclip, model, tmp_path):
    np.save(tmp_path / "emb.npy", np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32))
    done = unclip("decode", tmp_path / "emb.npy", "--model", model, "--out", tmp_path / "out", *FEW)
    assert done.code == 0, done.err
    assert len(done.lines) == 2
    np.save(tmp_path / "wide.npy", np.zeros((2, 24), np.float32))
    done = unclip("decode", tmp_path / "wide.npy", "--model", model, "--out", tmp_path / "out", *FEW)
    assert done.code != 0
    assert "embeddings of width 24, but the model needs width 16" in done.err


def test_inpaint_is_refused(unclip, model, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    done = unclip(
        *("inpaint", tmp_path / "photo.png", "--mask", tmp_path / "mask.png", "--prompt", "a cat", "--model", model)
    )
    assert done.code != 0
    assert "KandinskyV22CombinedPipeline" in done.err


def test_a_decoder_alone_cannot_generate(unclip, model):
    done = unclip("generate", "a cat", "--model", model.with_name("decoder"), *FEW)
    assert done.code != 0
    assert "Traceback" not in done.err
