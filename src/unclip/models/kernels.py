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
"""The largest number of attention scores in memory at once (128 MiB in bfloat16) for the faster kernel."""

MIN_PIXELS_TO_MERGE_WEIGHTS = 512
"""The smallest number of pixels (batch × h × w) for which merging the weights saves time: 1.2 to 1.4 times as fast
here, 1.6 at 1,024 pixels, 2.3 at 16,384 (one core, AVX2, 96 to 320 channels)."""


@functools.cache
def _cpu_computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for a half type on this CPU (which need AVX-512, or the equivalent on ARM)."""
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
    """PyTorch's layer. Half types that the CPU only emulates are computed in float32, one layer at a time."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_emulated(input.dtype, input.device):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias).to(input.dtype)


class Conv2d(nn.Conv2d):
    """PyTorch's layer. Half types that the CPU only emulates are computed in float32, one layer at a time.

    With `doubled`, the input is first enlarged to twice its size by nearest neighbour; the kernel must then be 3×3 with
    a padding of 1. Four pixels of the enlarged picture equal one of the input, so the nine weights meet only four
    values. On a CPU in float32, one transposed convolution of 4×4 with stride 2 does both, with four products in place
    of nine. Wide layers are trained by Winograd convolutions (`convolution`).
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
        """Whether this is a plain 3×3 convolution, without stride, dilation or groups."""
        settings = self.kernel_size, self.padding, self.stride, self.dilation, self.groups, self.padding_mode
        return settings == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _merged_for_doubling(weight: Tensor) -> Tensor:
    """Merge doubling with the convolution after it: kernel [out, in, 3, 3] → transposed kernel [in, out, 4, 4].

    Along each axis, an even output pixel uses the previous input pixel with weight 0 and its own with weights 1 + 2. An
    odd one uses its own with weights 0 + 1 and the next with weight 2. The transposed kernel has them in reverse order.
    """
    num_out, num_in = weight.shape[:2]
    axis = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    both = torch.kron(axis, axis)
    return (weight.permute(1, 0, 2, 3).reshape(num_in * num_out, 9) @ both.T).view(num_in, num_out, 4, 4)


class Embedding(nn.Embedding):
    """PyTorch's layer without random weights on the meta device, since they import PyTorch's compiler for seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class GroupNorm(nn.GroupNorm):
    """PyTorch's layer. Half types are computed in float32 on the CPU, which is 2 to 4 times faster."""

    def forward(self, input: Tensor) -> Tensor:
        if not _is_half_on_cpu(input):
            return super().forward(input)
        normed = F.group_norm(input.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(input.dtype)


BLOCK = 4
"""Side of a block of output pixels. A tile of input pixels is one pixel larger on every side."""

MIN_CHANNELS = 128
"""With fewer input or output channels, the transforms cost as much as they save."""

MIN_PIXELS = 1024
"""The smallest number of pixels (batch × h × w) for which Winograd convolutions save time.

Forward and backward, float32, AVX2, one core: 1.3 to 1.8 times as fast as oneDNN from 128 to 512 channels and 1,024
to 16,384 pixels; 1.0 times at 96 channels. Two cores: 1.3 to 2 times."""

MAX_CHUNK_BYTES = 6 * 2**20
"""Largest size of the transformed tiles in memory. They fit into the processor's cache: 1.2 times as fast."""

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
    """Whether `convolution` supports these tensors and is faster, forward and backward together.

    `enlarged` is the factor by which the sides of the input will be enlarged first.
    """
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
    """A 3×3 Winograd convolution with a padding of 1: [batch, in, h, w], [out, in, 3, 3], [out] → [batch, out, h, w].

    h and w are multiples of 4. The result is channels-last. The result and the gradients differ from those of a direct
    convolution by about 1e-5 of the largest value (float32). It cannot be differentiated twice.
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
    """The overlapping tiles of pictures [batch, h, w, channels], for one chunk of pictures at a time."""

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
        """The transformed tiles of a chunk: [36, tiles, channels]."""
        pictures = self.pictures[chunk]
        padded = self.padded[: len(pictures)]
        padded[:, 1:-1, 1:-1] = pictures
        side = BLOCK + 2
        tiles = padded.unfold(1, side, BLOCK).unfold(2, side, BLOCK).permute(4, 5, 0, 1, 2, 3)
        return (_matrix("input") @ tiles.reshape(36, -1)).view(36, -1, pictures.shape[-1])

    def add_up(self, tiles: Tensor, pictures: Tensor) -> None:
        """Add tiles [36, tiles × channels] where they overlap, and write the sum into `pictures`."""
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
    """Transform weights [out, in, 3, 3] to [36, in, out]."""
    return (_matrix("weight") @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, *weight.shape[1::-1])


@functools.cache
def _matrix(name: str) -> Tensor:
    """The transform of both axes together: [36 or 16, 36 or 9]."""
    rows = {"input": INPUT, "weight": WEIGHT, "output": OUTPUT}[name]
    axis = torch.tensor(rows, dtype=torch.float64, device="cpu")
    return torch.kron(axis, axis).float()
