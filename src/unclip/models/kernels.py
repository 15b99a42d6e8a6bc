"""Linear layers, convolutions, embeddings, attention and normalisation, each with the fastest kernel for its device.

The results are those of PyTorch's own functions, up to rounding.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        if self._is_3x3() and is_faster(input, weight, enlarged=2 if doubled else 1):
            return convolution(_doubled(input) if doubled else input, weight, bias)
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


BLOCK = 4
"""Width and height of a block of output pixels; a tile of input pixels reaches one pixel farther on every side."""

MIN_CHANNELS = 128
"""With fewer channels, in or out, the transforms cost what the products save."""

MIN_PIXELS = 1024
"""From how many pixels on (batch × h × w) transforming the weights pays.

Forward and backward, float32, AVX2, one core: 1.3 to 1.8 times as fast as oneDNN's from 128 to 512 channels and 1,024
to 16,384 pixels; 1.0 times at 96 channels. Two cores: 1.3 to 2 times."""

MAX_CHUNK_BYTES = 6 * 2**20
"""Limit of transformed tiles at a time, so that they fit the processor's cache: 1.2 times as fast as a whole batch."""

INPUT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
WEIGHT = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
OUTPUT = [
    [1, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
]


def is_faster(input: Tensor, weight: Tensor, *, enlarged: int = 1) -> bool:
    """Whether `convolution` may take these, the input `enlarged`, and is the faster way, both passes together."""
    batch, _, height, width = input.shape
    height, width = height * enlarged, width * enlarged
    return (
        min(weight.shape[:2]) >= MIN_CHANNELS
        and batch * height * width >= MIN_PIXELS
        and height % BLOCK == width % BLOCK == 0
        and input.device.type == weight.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and torch.is_grad_enabled()
        and (weight.requires_grad or input.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of 3×3 with a padding of 1: [batch, in, h, w], [out, in, 3, 3], [out] → [batch, out, h, w].

    h and w are multiples of 4. The result is channels-last; it and the gradients differ from the plain way's by about
    1e-5 of the largest value (float32). There is no second derivative.
    """
    return _Convolution.apply(input, weight, bias)  # pyright: ignore[reportReturnType]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        inputs = input.permute(0, 2, 3, 1)
        outputs = input.new_empty(*inputs.shape[:3], weight.shape[0])
        transformed = _weights(weight)
        tiles = _Tiles(inputs, chunk_channels=max(weight.shape[:2]))
        for chunk in tiles.chunks():
            values = torch.bmm(tiles.transformed(chunk), transformed)
            blocks = _as_blocks(outputs[chunk])
            blocks.copy_((_matrix("output") @ values.flatten(1)).view_as(blocks))
        if bias is not None:
            outputs += bias
        return outputs.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]  # the decorator makes `ctx` positional
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        input_needed, weight_needed, bias_needed = ctx.needs_input_grad
        gradient = gradients[0].permute(0, 2, 3, 1)
        inputs = input.permute(0, 2, 3, 1)
        transformed = _weights(weight).transpose(1, 2)
        weight_gradient = transformed.new_zeros(36, *weight.shape[1::-1])
        input_gradient = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        tiles = _Tiles(inputs, chunk_channels=max(weight.shape[:2]))
        for chunk in tiles.chunks():
            values = _matrix("output").T @ _as_blocks(gradient[chunk]).reshape(BLOCK**2, -1)
            values = values.view(36, -1, weight.shape[0])
            if weight_needed:
                weight_gradient.baddbmm_(tiles.transformed(chunk).transpose(1, 2), values)
            if input_needed:
                tiles.add_up(_matrix("input").T @ torch.bmm(values, transformed).flatten(1), input_gradient[chunk])
        plain = (_matrix("weight").T @ weight_gradient.flatten(1)).view(3, 3, *weight.shape[1::-1])
        return (
            input_gradient.permute(0, 3, 1, 2) if input_needed else None,
            plain.permute(3, 2, 0, 1) if weight_needed else None,
            gradient.sum((0, 1, 2)) if bias_needed else None,
        )


class _Tiles:
    """The overlapping tiles of pictures [batch, h, w, channels], a chunk of pictures at a time."""

    def __init__(self, pictures: Tensor, *, chunk_channels: int) -> None:
        self.pictures = pictures
        batch, height, width, channels = pictures.shape
        self.grid = height // BLOCK, width // BLOCK
        picture_bytes = 4 * 36 * self.grid[0] * self.grid[1] * chunk_channels
        self.chunk = min(max(MAX_CHUNK_BYTES // picture_bytes, 1), batch)
        self.padded = pictures.new_zeros(self.chunk, height + 2, width + 2, channels)
        """Its border stays zero."""

    def chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.pictures), self.chunk):
            yield slice(start, min(start + self.chunk, len(self.pictures)))

    def transformed(self, chunk: slice) -> Tensor:
        """[36, tiles, channels] of the chunk's pictures."""
        pictures = self.pictures[chunk]
        padded = self.padded[: len(pictures)]
        padded[:, 1:-1, 1:-1] = pictures
        side = BLOCK + 2
        tiles = padded.unfold(1, side, BLOCK).unfold(2, side, BLOCK).permute(4, 5, 0, 1, 2, 3)
        return (_matrix("input") @ tiles.reshape(36, -1)).view(36, -1, pictures.shape[-1])

    def add_up(self, tiles: Tensor, pictures: Tensor) -> None:
        """The transpose of cutting: [36, tiles × channels] added where they overlap, written into `pictures`."""
        batch, height, width, channels = pictures.shape
        rows, columns = self.grid
        wide = pictures.new_zeros(batch, height + BLOCK, width + BLOCK, channels)
        blocks = wide.view(batch, rows + 1, BLOCK, columns + 1, BLOCK, channels)
        tiles = tiles.view(BLOCK + 2, BLOCK + 2, batch, rows, columns, channels).permute(2, 3, 0, 4, 1, 5)
        blocks[:, :-1, :, :-1] = tiles[:, :, :BLOCK, :, :BLOCK]
        blocks[:, 1:, :2, :-1] += tiles[:, :, BLOCK:, :, :BLOCK]
        blocks[:, :-1, :, 1:, :2] += tiles[:, :, :BLOCK, :, BLOCK:]
        blocks[:, 1:, :2, 1:, :2] += tiles[:, :, BLOCK:, :, BLOCK:]
        pictures.copy_(wide[:, 1 : height + 1, 1 : width + 1])


def _as_blocks(pictures: Tensor) -> Tensor:
    """[batch, h, w, channels] → [4, 4, batch, h / 4, w / 4, channels], a view."""
    batch, height, width, channels = pictures.shape
    blocks = pictures.view(batch, height // BLOCK, BLOCK, width // BLOCK, BLOCK, channels)
    return blocks.permute(2, 4, 0, 1, 3, 5)


def _weights(weight: Tensor) -> Tensor:
    """[out, in, 3, 3] → [36, in, out], transformed."""
    return (_matrix("weight") @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, *weight.shape[1::-1])


@functools.cache
def _matrix(name: str) -> Tensor:
    """The transform of both axes at once, [36 or 16, 36 or 9]."""
    rows = {"input": INPUT, "weight": WEIGHT, "output": OUTPUT}[name]
    axis = torch.tensor(rows, dtype=torch.float64, device="cpu")
    return torch.kron(axis, axis).float()
