"""Trained stages put together: both pipelines load the folder and draw."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from unclip import UnCLIPImageVariationPipeline, UnCLIPPipeline
from unclip.errors import CheckpointError, ConfigError, InputError, MissingFileError, OutputExistsError
from unclip.training.assemble import PARTS, assemble
from unclip.training.clip import ClipTask
from unclip.training.task import make_task
from unclip.training.trainer import Trainer

FEW = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}


def write_run(task, folder):
    task.save(folder / "model")
    return folder


@pytest.fixture
def runs(tmp_path, tiny, clip_model):
    """A run of each stage, not trained at all."""
    shutil.copytree(clip_model, tmp_path / "clip" / "model")
    last = make_task(tiny("super_res", section={"only_last_step": True}))
    with torch.no_grad():
        last.network.conv_out.bias.fill_(0.5)
    return {
        "clip": tmp_path / "clip",
        "prior": write_run(make_task(tiny("prior")), tmp_path / "prior"),
        "decoder": write_run(make_task(tiny("decoder")), tmp_path / "decoder"),
        "super_res_first": write_run(make_task(tiny("super_res")), tmp_path / "super_res"),
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
    decoder = write_run(make_task(tiny("decoder", seed=8)), tmp_path / "decoder_more")
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
    with pytest.raises(MissingFileError, match="train the stage prior first"):
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


# ---- what sizes do not tell ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type is 'v_prediction' and 'epsilon'"),
        ({"beta_schedule": "linear", "beta_end": 0.01}, "beta_schedule .* beta_end is 0.02 and 0.01"),
        ({"num_timesteps": 500}, "num_timesteps is 1000 and 500"),
    ],
)
def test_a_last_step_of_another_process(runs, tmp_path, tiny, changes, words):
    process = dataclasses.replace(tiny("super_res").super_res.process, **changes)
    recipe = tiny("super_res", section={"only_last_step": True, "process": process})
    runs["super_res_last"] = write_run(make_task(recipe), tmp_path / "other")
    with pytest.raises(ConfigError, match=rf"super_res_last \(.*other\) share a scheduler, .*: {words}"):
        assemble(**runs, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_last_step_that_was_to_be_drawn_otherwise(runs, tmp_path, tiny):
    """The sampler determines the variance and the clipping, and a network may have no scheduler."""
    process = dataclasses.replace(tiny("super_res").super_res.process, variance_type="fixed_small", clip_range=2.0)
    recipe = tiny("super_res", section={"only_last_step": True, "process": process})
    runs["super_res_last"] = write_run(make_task(recipe), tmp_path / "other")
    assemble(**runs, out=tmp_path / "out")
    shutil.rmtree(runs["super_res_last"] / "model" / "super_res_scheduler")
    assemble(**runs, out=tmp_path / "again")


UNDER_CLIP = ("prior", "decoder")


@pytest.fixture
def other_clip(tmp_path, tiny):
    """Another CLIP of the same sizes."""
    return write_run(ClipTask(tiny("clip", seed=9)), tmp_path / "other_clip")


@pytest.fixture
def trained(runs, tmp_path, tiny):
    """The same with a state: prior and decoder have been trained."""
    for stage in UNDER_CLIP:
        recipe = tiny(stage, steps=1, batch_size=4)
        Trainer(make_task(recipe), recipe, tmp_path / f"{stage}_run").run()
    return runs | {stage: tmp_path / f"{stage}_run" for stage in UNDER_CLIP}


def test_runs_under_another_clip(trained, runs, tmp_path, other_clip):
    assemble(**trained, out=tmp_path / "right")
    for stage in UNDER_CLIP:
        one = runs | {stage: trained[stage], "clip": other_clip}
        with pytest.raises(ConfigError, match=rf"{stage} \(.*_run\) was trained with another CLIP .*other_clip"):
            assemble(**one, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # A model's folder does not say it, an assembled one's CLIP is the same, and a broken state says nothing.
    models = {stage: trained[stage] / "model" for stage in UNDER_CLIP}
    assemble(**trained | models | {"clip": other_clip}, out=tmp_path / "unknown")
    assemble(**trained | {"clip": tmp_path / "right"}, out=tmp_path / "again")
    for stage in UNDER_CLIP:
        (trained[stage] / "state" / "state.json").write_text("{")
    assemble(**trained | {"clip": other_clip}, out=tmp_path / "broken")


@pytest.mark.parametrize("stage", list(UNDER_CLIP))
def test_a_start_under_another_clip(trained, tmp_path, tiny, other_clip, stage):
    section = {"clip": other_clip / "model"}
    start = trained[stage] / "model"
    with pytest.warns(UserWarning, match="was trained with another CLIP .* must adapt to it"):
        make_task(tiny(stage, start_from=start, section=section))
    make_task(tiny(stage, start_from=start))
    assemble(**trained, out=tmp_path / "whole")
    with pytest.warns(UserWarning, match="whole was trained with another CLIP"):
        make_task(tiny(stage, start_from=tmp_path / "whole", section=section))
    make_task(tiny(stage, start_from=tmp_path / "whole"))


# ---- further super-resolution stages ----


@pytest.fixture
def more(tmp_path, tiny):
    """Runs of two further stages, 32 → 64 → 128 px."""
    runs = []
    for seed, size in ((21, 64), (22, 128)):
        model = tiny("super_res").super_res.model | {"sample_size": size}
        task = make_task(tiny("super_res", seed=seed, section={"model": model, "crop_size": 16}))
        runs.append(write_run(task, tmp_path / f"to_{size}"))
    return runs


def test_further_stages(runs, more, tmp_path):
    defaults = {"super_res_num_inference_steps": [2, 1, 1]}
    assemble(**runs, super_res_more=more, out=tmp_path / "out", defaults=defaults)
    pipe = UnCLIPPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert list(pipe.cascade) == ["super_res", "super_res_2", "super_res_3"]
    few = {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 2}
    assert pipe("a red circle", seed=1, **pipe.recommended, **few).images[0].size == (128, 128)
    vary = UnCLIPImageVariationPipeline.from_pretrained(tmp_path / "out")
    assert list(vary.cascade) == list(pipe.cascade)
    written = load_file(tmp_path / "out" / "super_res_3_first" / "diffusion_pytorch_model.safetensors")
    trained = load_file(more[1] / "model" / "super_res_first" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, written[name]) for name, value in trained.items())


def test_further_stages_out_of_a_model(runs, more, tmp_path):
    assemble(**runs, super_res_more=more, out=tmp_path / "old")
    shutil.copytree(tmp_path / "old" / "super_res_3_first", tmp_path / "old" / "super_res_3_last")
    model = {name: tmp_path / "old" for name in runs}
    assemble(**model, super_res_more=[tmp_path / "old"] * 2, out=tmp_path / "new")
    pipe = UnCLIPPipeline.from_pretrained(tmp_path / "new")
    assert pipe.cascade["super_res_3"].first.config.sample_size == 128
    assert pipe.super_res_2_last is None
    assert pipe.super_res_3_last is not None


def test_a_stage_serves_again_at_another_size(runs, tmp_path):
    assemble(**runs, out=tmp_path / "old")
    model = {name: tmp_path / "old" for name in runs}
    assemble(**model, super_res_more=[(tmp_path / "old", 64), (tmp_path / "old", 256)], out=tmp_path / "new")
    pipe = UnCLIPPipeline.from_pretrained(tmp_path / "new")
    sizes = {stage: networks.first.config.sample_size for stage, networks in pipe.cascade.items()}
    assert sizes == {"super_res": 32, "super_res_2": 64, "super_res_3": 256}
    assert pipe.super_res_3_last.config.sample_size == 256
    first, again = pipe.super_res_first.state_dict(), pipe.super_res_3_first.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize("size", [0, 32, 65_537])
def test_sizes_that_enlarge_nothing(runs, tmp_path, size):
    with pytest.raises(ConfigError, match="sample_size"):
        assemble(**runs, super_res_more=[(runs["super_res_first"], size)], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_by_its_name(runs, tmp_path, monkeypatch):
    assemble(**runs, out=tmp_path / "old")
    monkeypatch.setattr("unclip.training.assemble.resolve", {"unclip-emoji": tmp_path / "old"}.__getitem__)
    names = dict.fromkeys(runs, Path("unclip-emoji"))
    assemble(**names, out=tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in (tmp_path / "old").iterdir())


def test_further_stages_that_do_not_fit(runs, more, tmp_path):
    with pytest.raises(ConfigError, match=r"super_res_3_first.sample_size is 64, no more than the 128"):
        assemble(**runs, super_res_more=more[::-1], out=tmp_path / "out")
    with pytest.raises(MissingFileError, match="train the stage super_res_2 first"):
        assemble(**runs, super_res_more=[runs["prior"]], out=tmp_path / "out")
    with pytest.raises(InputError, match="there are 9 further super-resolution stages; at most 8"):
        assemble(**runs, super_res_more=more[:1] * 9, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
