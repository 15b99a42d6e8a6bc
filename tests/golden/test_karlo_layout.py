"""At Karlo's full size, our networks have the reference's parameters: names, shapes and counts. No memory is used."""

import warnings

import pytest
import torch

from unclip.models import PriorTransformer, UnCLIPTextProjModel, UNet2DConditionModel, UNet2DModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel as ReferenceTextProj

WIDTHS = (320, 640, 960, 1280)
PRIOR = dict(num_attention_heads=32, attention_head_dim=64, num_layers=20, embedding_dim=768, dropout=0.0)
DECODER = dict(
    sample_size=64,
    in_channels=3,
    out_channels=6,
    layers_per_block=3,
    block_out_channels=WIDTHS,
    down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
    cross_attention_dim=1536,
    class_embed_type="identity",
    attention_head_dim=64,
    resnet_time_scale_shift="scale_shift",
)
SUPER_RES = dict(
    sample_size=256,
    in_channels=6,
    out_channels=3,
    layers_per_block=3,
    block_out_channels=WIDTHS,
    down_block_types=("ResnetDownsampleBlock2D",) * 4,
    up_block_types=("ResnetUpsampleBlock2D",) * 4,
    add_attention=False,
    resnet_time_scale_shift="scale_shift",
)
TEXT_PROJ = dict(clip_extra_context_tokens=4, clip_embeddings_dim=768, time_embed_dim=1280, cross_attention_dim=1536)


@pytest.mark.parametrize(
    ("ours", "reference", "config", "count"),
    [
        (PriorTransformer, diffusers.PriorTransformer, PRIOR, 1_022_030_080),
        (UNet2DConditionModel, diffusers.UNet2DConditionModel, DECODER, 885_439_686),
        (UNet2DModel, diffusers.UNet2DModel, SUPER_RES, 729_702_083),
        (UnCLIPTextProjModel, ReferenceTextProj, TEXT_PROJ, 7_878_400),
    ],
)
def test_same_parameters(ours, reference, config, count):
    with torch.device("meta"):
        mine, theirs = ours.from_config(config), reference(**config)
    shapes = {name: tensor.shape for name, tensor in mine.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in shapes.values()) == count
    assert {name for name, _ in mine.named_parameters()} == set(shapes)


def test_default_widths_are_within_our_limits_with_room():
    """The check that refuses the absurd must not come near what exists."""
    for cls, config in ((PriorTransformer, PRIOR), (UNet2DConditionModel, DECODER), (UNet2DModel, SUPER_RES)):
        described = cls.config_class.from_dict(config)
        assert 2e8 < described.approximate_parameters() < 5e9


@pytest.mark.parametrize(("embedding_dim", "count"), [(768, 33_143_040), (1280, 34_193_152)])
def test_eclipse_has_no_time_embedding(embedding_dim, count):
    """Karlo's and Kandinsky 2.2's priors of ECLIPSE (arXiv 2312.04655): 33 and 34 million parameters."""
    config = {"num_attention_heads": 16, "attention_head_dim": 32, "num_layers": 10, "embedding_dim": embedding_dim}
    with torch.device("meta"):
        mine = PriorTransformer.from_config(config | {"additional_embeddings": 3})
        theirs = diffusers.PriorTransformer(**config, additional_embeddings=3)
    shapes = {name: tensor.shape for name, tensor in mine.state_dict().items()}
    expected = {name: tensor.shape for name, tensor in theirs.state_dict().items() if "time_embedding" not in name}
    assert shapes == expected
    assert shapes["positional_embedding"] == (1, 80, 512)
    assert sum(shape.numel() for shape in shapes.values()) == count
