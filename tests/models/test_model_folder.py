"""Networks in folders: what is written is what is read, also by diffusers."""

import json
import warnings

import pytest
import torch

from unclip.errors import ConfigError, UnsafeFileError, WeightsError
from unclip.models import PriorTransformer, UNet2DModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers

PRIOR = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=16, num_embeddings=5)


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
