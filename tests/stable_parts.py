"""Tiny parts of Stable unCLIP with random weights, as diffusers has them."""

import warnings
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from .conftest import CONTEXT, PRIOR, randomize, tiny_components

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

DIM = 16
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "attention_head_dim": (2, 4),
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 2 * DIM,
    "cross_attention_dim": 24,
    "layers_per_block": 1,
    "use_linear_projection": True,
    "upcast_attention": True,
}
VAE = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PRIOR_SCHEDULE = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "sample",
    "clip_sample_range": 5.0,
    "variance_type": "fixed_small_log",
}
DDIM = {
    **SCHEDULE,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}


def stable_parts() -> dict[str, Any]:
    """The components of both of diffusers' pipelines, by name."""
    ours = tiny_components()
    tokenizer = ours["tokenizer"]
    text = CLIPTextConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )
    prior_text = CLIPTextModelWithProjection(ours["text_encoder"].config)
    prior_text.load_state_dict(ours["text_encoder"].state_dict())
    prior = diffusers.PriorTransformer(**PRIOR)
    prior.load_state_dict(ours["prior"].state_dict())
    normalizer = StableUnCLIPImageNormalizer(DIM)
    generator = torch.Generator().manual_seed(9)
    normalizer.mean.data.normal_(generator=generator)
    normalizer.std.data.uniform_(0.5, 2, generator=generator)
    return {
        "prior_tokenizer": tokenizer,
        "prior_text_encoder": prior_text.eval(),
        "prior": prior.eval(),
        "prior_scheduler": diffusers.DDPMScheduler(**PRIOR_SCHEDULE),
        "image_normalizer": normalizer,
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "tokenizer": tokenizer,
        "text_encoder": randomize(CLIPTextModel(text), 11),
        "unet": randomize(diffusers.UNet2DConditionModel(**UNET), 12),
        "scheduler": diffusers.DDIMScheduler(**DDIM),
        "vae": randomize(diffusers.AutoencoderKL(**VAE), 13),
        "image_encoder": ours["image_encoder"],
        "feature_extractor": ours["feature_extractor"],
    }


def reference(kind: str, parts: dict[str, Any]) -> Any:
    """One of diffusers' pipelines, "text" or "variation", of these parts."""
    cls = {"text": diffusers.StableUnCLIPPipeline, "variation": diffusers.StableUnCLIPImg2ImgPipeline}[kind]
    of_prior = [name for name in parts if name.startswith("prior")]
    other = {"text": ["image_encoder", "feature_extractor"], "variation": of_prior}
    pipe = cls(**{name: part for name, part in parts.items() if name not in other[kind]})
    pipe.set_progress_bar_config(disable=True)
    return pipe
