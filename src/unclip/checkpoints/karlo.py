"""Rename the original Karlo weights to the folder layout's names, and back.

Each network has one table of names, which serves both directions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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


@dataclass(frozen=True)
class _Rule:
    """One original tensor and its targets: one tensor, or parts by head; `point` marks a width-1 convolution."""

    source: str
    targets: tuple[str, ...]
    point: bool = False

    def forward(self, tensor: Tensor, head_dim: int) -> list[Tensor]:
        if self.point:
            if tensor.ndim != 3 or tensor.shape[2] != 1:
                raise WeightsError(f"{self.source} has the shape {list(tensor.shape)}; a width-1 convolution is needed")
            tensor = tensor[:, :, 0]
        if len(self.targets) == 1:
            return [tensor]
        return split_heads(tensor, len(self.targets), head_dim, self.source)

    def backward(self, tensors: list[Tensor], head_dim: int) -> Tensor:
        tensor = tensors[0] if len(tensors) == 1 else join_heads(tensors, head_dim)
        return tensor[:, :, None] if self.point else tensor


def split_heads(tensor: Tensor, num_parts: int, head_dim: int, name: str = "the tensor") -> list[Tensor]:
    """The parts (q, k, v) of rows [heads · parts · head_dim, …], interleaved by head, each [heads · head_dim, …]."""
    if tensor.shape[0] % (num_parts * head_dim):
        raise WeightsError(
            f"{name} has {tensor.shape[0]} rows, not a multiple of {num_parts} x {head_dim} per head; check head_dim"
        )
    by_head = tensor.reshape(-1, num_parts, head_dim, *tensor.shape[1:])
    return [by_head[:, part].reshape(-1, *tensor.shape[1:]) for part in range(num_parts)]


def join_heads(parts: list[Tensor], head_dim: int) -> Tensor:
    """The inverse of `split_heads`."""
    import torch

    by_head = [part.reshape(-1, head_dim, *part.shape[1:]) for part in parts]
    return torch.stack(by_head, dim=1).reshape(-1, *parts[0].shape[1:])


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
            raise WeightsError(f"{name} has {value.numel()} values, and the prior's embeddings have {width}")
        converted[name] = value.reshape(1, width)
    return converted


def export_prior(
    state_dict: Mapping[str, Tensor], *, prefix: str = "model.", head_dim: int = HEAD_DIM
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The inverse of `convert_prior`: (state dict, mean [embedding_dim], std [embedding_dim])."""
    source = dict(state_dict)
    try:
        mean, std = source.pop("clip_mean")[0], source.pop("clip_std")[0]
    except KeyError as problem:
        raise WeightsError(f"the prior has no {problem}") from None
    rules = _prior_rules(_count(source, r"transformer_blocks\.(\d+)\."))
    return _unapply(rules, source, head_dim, prefix, "prior"), mean, std


def convert_text_projection(decoder_state_dict: Mapping[str, Tensor], *, prefix: str = "model.") -> dict[str, Tensor]:
    """The text projection's weights, which Karlo keeps in the decoder's file; the decoder's own weights are ignored.

    Raises WeightsError, with names, when a tensor is missing.
    """
    source = {k: v for k, v in _under(decoder_state_dict, prefix).items() if _is_text_projection(k)}
    return _apply(_text_projection_rules(), source, HEAD_DIM, "text projection")


def export_text_projection(state_dict: Mapping[str, Tensor], *, prefix: str = "model.") -> dict[str, Tensor]:
    """The inverse of `convert_text_projection`; join it with the decoder's weights to get Karlo's file."""
    return _unapply(_text_projection_rules(), state_dict, HEAD_DIM, prefix, "text projection")


def convert_unet(
    state_dict: Mapping[str, Tensor], *, kind: UNetKind, prefix: str = "model.", head_dim: int = HEAD_DIM
) -> dict[str, Tensor]:
    """A U-Net's weights by the folder layout's names; the numbers of blocks and resnets come from the names.

    `kind` "decoder" has attention and shares its file with the text projection, which is passed over; "super_res" has
    none. Only names under `prefix` are looked at. Raises WeightsError, with names, for missing and left-over tensors.
    """
    source = {k: v for k, v in _under(state_dict, prefix).items() if kind != "decoder" or not _is_text_projection(k)}
    num_blocks_in = _count(source, r"input_blocks\.(\d+)\.")
    upsamplers = [int(m[1]) for m in _matches(source, r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.weight")]
    stride = min(upsamplers, default=num_blocks_in - 1) + 1  # resnets a block, and its downsampler
    if stride < 2 or num_blocks_in % stride:
        raise WeightsError(
            f"the {kind} has {num_blocks_in} input blocks in groups of {stride}, which is not a Karlo U-Net"
        )
    rules = _unet_rules(kind, num_blocks_in // stride, stride - 1)
    rules += _shortcut_rules(num_blocks_in // stride, stride - 1, source, "source")
    return _apply(rules, source, head_dim, kind)


def export_unet(
    state_dict: Mapping[str, Tensor], *, kind: UNetKind, prefix: str = "model.", head_dim: int = HEAD_DIM
) -> dict[str, Tensor]:
    """The inverse of `convert_unet`."""
    num_blocks = _count(state_dict, r"down_blocks\.(\d+)\.")
    num_resnets = _count(state_dict, r"down_blocks\.0\.resnets\.(\d+)\.")
    rules = _unet_rules(kind, num_blocks, num_resnets)
    rules += _shortcut_rules(num_blocks, num_resnets, state_dict, "target")
    return _unapply(rules, state_dict, head_dim, prefix, kind)


def split_by_prefix(state_dict: Mapping[str, Tensor], prefixes: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors under each prefix, with full names; WeightsError if a tensor or a prefix has no match."""
    groups: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    left = []
    for name, value in state_dict.items():
        prefix = next((prefix for prefix in groups if name.startswith(prefix)), None)
        if prefix is None:
            left.append(name)
        else:
            groups[prefix][name] = value
    empty = [prefix for prefix, group in groups.items() if not group]
    if left or empty:
        raise WeightsError(f"nothing is named {empty}…, and {len(left)} names belong to no known part ({left[:4]})")
    return groups


# -- tables --------------------------------------------------------------------------------------------------------


def _pairs(table: Iterable[tuple[str, str]], source: str = "", target: str = "") -> list[_Rule]:
    return [_Rule(f"{source}{a}.{end}", (f"{target}{b}.{end}",)) for a, b in table for end in ("weight", "bias")]


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


def _text_projection_rules() -> list[_Rule]:
    return [*_pairs(_TEXT_PROJECTION), _Rule("cf_param", ("learned_classifier_free_guidance_embeddings",))]


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


def _shortcut_rules(
    num_blocks: int, num_resnets: int, state: Mapping[str, Tensor], side: Literal["source", "target"]
) -> list[_Rule]:
    """The shortcuts of those resnets whose first convolution in `state` changes the width."""
    rules = []
    for source, target in _resnet_places(num_blocks, num_resnets):
        conv = state.get(f"{source}in_layers.2.weight" if side == "source" else f"{target}conv1.weight")
        if conv is not None and conv.shape[0] != conv.shape[1]:
            rules += _pairs([("skip_connection", "conv_shortcut")], source, target)
    return rules


# -- applying them -------------------------------------------------------------------------------------------------


def _apply(rules: list[_Rule], source: Mapping[str, Tensor], head_dim: int, what: str) -> dict[str, Tensor]:
    _check_names([rule.source for rule in rules], source, what)
    return {
        target: part
        for rule in rules
        for target, part in zip(rule.targets, rule.forward(source[rule.source], head_dim), strict=True)
    }


def _unapply(
    rules: list[_Rule], state: Mapping[str, Tensor], head_dim: int, prefix: str, what: str
) -> dict[str, Tensor]:
    _check_names([target for rule in rules for target in rule.targets], state, what)
    return {prefix + rule.source: rule.backward([state[target] for target in rule.targets], head_dim) for rule in rules}


def _check_names(wanted: list[str], found: Mapping[str, Tensor], what: str) -> None:
    assert len(set(wanted)) == len(wanted)
    missing = sorted(set(wanted) - set(found))
    extra = sorted(set(found) - set(wanted))
    if missing or extra:
        parts = [
            f"{len(names)} {word} ({', '.join(names[:4])})"
            for names, word in ((missing, "missing"), (extra, "unknown"))
            if names
        ]
        raise WeightsError(f"the {what} does not have the names of its layout: {'; '.join(parts)}")


def _under(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}


def _is_text_projection(name: str) -> bool:
    return any(name == rule.source for rule in _text_projection_rules())


def _matches(names: Iterable[str], pattern: str) -> list[re.Match[str]]:
    return [found for name in names if (found := re.match(pattern, name))]


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that matches `pattern`."""
    return 1 + max((int(found[1]) for found in _matches(names, pattern)), default=-1)
