"""Trained stages put together: both pipelines load the folder and draw."""

import dataclasses
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline
from unclip.errors import CheckpointError, ConfigError, MissingFileError, OutputExistsError
from unclip.training.assemble import PARTS, assemble
from unclip.training.clip import ClipTask
from unclip.training.diffusion import DecoderTask, PriorTask, SuperResTask

FEW = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}


def write_run(task, folder):
    task.save(folder / "model")
    return folder


@pytest.fixture
def runs(tmp_path, tiny, clip_model):
    """A run of each stage, not trained at all."""
    shutil.copytree(clip_model, tmp_path / "clip" / "model")
    last = SuperResTask(tiny("super_res", section={"only_last_step": True}))
    with torch.no_grad():
        last.network.conv_out.bias.fill_(0.5)
    return {
        "clip": tmp_path / "clip",
        "prior": write_run(PriorTask(tiny("prior")), tmp_path / "prior"),
        "decoder": write_run(DecoderTask(tiny("decoder")), tmp_path / "decoder"),
        "super_res_first": write_run(SuperResTask(tiny("super_res")), tmp_path / "super_res"),
        "super_res_last": write_run(last, tmp_path / "super_res_last"),
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_both_pipelines_load_and_draw(runs, tmp_path, dtype):
    licence = tmp_path / "licence.txt"
    licence.write_text("free")
    out = tmp_path / "out"
    assemble(**runs, out=out, dtype=dtype, defaults={"prior_guidance_scale": 2.0}, files={"LICENCE": licence})
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*PARTS, "model_index.json", "generation_defaults.json", "LICENCE"]
    )
    weights = load_file(out / "decoder" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {dtype or torch.float32}
    pipe = UnCLIPPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    first = pipe("a red circle", seed=1, prior_num_inference_steps=2, **FEW).images[0]
    assert first.size == (32, 32)
    vary = UnCLIPImageVariationPipeline.from_pretrained(out)
    vary.set_progress_bar_config(disable=True)
    assert vary(Image.new("RGB", (40, 30), "red"), seed=1, **FEW).images[0].size == (32, 32)
    assert not torch.equal(pipe.super_res_first.conv_out.bias, pipe.super_res_last.conv_out.bias)


def test_one_network_for_all_of_super_resolution(runs, tmp_path):
    del runs["super_res_last"]
    assemble(**runs, out=tmp_path / "out")
    first, last = (
        load_file(tmp_path / "out" / name / "diffusion_pytorch_model.safetensors")
        for name in ("super_res_first", "super_res_last")
    )
    assert all(torch.equal(value, last[name]) for name, value in first.items())


def test_one_stage_anew_in_a_model(runs, tmp_path, tiny):
    assemble(**runs, out=tmp_path / "old")
    decoder = write_run(DecoderTask(tiny("decoder", seed=8)), tmp_path / "decoder_more")
    assemble(**{name: tmp_path / "old" for name in runs} | {"decoder": decoder}, out=tmp_path / "new")
    for name in ("decoder", "text_proj", "prior", "image_encoder", "super_res_last"):
        old, new = (next((tmp_path / which / name).glob("*.safetensors")).read_bytes() for which in ("old", "new"))
        assert (old == new) == (name not in ("decoder", "text_proj")), name


def test_a_folder_that_is_there(runs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputExistsError):
        assemble(**runs, out=tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
    assemble(**runs, out=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()


def test_a_run_that_is_not_trained(runs, tmp_path):
    shutil.rmtree(runs["prior"] / "model")
    with pytest.raises(MissingFileError, match="train prior there first"):
        assemble(**runs, out=tmp_path / "out")


def test_a_stage_in_the_place_of_another(runs, tmp_path):
    with pytest.raises(CheckpointError, match="super_res_last"):
        assemble(**runs | {"super_res_last": runs["super_res_first"]}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stages_that_do_not_fit(runs, tmp_path, tiny):
    settings = {"projection_dim": 16}
    recipe = dataclasses.replace(tiny("clip", section=settings))
    runs["clip"] = write_run(ClipTask(recipe), tmp_path / "narrow")
    with pytest.raises(ConfigError, match="the components do not fit"):
        assemble(**runs, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".unclip-tmp*"))
