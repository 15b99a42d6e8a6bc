"""Kandinsky's networks: the same keys, shapes and numbers as diffusers'."""

import warnings

import pytest
import torch

from unclip import UNet2DConditionModel, VQModel
from unclip.models import KandinskyUNet

from ..conftest import randomize
from ..kandinsky_parts import MOVQ, unet_settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers

FULL_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 8,
    "layers_per_block": 3,
    "block_out_channels": (384, 768, 1152, 1536),
    "down_block_types": ("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": (*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
    "addition_embed_type_num_heads": 64,
}
FULL = {
    "2.2": ({"encoder_hid_dim": 1280}, 1_253_057_288),
    "2.1": ({"encoder_hid_dim": 1024}, 1_228_661_768),
}
FULL_MOVQ = {
    "block_out_channels": (128, 256, 256, 512),
    "down_block_types": (*("DownEncoderBlock2D",) * 3, "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 3),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "norm_type": "spatial",
    "num_vq_embeddings": 16384,
    "vq_embed_dim": 4,
    "sample_size": 32,
}


def shapes(network):
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def twins(ours, theirs):
    assert shapes(ours) == shapes(theirs)
    randomize(ours, 1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs.eval()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", FULL)
def test_the_full_unet_has_the_keys_shapes_and_count(kind):
    more, count = FULL[kind]
    settings = unet_settings(kind) | FULL_UNET | more
    with torch.device("meta"):
        ours, theirs = UNet2DConditionModel.from_config(settings), diffusers.UNet2DConditionModel(**settings)
    assert shapes(ours) == shapes(theirs)
    assert sum(value.numel() for value in ours.parameters()) == count


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("kind", FULL)
@torch.no_grad()
def test_the_unet(agree, kind, channels):
    settings = unet_settings(kind, in_channels=channels)
    ours, theirs = twins(UNet2DConditionModel.from_config(settings), diffusers.UNet2DConditionModel(**settings))
    assert type(ours) is KandinskyUNet
    text = kind == "2.1"
    image = noise(2, 32 if text else 24)
    added = {"image_embeds": image} | ({"text_embeds": noise(2, 32, seed=1)} if text else {})
    states = noise(2, 7, 24, seed=2) if text else None
    x, t = noise(2, channels, 8, 12, seed=3), torch.tensor([3, 700])
    run = lambda net: net(x, t, encoder_hidden_states=states, added_cond_kwargs=added).sample  # noqa: E731
    made = run(ours)
    agree("Kandinsky's U-Net", made, lambda: run(theirs), [theirs])
    torch.testing.assert_close(made, run(theirs), rtol=0, atol=1e-5 * float(made.abs().max()))
    tokens, addition = ours.project(image, states, added.get("text_embeds"))
    torch.testing.assert_close(ours(x, t, context=ours.prepare(tokens), class_labels=addition).sample, made)


def test_the_full_movq_has_the_keys_shapes_and_count():
    with torch.device("meta"):
        ours, theirs = VQModel(**FULL_MOVQ), diffusers.VQModel(**FULL_MOVQ)
    assert shapes(ours) == shapes(theirs)
    assert sum(value.numel() for value in ours.parameters()) == 67_832_495


@pytest.mark.parametrize("blocks", [(32, 64), (32, 32, 64)])
@torch.no_grad()
def test_movq(agree, blocks):
    settings = MOVQ | {
        "block_out_channels": blocks,
        "layers_per_block": len(blocks) - 1,
        "down_block_types": ("DownEncoderBlock2D",) * (len(blocks) - 1) + ("AttnDownEncoderBlock2D",),
        "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (len(blocks) - 1),
    }
    ours, theirs = twins(VQModel(**settings), diffusers.VQModel(**settings))
    pictures, latents = noise(2, 3, 16, 24), noise(2, 4, 4, 6, seed=1)
    encoded, decoded = ours.encode_pictures(pictures), ours.decode_latents(latents)
    assert encoded.shape == (2, 4, 16 // ours.factor, 24 // ours.factor)
    assert decoded.shape == (2, 3, 4 * ours.factor, 6 * ours.factor)
    agree("MoVQ's encoder", encoded, lambda: theirs.encode(pictures).latents, [theirs])
    agree("MoVQ's decoder", decoded, lambda: theirs.decode(latents, force_not_quantize=True).sample, [theirs])
    with torch.enable_grad():  # nothing is overwritten then
        torch.testing.assert_close(ours.decode_latents(latents), decoded)
    torch.testing.assert_close(ours(pictures).sample, ours.decode_latents(encoded))
    quantised = theirs.decode(latents).sample
    assert not torch.allclose(decoded, quantised, atol=0.1)
