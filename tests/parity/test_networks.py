"""The same weights in diffusers' classes and in ours give the same tensors."""

import warnings

import pytest
import torch

from unclip.models import PriorTransformer, UnCLIPTextProjModel, UNet2DConditionModel, UNet2DModel

from ..rounding import UNIT

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel as ReferenceTextProj

PRIOR = dict(num_attention_heads=2, attention_head_dim=8, num_layers=3, embedding_dim=16, num_embeddings=7)
DECODER = dict(
    sample_size=8,
    in_channels=3,
    out_channels=6,
    layers_per_block=1,
    block_out_channels=(8, 16, 24),
    down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    cross_attention_dim=12,
    attention_head_dim=8,
    norm_num_groups=4,
    class_embed_type="identity",
    resnet_time_scale_shift="scale_shift",
)
SUPER_RES = dict(
    in_channels=6,
    out_channels=3,
    layers_per_block=2,
    block_out_channels=(8, 16),
    down_block_types=("ResnetDownsampleBlock2D",) * 2,
    up_block_types=("ResnetUpsampleBlock2D",) * 2,
    norm_num_groups=4,
    add_attention=False,
)


def twins(ours, reference, config):
    """The reference and ours with the same random weights, which went from one to the other and back, strictly."""
    torch.manual_seed(0)
    theirs = reference(**config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # Scales, and not weights, must stay near one for the network to stay in its range.
            is_scale = name.endswith("weight") and parameter.dim() == 1
            parameter.normal_(mean=float(is_scale), std=0.2)
    mine = ours.from_config(config).eval()
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    return theirs, mine


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm_in_type": "layer"},
        {"embedding_proj_norm_type": "layer"},
        {"embedding_proj_dim": 12},
        {"clip_embed_dim": 20},
        {"time_embed_dim": 40, "time_embed_act_fn": "gelu"},
        {"added_emb_type": None, "additional_embeddings": 3},
        {"encoder_hid_proj_type": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", [None, [[1] * 3 + [0] * 4, [1] * 7], [[0] * 7, [0, 0, 1, 1, 0, 1, 0]]], ids=str)
@torch.no_grad()
def test_prior(agree, settings, mask):
    theirs, mine = twins(PriorTransformer, diffusers.PriorTransformer, PRIOR | settings)
    mask = None if mask is None else torch.tensor(mask).bool()
    x, text = torch.randn(2, 16), torch.randn(2, 7, 16)
    embedding = torch.randn(2, settings.get("embedding_proj_dim", 16))
    for timestep in (5, torch.tensor(7), torch.tensor([0, 999])):
        inputs = (x, timestep, embedding, text, mask)
        got = mine(*inputs).predicted_image_embedding
        agree("networks", got, lambda inputs=inputs: theirs(*inputs).predicted_image_embedding, [theirs])
    assert len(mine(x, 5, embedding, text, mask, return_dict=False)) == 1


@torch.no_grad()
def test_prior_without_text_tokens(agree):
    """Shap-E's way: many image tokens, no text tokens, no query, and positions for the image's tokens only."""
    settings = {"additional_embeddings": 0, "added_emb_type": None, "encoder_hid_proj_type": None, "clip_embed_dim": 32}
    theirs, mine = twins(PriorTransformer, diffusers.PriorTransformer, PRIOR | settings | {"norm_in_type": "layer"})
    x, embedding = torch.randn(2, 7, 16), torch.randn(2, 16)
    got = mine(x, 3, embedding).predicted_image_embedding
    assert got.shape == (2, 7, 32)
    agree("networks", got, lambda: theirs(x, 3, embedding).predicted_image_embedding, [theirs])


@pytest.mark.parametrize("settings", [{}, {"norm_in_type": "layer"}, {"embedding_proj_norm_type": "layer"}], ids=str)
@torch.no_grad()
def test_prior_without_timestep(agree, settings):
    """ECLIPSE's network: the blocks of diffusers' class in their order, without its time embedding."""
    settings = PRIOR | settings | {"additional_embeddings": 3}
    theirs = diffusers.PriorTransformer(**settings).eval()
    del theirs.time_embedding
    for parameter in theirs.parameters():
        parameter.normal_(std=0.3)
    mine = PriorTransformer.from_config(settings).eval()
    mine.load_state_dict(theirs.state_dict(), strict=True)
    noise, embedding, text = torch.randn(2, 16), torch.randn(2, 16), torch.randn(2, 7, 16)
    mask = torch.tensor([[1] * 3 + [0] * 4, [1] * 7]).bool()

    def run():
        summary = embedding if theirs.embedding_proj_norm is None else theirs.embedding_proj_norm(embedding)
        parts = [theirs.encoder_hidden_states_proj(text), theirs.embedding_proj(summary)[:, None]]
        parts += [theirs.proj_in(noise)[:, None], theirs.prd_embedding.expand(2, -1, -1)]
        tokens = torch.cat(parts, dim=1) + theirs.positional_embedding
        seen = torch.cat([mask, torch.ones(2, 3, dtype=torch.bool)], dim=1)
        bias = (~seen)[:, None] * -10000.0 + theirs.causal_attention_mask
        tokens = tokens if theirs.norm_in is None else theirs.norm_in(tokens)
        for block in theirs.transformer_blocks:
            tokens = block(tokens, attention_mask=bias.repeat_interleave(2, dim=0))
        return theirs.proj_to_clip_embeddings(theirs.norm_out(tokens)[:, -1])

    agree("networks", mine(noise, 0, embedding, text, mask).predicted_image_embedding, run, [theirs])
    shorter = mine(noise[:1], 0, embedding[:1], text[:1, :3], mask[:1, :3]).predicted_image_embedding
    agree("networks", shorter, lambda: run()[:1], [theirs])


@torch.no_grad()
def test_prior_whitening(agree):
    theirs, mine = twins(PriorTransformer, diffusers.PriorTransformer, PRIOR)
    x = torch.randn(2, 16)
    agree("networks", mine.post_process_latents(x), lambda: theirs.post_process_latents(x), [theirs])
    # The spread is divided by after the mean is taken away again: what the sum has lost returns so many times larger.
    lost = UNIT * (mine.clip_mean.abs() + x.abs() * mine.clip_std.abs()) / mine.clip_std.abs()
    assert ((mine.whiten(mine.post_process_latents(x)) - x).abs() <= 4 * lost).all()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resnet_time_scale_shift": "default"},
        {"class_embed_type": None},
        {"layers_per_block": (1, 2, 3)},
        {"act_fn": "gelu"},
        {"flip_sin_to_cos": False, "freq_shift": 1},
        {"time_embedding_dim": 20},
        {"norm_eps": 1e-3},
        {"up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask_name", [None, "attention_mask", "encoder_attention_mask"])
@torch.no_grad()
def test_decoder(agree, settings, mask_name):
    theirs, mine = twins(UNet2DConditionModel, diffusers.UNet2DConditionModel, DECODER | settings)
    x, context = torch.randn(2, 3, 8, 12), torch.randn(2, 5, 12)
    inputs = {} if mask_name is None else {mask_name: torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()}
    if (DECODER | settings)["class_embed_type"]:
        inputs["class_labels"] = torch.randn(2, settings.get("time_embedding_dim", 32))
    for timestep in (5, 0.5, torch.tensor(7), torch.tensor([0, 999])):
        got = mine(x, timestep, context, **inputs).sample
        agree("networks", got, lambda t=timestep: theirs(x, t, context, **inputs).sample, [theirs])
    assert len(mine(x, 5, context, return_dict=False, **inputs)) == 1


@pytest.mark.parametrize("settings", [{}, {"resnet_time_scale_shift": "scale_shift"}, {"act_fn": "gelu"}], ids=str)
@pytest.mark.parametrize("class_embed_type", [None, "identity"])
@torch.no_grad()
def test_super_res(agree, settings, class_embed_type):
    config = SUPER_RES | settings | {"class_embed_type": class_embed_type}
    theirs, mine = twins(UNet2DModel, diffusers.UNet2DModel, config)
    x, labels = torch.randn(2, 6, 8, 6), torch.randn(2, 32) if class_embed_type else None
    for timestep in (5, torch.tensor([0, 999])):
        agree("networks", mine(x, timestep, labels).sample, lambda t=timestep: theirs(x, t, labels).sample, [theirs])


@pytest.mark.parametrize("guidance", [False, True])
@torch.no_grad()
def test_text_proj(agree, guidance):
    config = dict(clip_extra_context_tokens=3, clip_embeddings_dim=16, time_embed_dim=24, cross_attention_dim=20)
    theirs, mine = twins(UnCLIPTextProjModel, ReferenceTextProj, config)
    texts = 4 if guidance else 2
    inputs = dict(
        image_embeddings=torch.randn(2, 16),
        prompt_embeds=torch.randn(texts, 16),
        text_encoder_hidden_states=torch.randn(texts, 5, 16),
        do_classifier_free_guidance=guidance,
    )
    agree("networks", mine(**inputs), lambda: theirs(**inputs), [theirs])


def test_gradients(agree):
    """Not only the outputs: what a training step sees is the same too."""
    theirs, mine = twins(UNet2DConditionModel, diffusers.UNet2DConditionModel, DECODER)
    x, context, labels = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 12), torch.randn(2, 32)
    names = [name for name, _ in mine.named_parameters()]

    def gradients(model):
        loss = model(x, torch.tensor([3, 700]), context, class_labels=labels).sample.square().mean()
        return torch.autograd.grad(loss, [dict(model.named_parameters())[name] for name in names])

    agree("gradients", gradients(mine), lambda: gradients(theirs), [theirs])
