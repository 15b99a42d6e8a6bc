"""Convolutions of 3×3 with a quarter of the products, for training on a CPU.

Winograd's minimal filtering F(4×4, 3×3), as Lavin and Gray 2016 ("Fast algorithms for convolutional neural networks",
equation 8 and section 4.3) apply it: a tile of 6×6 input pixels and the nine weights are transformed to 36 values each,
multiplied value by value and summed over the channels as 36 matrix products, and transformed back to a block of 4×4
output pixels. Both gradients take the same way backwards. Knows no layer. Called by `models.kernels.Conv2d`.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 4
"""Width and height of a block of output pixels; a tile of input pixels reaches one pixel farther on every side."""

MIN_CHANNELS = 128
"""With fewer channels, in or out, the transforms cost what the products save."""

MIN_PIXELS = 1024
"""From how many pixels on (batch × h × w) transforming the weights pays.

Forward and backward, float32, AVX2, one core: 1.3 to 1.8 times as fast as oneDNN's from 128 to 512 channels and 1,024
to 16,384 pixels; 1.0 times at 96 channels. Two cores: 1.3 to 2 times."""

MAX_CHUNK_BYTES = 6 * 2**20
"""Of transformed tiles at once, so that they stay in the processor's cache: 1.2 times as fast as a whole batch."""

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
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
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
