"""Each task: it learns, its batches are functions of (seed, step), and what it saves loads here and elsewhere."""

import dataclasses
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

import unclip
from unclip.clip.encoders import TextEncoder
from unclip.clip.pretrained import read_clip
from unclip.errors import ConfigError, DataError
from unclip.training import conditions, diffusion
from unclip.training.clip import ClipTask, retrieval_ranks, shift_and_zoom
from unclip.training.conditions import text_batch
from unclip.training.diffusion import degrade
from unclip.training.recipe import TASKS, SuperResSettings, read_recipe
from unclip.training.task import make_task
from unclip.training.trainer import step_generator

from ..rounding import TIMES, UNIT

STAGES = pytest.mark.parametrize("stage", list(TASKS))


def mean_loss(task, seeds=range(1000, 1008)) -> float:
    """Over the same eight batches, which no training step of the test draws."""
    with torch.no_grad():
        return sum(task.module(task.batch(seed, 16, step_generator(0, seed)))["loss"].item() for seed in seeds) / len(
            seeds
        )


@STAGES
def test_it_learns(tiny, stage):
    task = make_task(tiny(stage))
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=2e-3)
    before = mean_loss(task)
    for step in range(60):
        loss = task.module(task.batch(step, 16, step_generator(0, step)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wanted = {"clip": 0.7, "prior": 0.8, "prior_autoregressive": 0.8, "decoder": 0.7, "super_res": 0.6}[stage]
    assert mean_loss(task) < wanted * before


@STAGES
def test_batches_and_weights_are_functions_of_the_seed(tiny, stage):
    one, other = make_task(tiny(stage)), make_task(tiny(stage))
    for (name, mine), theirs in zip(one.module.state_dict().items(), other.module.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    other.batch(0, 8, step_generator(3, 0))  # what was drawn before does not matter
    mine, theirs = one.batch(7, 8, step_generator(3, 7)), other.batch(7, 8, step_generator(3, 7))
    later = one.batch(8, 8, step_generator(3, 8))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) and len(mine[name]) == 8 for name in mine)
    assert any(mine[name].shape != later[name].shape or not torch.equal(mine[name], later[name]) for name in mine)


@STAGES
def test_a_process_encodes_its_own_rows_alone(tiny, stage, monkeypatch):
    task = make_task(tiny(stage))
    own = torch.tensor([5, 1, 6])
    every = task.batch(3, 8, step_generator(0, 3))
    encoded = []
    encode = TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder, "encode", lambda encoder, texts: encoded.append(len(texts)) or encode(encoder, texts)
    )
    mine = task.batch(3, 8, step_generator(0, 3), own)
    assert encoded == ([] if stage in ("clip", "super_res") else [3])
    assert mine.keys() == every.keys()
    for name, value in mine.items():
        wanted = every[name][own]
        torch.testing.assert_close(value, wanted[:, : value.shape[1]] if name.startswith("text_") else wanted)


@pytest.mark.parametrize("stage", ["prior", "prior_autoregressive", "decoder"])
def test_the_frozen_clip_lies_where_is_computed(tiny, stage, monkeypatch):
    moved = []
    for kind in (CLIPTextModelWithProjection, CLIPVisionModelWithProjection):
        monkeypatch.setattr(kind, "to", lambda module, device: moved.append((type(module), device)) or module)
    device = torch.device("cpu", 0)
    monkeypatch.setattr(conditions, "computing_device", lambda: device)
    make_task(tiny(stage))
    assert moved == [(CLIPTextModelWithProjection, device), (CLIPVisionModelWithProjection, device)]


def test_the_frozen_clip_lies_where_it_is_asked_to(clip_model, monkeypatch):
    monkeypatch.setattr(conditions, "computing_device", lambda: torch.device("meta"))
    clip = conditions.FrozenClip(clip_model, device="cpu")
    pictures = torch.zeros(2, 3, clip.image_size, clip.image_size)
    assert clip.embed(pictures).isfinite().all()


@STAGES
def test_what_is_saved_loads_again(tiny, stage, tmp_path):
    task = make_task(tiny(stage))
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(0.01)
    task.save(tmp_path)
    parts = {
        "clip": {"text_encoder": task.module.text, "image_encoder": task.module.image} if stage == "clip" else {},
        "prior": {"prior": "PriorTransformer"},
        "prior_autoregressive": {"prior": "AutoregressivePrior"},
        "decoder": {"decoder": "UNet2DConditionModel", "text_proj": "UnCLIPTextProjModel"},
        "super_res": {"super_res_first": "UNet2DModel"},
    }[stage]
    for name, kind in parts.items():
        if stage == "clip":
            again, own = type(kind).from_pretrained(tmp_path / name), kind
        else:
            again = getattr(unclip, kind).from_pretrained(tmp_path / name)
            own = getattr(task.module, "network" if stage == "super_res" else name)
        assert_same(again, own)
        if stage != "clip" and hasattr(diffusers, kind):
            assert_same(getattr(diffusers, kind).from_pretrained(tmp_path / name), own)
    if stage == "prior_autoregressive":
        assert [path.name for path in tmp_path.iterdir()] == ["prior"]
    elif stage != "clip":
        scheduler = diffusers.UnCLIPScheduler.from_pretrained(tmp_path / f"{stage}_scheduler")
        process = getattr(task.settings, "process")  # noqa: B009
        assert scheduler.config.prediction_type == process.prediction_type
        assert scheduler.config.clip_sample_range == process.clip_range
    else:
        assert (tmp_path / "tokenizer" / "tokenizer_config.json").is_file()
        settings = json.loads((tmp_path / "feature_extractor" / "preprocessor_config.json").read_text())
        assert settings["size"] == settings["crop_size"] == {"height": 32, "width": 32}
        assert settings["do_center_crop"] is False


def assert_same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = dict(one.state_dict()), dict(other.state_dict())
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


@STAGES
def test_sheets(tiny, stage, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion, "SHEET_STEPS", 2)
    task = make_task(tiny(stage))
    task.sample_sheet(tmp_path / "0001.png")
    if stage in ("clip", "prior", "prior_autoregressive"):
        text = (tmp_path / "0001.txt").read_text()
        assert ("trained: top-1" in text and "held out: top-1" in text) or "cosine" in text
    else:
        assert (tmp_path / "0001.png").stat().st_size > 200


# -- CLIP ----------------------------------------------------------------------------------------------------------


def test_contrastive_loss_takes_one_picture_twice_as_one(tiny):
    task = ClipTask(tiny("clip", section={"reconstruction_weight": 0.0}))
    batch = task.batch(0, 2, step_generator(0, 0))
    twice = {name: torch.cat([value[:1], value[:1]]) for name, value in batch.items()}
    found = task.module(twice)
    assert found["in_batch_retrieval"] == 1.0
    assert found["loss"].item() == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)
    assert "reconstruction" not in found
    assert not hasattr(task.module, "thumbnail")


def test_ranks(tiny):
    task = ClipTask(tiny("clip"))
    rows = task.source.examples(100)
    ranks = retrieval_ranks(task.module, task.tokenizer, rows.captions, rows.images[32])
    assert ranks.shape == (10,)
    assert 0 <= ranks.min() <= ranks.max() <= 9


def test_a_judge_sees_everything_and_has_no_held_out_part(tiny, tmp_path):
    task = ClipTask(tiny("clip", section={"include_held_out": True}))
    assert len(task.source.records) == 12
    assert len(ClipTask(tiny("clip")).source.records) == 10


def test_without_held_out_pictures_the_sheet_says_so_by_silence(tiny, tmp_path, pictures):
    lines = [json.loads(line) | {"held_out": False} for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        (tmp_path / line["file_name"]).write_bytes((pictures / line["file_name"]).read_bytes())
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = ClipTask(dataclasses.replace(tiny("clip"), data=tmp_path))
    task.sample_sheet(tmp_path / "1.png")
    assert "held out" not in (tmp_path / "1.txt").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_heads": 3}, "hidden_size .* is 32"),
        ({"image_heads": 3}, "hidden_size .* is 32"),
        ({"patch_size": 7}, "image_size"),
    ],
)
def test_clip_sizes_that_do_not_fit(tiny, change, words):
    with pytest.raises(ConfigError, match=words):
        ClipTask(tiny("clip", section=change))


def test_a_clip_of_any_configuration(tiny, tmp_path):
    section = {
        "text_config": {"hidden_size": 24, "intermediate_size": 40, "hidden_act": "gelu"},
        "image_config": {"layer_norm_eps": 1e-4, "intermediate_size": 56},
    }
    task = ClipTask(tiny("clip", section=section))
    text, image = task.module.text.config, task.module.image.config
    assert (text.hidden_size, text.intermediate_size, text.hidden_act) == (24, 40, "gelu")
    assert (image.layer_norm_eps, image.intermediate_size) == (1e-4, 56)
    task.save(tmp_path / "clip")
    assert read_clip(tmp_path / "clip").text_encoder.config.hidden_size == 24
    with pytest.raises(ConfigError, match=r"text_config is {} there and {.*} here"):
        ClipTask(dataclasses.replace(tiny("clip", section=section), start_from=tmp_path / "clip"))


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("text_config", "num_hidden_layers", 3, "clip.text_config.num_hidden_layers cannot be set.*hidden_act"),
        ("image_config", "num_channels", 4, "clip.image_config.num_channels cannot be set"),
        (
            "image_config",
            "windows",
            4,
            "clip.image_config.windows cannot be set; CLIPVisionConfig may have .*hidden_act",
        ),
        ("text_config", "hidden_size", "wide", "hidden_size in .clip.text_config. is 'wide'"),
        ("text_config", "hidden_size", 7, "hidden_size .* is 7; it must be a multiple"),
        ("text_config", "intermediate_size", 0, "intermediate_size in .* is 0"),
        ("text_config", "hidden_act", "swoosh", "hidden_act in .* is 'swoosh'.*quick_gelu"),
        ("image_config", "hidden_act", ["gelu"], "hidden_act in .* is"),
        ("image_config", "initializer_range", -1.0, "cannot be built: normal expects std"),
        ("image_config", "attention_dropout", "much", "must be a number from 0 to below 1"),
    ],
)
def test_settings_that_no_clip_has(tiny, section, key, value, words):
    with pytest.raises(ConfigError, match=words):
        ClipTask(tiny("clip", section={section: {key: value}}))


def test_shift_and_zoom():
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    same = shift_and_zoom(images, torch.Generator().manual_seed(0), shift=0.0, zoom=0.0)
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)
    moved = shift_and_zoom(images, torch.Generator().manual_seed(0))
    assert not torch.allclose(moved, images, atol=0.1)
    white = shift_and_zoom(torch.ones(2, 3, 16, 16), torch.Generator().manual_seed(1), shift=0.5)
    torch.testing.assert_close(white, torch.ones(2, 3, 16, 16))


# -- prior and decoder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["prior", "decoder", "super_res"])
def test_the_first_weights_hang_on_the_recipes_seed_alone(tiny, stage):
    states = []
    for seed, chance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(chance)
        states.append(make_task(tiny(stage, seed=seed)).module.state_dict())
    first, again, other = states
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_whitening(tiny):
    task = make_task(tiny("prior"))
    weights = task.data.source.weights / task.data.source.weights.sum()
    whitened = task.stage.prior.whiten(task.data.table)
    mean = (weights[:, None] * whitened).sum(0)
    spread = (weights[:, None] * (whitened - mean) ** 2).sum(0).sqrt()
    # Rounding of the table, in units of the spread by which it is divided.
    lost = TIMES * UNIT * float((task.data.table.abs().amax(0) / task.stage.prior.clip_std).max())
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=lost, rtol=0)
    torch.testing.assert_close(spread, torch.ones_like(spread), atol=lost, rtol=0)
    returned = task.stage.finish(whitened)
    torch.testing.assert_close(returned, task.data.table, atol=TIMES * UNIT * float(returned.abs().max()), rtol=0)
    assert not task.module.prior.clip_mean.requires_grad
    assert not task.module.prior.clip_std.requires_grad


def test_the_prior_drops_captions_at_the_stated_rate(tiny):
    task = make_task(tiny("prior", section={"text_drop": 0.25}))
    assert dropped(task, 2000) == pytest.approx(0.25, abs=0.04)
    assert dropped(make_task(tiny("prior", section={"text_drop": 0.0})), 200) == 0
    assert dropped(make_task(tiny("prior", section={"text_drop": 1.0})), 200) == 1


def test_the_decoder_drops_captions_and_embeddings_each_for_itself(tiny):
    task = make_task(tiny("decoder", section={"text_drop": 0.5, "image_drop": 0.2}))
    batch = task.batch(0, 2000, step_generator(0, 0))
    empty = is_empty(task, batch)
    gone = ~batch["given"]
    assert empty.float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert gone.float().mean().item() == pytest.approx(0.2, abs=0.04)
    assert (empty & gone).float().mean().item() == pytest.approx(0.1, abs=0.03)


def dropped(task, count) -> float:
    return is_empty(task, task.batch(0, count, step_generator(0, 0))).float().mean().item()


def is_empty(task, batch):
    return (batch["text_embeds"] - task.clip.empty.embeds).abs().amax(dim=1) < 1e-5


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_padding_is_left_out_and_changes_nothing(tiny, stage):
    task = make_task(tiny(stage, section={"text_drop": 0.2}))
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        text = task.clip.text.encode(["red", "a blue circle", ""])
    batch = task.batch(0, 3, step_generator(0, 0))
    short = text_batch(text)
    assert short["text_mask"].shape[1] == 8 < text.mask.shape[1] == 12
    assert short["text_mask"].sum() == text.mask.sum()
    whole = {"text_embeds": text.embeds, "text_hidden_states": text.hidden_states, "text_mask": text.mask}
    losses = []
    for words in (short, whole):
        task.module.zero_grad()
        losses.append(task.module(batch | words)["loss"])
        losses[-1].backward()
        gradients = {name: p.grad.clone() for name, p in task.module.named_parameters() if p.grad is not None}
        if words is short:
            wanted = gradients
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    assert wanted.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(wanted[name], gradient, rtol=1e-3, atol=1e-5)


def test_embeddings_are_jittered_by_their_spread(tiny):
    plain = make_task(tiny("decoder", section={"embedding_noise": 0.0})).batch(0, 2000, step_generator(0, 0))
    task = make_task(tiny("decoder", section={"embedding_noise": 0.5}))
    jitter = task.batch(0, 2000, step_generator(0, 0))["image_embedding"] - plain["image_embedding"]
    torch.testing.assert_close(jitter.std(dim=0), 0.5 * task.spread[0], rtol=0.1, atol=1e-6)
    # everything else is drawn alike
    assert torch.equal(task.batch(0, 2000, step_generator(0, 0))["noise"], plain["noise"])


def test_without_a_clip(tiny, tmp_path):
    with pytest.raises(ConfigError, match="train that stage first"):
        make_task(tiny("prior", section={"clip": tmp_path}))


def test_learned_variance_needs_twice_the_channels(tiny):
    recipe = tiny("decoder")
    process = dataclasses.replace(recipe.decoder.process, variance_type="learned_range")
    with pytest.raises(ConfigError, match=r"out_channels is 3.*needs 6"):
        make_task(tiny("decoder", section={"process": process}))
    model = recipe.decoder.model | {"out_channels": 6}
    task = make_task(tiny("decoder", section={"process": process, "model": model}))
    assert task.module(task.batch(0, 4, step_generator(0, 0)))["loss"].isfinite()


def test_a_time_embedding_of_a_width_of_its_own(tiny):
    task = make_task(tiny("decoder", section={"model": tiny("decoder").decoder.model | {"time_embedding_dim": 40}}))
    assert task.stage.text_proj.config.time_embed_dim == 40
    assert task.module(task.batch(0, 2, step_generator(0, 0)))["loss"].isfinite()


def test_everything_held_out(tiny, tmp_path, pictures):
    line = json.loads((pictures / "metadata.jsonl").read_text().splitlines()[0]) | {"held_out": True}
    (tmp_path / line["file_name"]).write_bytes((pictures / line["file_name"]).read_bytes())
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match="none of 1 pictures can be used for training"):
        ClipTask(dataclasses.replace(tiny("clip"), data=tmp_path))


# -- super-resolution ----------------------------------------------------------------------------------------------


def settings(**changes):
    return SuperResSettings(**{"low_res_size": 8, "crop_size": 16, "blur_share": 0.0, "noise": 0.0, **changes})


def test_degrade_without_anything_is_the_mean_of_each_tile():
    large = torch.rand(2, 3, 32, 32) * 2 - 1
    small = degrade(large, settings(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(small, large.unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(-1, -2)))


def test_degrade_blurs_a_share():
    large = torch.zeros(400, 3, 32, 32)
    large[:, :, 16:20, 16:20] = 1.0
    small = degrade(large, settings(blur_share=0.3), torch.Generator().manual_seed(0))
    blurred = small[:, 0, 4, 4] < 0.99
    assert blurred.float().mean().item() == pytest.approx(0.3, abs=0.07)
    edge = torch.tensor(-0.5 / 0.6**2).exp()
    line = torch.stack([edge, torch.ones(()), edge]) / (1 + 2 * edge)
    first = small[blurred][0, 0, 3:6, 3:6]
    torch.testing.assert_close(first, line[:, None] * line[None, :])
    assert small[blurred][0].sum().item() == pytest.approx(3.0, abs=1e-4)  # nothing is lost


def test_degrade_adds_noise_up_to_a_strength():
    small = degrade(torch.zeros(500, 3, 32, 32), settings(noise=0.2), torch.Generator().manual_seed(0))
    spread = small.flatten(1).std(dim=1)
    assert spread.max() < 0.25
    assert spread.mean().item() == pytest.approx(0.1, abs=0.02)
    assert degrade(torch.ones(9, 3, 32, 32), settings(noise=0.2), torch.Generator()).max() <= 1


def test_crops_lie_where_their_enlarged_twins_lie(tiny):
    task = make_task(tiny("super_res", section={"noise": 0.0, "blur_share": 0.0}))
    batch = task.batch(0, 16, step_generator(0, 0))
    assert batch["x0"].shape == batch["enlarged"].shape == (16, 3, 16, 16)
    near = (batch["x0"] - batch["enlarged"]).pow(2).mean()
    far = (batch["x0"] - batch["enlarged"].roll(1, 0)).pow(2).mean()
    assert near < 0.3 * far


def test_the_last_step_alone(tiny, tmp_path):
    task = make_task(tiny("super_res", section={"only_last_step": True}))
    assert task.batch(0, 8, step_generator(0, 0))["t"].eq(0).all()
    task.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["super_res_last", "super_res_scheduler"]


def test_a_further_stage_is_super_resolution_of_larger_pictures(tiny, tmp_path):
    """128 → 512 px on crops and the paper's linear schedule: the same task with other numbers."""
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for index in range(2):
        rough = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        rough.resize((512, 512), Image.Resampling.BICUBIC).save(data / f"{index}.png")
    rows = [{"file_name": f"{index}.png", "concept": str(index), "captions": [str(index)]} for index in range(2)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny("super_res", data=data)
    settings = {
        "model": recipe.super_res.model | {"sample_size": 512},
        "process": dataclasses.replace(recipe.super_res.process, beta_schedule="linear"),
        "low_res_size": 128,
        "crop_size": 64,
    }
    task = make_task(tiny("super_res", data=data, section=settings))
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=2e-3)
    losses = []
    for step in range(40):
        batch = task.batch(step, 4, step_generator(0, step))
        assert batch["x0"].shape == batch["enlarged"].shape == (4, 3, 64, 64)
        losses.append(task.module(batch)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert torch.stack(losses[-8:]).mean() < 0.8 * torch.stack(losses[:4]).mean()
    task.save(tmp_path / "model")
    scheduler = unclip.UnCLIPScheduler.from_pretrained(tmp_path / "model" / "super_res_scheduler")
    assert scheduler.config["beta_schedule"] == "linear"
    assert unclip.UNet2DModel.from_pretrained(tmp_path / "model" / "super_res_first").config.sample_size == 512


NETWORKS = {
    "prior": ["prior"],
    "prior_autoregressive": ["prior"],
    "decoder": ["decoder", "text_proj"],
    "super_res": ["super_res_first"],
}


@pytest.mark.parametrize("stage", list(NETWORKS))
def test_a_model_to_start_from(tiny, tmp_path, stage):
    first = make_task(tiny(stage))
    if stage == "prior":
        first.stage.prior.clip_mean.add_(1.0)  # the whitening is what it learned with, not this data's
    first.save(tmp_path)
    task = make_task(tiny(stage, seed=99, start_from=tmp_path))
    saved = {}
    for name in NETWORKS[stage]:
        file = tmp_path / name / "diffusion_pytorch_model.safetensors"
        prefix = "network" if stage == "super_res" else name
        saved |= {f"{prefix}.{key}": value for key, value in load_file(file).items()}
    found = task.module.state_dict()
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    frozen = {name for name, parameter in task.module.named_parameters() if not parameter.requires_grad}
    tables = ("pca_mean", "pca_components", "code_low", "code_high", "dot_edges")
    statistics = {"prior": ("clip_mean", "clip_std"), "prior_autoregressive": tables}.get(stage, ())
    assert frozen == {f"prior.{name}" for name in statistics}
    with torch.no_grad():
        batch = first.batch(0, 8, step_generator(0, 0))
        assert torch.equal(first.module(batch)["loss"], task.module(batch)["loss"])


def test_a_last_step_to_start_from(tiny, tmp_path):
    for last in (False, True):
        make_task(tiny("super_res", seed=1 + last, section={"only_last_step": last})).save(tmp_path)
        task = make_task(tiny("super_res", section={"only_last_step": True}, start_from=tmp_path))
        name = "super_res_last" if last else "super_res_first"
        assert_same(task.network, unclip.UNet2DModel.from_pretrained(tmp_path / name))


def test_a_start_of_another_size(tiny, tmp_path):
    make_task(tiny("super_res")).save(tmp_path)
    model = tiny("super_res").super_res.model | {"layers_per_block": 3}
    with pytest.raises(ConfigError, match=r"super_res_first .*layers_per_block is \d there and 3 here"):
        make_task(tiny("super_res", section={"model": model}, start_from=tmp_path))


def test_crops_larger_than_the_picture(tiny):
    with pytest.raises(ConfigError, match="crop_size is 64"):
        make_task(tiny("super_res", section={"crop_size": 64}))


def test_a_decoder_forgets_its_text(tiny, tmp_path):
    model = tmp_path / "model"
    first = make_task(tiny("decoder"))
    first.save(model)
    for part in ("text_encoder", "image_encoder", "tokenizer", "feature_extractor"):
        shutil.copytree(first.clip.folder / part, model / part)
    with torch.no_grad():
        for parameter in first.module.parameters():
            parameter.normal_(std=0.1)
    first.save(model)
    task = make_task(tiny("decoder", start_from=model, section={"forget_text": True}))
    text = task.clip.text.encode(["a red circle", "a blue bar", ""])
    condition = {"image_embeddings": torch.zeros(3, task.clip.width), "given": None}
    tokens, addition = task.stage.text_proj(
        **condition, prompt_embeds=text.embeds, text_encoder_hidden_states=text.hidden_states
    )
    _, wanted = first.stage.text_proj(
        **condition, prompt_embeds=text.embeds, text_encoder_hidden_states=text.hidden_states
    )
    torch.testing.assert_close(addition, wanted[2:].expand(3, -1))  # as of the empty caption
    torch.testing.assert_close(tokens[0], tokens[2])
    loss = task.module(task.batch(0, 8, step_generator(0, 0)))["loss"]
    loss.backward()
    assert task.stage.text_proj.embedding_proj.weight.grad.abs().sum() > 0


def test_nothing_to_forget(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('stage = "decoder"\ndata = "d"\n[decoder]\nforget_text = true\n')
    with pytest.raises(ConfigError, match=r"decoder\.forget_text needs start_from"):
        read_recipe(path)


def test_texts_of_one_length_together(tiny):
    task = make_task(tiny("clip"))
    texts = ["red", "a red circle", "a picture of a blue bar", "", "a bar", "a picture of an orange circle"]
    for pad in (task.tokenizer.pad_token_id, 0):  # as most tokenizers pad, and as some do
        ids = task.tokenizer(texts, padding=True, return_tensors="pt")
        ids = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, pad)
        torch.testing.assert_close(task.module._read(ids), task.module.text(input_ids=ids).text_embeds)
