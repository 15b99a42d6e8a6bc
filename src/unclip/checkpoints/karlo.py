"""Rename the original Karlo weights to the folder layout's names. Each network has one table of names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from unclip.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

HEAD_DIM = 64
"""Karlo's width of an attention head, in all of its networks."""

UNetKind = Literal["decoder", "super_res"]

_TEXT_PROJECTION = (
    ("text_seq_proj.0", "encoder_hidden_states_proj"),
    ("text_seq_proj.1", "text_encoder_hidden_states_norm"),
    ("clip_tok_proj", "clip_extra_context_tokens_proj"),
    ("text_feat_proj", "embedding_proj"),
    ("clip_emb", "clip_image_embeddings_project_to_time_embeddings"),
)
_PRIOR = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("clip_img_proj", "proj_in"),
    ("text_emb_proj", "embedding_proj"),
    ("text_enc_proj", "encoder_hidden_states_proj"),
    ("final_ln", "norm_out"),
    ("out_proj", "proj_to_clip_embeddings"),
)
_PRIOR_BLOCK = (
    ("attn.c_proj", "attn1.to_out.0"),
    ("mlp.c_fc", "ff.net.0.proj"),
    ("mlp.c_proj", "ff.net.2"),
    ("ln_1", "norm1"),
    ("ln_2", "norm3"),
)
_UNET = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)
_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
)


class _Rule(NamedTuple):
    """One original tensor and its targets: one tensor, or parts by head; `point` marks a width-1 convolution."""

    source: str
    targets: tuple[str, ...]
    point: bool = False


def _pairs(table: Iterable[tuple[str, str]], source: str = "", target: str = "") -> list[_Rule]:
    return [_Rule(f"{source}{a}.{end}", (f"{target}{b}.{end}",)) for a, b in table for end in ("weight", "bias")]


_TEXT_RULES = [*_pairs(_TEXT_PROJECTION), _Rule("cf_param", ("learned_classifier_free_guidance_embeddings",))]


def split_heads(tensor: Tensor, num_parts: int, head_dim: int, name: str = "the tensor") -> list[Tensor]:
    """The parts (q, k, v) of rows [heads · parts · head_dim, …], interleaved by head, each [heads · head_dim, …]."""
    if tensor.shape[0] % (num_parts * head_dim):
        raise WeightsError(
            f"{name} has {tensor.shape[0]} rows, not a multiple of {num_parts} x {head_dim} per head; check head_dim"
        )
    by_head = tensor.reshape(-1, num_parts, head_dim, *tensor.shape[1:])
    return [by_head[:, part].reshape(-1, *tensor.shape[1:]) for part in range(num_parts)]


# -- the three networks --------------------------------------------------------------------------------------------


def convert_prior(
    state_dict: Mapping[str, Tensor], mean: Tensor, std: Tensor, *, prefix: str = "model.", head_dim: int = HEAD_DIM
) -> dict[str, Tensor]:
    """The prior's weights by the folder layout's names; `mean` and `std` [embedding_dim] (or [1, …]) whiten embeddings.

    Raises WeightsError, with names, when a tensor is missing, left over, or has an impossible shape.
    """
    source = _under(state_dict, prefix)
    converted = _apply(_prior_rules(_count(source, r"transformer\.resblocks\.(\d+)\.")), source, head_dim, "prior")
    width = converted["proj_in.weight"].shape[1]
    for name, value in (("clip_mean", mean), ("clip_std", std)):
        if value.numel() != width:
            raise WeightsError(f"{name} has {value.numel()} values, but the prior's embeddings have {width}")
        converted[name] = value.reshape(1, width)
    return converted


def convert_text_projection(decoder_state_dict: Mapping[str, Tensor], *, prefix: str = "model.") -> dict[str, Tensor]:
    """The text projection's weights, which Karlo keeps in the decoder's file; the decoder's own weights are ignored.

    Raises WeightsError, with names, when a tensor is missing.
    """
    names = {rule.source for rule in _TEXT_RULES}
    source = {name: value for name, value in _under(decoder_state_dict, prefix).items() if name in names}
    return _apply(_TEXT_RULES, source, HEAD_DIM, "text projection")


def convert_unet(
    state_dict: Mapping[str, Tensor], *, kind: UNetKind, prefix: str = "model.", head_dim: int = HEAD_DIM
) -> dict[str, Tensor]:
    """A U-Net's weights by the folder layout's names; the numbers of blocks and resnets come from the names.

    `kind` "decoder" has attention and shares its file with the text projection, which is skipped; "super_res" has
    none. Only names under `prefix` are used. Raises WeightsError, with names, for missing and left-over tensors.
    """
    foreign = {rule.source for rule in _TEXT_RULES if kind == "decoder"}
    source = {name: value for name, value in _under(state_dict, prefix).items() if name not in foreign}
    num_blocks_in = _count(source, r"input_blocks\.(\d+)\.")
    ends = re.compile(r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.weight")
    upsamplers = [int(found[1]) for name in source if (found := ends.match(name))]
    stride = min(upsamplers, default=num_blocks_in - 1) + 1  # resnets a block, and its downsampler
    if stride < 2 or num_blocks_in % stride:
        raise WeightsError(
            f"the {kind} has {num_blocks_in} input blocks in groups of {stride}, which is not a Karlo U-Net"
        )
    rules = _unet_rules(kind, num_blocks_in // stride, stride - 1)
    for place, target in _resnet_places(num_blocks_in // stride, stride - 1):
        conv = source.get(f"{place}in_layers.2.weight")
        if conv is not None and conv.shape[0] != conv.shape[1]:  # only such a resnet has a shortcut
            rules += _pairs([("skip_connection", "conv_shortcut")], place, target)
    return _apply(rules, source, head_dim, kind)


def split_by_prefix(state_dict: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors under each prefix, with full names; WeightsError if a tensor or a prefix has no match."""
    groups = {
        prefix: {name: value for name, value in state_dict.items() if name.startswith(prefix)} for prefix in prefixes
    }
    left = set(state_dict).difference(*groups.values())
    empty = [prefix for prefix, group in groups.items() if not group]
    if left or empty:
        raise WeightsError(
            f"no tensor is named {empty}…, and {len(left)} names do not belong to a known part ({sorted(left)[:4]})"
        )
    return groups


# -- tables --------------------------------------------------------------------------------------------------------


def _prior_rules(num_layers: int) -> list[_Rule]:
    rules = [
        *_pairs(_PRIOR),
        _Rule("positional_embedding", ("positional_embedding",)),
        _Rule("prd_emb", ("prd_embedding",)),
    ]
    for i in range(num_layers):
        source, target = f"transformer.resblocks.{i}.", f"transformer_blocks.{i}."
        rules += _pairs(_PRIOR_BLOCK, source, target)
        for end in ("weight", "bias"):
            rules.append(_Rule(f"{source}attn.c_qkv.{end}", tuple(f"{target}attn1.to_{x}.{end}" for x in "qkv")))
    return rules


def _resnet_places(num_blocks: int, num_resnets: int) -> list[tuple[str, str]]:
    """(original, folder layout) prefixes of the resnets in the blocks, without down- and upsamplers."""
    step = num_resnets + 1
    places = []
    for b in range(num_blocks):
        places += [(f"input_blocks.{1 + step * b + r}.0.", f"down_blocks.{b}.resnets.{r}.") for r in range(num_resnets)]
        places += [(f"output_blocks.{step * b + r}.0.", f"up_blocks.{b}.resnets.{r}.") for r in range(step)]
    return places


def _unet_rules(kind: UNetKind, num_blocks: int, num_resnets: int) -> list[_Rule]:
    """The rules of a U-Net except shortcuts, which a resnet has only where its width changes."""
    has_attention, step = kind == "decoder", num_resnets + 1
    places = _resnet_places(num_blocks, num_resnets)
    attentions = []
    for b in range(num_blocks - 1):
        places.append((f"input_blocks.{step * (b + 1)}.0.", f"down_blocks.{b}.downsamplers.0."))
        places.append((f"output_blocks.{step * b + num_resnets}.{1 + has_attention}.", f"up_blocks.{b}.upsamplers.0."))
        attentions += [
            (f"input_blocks.{1 + step * (b + 1) + r}.1.", f"down_blocks.{b + 1}.attentions.{r}.")
            for r in range(num_resnets)
        ]
        attentions += [(f"output_blocks.{step * b + r}.1.", f"up_blocks.{b}.attentions.{r}.") for r in range(step)]
    places += [
        ("middle_block.0.", "mid_block.resnets.0."),
        (f"middle_block.{1 + has_attention}.", "mid_block.resnets.1."),
    ]
    attentions.append(("middle_block.1.", "mid_block.attentions.0."))
    rules = _pairs(_UNET)
    for source, target in places:
        rules += _pairs(_RESNET, source, target)
    for source, target in attentions if has_attention else ():
        rules += _pairs([("norm", "group_norm")], source, target)
        for end, point in (("weight", True), ("bias", False)):
            rules += [
                _Rule(f"{source}qkv.{end}", tuple(f"{target}to_{x}.{end}" for x in "qkv"), point),
                _Rule(f"{source}encoder_kv.{end}", tuple(f"{target}add_{x}_proj.{end}" for x in "kv"), point),
                _Rule(f"{source}proj_out.{end}", (f"{target}to_out.0.{end}",), point),
            ]
    return rules


# -- applying them -------------------------------------------------------------------------------------------------


def _apply(rules: list[_Rule], source: Mapping[str, Tensor], head_dim: int, what: str) -> dict[str, Tensor]:
    wanted = {rule.source for rule in rules}
    differences = {"missing": sorted(wanted - set(source)), "unknown": sorted(set(source) - wanted)}
    parts = [f"{len(names)} {word} ({', '.join(names[:4])})" for word, names in differences.items() if names]
    if parts:
        raise WeightsError(f"the {what} does not have the expected names: {'; '.join(parts)}")
    converted: dict[str, Tensor] = {}
    for name, targets, point in rules:
        tensor = source[name]
        if point and (tensor.ndim != 3 or tensor.shape[2] != 1):
            raise WeightsError(f"{name} has the shape {list(tensor.shape)}; a width-1 convolution is needed")
        tensor = tensor[:, :, 0] if point else tensor
        split = split_heads(tensor, len(targets), head_dim, name) if len(targets) > 1 else [tensor]
        converted.update(zip(targets, split, strict=True))
    return converted


def _under(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that matches `pattern`."""
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)
