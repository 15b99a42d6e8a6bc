"""Super-resolution as a stage, as a whole or in overlapping tiles."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.diffusion.loop import Denoiser
from unclip.diffusion.process import DiffusionProcess
from unclip.errors import InputError
from unclip.models.layers import timestep_rows
from unclip.models.unet import UNet2DModel
from unclip.numbers import whole
from unclip.stages.stage import Size, SuperResCondition, reusing, size_px


@dataclass(frozen=True)
class Tiling:
    """Square tiles of `tile_px`, which overlap by `overlap_px` or more.

    The outer quarter of an overlap, near the tile's border, has weight 0; between the two quarters one tile fades into
    the next linearly. The output of a network with a receptive field of at most a quarter of the overlap is therefore
    the same as for the whole picture. The output of a network with a larger one, as with group normalisation, is
    averaged across the overlap at every step (MultiDiffusion, Bar-Tal et al. 2302.08113).

    Raises:
        InputError: a size is not a positive whole number, or the overlap is more than half of a tile.
    """

    tile_px: int = 256
    overlap_px: int = 32

    def __post_init__(self) -> None:
        for name in ("tile_px", "overlap_px"):
            object.__setattr__(self, name, whole(getattr(self, name), name, unit="whole number of pixels"))
        if 2 * self.overlap_px > self.tile_px:
            raise InputError(
                f"tiles of {self.tile_px} px overlap by {self.overlap_px} px; they may overlap by at most half"
            )

    def check_multiple(self, multiple: int) -> None:
        """Raises: InputError unless both sizes are multiples of `multiple`."""
        if self.tile_px % multiple or self.overlap_px % multiple:
            sizes = f"tiles of {self.tile_px} px that overlap by {self.overlap_px} px"
            raise InputError(f"{sizes} do not fit the networks: both must be multiples of {multiple}")

    def starts(self, size_px: int) -> list[int]:
        """The starts of the tiles along a side; the last tile ends with the side."""
        if size_px <= self.tile_px:
            return [0]
        return [*range(0, size_px - self.tile_px, self.tile_px - self.overlap_px), size_px - self.tile_px]

    def weights(self, start: int, size_px: int) -> Tensor:
        """The weights of the pixels of the tile at `start`: float32 [min(tile, side)] in [0, 1]."""
        length = min(self.tile_px, size_px)
        margin = self.overlap_px // 4
        place = torch.arange(length, dtype=torch.float32)
        ramp = self.overlap_px - 2 * margin
        weights = torch.ones(length)
        if start > 0:
            weights = weights * ((place - margin + 0.5) / ramp).clamp(0, 1)
        if start + length < size_px:
            weights = weights * ((length - 1 - place - margin + 0.5) / ramp).clamp(0, 1)
        return weights


def tiled(network: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling) -> Tensor:
    """Apply `network` to `x` in tiles, one after another, so that memory is that of a tile and of the result.

    Args:
        network: [batch, channels, h, w] → float32 [batch, outputs, h, w].
        x: [batch, channels, height, width].

    Returns: float32 [batch, outputs, height, width].
    """
    height, width = x.shape[2:]
    rows, columns = tiling.starts(height), tiling.starts(width)
    if len(rows) == len(columns) == 1:
        return network(x)
    total: Tensor | None = None
    weight_sum = torch.zeros(height, width, device=x.device)
    for top, left in product(rows, columns):
        window = (..., slice(top, top + tiling.tile_px), slice(left, left + tiling.tile_px))
        weights = tiling.weights(top, height)[:, None] * tiling.weights(left, width)[None, :]
        weights = weights.to(x.device)
        output = network(x[window])
        if total is None:
            total = output.new_zeros((*output.shape[:2], height, width))
        total[window] += weights * output
        weight_sum[window] += weights
    assert total is not None
    return total / weight_sum


@dataclass(frozen=True)
class SuperResStage:
    """Diffuses large pictures [batch, 3, height, width], conditioned on the enlarged small ones.

    Attributes:
        first: the network of every timestep except 0.
        last: the network of timestep 0. Karlo's schedule always ends there, and its second network was tuned only for
            it. A path without timestep 0 (of one step, or DPM-Solver's) uses only the first network.
        size: height and width; None: a square of the first network's `sample_size`.
        tiling: the tiles of the networks' inputs; None: whole pictures.
        reuse: the first network's deep levels are computed in every `reuse`-th step; see `reusing`. With tiles, in
            every step.
    """

    first: UNet2DModel
    last: UNet2DModel
    process: DiffusionProcess
    size: Size | None = None
    tiling: Tiling | None = None
    reuse: int = 1

    def prepare(self, condition: SuperResCondition) -> Denoiser:
        """Enlarge the small picture once."""
        enlarged = enlarge(condition.low_res.float(), self._size())
        per_dtype = {net.dtype: enlarged.to(net.dtype) for net in (self.first, self.last)}
        first, last = reusing(self.first, self.reuse if self.tiling is None else 1), reusing(self.last, 1)

        def denoise(x_t: Tensor, t: int | Tensor) -> Tensor:
            is_last = isinstance(t, int) and t == 0
            network, dtype = (last, self.last.dtype) if is_last else (first, self.first.dtype)
            rows = timestep_rows(t, x_t)
            both = torch.cat([x_t.to(dtype), per_dtype[dtype]], dim=1)
            if self.tiling is None:
                return network(both, rows).float()
            return tiled(lambda part: network(part, rows).float(), both, self.tiling)

        return denoise

    def _size(self) -> Size:
        own = self.first.config.sample_size
        return self.size or (size_px(own), size_px(own))

    def sample_shape(self, batch_size: int) -> tuple[int, ...]:
        config = self.first.config
        return (batch_size, config.in_channels // 2, *self._size())

    def finish(self, x0: Tensor) -> Tensor:
        """A picture in [-1, 1]."""
        return x0.clamp(-1, 1)


def enlarge(low_res: Tensor, size: int | Size) -> Tensor:
    """[batch, 3, h, w] → [batch, 3, height, width], bicubic with antialiasing, as Karlo conditions its networks.

    A `size` of one number is a square's. On MPS, which lacks this kernel, the CPU computes the same picture.
    """
    device = low_res.device
    on = low_res.cpu() if device.type == "mps" else low_res
    return F.interpolate(on, size=size, mode="bicubic", antialias=True, align_corners=False).to(device)
