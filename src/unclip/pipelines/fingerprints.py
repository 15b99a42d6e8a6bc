"""Short texts that tell a model's weights from any other's.

Knows networks' values; knows not what a fingerprint is kept with. Called by `manipulation.py`.
"""

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from unclip.pipelines.generation import GenerationPipeline
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline

if TYPE_CHECKING:
    from torch import nn

VALUES = 64
"""Of each tensor, about."""


def fingerprint(pipe: GenerationPipeline) -> str:
    """A text that tells a decoder's weights from any other's, whatever type they are loaded in.

    It is of the signs of some values of each tensor, which rounding to a smaller type leaves. Empty where the weights
    are away (offloaded layer by layer).
    """
    return _of((pipe.text_proj, pipe.decoder))


def encoder_fingerprint(pipe: UnCLIPImageVariationPipeline) -> str:
    """As `fingerprint`, of the image encoder: it tells one space of embeddings from another."""
    return _of((pipe.image_encoder,))


def _of(networks: "Iterable[nn.Module]") -> str:
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            if tensor.is_meta:
                return ""
            flat = tensor.detach().flatten()
            signs = flat[:: max(1, len(flat) // VALUES)] > 0
            digest.update(f"{name} {tuple(tensor.shape)} ".encode() + bytes(signs.cpu().tolist()))
    return digest.hexdigest()[:16]
