"""Configurations: a mapping, the ecosystem's keys, and refusal by name."""

import pytest
import torch

from unclip.errors import ConfigError
from unclip.models import (
    PriorConfig,
    PriorTransformer,
    UnCLIPTextProjConfig,
    UNet2DConditionConfig,
    UNet2DConditionModel,
    UNet2DConfig,
    UNet2DModel,
)

DECODER = dict(
    block_out_channels=[8, 16],
    down_block_types=["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    norm_num_groups=4,
)
SUPER_RES = dict(
    block_out_channels=[8, 16],
    down_block_types=["ResnetDownsampleBlock2D"] * 2,
    up_block_types=["ResnetUpsampleBlock2D"] * 2,
    norm_num_groups=4,
    add_attention=False,
)


def test_it_is_a_mapping_and_an_object():
    config = PriorConfig.from_dict({"num_layers": 2, "_class_name": "PriorTransformer", "_diffusers_version": "0.1"})
    assert config.num_layers == config["num_layers"] == dict(config)["num_layers"] == 2
    assert len(config) == len(list(config)) == 15
    assert "_class_name" not in config
    assert config == PriorConfig(num_layers=2) != PriorConfig(num_layers=3)
    assert PriorConfig.from_dict(config) == config
    with pytest.raises(KeyError):
        config["check"]
    with pytest.raises(AttributeError):
        config.num_layers = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_lists_become_tuples():
    assert UNet2DConditionConfig.from_dict(DECODER).block_out_channels == (8, 16)
    assert UNet2DConditionConfig(**DECODER).down_block_types == tuple(DECODER["down_block_types"])


def test_neutral_keys_are_accepted_and_others_are_not():
    neutral = {"dual_cross_attention": False, "only_cross_attention": False, "downsample_padding": 1}
    UNet2DConditionConfig.from_dict(DECODER | neutral | {"mid_block_scale_factor": 1.0})
    UNet2DConfig.from_dict(SUPER_RES | {"downsample_type": "resnet", "center_input_sample": False})


@pytest.mark.parametrize(
    ("config", "base", "settings", "words"),
    [
        (PriorConfig, {}, {"num_layer": 3}, ["num_layer", "3"]),
        (PriorConfig, {}, {"num_layers": 257}, ["num_layers", "257", "256"]),
        (PriorConfig, {}, {"num_layers": 0}, ["num_layers", "0"]),
        (PriorConfig, {}, {"num_layers": True}, ["num_layers", "True"]),
        (PriorConfig, {}, {"num_layers": "20"}, ["num_layers", "'20'"]),
        (PriorConfig, {}, {"embedding_dim": 10**9}, ["embedding_dim", "16,384"]),
        (PriorConfig, {}, {"num_attention_heads": 16384, "attention_head_dim": 64}, ["num_attention_heads", "65536"]),
        (PriorConfig, {}, {"num_attention_heads": 256, "attention_head_dim": 256}, ["parameters", "limit"]),
        (PriorConfig, {}, {"dropout": 1.5}, ["dropout", "1.5"]),
        (PriorConfig, {}, {"dropout": float("nan")}, ["dropout", "nan"]),
        (PriorConfig, {}, {"norm_in_type": "batch"}, ["norm_in_type", "'batch'", "'layer'"]),
        (PriorConfig, {}, {"time_embed_act_fn": "tanh"}, ["time_embed_act_fn", "'tanh'", "'silu'"]),
        (PriorConfig, {}, {"added_emb_type": "x"}, ["added_emb_type", "'x'", "'prd'"]),
        (UNet2DConditionConfig, {}, {}, ["CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"]),
        (UNet2DConditionConfig, DECODER, {"only_cross_attention": True}, ["only_cross_attention", "True", "False"]),
        (UNet2DConditionConfig, DECODER, {"encoder_hid_dim": 5}, ["encoder_hid_dim", "5", "None"]),
        (UNet2DConditionConfig, DECODER, {"conv_in_kernel": 5}, ["conv_in_kernel", "5", "3"]),
        (UNet2DConditionConfig, DECODER, {"block_out_channels": [8, 18]}, ["norm_num_groups", "18"]),
        (UNet2DConditionConfig, DECODER, {"block_out_channels": [8, 12]}, ["attention_head_dim", "12"]),
        (UNet2DConditionConfig, DECODER, {"block_out_channels": [8]}, ["down_block_types", "1"]),
        (UNet2DConditionConfig, DECODER, {"block_out_channels": 8}, ["block_out_channels", "8"]),
        (UNet2DConditionConfig, DECODER, {"layers_per_block": [1]}, ["layers", "2"]),
        (UNet2DConditionConfig, DECODER, {"layers_per_block": 1000}, ["layers_per_block", "1000", "64"]),
        (UNet2DConditionConfig, DECODER, {"attention_head_dim": [8, 8]}, ["attention_head_dim"]),
        (UNet2DConditionConfig, DECODER, {"cross_attention_dim": 10**6}, ["cross_attention_dim", "1000000"]),
        (UNet2DConditionConfig, DECODER, {"class_embed_type": "timestep"}, ["class_embed_type", "'timestep'"]),
        (UNet2DConditionConfig, DECODER, {"up_block_types": "ResnetUpsampleBlock2D"}, ["up_block_types"]),
        (UNet2DConditionConfig, DECODER, {"flip_sin_to_cos": 1}, ["flip_sin_to_cos"]),
        (
            UNet2DConditionConfig,
            DECODER,
            {"block_out_channels": [16384, 16384], "layers_per_block": 30},
            ["parameters", "limit"],
        ),
        (UNet2DConfig, SUPER_RES, {"add_attention": True}, ["add_attention", "True", "False"]),
        (UNet2DConfig, SUPER_RES, {"mid_block_type": None}, ["mid_block_type", "None"]),
        (UNet2DConfig, SUPER_RES, {"layers_per_block": (1, 2)}, ["layers_per_block"]),
        (UNet2DConfig, SUPER_RES, {"time_embedding_type": "fourier"}, ["time_embedding_type", "'fourier'"]),
        (UNet2DConfig, SUPER_RES, {"norm_num_groups": None}, ["norm_num_groups", "None"]),
        (UnCLIPTextProjConfig, {}, {"time_embed_dim": 8}, ["cross_attention_dim"]),
    ],
)
def test_refusals_name_the_key_and_the_value(config, base, settings, words):
    with pytest.raises(ConfigError) as refusal:
        config.from_dict(base | settings)
    for word in words:
        assert word in str(refusal.value)


def test_nothing_is_allocated_before_the_check():
    """Would be 80 GB of weights; on a device that counts, none are made."""
    made = []

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            made.append(func)
            return func(*args, **(kwargs or {}))

    for model, settings in (
        (PriorTransformer, {"num_attention_heads": 256, "attention_head_dim": 256}),
        (UNet2DModel, SUPER_RES | {"block_out_channels": [16384] * 2, "layers_per_block": 30}),
        (UNet2DConditionModel, DECODER | {"in_channels": -1}),
    ):
        with Counting(), pytest.raises(ConfigError):
            model.from_config(settings)
    assert made == []


def test_a_network_takes_a_configuration_a_mapping_or_names():
    for model in (
        UNet2DModel(SUPER_RES),
        UNet2DModel(**SUPER_RES),
        UNet2DModel(UNet2DConfig(**SUPER_RES)),
        UNet2DModel(SUPER_RES | {"in_channels": 5}, in_channels=3),
    ):
        assert model.config == UNet2DConfig(**SUPER_RES)


def test_a_number_of_thousands_of_digits():
    with pytest.raises(ConfigError, match="embedding_dim is a value of type int; it must be a whole number"):
        PriorConfig(embedding_dim=10**5000)
