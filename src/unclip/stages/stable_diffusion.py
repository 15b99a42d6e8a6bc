"""Stable unCLIP's decoder in latent space: its condition, and the networks that are classes of diffusers.

diffusers is imported only when one of its networks is read; it is in the extra `family`. Source of the noise level:
Ho et al. 2106.15282 (conditioning augmentation), here of the image embedding.
"""

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from unclip.checkpoints.files import read_json, safe_join
from unclip.checkpoints.weights import (
    WeightsIndex,
    check_fit,
    checked_cast,
    open_weights,
    read_tensors,
    save_weights,
    state_of,
)
from unclip.clip.encoders import Batched
from unclip.clip.statistics import noised
from unclip.diffusion.loop import Denoiser
from unclip.diffusion.process import DiffusionProcess
from unclip.errors import ConfigError, MissingDependencyError
from unclip.models.layers import sinusoidal_embedding

BORROWED = ("AutoencoderKL", "UNet2DConditionModel")
"""The classes of diffusers; unclip has its own class for the other kind of UNet2DConditionModel."""
ATTENTION_BLOCKS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
"""Blocks of Stable Diffusion's U-Net, which unclip's own UNet2DConditionModel does not have."""

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of the autoencoder's attention in the files of older versions of diffusers, and their present names."""


def is_borrowed(class_name: str, folder: Path) -> bool:
    """Whether a component's folder contains a network that diffusers' class computes here."""
    if class_name != "UNet2DConditionModel":
        return class_name in BORROWED
    blocks = read_json(safe_join(folder, "config.json")).get("down_block_types")
    return isinstance(blocks, list) and any(block in ATTENTION_BLOCKS for block in blocks)


def read_borrowed(class_name: str, folder: Path, dtype: torch.dtype | None, variant: str | None) -> nn.Module:
    """Read a network by diffusers' class, in evaluation mode.

    Args:
        class_name: a name in `BORROWED`.
        folder: with config.json and safetensors.
        dtype: of the weights; None for float32.
        variant: of the weights, for example "fp16".

    Raises: MissingDependencyError without diffusers; CheckpointError as `open_weights`; WeightsError for weights that
        do not fit the configuration, or are not finite.
    """
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as problem:
        raise MissingDependencyError(f"{class_name} needs diffusers: pip install 'unclip[family]'") from problem
    settings = read_json(safe_join(folder, "config.json"))
    with torch.device("meta"):
        network = getattr(diffusers, class_name).from_config(settings)
    index = open_weights(folder, variant=variant)
    names = {name: _present_name(name) for name in index}
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    check_fit(wanted, WeightsIndex((names[name], info) for name, info in index.items()), folder)
    loaded = {
        names[name]: checked_cast(tensor, dtype or torch.float32, name, str(folder))
        for name, tensor in read_tensors(index)
    }
    network.load_state_dict(loaded, strict=True, assign=True)
    return network.eval()


def write_borrowed(network: Any, folder: Path, variant: str | None) -> None:
    """Write config.json and the weights of one of diffusers' networks."""
    folder.mkdir(parents=True, exist_ok=True)
    network.save_config(folder)
    save_weights(folder, state_of(network), variant=variant)


def _present_name(name: str) -> str:
    return re.sub(
        r"(\.attentions\.\d+)\.(query|key|value|proj_attn)\.",
        lambda found: f"{found[1]}.{_OLD_ATTENTION[found[2]]}.",
        name,
    )


@dataclass(frozen=True)
class StableCondition(Batched):
    """The condition of Stable unCLIP's decoder.

    Attributes:
        text_states: the text encoder's hidden states [batch, tokens, cross_attention_dim].
        class_labels: the noised image embedding and its level [batch, 2 · embedding_dim], see `noised_with_level`.
    """

    text_states: Tensor
    class_labels: Tensor

    @classmethod
    def null(cls, text_states: Tensor, embedding_dim: int) -> Self:
        """The null condition of guidance: zeros take the place of the embedding and of the level's features."""
        return cls(text_states, text_states.new_zeros(len(text_states), 2 * embedding_dim, dtype=torch.float32))


def noised_with_level(
    embeddings: Tensor, level: int, noise: Tensor, mean: Tensor, std: Tensor, process: DiffusionProcess
) -> Tensor:
    """The noised embeddings, followed by features of the noise level: float32 [batch, 2 · embedding_dim].

    The features are cosines, then sines. Level 0 has a little noise too.

    Args:
        embeddings, noise: [batch, embedding_dim].
        level: a timestep of `process`.
        mean, std: by which embeddings are whitened, [1, embedding_dim].
        process: only its schedule counts; the published models have the cosine schedule of 1000 steps.
    """
    found = noised(embeddings, level, noise, mean, std, process)
    levels = torch.full((len(found),), float(level), device=found.device)
    return torch.cat([found, sinusoidal_embedding(levels, found.shape[1])], dim=1)


@dataclass(frozen=True)
class KLAutoencoder:
    """diffusers' AutoencoderKL as an `Autoencoder` of `unclip.stages.latent`."""

    network: Any

    @property
    def factor(self) -> int:
        """Pixels for each cell of the latents, along one side."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.network.config.latent_channels

    @property
    def scale(self) -> float:
        """The factor of the latents that are diffused; 0.18215 in Stable Diffusion."""
        return self.network.config.scaling_factor

    def check(self) -> None:
        """Raises: ConfigError for an autoencoder whose latents are shifted."""
        if (shift := self.network.config.get("shift_factor")) is not None:
            raise ConfigError(f"vae.shift_factor is {shift}; only autoencoders without a shift are supported")

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Pictures [batch, 3, height, width] in [-1, 1] → the most likely latents, times `scale`; float32."""
        latents = self.network.encode(pictures.to(self.network.dtype)).latent_dist.mode()
        return latents.float() * self.scale

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents, times `scale` → pictures, float32, about in [-1, 1]."""
        return self.network.decode((latents / self.scale).to(self.network.dtype), return_dict=False)[0].float()


def stable_denoiser(unet: Any, condition: StableCondition) -> Denoiser:
    """One step of Stable unCLIP's U-Net, a class of diffusers, for a condition."""
    dtype = unet.dtype
    states, labels = condition.text_states.to(dtype), condition.class_labels.to(dtype)

    def denoise(x_t: Tensor, t: int | Tensor) -> Tensor:
        given = {"encoder_hidden_states": states, "class_labels": labels, "return_dict": False}
        return unet(x_t.to(dtype), t, **given)[0].float()

    return denoise
