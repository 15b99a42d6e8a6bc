"""The autoregressive prior's task: what it draws and drops, its codes, and the folder that a pipeline loads."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from unclip import AutoregressivePrior, UnCLIPPipeline
from unclip.errors import ConfigError
from unclip.training.assemble import assemble
from unclip.training.task import make_task
from unclip.training.trainer import step_generator

FEW = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}


def task_of(tiny, **section):
    return make_task(tiny("prior_autoregressive", section=section))


def test_texts_and_dot_products_are_dropped_at_the_stated_rates(tiny):
    task = task_of(tiny, text_drop=0.25, dot_drop=0.2)
    batch = task.batch(0, 3000, step_generator(0, 0))
    empty = (batch["text_embeds"] - task.clip.empty.embeds).abs().amax(dim=1) < 1e-5
    untold = batch["dot_codes"] == task.stage.prior.no_dot_code
    assert empty.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert untold[empty].all()
    assert untold[~empty].float().mean().item() == pytest.approx(0.2, abs=0.03)
    told = batch["dot_codes"][~untold].bincount(minlength=4) / (~untold).sum()
    torch.testing.assert_close(told, torch.full((4,), 0.25), rtol=0, atol=0.04)
    batch = task_of(tiny, text_drop=0.0, dot_drop=0.0).batch(0, 300, step_generator(0, 0))
    assert not (batch["dot_codes"] == 4).any()
    assert len(batch["text_embeds"].unique(dim=0)) > 10


def test_codes_are_those_of_the_pictures_and_of_their_neighbourhood_with_noise(tiny):
    plain, noisy = task_of(tiny), task_of(tiny, code_noise=0.3)
    prior = plain.stage.prior
    table = prior.encode(plain.data.table)
    codes = plain.batch(0, 500, step_generator(0, 0))["codes"]
    known = {tuple(row) for row in table.tolist()}
    assert {tuple(row) for row in codes.tolist()} == known
    moved = noisy.batch(0, 500, step_generator(0, 0))["codes"]
    assert not torch.equal(moved, codes)
    embeddings, weights = plain.data.weighted()
    coordinates = (embeddings - prior.pca_mean) @ prior.pca_components.T
    spread = (weights @ (coordinates - weights @ coordinates).square()).sqrt()
    width = (prior.code_high - prior.code_low) / prior.config.num_buckets
    inner = (codes > 3) & (codes < 12)
    for k in range(3):
        shift = ((moved - codes) * width)[inner[:, k], k]
        assert shift.std().item() == pytest.approx(0.3 * spread[k].item(), rel=0.25)


def test_padding_that_no_caption_reaches_is_left_out(tiny):
    batch = task_of(tiny).batch(0, 16, step_generator(0, 0))
    longest = batch["text_mask"].sum(dim=1).max()
    assert batch["text_mask"].shape[1] == batch["text_hidden_states"].shape[1] == longest < 12


def test_the_sheet_and_the_folder(tiny, tmp_path):
    task = task_of(tiny)
    task.sample_sheet(tmp_path / "0001.png")
    assert (tmp_path / "0001.txt").read_text().startswith("cosine to the true embedding ")
    task.save(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["prior"]
    read = AutoregressivePrior.from_pretrained(tmp_path / "model" / "prior")
    assert torch.equal(read.encode(task.data.table), task.stage.prior.encode(task.data.table))


def test_a_start_keeps_its_codes(tiny, tmp_path):
    first = task_of(tiny)
    first.stage.prior.code_low.sub_(1.0)
    first.save(tmp_path)
    second = make_task(tiny("prior_autoregressive", seed=9, start_from=tmp_path))
    saved = load_file(tmp_path / "prior" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in second.stage.prior.state_dict().items())


def test_more_components_than_the_data_have(tiny):
    model = tiny("prior_autoregressive").prior_autoregressive.model | {"num_components": 30}
    with pytest.raises(ConfigError, match="num_components 30: reduce num_components"):
        task_of(tiny, model=model)


def test_settings_outside_their_limits(tiny):
    for bad in ({"text_drop": 1.5}, {"dot_drop": -0.1}, {"code_noise": -1.0}):
        with pytest.raises(ConfigError, match=rf"prior_autoregressive\.{next(iter(bad))} is"):
            tiny("prior_autoregressive", section=bad)
    for change, words in (
        ({}, r"must not have a section \[prior\]"),
        ({"prior": None}, r"needs a section \[prior_auto"),
    ):
        with pytest.raises(ConfigError, match=words):
            dataclasses.replace(tiny("prior"), stage="prior_autoregressive", **change)


def test_assembled_into_a_model_that_draws(tiny, tmp_path, clip_model):
    shutil.copytree(clip_model, tmp_path / "clip" / "model")
    recipes = {
        "prior": "prior_autoregressive",
        "decoder": "decoder",
        "super_res_first": "super_res",
    }
    runs = {"clip": tmp_path / "clip"}
    for name, stage in recipes.items():
        make_task(tiny(stage)).save(tmp_path / name / "model")
        runs[name] = tmp_path / name
    assemble(**runs, out=tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["prior"] == ["unclip", "AutoregressivePrior"]
    assert "prior_scheduler" not in index
    assert not (tmp_path / "out" / "prior_scheduler").exists()
    pipe = UnCLIPPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", seed=1, **FEW).images[0].size == (32, 32)
    again = {name: tmp_path / "out" for name in runs}  # a model's folder serves as a run, whichever prior it has
    assemble(**again, out=tmp_path / "again")
    assert UnCLIPPipeline.from_pretrained(tmp_path / "again").prior_scheduler is None
