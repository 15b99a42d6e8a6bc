"""Tiny networks of the reference library, whose names and shapes are what a converted folder must have."""

import warnings
from typing import Any

import pytest
import torch

WIDTHS = (32, 64, 64, 64)
CLIP_DIM, CONTEXT_DIM = 24, 40


@pytest.fixture(scope="session")
def reference_modules() -> dict[str, Any]:
    """Karlo in small: four blocks of three resnets, heads of 8, as diffusers builds it."""
    from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = {
            "prior": PriorTransformer(
                num_attention_heads=4, attention_head_dim=8, num_layers=2, embedding_dim=CLIP_DIM, num_embeddings=9
            ),
            "text_proj": UnCLIPTextProjModel(
                clip_extra_context_tokens=4,
                clip_embeddings_dim=CLIP_DIM,
                time_embed_dim=4 * WIDTHS[0],
                cross_attention_dim=CONTEXT_DIM,
            ),
            "decoder": UNet2DConditionModel(
                sample_size=64,
                in_channels=3,
                out_channels=6,
                layers_per_block=3,
                block_out_channels=WIDTHS,
                down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
                mid_block_type="UNetMidBlock2DSimpleCrossAttn",
                up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
                cross_attention_dim=CONTEXT_DIM,
                class_embed_type="identity",
                attention_head_dim=8,
                resnet_time_scale_shift="scale_shift",
            ),
            **{
                name: UNet2DModel(
                    sample_size=256,
                    in_channels=6,
                    out_channels=3,
                    layers_per_block=3,
                    block_out_channels=WIDTHS,
                    down_block_types=("ResnetDownsampleBlock2D",) * 4,
                    up_block_types=("ResnetUpsampleBlock2D",) * 4,
                    add_attention=False,
                    resnet_time_scale_shift=shift,
                )
                for name, shift in (("super_res_first", "default"), ("super_res_last", "scale_shift"))
            },
        }
    for module in modules.values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    return modules


@pytest.fixture(scope="session")
def reference(reference_modules) -> dict[str, dict[str, torch.Tensor]]:
    """Their state dicts by component name."""
    return {
        name: {key: value.detach().clone() for key, value in module.state_dict().items()}
        for name, module in reference_modules.items()
    }
