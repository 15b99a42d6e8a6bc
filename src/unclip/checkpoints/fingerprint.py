"""Short texts that tell a network's weights from any other's, whatever type they are kept in.

Knows weights by name; knows not what a fingerprint is kept with. Called by pipelines and where folders are converted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VALUES = 64
"""Of each tensor, about."""
THRESHOLD = 257 * 2.0**-25
"""Halfway between two neighbours in float16 and in bfloat16 too, so that rounding to either leads no value across."""
OLD_THRESHOLD = 0.0
"""Of files from before: a very small value is 0 in float16."""


def fingerprint(states: Iterable[Mapping[str, Tensor]]) -> str:
    """A text that tells the weights of some networks, by name, from any other's.

    It says of some values of each tensor whether they are above a threshold, which rounding to a smaller type leaves.
    Empty where weights are away (offloaded layer by layer).
    """
    return _digest(states, THRESHOLD)


def may_be_of(made: str, states: Iterable[Mapping[str, Tensor]]) -> bool:
    """Whether a fingerprint is of these networks, or it cannot be known: it is empty, or weights are away."""
    states = list(states)
    own = [_digest(states, threshold) for threshold in (THRESHOLD, OLD_THRESHOLD)]
    return not made or not own[0] or made in own


def _digest(states: Iterable[Mapping[str, Tensor]], threshold: float) -> str:
    digest = hashlib.sha256()
    for state in states:
        for name, tensor in sorted(state.items()):
            if tensor.is_meta:
                return ""
            flat = tensor.detach().flatten()
            above = flat[:: max(1, len(flat) // VALUES)].float() > threshold
            digest.update(f"{name} {tuple(tensor.shape)} ".encode() + bytes(above.cpu().tolist()))
    return digest.hexdigest()[:16]
