"""Linear layers, convolutions, tables, attention and normalisation, each by the way that is fastest where it runs.

The results are those of PyTorch's own functions, up to rounding. Knows no network. Called by the networks' layers.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.models import winograd

MAX_SCORES_ON_CPU = 2**26
"""How many attention scores may stand in memory at once (128 MiB in bfloat16) for speed's sake."""

MIN_PIXELS_TO_MERGE_WEIGHTS = 512
"""From how many pixels on (batch × h × w) preparing the weights costs less than it saves: 1.2 to 1.4 times as fast
there, 1.6 at 1,024, 2.3 at 16,384 (one core, AVX2, 96 to 320 channels)."""


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
    """As PyTorch's; a half type that the CPU only emulates is computed in float32, one layer's weights at a time.

    With `doubled` the input is first enlarged twice by nearest neighbour, for kernels of 3×3 with a padding of 1. Four
    pixels of the enlarged picture are one of the input, so that the nine weights meet only four values: on a CPU in
    float32 one transposed convolution of 4×4 and stride 2 does both, with four products in nine. Wide layers train
    faster by `models.winograd`.
    """

    def forward(self, input: Tensor, doubled: bool = False) -> Tensor:
        if is_emulated(input.dtype, input.device):
            bias = None if self.bias is None else self.bias.float()
            return self._computed(input.float(), self.weight.float(), bias, doubled).to(input.dtype)
        return self._computed(input, self.weight, self.bias, doubled)

    def _computed(self, input: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool) -> Tensor:
        if self._is_3x3() and winograd.is_faster(input, weight, enlarged=2 if doubled else 1):
            return winograd.convolution(_doubled(input) if doubled else input, weight, bias)
        if doubled:
            many = input.shape[0] * input.shape[2] * input.shape[3] >= MIN_PIXELS_TO_MERGE_WEIGHTS
            on_cpu = input.device.type == "cpu" and input.dtype == torch.float32
            if many and on_cpu and not torch.is_autocast_enabled("cpu"):
                return F.conv_transpose2d(input, _merged_for_doubling(weight), bias, stride=2, padding=1)
            input = _doubled(input)
        return self._conv_forward(input, weight, bias)

    def _is_3x3(self) -> bool:
        """And nothing else: neither a stride nor holes nor groups."""
        settings = self.kernel_size, self.padding, self.stride, self.dilation, self.groups, self.padding_mode
        return settings == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _merged_for_doubling(weight: Tensor) -> Tensor:
    """[out, in, 3, 3] of a convolution after doubling → [in, out, 4, 4] of the transposed one that does both.

    Along each axis an even pixel sees the pixel before it with weight 0 and its own with 1 + 2; an odd one its own with
    0 + 1 and the next with 2. The transposed kernel lists them from the last to the first.
    """
    num_out, num_in = weight.shape[:2]
    axis = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    both = torch.kron(axis, axis)
    return (weight.permute(1, 0, 2, 3).reshape(num_in * num_out, 9) @ both.T).view(num_in, num_out, 4, 4)


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
