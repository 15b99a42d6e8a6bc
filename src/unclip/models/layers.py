"""The layers of the networks: timestep embeddings, attention, transformer blocks and residual blocks."""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.errors import InputError
from unclip.models.entry import entry_point, routes_entry_points
from unclip.models.kernels import Conv2d, GroupNorm, Linear, attention
from unclip.numbers import whole

Activation = Literal["silu", "swish", "gelu", "relu", "mish"]


def activation(name: Activation) -> nn.Module:
    """The activation called `name`."""
    return {"silu": nn.SiLU, "swish": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "mish": nn.Mish}[name]()


def timestep_rows(timestep: Tensor | float, samples: Tensor) -> Tensor:
    """`timestep` (a number, or a tensor [] or [batch]) as float32 [1] or [batch] on the device of `samples`.

    A number becomes one row that broadcasts over the batch. It is filled on the device, without a transfer.

    Raises: InputError if the numbers of timesteps and samples differ.
    """
    device = samples.device
    if not isinstance(timestep, Tensor):
        return torch.full((1,), float(timestep), dtype=torch.float32, device=device)
    rows = timestep.to(device=device, dtype=torch.float32, non_blocking=True).reshape(-1)
    if len(rows) not in (1, len(samples)):
        raise InputError(f"{len(rows)} timesteps for a batch of {len(samples)}; give one, or one for each")
    return rows


def sinusoidal_embedding(
    timesteps: Tensor,
    width: int,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
    max_period: float = 10_000.0,
) -> Tensor:
    """Features of `timesteps` [batch] at geometrically spaced frequencies: float32 [batch, width].

    The first half contains sines and the second cosines, or the reverse with `flip_sin_to_cos`. If `width` is odd,
    the last feature is zero. Source: Vaswani et al. 2017, §3.5, as used by Ho et al. 2020.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(steps * (-math.log(max_period) / (half - freq_shift)))
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    features = torch.cat(parts, dim=-1)
    return F.pad(features, (0, 1)) if width % 2 else features


class TimestepEmbedding(nn.Module):
    """Two linear layers with an activation between them: [batch, in_width] → [batch, out_width]."""

    def __init__(
        self, in_width: int, hidden_width: int, out_width: int | None = None, act_fn: Activation = "silu"
    ) -> None:
        super().__init__()
        self.linear_1 = Linear(in_width, hidden_width)
        self.act = activation(act_fn)
        self.linear_2 = Linear(hidden_width, out_width or hidden_width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


MASKED = -10_000.0
"""The value that diffusers adds to the score of a masked token, instead of minus infinity."""


class KeyValue(NamedTuple):
    """Keys and values of some tokens in one layer, before the heads are split: each [batch, tokens, width]."""

    key: Tensor
    value: Tensor

    def then(self, key: Tensor, value: Tensor) -> "KeyValue":
        """These tokens followed by others."""
        return KeyValue(torch.cat([self.key, key], dim=1), torch.cat([self.value, value], dim=1))


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask [batch, tokens] (true or 1: not masked) as an additive bias [batch, 1, 1, tokens]: 0 or `MASKED`."""
    if mask.dim() != 2:
        raise InputError(f"an attention mask must be [batch, tokens]; this one is {tuple(mask.shape)}")
    return ((1.0 - mask.to(dtype)) * MASKED)[:, None, None, :]


def may_overwrite(*makers: nn.Module) -> bool:
    """Whether the outputs of these layers may be changed in place, which saves new memory: no gradient or hook needs
    them, and the network is not being compiled."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return not any(maker._forward_hooks for maker in makers)


class HeadedAttention(nn.Module):
    """Projections to queries, keys and values and back, and softmax attention over `num_heads` heads.

    `slice_size`: None computes all heads at once, "auto" half of them at a time, "max" one head at a time, and a
    number that many of the batch × heads attention maps at a time. Slices save memory; the result is the same.
    """

    def __init__(self, width: int, head_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = width // head_width
        self.slice_size: int | str | None = None
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.to_out = nn.ModuleList([Linear(width, width), nn.Dropout(dropout)])

    def split_heads(self, tokens: Tensor) -> Tensor:
        """[batch, tokens, width] → a view [batch, heads, tokens, head width]."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, query: Tensor, memory: KeyValue, bias: Tensor | None) -> Tensor:
        """The output for `query` [batch, tokens, width]. `bias` broadcasts to [batch, heads, tokens, memory tokens]."""
        queries, keys, values = self.split_heads(query), self.split_heads(memory.key), self.split_heads(memory.value)
        if bias is not None:
            bias = bias.to(queries.dtype)
        if self.slice_size is None:
            answers = attention(queries, keys, values, bias)
        else:
            answers = self._attend_in_slices(queries, keys, values, bias)
        return self.to_out[1](self.to_out[0](answers.transpose(1, 2).flatten(2)))

    def _attend_in_slices(self, queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads = queries.shape[0], self.num_heads
        size = {"auto": max(1, heads // 2), "max": 1}.get(str(self.slice_size), self.slice_size)
        assert isinstance(size, int)
        num_rows, num_heads = max(1, size // heads), min(size, heads)
        if bias is not None:
            bias = bias.expand(batch, -1, -1, -1)
        rows = []
        for row in (slice(i, i + num_rows) for i in range(0, batch, num_rows)):
            row_bias = None if bias is None else bias[row]
            parts = [
                attention(queries[row, part], keys[row, part], values[row, part], row_bias)
                for part in (slice(i, i + num_heads) for i in range(0, heads, num_heads))
            ]
            rows.append(torch.cat(parts, dim=1))
        return torch.cat(rows, dim=0)


class AddedKeyValueAttention(HeadedAttention):
    """Pixels attend to added context tokens and to one another; the result is added to the input.

    Source: Nichol et al. 2021 (GLIDE) §2.2, which arXiv 2204.06125 §2.1 builds on.
    """

    def __init__(self, channels: int, head_width: int, context_width: int, num_groups: int) -> None:
        super().__init__(channels, head_width)
        self.group_norm = GroupNorm(num_groups, channels, eps=1e-5)
        self.add_k_proj = Linear(context_width, channels)
        self.add_v_proj = Linear(context_width, channels)

    def prepare(self, context: Tensor) -> KeyValue:
        """Keys and values of the context [batch, tokens, context width]. They do not depend on the step."""
        return KeyValue(self.add_k_proj(context), self.add_v_proj(context))

    def forward(self, pixels: Tensor, added: KeyValue, bias: Tensor | None) -> Tensor:
        """`pixels` [batch, channels, height, width]; `bias` [batch, 1, 1, context tokens] or None."""
        # A channels-last picture is laid out as tokens, so both reshapes are views.
        tokens = self.group_norm(pixels).flatten(2).transpose(1, 2)
        if bias is not None:
            bias = F.pad(bias, (0, tokens.shape[1]))
        memory = added.then(self.to_k(tokens), self.to_v(tokens))
        answers = self.attend(self.to_q(tokens), memory, bias)
        answers = answers.transpose(1, 2).unflatten(2, pixels.shape[2:])
        return answers.add_(pixels) if may_overwrite(self.to_out[0]) else pixels + answers


class _GeluLinear(nn.Module):
    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.proj = Linear(width, hidden_width)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.gelu(self.proj(tokens))


class FeedForward(nn.Module):
    """Linear, GELU, dropout, linear. The hidden layer is four times as wide."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(_GeluLinear(width, 4 * width), nn.Dropout(dropout), Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class PriorBlock(nn.Module):
    """One pre-norm transformer block, which can also attend to keys and values of earlier tokens."""

    def __init__(self, width: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = HeadedAttention(width, head_width, dropout)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width, dropout)

    @entry_point
    def prepare(self, tokens: Tensor) -> KeyValue:
        """Only the keys and values of `tokens` [batch, tokens, width]."""
        normed = self.norm1(tokens)
        return KeyValue(self.attn1.to_k(normed), self.attn1.to_v(normed))

    @routes_entry_points
    def forward(
        self, tokens: Tensor, bias: Tensor | None, *, before: KeyValue | None = None, first_read: int = 0
    ) -> tuple[Tensor, KeyValue]:
        """The output tokens from index `first_read` on, and the keys and values of all input tokens."""
        normed = self.norm1(tokens)
        own = KeyValue(self.attn1.to_k(normed), self.attn1.to_v(normed))
        if first_read:
            tokens, normed = tokens[:, first_read:], normed[:, first_read:]
            bias = bias if bias is None else bias[:, :, first_read:]
        memory = own if before is None else before.then(*own)
        tokens = tokens + self.attn1.attend(self.attn1.to_q(normed), memory, bias)
        return tokens + self.ff(self.norm3(tokens)), own


@torch.no_grad()
def initialize_blocks(blocks: nn.ModuleList) -> None:
    """Scale the residual branches of `PriorBlock`s down by the depth, so that a deep stack is stable at the start."""
    scale = (2 * len(blocks)) ** -0.5
    for name, parameter in blocks.named_parameters():
        if name.endswith(("to_out.0.weight", "net.2.weight")):
            parameter.mul_(scale)
        elif name.endswith(("to_out.0.bias", "net.2.bias")):
            parameter.zero_()


def set_slicing(module: nn.Module, slice_size: Any) -> None:
    """Set `slice_size` of every attention in `module`; see `HeadedAttention`."""
    if slice_size is not None and slice_size not in ("auto", "max"):
        slice_size = whole(slice_size, 'slice_size, if neither "auto" nor "max",')
    for part in module.modules():
        if isinstance(part, HeadedAttention):
            part.slice_size = slice_size


class ResnetBlock(nn.Module):
    """[batch, in_channels, h, w] → [batch, out_channels, h', w'], where h' is h, h / 2 ("down") or 2 h ("up").

    With `scale_shift`, the embedding scales and shifts the result of the second normalisation (Dhariwal and Nichol
    2021, "adaptive group normalisation"). Otherwise it is added before that normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resample: Literal["up", "down"] | None = None,
        *,
        embedding_width: int,
        num_groups: int,
        eps: float,
        act_fn: Activation,
        dropout: float,
        scale_shift: bool,
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
        """`embedding` [batch or 1, embedding_width] is after its activation, which is computed once for all blocks."""
        h = self._activated(self.norm1(x), self.norm1)
        # A wrapper, such as that of an adapter, has no argument `doubled`.
        is_plain = type(self.conv1) is Conv2d
        h = self.conv1(h, doubled=True) if self.resample == "up" and is_plain else self.conv1(self._resampled(h))
        condition = self.time_emb_proj(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = self.norm2(h)
            h = torch.addcmul(shift, h, 1 + scale, out=h if may_overwrite(self.norm2) else None)
        else:
            h = self.norm2(h + condition)
        h = self.conv2(self.dropout(self._activated(h, self.norm2)))
        x = self._resampled(x)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h.add_(x) if may_overwrite(self.conv2) else x + h

    def _activated(self, h: Tensor, maker: nn.Module) -> Tensor:
        return F.silu(h, inplace=may_overwrite(maker)) if type(self.act) is nn.SiLU else self.act(h)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return x
