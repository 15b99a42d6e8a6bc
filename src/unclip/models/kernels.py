"""Linear layers, convolutions, embeddings, attention and normalisation, each with the fastest kernel for its device.

The results are those of PyTorch's own functions, up to rounding.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MAX_SCORES_ON_CPU = 2**26
"""The largest number of attention scores in memory at once (128 MiB in bfloat16) for two matrix products."""

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


def automatic_type(device: torch.device) -> torch.dtype:
    """The fastest type on `device`: float16, or on a CPU bfloat16 if it computes that, else float32."""
    if device.type != "cpu":
        return torch.float16
    return torch.float32 if is_emulated(torch.bfloat16, device) else torch.bfloat16


def _is_half_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of [batch, heads, tokens, head width]; `bias` broadcasts to [batch, heads, queries, keys]."""
    num_scores = queries.shape[0] * queries.shape[1] * queries.shape[2] * keys.shape[2]
    if is_emulated(queries.dtype, queries.device):
        wide = (x if x is None else x.float() for x in (queries, keys, values, bias))
        return attention(*wide).to(values.dtype)  # pyright: ignore[reportArgumentType]
    is_trained = torch.is_grad_enabled() and (queries.requires_grad or values.requires_grad)
    if is_trained and _is_half_on_cpu(queries) and num_scores <= MAX_SCORES_ON_CPU:
        # With the backward pass, two matrix products are 2.5 to 5 times as fast as PyTorch's fused kernel (torch 2.13,
        # AVX-512 bf16, 2026-11).
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return weights.to(values.dtype) @ values
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)


Run = Callable[[Tensor], Tensor]
"""Computes a layer's output from weights in oneDNN's own layout."""

_packed: ContextVar["_Packed | None"] = ContextVar("packed", default=None)

MIN_CALLS_TO_PACK = {"winograd": 2, "convolution": 6, "linear": 10}
"""The number of calls after which packing the weights has saved more time than it took."""

MAX_PIXELS_TO_PACK = 2048
"""The largest number of pixels (batch × h × w) for which packing saves time: PyTorch converts the weights at each call,
which takes a part of the time that decreases with the number of pixels."""


@dataclass
class _Packed:
    """The layers with packed weights: the address of the weights, and the function."""

    num_calls: int
    runs: dict[nn.Module, tuple[int, Run | None]] = field(default_factory=dict)

    def pays(self, kind: str) -> bool:
        return self.num_calls >= MIN_CALLS_TO_PACK[kind]


@contextmanager
def packed_weights(num_calls: int) -> Iterator[None]:
    """Keep the weights of the layers that run on a CPU within this block in oneDNN's own layout, for many calls.

    PyTorch converts the weights of a convolution at each call, and does not use oneDNN for float32 linear layers.
    Within the block, each layer converts them once. Convolutions of float32 with many pixels become Winograd
    convolutions. The copies of the weights are freed at the end. With gradients, with autocast and on other devices,
    nothing changes.

    Args:
        num_calls: how often each layer will be called.
    """
    uses_onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    token = _packed.set(_Packed(num_calls) if uses_onednn else None)
    try:
        yield
    finally:
        _packed.reset(token)


def _packed_run(layer: "Linear | Conv2d", input: Tensor, *shape: Any) -> Run | None:
    """How a layer computes this input with packed weights; None for PyTorch's way."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    packed = _packed.get()
    if packed is None:
        return None
    address, known = layer.weight.data_ptr(), packed.runs.get(layer)
    if known is None:
        run = layer.pack(packed, input, *shape) if _can_pack(layer, input) else None
        known = packed.runs[layer] = address, run
    return known[1] if known[0] == address else None


def _can_pack(layer: "Linear | Conv2d", input: Tensor) -> bool:
    return (
        type(layer.weight) is nn.Parameter
        and input.device.type == layer.weight.device.type == "cpu"
        and input.dtype == layer.weight.dtype
        and input.dtype in (torch.float32, torch.bfloat16)
        and not is_emulated(input.dtype, input.device)
        and not torch.is_autocast_enabled("cpu")
        and input.numel() > 0
        and "forward" not in vars(layer)  # an offloading hook may move the weights
    )


class Linear(nn.Linear):
    """PyTorch's layer. Half types that the CPU only emulates are computed in float32, one layer at a time."""

    def forward(self, input: Tensor) -> Tensor:
        if run := _packed_run(self, input):
            return run(input)
        if not is_emulated(input.dtype, input.device):
            return F.linear(input, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias).to(input.dtype)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # the weights of a file follow
            super().reset_parameters()

    def pack(self, packed: _Packed, input: Tensor) -> Run | None:
        """How to compute inputs of this shape with packed weights; None if that does not save time."""
        if not packed.pays("linear") or input.dtype != torch.float32:
            return None
        return _packed_linear(self.weight.detach(), self.bias, math.prod(input.shape[:-1]))


def _packed_linear(weight: Tensor, bias: Tensor | None, rows: int) -> Run:
    """A linear layer with weights [out, in], for about `rows` rows at a time."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return lambda input: torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")


class Conv2d(nn.Conv2d):
    """PyTorch's layer. Half types that the CPU only emulates are computed in float32, one layer at a time.

    With `doubled`, the input is first enlarged to twice its size by nearest neighbour; the kernel must then be 3×3 with
    a padding of 1. Four pixels of the enlarged picture equal one of the input, so the nine weights meet only four
    values. On a CPU in float32, one transposed convolution of 4×4 with stride 2 does both, with four products in place
    of nine. Wide layers are trained by Winograd convolutions (`convolution`).
    """

    def forward(self, input: Tensor, doubled: bool = False) -> Tensor:
        if run := _packed_run(self, input, doubled):
            return run(input)
        if is_emulated(input.dtype, input.device):
            bias = None if self.bias is None else self.bias.float()
            return self._computed(input.float(), self.weight.float(), bias, doubled).to(input.dtype)
        return self._computed(input, self.weight, self.bias, doubled)

    def pack(self, packed: _Packed, input: Tensor, doubled: bool = False) -> Run | None:
        """How to compute inputs of this shape with packed weights; None if that does not save time."""
        weight, bias = self.weight.detach(), self.bias
        batch, _, height, width = input.shape
        height, width = (2 * height, 2 * width) if doubled else (height, width)
        if self._is_3x3() and input.dtype == torch.float32 and pays_in_sampling(weight, batch, height, width):
            if not packed.pays("winograd"):
                return None
            winograd = _PackedWinograd(weight, bias, batch * height * width // BLOCK**2)
            return lambda x: winograd(_doubled(x) if doubled else x)
        if not packed.pays("convolution") or batch * height * width > MAX_PIXELS_TO_PACK or not self._pads_zeros():
            return None
        how = self.padding, self.stride, self.dilation, self.groups
        size = (batch, input.shape[1], height, width)
        layout = weight.contiguous().to_mkldnn()
        own = torch._C._nn.mkldnn_reorder_conv2d_weight(layout, *how, size)  # pyright: ignore[reportAttributeAccessIssue]

        def run(x: Tensor) -> Tensor:
            x = _doubled(x) if doubled else x
            return torch.ops.mkldnn._convolution_pointwise(x, own, bias, *how, "none", [], "")

        return run

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()

    def _pads_zeros(self) -> bool:
        return self.padding_mode == "zeros" and not isinstance(self.padding, str)

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


MIN_PIXELS_OF_HALF_NORM = 1024
"""PyTorch's group normalisation of half types is fast from this many pixels on, where it has another algorithm."""


class GroupNorm(nn.GroupNorm):
    """PyTorch's layer. Half types with few pixels are computed in float32 on the CPU, which is 2 to 6 times faster."""

    def forward(self, input: Tensor) -> Tensor:
        many = math.prod(input.shape[2:]) >= MIN_PIXELS_OF_HALF_NORM
        if not _is_half_on_cpu(input) or (many and not is_emulated(input.dtype, input.device)):
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

MAX_CHUNK_BYTES = 8 * 2**20
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


MIN_PRODUCTS, MIN_TILES = 2**29, 128
"""The smallest convolution (products of the direct way, and tiles) that Winograd computes in sampling: with less, calls
of 36 small matrix products cost more than they save."""


def pays_in_sampling(weight: Tensor, batch: int, height: int, width: int) -> bool:
    """Whether `_PackedWinograd` supports a picture [batch, in, height, width] and saves time with float32 weights.

    Of the 9 products per weight and pixel, 2.25 remain. The transforms add 81 / out + 36 / in of a product.
    """
    num_pixels = batch * height * width
    is_large = 9 * weight.shape[0] * weight.shape[1] * num_pixels >= MIN_PRODUCTS and num_pixels >= MIN_TILES * BLOCK**2
    return is_large and min(weight.shape[:2]) >= MIN_CHANNELS and height % BLOCK == width % BLOCK == 0


class _PackedWinograd:
    """`convolution` without gradients, with transformed weights that are packed once."""

    def __init__(self, weight: Tensor, bias: Tensor | None, num_tiles: int) -> None:
        self.bias, self.num_out = bias, weight.shape[0]
        most = max(MAX_CHUNK_BYTES // (4 * 36 * max(weight.shape[:2])), 1)
        rows = min(most, num_tiles)
        self.products = [_packed_linear(each.T, None, rows) for each in _weights(weight)]

    def __call__(self, input: Tensor) -> Tensor:
        inputs = input.permute(0, 2, 3, 1)
        batch, height, width, _ = inputs.shape
        outputs = input.new_empty(batch, height, width, self.num_out)
        for picture in range(batch):
            padded = F.pad(inputs[picture : picture + 1], (0, 0, 1, 1, 1, 1))
            for rows in self._strips(padded):
                self._strip(padded[:, rows.start : rows.stop + 2], outputs[picture : picture + 1, rows])
        if self.bias is not None:
            outputs += self.bias
        return outputs.permute(0, 3, 1, 2)

    def _strips(self, padded: Tensor) -> Iterator[slice]:
        """Strips of a picture whose transformed tiles fit into the cache."""
        _, height, width, channels = padded.shape
        row_bytes = 4 * 36 * (width // BLOCK) * max(channels, self.num_out)
        size = max(MAX_CHUNK_BYTES // row_bytes, 1) * BLOCK
        for start in range(0, height - 2, size):
            yield slice(start, min(start + size, height - 2))

    def _strip(self, padded: Tensor, output: Tensor) -> None:
        side, channels = BLOCK + 2, padded.shape[-1]
        tiles = padded.unfold(1, side, BLOCK).unfold(2, side, BLOCK).permute(4, 5, 0, 1, 2, 3).reshape(36, -1)
        transformed = _both_axes("input", tiles).view(36, -1, channels)
        values = torch.stack([product(tile) for product, tile in zip(self.products, transformed, strict=True)])
        blocks = _as_blocks(output)
        blocks.copy_(_both_axes("output", values.flatten(1)).view_as(blocks))


def _both_axes(name: Literal["input", "output"], tiles: Tensor) -> Tensor:
    """Transform tiles [36, n] along one axis and then along the other: [36 or 16, n]."""
    axis = _axis(name)
    first = (axis @ tiles.view(6, -1)).view(len(axis), 6, -1)
    return torch.matmul(axis, first).flatten(0, 1)


def _as_blocks(pictures: Tensor) -> Tensor:
    """[batch, h, w, channels] → [4, 4, batch, h / 4, w / 4, channels], a view."""
    batch, height, width, channels = pictures.shape
    blocks = pictures.view(batch, height // BLOCK, BLOCK, width // BLOCK, BLOCK, channels)
    return blocks.permute(2, 4, 0, 1, 3, 5)


def _weights(weight: Tensor) -> Tensor:
    """Transform weights [out, in, 3, 3] to [36, in, out]."""
    return (_matrix("weight") @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, *weight.shape[1::-1])


@functools.cache
def _axis(name: str) -> Tensor:
    rows = {"input": INPUT, "weight": WEIGHT, "output": OUTPUT}[name]
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


@functools.cache
def _matrix(name: str) -> Tensor:
    """The transform of both axes together: [36 or 16, 36 or 9]."""
    axis = _axis(name).double()
    return torch.kron(axis, axis).float()
