"""Tiny networks of Kandinsky 2.1 and 2.2 with random weights, as diffusers' classes and as unclip's."""

from typing import Any

import torch

from .conftest import randomize, tiny_components

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 8,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift",
    "encoder_hid_dim": 24,
}
KINDS = {
    "2.2": {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"},
    "2.1": {"addition_embed_type": "text_image", "encoder_hid_dim_type": "text_image_proj"},
}
MOVQ = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "norm_type": "spatial",
    "num_vq_embeddings": 12,
    "vq_embed_dim": 4,
}


def unet_settings(kind: str, **more: Any) -> dict[str, Any]:
    """Settings of the U-Net of Kandinsky "2.1" or "2.2"."""
    return UNET | KINDS[kind] | more


WIDTH = 16
"""Width of the embeddings of the tiny CLIP."""


def movq() -> Any:
    """A tiny MoVQ with random weights: latents of 4 channels, at half of the pictures' size."""
    from unclip import VQModel

    return randomize(VQModel(**MOVQ), 11)


def prior_parts() -> dict[str, Any]:
    """The components of a prior's pipeline."""
    from unclip import UnCLIPScheduler

    tiny = tiny_components()
    names = {"image_encoder": "image_encoder", "feature_extractor": "image_processor"}
    parts = {name: tiny[name] for name in ("text_encoder", "tokenizer", "prior")}
    parts |= {ours: tiny[theirs] for theirs, ours in names.items()}
    return parts | {"scheduler": UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0)}


def decoder_parts(kind: str, channels: int = 4) -> dict[str, Any]:
    """The components of a decoder's pipeline of Kandinsky "2.1" or "2.2", with 4 input channels or 9 to inpaint."""
    from unclip import DDIMScheduler, DDPMScheduler, UNet2DConditionModel

    schedule = {"beta_start": 0.00085, "beta_end": 0.012}
    if kind == "2.2":
        settings = unet_settings(kind, in_channels=channels, encoder_hid_dim=WIDTH)
        scheduler: Any = DDPMScheduler(
            **schedule, variance_type="learned_range", thresholding=True, sample_max_value=2.0
        )
        more: dict[str, Any] = {}
    else:
        settings = unet_settings(kind, in_channels=channels, cross_attention_dim=WIDTH)
        scheduler = DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        more = {"text_encoder": multilingual_encoder(), "tokenizer": multilingual_tokenizer()}
    unet = randomize(UNet2DConditionModel.from_config(settings), 12)
    with torch.no_grad():
        unet.conv_out.weight *= 0.03  # large outputs grow step by step, and with them their rounding
    return {**more, "unet": unet, "movq": movq(), "scheduler": scheduler}


def multilingual_encoder() -> Any:
    """A tiny MultilingualCLIP with random weights."""
    from unclip.clip.multilingual import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        numDims=WIDTH,
        transformerDimensions=24,
        hidden_size=24,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=60,
        max_position_embeddings=90,
        pad_token_id=1,
    )
    torch.manual_seed(13)
    return MultilingualCLIP(config).eval()


def multilingual_tokenizer() -> Any:
    """XLM-RoBERTa's tokenizer with a vocabulary of letters."""
    from transformers import XLMRobertaTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    special = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    return XLMRobertaTokenizer(vocab=special + [("\u2581", -2.0)] + [(letter, -3.0) for letter in letters])
