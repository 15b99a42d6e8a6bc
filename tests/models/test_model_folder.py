"""Networks in folders: what is written is what is read, also by diffusers."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

from unclip.checkpoints import weights
from unclip.clip.networks import CLIPImageEncoder, CLIPTextEncoder
from unclip.errors import ConfigError, MissingFileError, OutputError, UnsafeFileError, WeightsError
from unclip.models import AutoregressivePrior, PriorTransformer, UNet2DModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers

PRIOR = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=16, num_embeddings=5)

SUPER_RES = dict(
    block_out_channels=[8, 16],
    layers_per_block=1,
    norm_num_groups=4,
    add_attention=False,
    down_block_types=["ResnetDownsampleBlock2D"] * 2,
    up_block_types=["ResnetUpsampleBlock2D"] * 2,
)


@pytest.fixture
def model():
    return PriorTransformer(PRIOR).initialize_for_training(torch.Generator().manual_seed(0))


def test_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path / "a" / "prior")
    read = PriorTransformer.from_pretrained(tmp_path / "a", subfolder="prior")
    assert read.config == model.config
    assert not read.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)
    assert all(parameter.requires_grad for parameter in read.transformer_blocks.parameters())
    halved = PriorTransformer.from_pretrained(str(tmp_path / "a" / "prior"), torch_dtype=torch.float16)
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.float16}
    written = json.loads((tmp_path / "a" / "prior" / "config.json").read_text())
    assert written["_class_name"] == "PriorTransformer"
    assert written["num_layers"] == 2


def test_a_unet_is_channels_last_from_a_folder_as_built(tmp_path):
    built = UNet2DModel(**SUPER_RES)
    built.save_pretrained(tmp_path)
    for network in (built, UNet2DModel.from_pretrained(tmp_path)):
        kernels = [module.weight for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
        assert not all(kernel.is_contiguous() for kernel in kernels)


def test_variant(model, tmp_path):
    model.half().save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").exists()
    assert PriorTransformer.from_pretrained(tmp_path, variant="fp16").dtype == torch.float32
    read = PriorTransformer.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert read.dtype == torch.float16


def test_diffusers_reads_ours_and_we_read_diffusers(model, tmp_path):
    model.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = diffusers.PriorTransformer.from_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
    read = PriorTransformer.from_pretrained(tmp_path / "theirs")
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor)


def test_pickles_are_not_written(model, tmp_path):
    with pytest.raises(UnsafeFileError, match="safe_serialization"):
        model.save_pretrained(tmp_path / "x", safe_serialization=False)
    assert not (tmp_path / "x").exists()


def test_another_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="PriorTransformer"):
        UNet2DModel.from_pretrained(tmp_path)


def test_a_configuration_that_does_not_fit_the_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError):
        PriorTransformer.from_pretrained(tmp_path)


class KilledError(Exception):
    pass


def die(*_, **__):
    raise KilledError


def die_at_the_configuration(monkeypatch):
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: die() if str(new).endswith("config.json") else replace(old, new)
    )


@pytest.fixture
def other():
    """A network with the same shapes: its weights load with the configuration of `model`, but have no meaning."""
    settings = {**PRIOR, "num_attention_heads": 4, "attention_head_dim": 4}
    return PriorTransformer(settings).initialize_for_training(torch.Generator().manual_seed(1))


def is_in(folder, model):
    """Whether a folder holds this model, whole."""
    read = PriorTransformer.from_pretrained(folder)
    state = model.state_dict()
    return read.config == model.config and all(torch.equal(t, state[name]) for name, t in read.state_dict().items())


@pytest.mark.parametrize("max_shard_size", ["10GB", "8KB"])
def test_killed_between_weights_and_configuration(model, other, tmp_path, monkeypatch, max_shard_size):
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    die_at_the_configuration(monkeypatch)
    with pytest.raises(KilledError):
        other.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    with pytest.raises(MissingFileError, match=r"config\.json"):
        PriorTransformer.from_pretrained(tmp_path)
    monkeypatch.undo()
    other.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert is_in(tmp_path, other)


@pytest.mark.parametrize("max_shard_size", ["10GB", "8KB"])
@pytest.mark.parametrize("when", ["a weight is written", "a file is synced"])
def test_a_save_that_fails_before_its_weights_stand_leaves_the_old_model(
    model, other, tmp_path, monkeypatch, max_shard_size, when
):
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    names = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(weights, "_save" if when == "a weight is written" else "sync", die)
    with pytest.raises(KilledError):
        other.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    with torch.no_grad():
        other.norm_out.weight[0] = float("nan")
    monkeypatch.undo()
    with pytest.raises(WeightsError, match="NaN"):
        other.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert is_in(tmp_path, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_killed_at_any_operation(model, other, tmp_path, monkeypatch):
    """Whatever the last change of the folder was, it holds one model or the other, or none that loads."""
    import shutil
    from pathlib import Path

    left = []
    outcomes = set()
    for name, owner in (("replace", os), ("unlink", Path)):
        original = getattr(owner, name)

        def counted(*given, original=original, **named):
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
            return original(*given, **named)

        monkeypatch.setattr(owner, name, counted)
    for operations in range(40):
        left[:] = [10**6]
        folder = tmp_path / str(operations)
        model.save_pretrained(folder, max_shard_size="20KB")
        left[:] = [operations]
        try:
            other.save_pretrained(folder, max_shard_size="20KB")
            killed = False
        except KilledError:
            killed = True
        left[:] = [10**6]
        try:
            outcomes.add("old" if is_in(folder, model) else "new")
            assert is_in(folder, model) or is_in(folder, other)
        except (MissingFileError, WeightsError):
            outcomes.add("none")
        shutil.rmtree(folder)
        if not killed:
            break
    assert not killed
    assert outcomes == {"old", "new", "none"}


def test_a_configuration_that_says_the_same_stays(model, tmp_path, monkeypatch):
    """As when a newer version of unclip saves better weights of the same network."""
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"_unclip_version": "0.0.1"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model.initialize_for_training(torch.Generator().manual_seed(5))
    die_at_the_configuration(monkeypatch)
    with pytest.raises(KilledError):
        model.save_pretrained(tmp_path)
    assert is_in(tmp_path, model)


def test_a_broken_configuration_is_replaced(model, tmp_path):
    tmp_path.joinpath("config.json").write_text("{")
    model.save_pretrained(tmp_path)
    assert is_in(tmp_path, model)


READ = """
import sys
from {module} import {name}
network = {name}.from_pretrained({folder!r})
assert not any(parameter.is_meta for parameter in network.parameters())
print([name for name in ("sympy", "torch._dynamo", "torch._inductor", "transformers") if name in sys.modules])
"""


@pytest.mark.parametrize(
    "network",
    [
        lambda: PriorTransformer(PRIOR),
        lambda: AutoregressivePrior(PRIOR | {"num_components": 4}),
        lambda: UNet2DModel(**SUPER_RES),
        lambda: CLIPTextEncoder(vocab_size=9, eos_token_id=8, num_hidden_layers=1),
        lambda: CLIPImageEncoder(image_size=8, patch_size=4, num_hidden_layers=1),
    ],
    ids=["prior", "autoregressive", "unet", "text", "image"],
)
def test_reading_one_imports_no_compiler(network, tmp_path):
    """Drawing some kinds of weights on the meta device would: `normal_` does."""
    made = network()
    made.save_pretrained(tmp_path)
    code = READ.format(module=type(made).__module__, name=type(made).__name__, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("max_shard_size", ["10GB", "8KB"])
@pytest.mark.parametrize("room_bytes", [1, 300, 9_000])
def test_a_full_disk_leaves_the_old_model(model, other, tmp_path, max_shard_size, room_bytes, little_room):
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with little_room(room_bytes), pytest.raises(OutputError, match="cannot be written"):
        other.save_pretrained(tmp_path, max_shard_size="10GB")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_is_full_when_the_index_is_written(model, other, tmp_path, little_room):
    """Shards of 8 KB fit, their index of more does not."""
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with little_room(3_000), pytest.raises(OutputError):
        other.save_pretrained(tmp_path, max_shard_size="2KB")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("network", ["model", "autoregressive", "unet", "encoder"])
def test_torchs_default_type_changes_no_network(model, tmp_path, default, network):
    networks = {
        "model": model,
        "autoregressive": AutoregressivePrior(num_attention_heads=2, attention_head_dim=8, num_layers=1,
                                              embedding_dim=16, num_components=4, num_embeddings=5),
        "unet": UNet2DModel(**SUPER_RES),
        "encoder": CLIPImageEncoder(hidden_size=16, intermediate_size=16, num_attention_heads=2, image_size=8,
                                    patch_size=4, num_hidden_layers=1),
    }  # fmt: skip
    saved = networks[network]
    saved.save_pretrained(tmp_path)
    torch.set_default_dtype(default)
    try:
        read = type(saved).from_pretrained(tmp_path)
        half = type(saved).from_pretrained(tmp_path, torch_dtype=torch.float16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in read.state_dict().values()} == {torch.float32}
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in read.state_dict().items())
    assert half.dtype == torch.float16
