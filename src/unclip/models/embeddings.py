"""Timesteps as vectors: sinusoidal features and the small network that follows them.

Knows nothing of schedules: a timestep is any number. Called by the networks beside it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.errors import ConfigError
from unclip.models.kernels import Linear

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "mish": nn.Mish,
}


def activation(name: str) -> nn.Module:
    """The activation called `name`; ConfigError when it is not one of `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {name!r} is not implemented; use one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]()


def timestep_rows(timestep: Tensor | float, device: torch.device) -> Tensor:
    """`timestep` (a number, or a tensor [] or [batch]) as float32 [1] or [batch] on `device`.

    A number becomes one row that broadcasts over the batch, filled on the device: no transfer, no waiting.
    """
    if isinstance(timestep, Tensor):
        return timestep.to(device=device, dtype=torch.float32, non_blocking=True).reshape(-1)
    return torch.full((1,), float(timestep), dtype=torch.float32, device=device)


def sinusoidal_embedding(
    timesteps: Tensor,
    width: int,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
    max_period: float = 10_000.0,
) -> Tensor:
    """Features of `timesteps` [batch] at geometrically spaced frequencies: float32 [batch, width].

    The first half holds sines and the second cosines, or the other way round with `flip_sin_to_cos`;
    an odd `width` ends in a zero. Source: Vaswani et al. 2017, §3.5, as used by Ho et al. 2020.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(steps * (-math.log(max_period) / (half - freq_shift)))
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    features = torch.cat(parts, dim=-1)
    return F.pad(features, (0, 1)) if width % 2 else features


class TimestepEmbedding(nn.Module):
    """Two linear layers with an activation between: [batch, in_width] → [batch, out_width]."""

    def __init__(self, in_width: int, hidden_width: int, out_width: int | None = None, act_fn: str = "silu") -> None:
        super().__init__()
        self.linear_1 = Linear(in_width, hidden_width)
        self.act = activation(act_fn)
        self.linear_2 = Linear(hidden_width, out_width or hidden_width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))
