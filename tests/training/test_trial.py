"""Settings that do not fit each other or into memory are refused before any data are read."""

import dataclasses
import time

import psutil
import pytest
import torch

from unclip.errors import ConfigError
from unclip.training import task as task_module
from unclip.training.dry_run import kept_bytes
from unclip.training.recipe import TASKS
from unclip.training.task import make_task


def refused(tiny, tmp_path, stage: str, table: str, settings: dict, words: str) -> None:
    """Runs a recipe whose data do not exist, and must not be read."""
    recipe = tiny(stage)
    section = getattr(recipe, stage)
    changed = settings if not table else {table: getattr(section, table) | settings}
    recipe = dataclasses.replace(recipe, data=tmp_path / "no-data", **{stage: dataclasses.replace(section, **changed)})
    begun = time.perf_counter()
    with pytest.raises(ConfigError, match=words):
        make_task(recipe)
    assert time.perf_counter() - begun < 3  # a second, and the shared machine's moods


@pytest.mark.parametrize(
    ("stage", "table", "settings", "words"),
    [
        ("prior", "model", {"embedding_dim": 7}, "do not fit"),
        ("prior", "model", {"num_embeddings": 7}, "do not fit"),
        ("prior", "model", {"additional_embeddings": 9}, "do not fit"),
        ("prior", "model", {"clip_embed_dim": 7}, "do not fit"),
        ("prior", "model", {"encoder_hid_proj_type": None, "attention_head_dim": 8}, "do not fit"),
        ("prior", "model", {"num_attention_heads": []}, r"num_attention_heads is \(\)"),
        ("prior", "model", {"num_layers": [1, 2]}, "num_layers"),
        ("prior", "model", {"dropout": 2.0}, "dropout is 2.0"),
        ("prior", "model", {"num_embeddings": 10**9}, "num_embeddings is 1000000000"),
        ("prior_autoregressive", "model", {"embedding_dim": 7}, "do not fit"),
        ("prior_autoregressive", "model", {"num_components": 33}, "num_components"),
        ("prior_autoregressive", "model", {"num_buckets": [3]}, "num_buckets"),
        ("decoder", "model", {"in_channels": 4, "out_channels": 4}, "do not fit"),
        ("decoder", "model", {"sample_size": 7}, "do not fit"),
        ("decoder", "model", {"sample_size": []}, r"sample_size is \(\)"),
        ("decoder", "model", {"class_embed_type": None, "cross_attention_dim": [24]}, "cross_attention_dim"),
        ("decoder", "model", {"layers_per_block": [1]}, "layers_per_block"),
        ("decoder", "model", {"layers_per_block": 200}, "at most 64 layers in all"),
        ("decoder", "model", {"act_fn": []}, "act_fn"),
        ("decoder", "model", {"down_block_types": []}, "down_block_types"),
        ("decoder", "text_proj", {"clip_embeddings_dim": 7}, "do not fit"),
        ("decoder", "text_proj", {"time_embed_dim": 7}, "do not fit"),
        ("decoder", "text_proj", {"cross_attention_dim": 7}, "do not fit"),
        ("super_res", "model", {"in_channels": 3}, "do not fit"),
        ("super_res", "model", {"out_channels": 6}, "do not fit"),
        ("super_res", "model", {"sample_size": 33}, "do not fit"),
        ("super_res", "", {"crop_size": 33}, "crop_size is 33"),
        ("super_res", "", {"crop_size": 15}, "do not fit"),
        ("clip", "", {"text_heads": 5}, "must be a multiple"),
        ("clip", "", {"patch_size": 5}, "must be a multiple"),
        (
            "clip",
            "text_config",
            {"attention_dropout": 2.0},
            "attention_dropout in .* is 2.0; it must be a number from 0 to",
        ),
        ("clip", "text_config", {"attention_dropout": "x"}, "attention_dropout in .* is 'x'"),
        ("clip", "text_config", {"layer_norm_eps": 0}, "layer_norm_eps.* 0 "),
        ("clip", "text_config", {"intermediate_size": 10**9}, "intermediate_size in .* is 1000000000"),
        ("clip", "text_config", {"hidden_size": True}, "hidden_size in .* is True"),
        ("clip", "text_config", {"hidden_size": []}, r"hidden_size in .* is \[\]"),
    ],
)
def test_settings_that_do_not_fit(tiny, tmp_path, stage, table, settings, words):
    refused(tiny, tmp_path, stage, table, settings, words)


@pytest.mark.parametrize("stage", list(TASKS))
def test_a_batch_that_memory_does_not_hold(tiny, tmp_path, stage):
    recipe = tiny(stage, batch_size=10**6, data=tmp_path / "no-data")
    begun = time.perf_counter()
    words = "batch_size is 1000000.* GiB of memory are needed, but only .* GiB are available: lower batch_size"
    with pytest.raises(ConfigError, match=words):
        make_task(recipe)
    assert time.perf_counter() - begun < 3
    with pytest.raises(ConfigError, match="batch_size is 1000000000"):
        make_task(dataclasses.replace(recipe, batch_size=10**9))


@pytest.mark.parametrize(
    ("stage", "table", "settings"),
    [
        ("prior", "model", {"num_attention_heads": 64, "attention_head_dim": 128, "num_layers": 60}),
        ("prior_autoregressive", "model", {"num_attention_heads": 64, "attention_head_dim": 128, "num_layers": 60}),
        ("decoder", "model", {"block_out_channels": [8192, 8192], "layers_per_block": 2}),
        ("super_res", "model", {"block_out_channels": [8192, 8192], "layers_per_block": 2}),
        ("clip", "", {"projection_dim": 16384, "image_width": 16384, "text_layers": 20}),
    ],
)
def test_a_network_that_memory_does_not_hold(tiny, tmp_path, monkeypatch, stage, table, settings):
    monkeypatch.setattr(task_module, "available_bytes", lambda device: 64 * 2**30)
    before = psutil.Process().memory_info().rss
    refused(tiny, tmp_path, stage, table, settings, r"has .* parameters; .* 64\.0 GiB are available: make the network")
    assert psutil.Process().memory_info().rss - before < 2**28


@pytest.mark.parametrize("stage", list(TASKS))
def test_what_is_counted_is_what_a_step_keeps(tiny, stage):
    task = make_task(tiny(stage))
    batch = task.batch(0, 16, torch.Generator().manual_seed(0))
    own = {p.untyped_storage().data_ptr() for p in task.module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        task.module(batch)
    found = sum(storage.nbytes() for storage in kept.values())
    counted = kept_bytes(task.module, {name: value.to("meta") for name, value in batch.items()})
    assert 0.9 * found < counted < found / 0.8
    assert not any(parameter.is_meta for parameter in task.module.parameters())
