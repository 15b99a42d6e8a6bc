"""Tiny networks of Kandinsky 2.1 and 2.2 with random weights, as diffusers' classes and as unclip's."""

from typing import Any

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
