"""Commands with a Kandinsky folder as the model."""

import json
import shutil

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


def test_convert_and_info(unclip, model, tmp_path):
    parts = ["--prior", model.with_name("prior"), "--decoder", model.with_name("decoder")]
    done = unclip("convert", "kandinsky", *parts, "--out", tmp_path / "joined")
    assert (done.code, done.lines) == (0, [str(tmp_path / "joined")])
    pictures = []
    for folder in (model, tmp_path / "joined"):
        out = tmp_path / f"from {folder.name}"
        made = unclip("generate", "a cat", "--model", folder, "--seed", 1, "--out", out, "--prior-steps", 2, *FEW)
        pictures.append(np.asarray(Image.open(made.lines[0])))
    assert np.array_equal(*pictures)
    about = json.loads(unclip("info", tmp_path / "joined", "--json").out)
    assert about["family"]["name"] == "Kandinsky 2.2: prior and decoder"
    assert about["components"]["unet"]["parameters"] > 0
    told = unclip("info", model.with_name("prior")).out
    assert "family: Kandinsky 2.2: the prior\n" in told
    assert "next: unclip convert kandinsky --prior FOLDER" in told


def test_what_convert_kandinsky_refuses(unclip, model, tmp_path):
    prior, decoder = model.with_name("prior"), model.with_name("decoder")
    for given, words in (
        ((decoder, decoder), "contains a KandinskyV22Pipeline, not a prior of Kandinsky"),
        (
            (prior, prior),
            "contains a KandinskyV22PriorPipeline; with this prior it must be one of KandinskyV22Pipeline",
        ),
    ):
        done = unclip("convert", "kandinsky", "--prior", given[0], "--decoder", given[1], "--out", tmp_path / "no")
        assert done.code == 1
        assert words in done.err
    wide = shutil.copytree(decoder, tmp_path / "wide")
    config = json.loads((wide / "unet" / "config.json").read_text())
    (wide / "unet" / "config.json").write_text(json.dumps(config | {"encoder_hid_dim": 24}))
    done = unclip("convert", "kandinsky", "--prior", prior, "--decoder", wide, "--out", tmp_path / "no")
    assert "the prior makes embeddings of width 16; the decoder needs 24" in done.err
    assert not (tmp_path / "no").exists()


def test_a_decoder_alone_cannot_generate(unclip, model):
    done = unclip("generate", "a cat", "--model", model.with_name("decoder"), *FEW)
    assert done.code != 0
    assert "Traceback" not in done.err
