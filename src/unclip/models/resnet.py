"""The residual block of the UNets: two convolutions, conditioned on the time embedding between them.

Knows neither its neighbours nor what is in the embedding. Called by the UNets' blocks.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models.embeddings import activation
from unclip.models.kernels import Conv2d, GroupNorm, Linear


class ResnetBlock(nn.Module):
    """[batch, in_channels, h, w] → [batch, out_channels, h', w'], where h' is h, h / 2 ("down") or 2 h ("up").

    With `scale_shift` the embedding scales and shifts the second normalisation's result (Dhariwal and Nichol 2021,
    "adaptive group normalisation"); without, it is added before that normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_width: int,
        num_groups: int,
        eps: float,
        act_fn: str,
        dropout: float,
        scale_shift: bool,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm1 = GroupNorm(num_groups, in_channels, eps=eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = Linear(embedding_width, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNorm(num_groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.act = activation(act_fn)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`embedding` [batch or 1, embedding_width] has been through its activation already, once for all blocks."""
        h = self.act(self.norm1(x))
        # A wrapper, of an adapter for one, knows nothing of doubling.
        is_plain = type(self.conv1) is Conv2d
        h = self.conv1(h, doubled=True) if self.resample == "up" and is_plain else self.conv1(self._resampled(h))
        condition = self.time_emb_proj(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + condition)
        h = self.conv2(self.dropout(self.act(h)))
        x = self._resampled(x)
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return x
