"""Linear layers, convolutions, tables, attention and normalisation, each by the way that is fastest where it runs.

The results are those of PyTorch's own functions, up to rounding. Knows no network. Called by the networks' layers.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SCORES_ON_CPU = 2**26
"""How many attention scores may stand in memory at once (128 MiB in bfloat16) for speed's sake."""


@functools.cache
def _cpu_computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for a half type on this CPU (they need AVX-512, or its like on ARM)."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, name)())


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `dtype` is a half type that `device`, a CPU, computes many times slower than float32."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not _cpu_computes(dtype)


def _is_half_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of [batch, heads, tokens, head width]; `bias` broadcasts to [batch, heads, queries, keys]."""
    num_scores = queries.shape[0] * queries.shape[1] * queries.shape[2] * keys.shape[2]
    if is_emulated(queries.dtype, queries.device):
        wide = (x if x is None else x.float() for x in (queries, keys, values, bias))
        return attention(*wide).to(values.dtype)  # pyright: ignore[reportArgumentType]
    if _is_half_on_cpu(queries) and queries.dtype == torch.bfloat16 and num_scores <= MAX_SCORES_ON_CPU:
        # Two matrix products beat PyTorch's fused kernel here: 1.2 to 1.6 times forward, 2.5 to 5 times with the
        # backward pass (torch 2.13, AVX-512 bf16, 2026-11).
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return weights.to(values.dtype) @ values
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)


class Linear(nn.Linear):
    """As PyTorch's; a half type that the CPU only emulates is computed in float32, one layer's weights at a time."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_emulated(input.dtype, input.device):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias).to(input.dtype)


class Conv2d(nn.Conv2d):
    """As PyTorch's; a half type that the CPU only emulates is computed in float32, one layer's weights at a time."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_emulated(input.dtype, input.device):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(input.float(), self.weight.float(), bias).to(input.dtype)


class Embedding(nn.Embedding):
    """As PyTorch's; on the meta device nothing is drawn, since that alone imports PyTorch's compiler, for seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class GroupNorm(nn.GroupNorm):
    """As PyTorch's; half types on the CPU are computed in float32, which is 2 to 4 times faster there."""

    def forward(self, input: Tensor) -> Tensor:
        if not _is_half_on_cpu(input):
            return super().forward(input)
        normed = F.group_norm(input.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(input.dtype)
