"""The table of original names, held against names written down by hand, and both of its directions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unclip.checkpoints import karlo, layout
from unclip.errors import WeightsError

from ..karlo_export import export_prior, export_text_projection, export_unet, join_heads

PRIOR_NAMES = {
    "model.time_embed.0.weight": "time_embedding.linear_1.weight",
    "model.time_embed.2.bias": "time_embedding.linear_2.bias",
    "model.clip_img_proj.weight": "proj_in.weight",
    "model.text_emb_proj.weight": "embedding_proj.weight",
    "model.text_enc_proj.bias": "encoder_hidden_states_proj.bias",
    "model.positional_embedding": "positional_embedding",
    "model.prd_emb": "prd_embedding",
    "model.transformer.resblocks.1.attn.c_proj.weight": "transformer_blocks.1.attn1.to_out.0.weight",
    "model.transformer.resblocks.0.mlp.c_fc.weight": "transformer_blocks.0.ff.net.0.proj.weight",
    "model.transformer.resblocks.0.mlp.c_proj.bias": "transformer_blocks.0.ff.net.2.bias",
    "model.transformer.resblocks.1.ln_1.weight": "transformer_blocks.1.norm1.weight",
    "model.transformer.resblocks.1.ln_2.bias": "transformer_blocks.1.norm3.bias",
    "model.final_ln.weight": "norm_out.weight",
    "model.out_proj.weight": "proj_to_clip_embeddings.weight",
}
TEXT_NAMES = {
    "model.text_seq_proj.0.weight": "encoder_hidden_states_proj.weight",
    "model.text_seq_proj.1.bias": "text_encoder_hidden_states_norm.bias",
    "model.clip_tok_proj.weight": "clip_extra_context_tokens_proj.weight",
    "model.text_feat_proj.bias": "embedding_proj.bias",
    "model.cf_param": "learned_classifier_free_guidance_embeddings",
    "model.clip_emb.weight": "clip_image_embeddings_project_to_time_embeddings.weight",
}
BOTH_UNETS = {
    "time_embed.0.weight": "time_embedding.linear_1.weight",
    "time_embed.2.bias": "time_embedding.linear_2.bias",
    "input_blocks.0.0.weight": "conv_in.weight",
    "input_blocks.1.0.in_layers.0.weight": "down_blocks.0.resnets.0.norm1.weight",
    "input_blocks.3.0.in_layers.2.bias": "down_blocks.0.resnets.2.conv1.bias",
    "input_blocks.4.0.emb_layers.1.weight": "down_blocks.0.downsamplers.0.time_emb_proj.weight",
    "input_blocks.5.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
    "input_blocks.12.0.out_layers.3.weight": "down_blocks.2.downsamplers.0.conv2.weight",
    "input_blocks.15.0.out_layers.0.weight": "down_blocks.3.resnets.2.norm2.weight",
    "middle_block.0.in_layers.2.weight": "mid_block.resnets.0.conv1.weight",
    "output_blocks.0.0.in_layers.2.weight": "up_blocks.0.resnets.0.conv1.weight",
    "output_blocks.7.0.in_layers.2.weight": "up_blocks.1.resnets.3.conv1.weight",
    "output_blocks.15.0.skip_connection.bias": "up_blocks.3.resnets.3.conv_shortcut.bias",
    "out.0.bias": "conv_norm_out.bias",
    "out.2.weight": "conv_out.weight",
}
DECODER_NAMES = {
    **BOTH_UNETS,
    "middle_block.2.in_layers.2.weight": "mid_block.resnets.1.conv1.weight",
    "middle_block.1.norm.weight": "mid_block.attentions.0.group_norm.weight",
    "input_blocks.5.1.norm.bias": "down_blocks.1.attentions.0.group_norm.bias",
    "input_blocks.15.1.proj_out.bias": "down_blocks.3.attentions.2.to_out.0.bias",
    "output_blocks.0.1.proj_out.bias": "up_blocks.0.attentions.0.to_out.0.bias",
    "output_blocks.11.1.norm.weight": "up_blocks.2.attentions.3.group_norm.weight",
    "output_blocks.3.2.in_layers.2.weight": "up_blocks.0.upsamplers.0.conv1.weight",
    "output_blocks.11.2.out_layers.3.bias": "up_blocks.2.upsamplers.0.conv2.bias",
}
SUPER_RES_NAMES = {
    **BOTH_UNETS,
    "middle_block.1.in_layers.2.weight": "mid_block.resnets.1.conv1.weight",
    "output_blocks.3.1.in_layers.2.weight": "up_blocks.0.upsamplers.0.conv1.weight",
    "output_blocks.11.1.emb_layers.1.bias": "up_blocks.2.upsamplers.0.time_emb_proj.bias",
}


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_prior_names_are_the_published_ones(reference):
    original, mean, std = export_prior(reference["prior"], head_dim=8)
    assert len(original) == 2 + 7 * 2 + 2 * 12
    for theirs, ours in PRIOR_NAMES.items():
        assert torch.equal(original[theirs], reference["prior"][ours]), theirs
    assert torch.equal(mean, reference["prior"]["clip_mean"][0])
    assert mean.ndim == 1
    assert same(karlo.convert_prior(original, mean, std, head_dim=8), reference["prior"])
    assert same(karlo.convert_prior(original, mean[None], std[None], head_dim=8), reference["prior"])


def test_text_projection_names_are_the_published_ones(reference):
    original = export_text_projection(reference["text_proj"])
    for theirs, ours in TEXT_NAMES.items():
        assert torch.equal(original[theirs], reference["text_proj"][ours]), theirs
    assert same(karlo.convert_text_projection(original), reference["text_proj"])


@pytest.mark.parametrize(
    ("part", "kind", "prefix", "names"),
    [
        ("decoder", "decoder", "model.", DECODER_NAMES),
        ("super_res_first", "super_res", "model_first_steps.", SUPER_RES_NAMES),
        ("super_res_last", "super_res", "model_last_step.", SUPER_RES_NAMES),
    ],
)
def test_unet_names_are_the_published_ones(reference, part, kind, prefix, names):
    original = export_unet(reference[part], kind=kind, prefix=prefix, head_dim=8)
    for theirs, ours in names.items():
        assert torch.equal(original[prefix + theirs], reference[part][ours]), theirs
    assert same(karlo.convert_unet(original, kind=kind, prefix=prefix, head_dim=8), reference[part])


def test_attention_weights_become_convolutions_of_width_one(reference):
    original = export_unet(reference["decoder"], kind="decoder", head_dim=8)
    width = reference["decoder"]["mid_block.attentions.0.to_q.weight"].shape[0]
    context = reference["decoder"]["mid_block.attentions.0.add_k_proj.weight"].shape[1]
    assert original["model.middle_block.1.qkv.weight"].shape == (3 * width, width, 1)
    assert original["model.middle_block.1.encoder_kv.weight"].shape == (2 * width, context, 1)
    assert original["model.middle_block.1.proj_out.weight"].shape == (width, width, 1)
    assert original["model.middle_block.1.qkv.bias"].shape == (3 * width,)


def test_rows_lie_head_by_head_as_the_original_reads_them():
    # The original's attention sees [heads, 3 * head_dim] rows and cuts each head's into q, k, v; 2 heads of 3 here.
    rows = torch.arange(18.0)
    q, k, v = karlo.split_heads(rows, 3, 3)
    assert q.tolist() == [0, 1, 2, 9, 10, 11]
    assert k.tolist() == [3, 4, 5, 12, 13, 14]
    assert v.tolist() == [6, 7, 8, 15, 16, 17]
    key, value = karlo.split_heads(torch.arange(8.0)[:, None] * torch.ones(1, 5), 2, 2)
    assert key[:, 0].tolist() == [0, 1, 4, 5]
    assert value[:, 4].tolist() == [2, 3, 6, 7]


@settings(deadline=None, max_examples=40)
@given(
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 6),
    parts=st.integers(2, 3),
    tail=st.sampled_from([(), (3,), (2, 1)]),
)
def test_joining_heads_undoes_splitting_them(heads, head_dim, parts, tail):
    tensor = torch.randn(heads * parts * head_dim, *tail)
    assert torch.equal(join_heads(karlo.split_heads(tensor, parts, head_dim), head_dim), tensor)


def test_a_wrong_head_width_is_said():
    with pytest.raises(WeightsError, match="not a multiple of 3 x"):
        karlo.split_heads(torch.zeros(10), 3, 2, "qkv")


@pytest.mark.parametrize("part", ["prior", "decoder", "super_res_first"])
def test_every_original_name_is_used_exactly_once(reference, part):
    def convert(state):
        if part == "prior":
            mean = torch.zeros(reference["prior"]["clip_mean"].shape[1])
            return karlo.convert_prior(state, mean, mean, head_dim=8)
        return karlo.convert_unet(state, kind="decoder" if part == "decoder" else "super_res", head_dim=8)

    if part == "prior":
        original = export_prior(reference["prior"], head_dim=8)[0]
    else:
        kind = "decoder" if part == "decoder" else "super_res"
        original = export_unet(reference[part], kind=kind, head_dim=8)
    assert sum(t.numel() for t in original.values()) == sum(
        t.numel() for n, t in reference[part].items() if n not in ("clip_mean", "clip_std")
    )
    with pytest.raises(WeightsError, match=r"1 unknown \(new\.weight\)"):
        convert({**original, "model.new.weight": torch.ones(1)})
    for name in list(original)[::7]:
        with pytest.raises(WeightsError) as caught:
            convert({key: value for key, value in original.items() if key != name})
        assert "Karlo U-Net" in str(caught.value) or name.removeprefix("model.") in str(caught.value)


def test_one_networks_weights_are_not_taken_for_anothers(reference):
    decoder = export_unet(reference["decoder"], kind="decoder", head_dim=8)
    with pytest.raises(WeightsError):
        karlo.convert_unet(decoder, kind="super_res", head_dim=8)
    super_res = export_unet(reference["super_res_first"], kind="super_res")
    with pytest.raises(WeightsError):
        karlo.convert_unet(super_res, kind="decoder", head_dim=8)
    with pytest.raises(WeightsError, match="Karlo U-Net"):
        karlo.convert_unet({}, kind="decoder")
    with pytest.raises(WeightsError, match="missing"):
        karlo.convert_prior(decoder, torch.zeros(1), torch.zeros(1))
    with pytest.raises(WeightsError, match="missing"):
        karlo.convert_text_projection(decoder)


def test_shapes_that_cannot_be_are_said(reference):
    original = export_unet(reference["decoder"], kind="decoder", head_dim=8)
    name = "model.middle_block.1.qkv.weight"
    with pytest.raises(WeightsError, match="width-1 convolution"):
        karlo.convert_unet({**original, name: original[name][:, :, 0]}, kind="decoder", head_dim=8)
    prior, mean, std = export_prior(reference["prior"], head_dim=8)
    with pytest.raises(WeightsError, match="clip_std has 3 values"):
        karlo.convert_prior(prior, mean, std[:3], head_dim=8)


def test_a_files_names_are_divided_by_prefix():
    state = {"a.x": torch.ones(1), "b.y": torch.ones(1)}
    groups = karlo.split_by_prefix(state, ["a.", "b."])
    assert list(groups["a."]) == ["a.x"]
    assert list(groups["b."]) == ["b.y"]
    with pytest.raises(WeightsError, match=r"1 names do not belong to a known part \(\['b.y'\]\)"):
        karlo.split_by_prefix(state, ["a."])
    with pytest.raises(WeightsError, match=r"no tensor is named \['c\.'\]"):
        karlo.split_by_prefix(state, ["a.", "b.", "c."])


@pytest.mark.parametrize(("shift", "size"), [("default", 692), ("scale_shift", 730)])
def test_karlo_at_its_full_size_has_the_published_configuration_and_number_of_parameters(shift, size):
    from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel

    widths = (320, 640, 960, 1280)
    blocks = {"layers_per_block": 3, "block_out_channels": widths}
    with torch.device("meta"):
        prior = PriorTransformer(
            num_attention_heads=32, attention_head_dim=64, num_layers=20, embedding_dim=768, num_embeddings=77
        ).state_dict()
        decoder = UNet2DConditionModel(
            **blocks,
            in_channels=3,
            out_channels=6,
            down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
            cross_attention_dim=1536,
            class_embed_type="identity",
            attention_head_dim=64,
            resnet_time_scale_shift="scale_shift",
        ).state_dict()
        super_res = UNet2DModel(
            **blocks,
            in_channels=6,
            out_channels=3,
            down_block_types=("ResnetDownsampleBlock2D",) * 4,
            up_block_types=("ResnetUpsampleBlock2D",) * 4,
            add_attention=False,
            resnet_time_scale_shift=shift,
        ).state_dict()
    original, mean, std = export_prior(prior)
    prior = karlo.convert_prior(original, mean, std)
    config = layout.prior_config(prior, 64)
    assert (config["num_attention_heads"], config["num_layers"], config["num_embeddings"]) == (32, 20, 77)
    assert (config["embedding_dim"], config["additional_embeddings"]) == (768, 4)
    decoder = karlo.convert_unet(export_unet(decoder, kind="decoder"), kind="decoder")
    config = layout.decoder_config(decoder, 64)
    assert config["block_out_channels"] == list(widths)
    assert config["cross_attention_dim"] == 1536
    assert config["layers_per_block"] == 3
    assert config["resnet_time_scale_shift"] == "scale_shift"
    super_res = karlo.convert_unet(export_unet(super_res, kind="super_res"), kind="super_res")
    config = layout.super_res_config(super_res, "super_res_last")
    assert config["resnet_time_scale_shift"] == shift
    assert config["in_channels"] == 6
    sizes = [sum(tensor.numel() for tensor in state.values()) for state in (prior, decoder, super_res)]
    assert [round(size / 1e6) for size in sizes] == [1022, 885, size]
