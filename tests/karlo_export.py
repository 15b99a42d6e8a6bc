"""Writes networks under the names of Karlo's original files: the inverse of `unclip.checkpoints.karlo`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from unclip.checkpoints import karlo


def export_prior(state: Mapping[str, Tensor], *, head_dim: int = 64) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(state dict, mean [embedding_dim], std [embedding_dim])."""
    source = dict(state)
    mean, std = source.pop("clip_mean")[0], source.pop("clip_std")[0]
    num_layers = len({name.split(".")[1] for name in source if name.startswith("transformer_blocks.")})
    return _export(karlo._prior_rules(num_layers), source, head_dim, "model."), mean, std


def export_text_projection(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _export(karlo._TEXT_RULES, state, 64, "model.")


def export_unet(
    state: Mapping[str, Tensor], *, kind: karlo.UNetKind, prefix: str = "model.", head_dim: int = 64
) -> dict[str, Tensor]:
    blocks = len({name.split(".")[1] for name in state if name.startswith("down_blocks.")})
    resnets = len({name.split(".")[3] for name in state if name.startswith("down_blocks.0.resnets.")})
    rules = karlo._unet_rules(kind, blocks, resnets)
    for source, target in karlo._resnet_places(blocks, resnets):
        if f"{target}conv_shortcut.weight" in state:
            rules += karlo._pairs([("skip_connection", "conv_shortcut")], source, target)
    return _export(rules, state, head_dim, prefix)


def join_heads(parts: list[Tensor], head_dim: int) -> Tensor:
    """The inverse of `karlo.split_heads`."""
    by_head = [part.reshape(-1, head_dim, *part.shape[1:]) for part in parts]
    return torch.stack(by_head, dim=1).reshape(-1, *parts[0].shape[1:])


def _export(rules: list[karlo._Rule], state: Mapping[str, Tensor], head_dim: int, prefix: str) -> dict[str, Tensor]:
    found = {}
    for rule in rules:
        parts = [state[target] for target in rule.targets]
        tensor = parts[0] if len(parts) == 1 else join_heads(parts, head_dim)
        found[prefix + rule.source] = tensor[:, :, None] if rule.point else tensor
    assert {target for rule in rules for target in rule.targets} == set(state)
    return found
