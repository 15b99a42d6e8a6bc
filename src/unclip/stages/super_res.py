"""Super-resolution as a stage: small picture → large picture (paper §2.1; Karlo's two networks).

Knows its U-Nets and how the small picture is enlarged for them; knows no schedule. Called by pipelines and by training.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.diffusion.loop import Denoiser
from unclip.diffusion.process import DiffusionProcess
from unclip.models.embeddings import timestep_rows
from unclip.models.unet import UNet2DModel
from unclip.stages.condition import SuperResCondition
from unclip.stages.stage import Size, size_px
from unclip.stages.tiling import Tiling, tiled


@dataclass(frozen=True)
class SuperResStage:
    """Diffuses large pictures [batch, 3, height, width] beside the enlarged small one.

    Attributes:
        first: the network of every timestep but 0.
        last: the network of timestep 0, at which Karlo's schedule always ends and for which alone its second network
            was tuned. A path that does not visit 0 (one step, or DPM-Solver's) is the first network's throughout.
        size: height and width; None: the first network's own square of `sample_size`.
        tiling: the networks see the picture in tiles; None: as a whole.
    """

    first: UNet2DModel
    last: UNet2DModel
    process: DiffusionProcess
    size: Size | None = None
    tiling: Tiling | None = None

    def prepare(self, condition: SuperResCondition) -> Denoiser:
        """The small picture is enlarged once."""
        enlarged = enlarge(condition.low_res.float(), self._size())
        per_dtype = {net.dtype: enlarged.to(net.dtype) for net in (self.first, self.last)}

        def denoise(x_t: Tensor, t: int | Tensor) -> Tensor:
            network = self.last if isinstance(t, int) and t == 0 else self.first
            dtype, rows = network.dtype, timestep_rows(t, x_t.device)
            both = torch.cat([x_t.to(dtype), per_dtype[dtype]], dim=1)
            if self.tiling is None:
                return network(both, rows).sample.float()
            return tiled(lambda part: network(part, rows).sample.float(), both, self.tiling)

        return denoise

    def _size(self) -> Size:
        own = self.first.config.sample_size
        return self.size or (size_px(own), size_px(own))

    def sample_shape(self, condition: SuperResCondition) -> tuple[int, ...]:
        config = self.first.config
        return (len(condition), config.in_channels // 2, *self._size())

    def finish(self, x0: Tensor) -> Tensor:
        """A picture in [-1, 1]."""
        return x0.clamp(-1, 1)


def enlarge(low_res: Tensor, size: int | Size) -> Tensor:
    """[batch, 3, h, w] → [batch, 3, height, width], bicubic with antialiasing, as Karlo conditions its networks.

    A `size` of one number is a square's. MPS lacks that kernel: there the CPU does it, and the picture is the same.
    """
    device = low_res.device
    on = low_res.cpu() if device.type == "mps" else low_res
    return F.interpolate(on, size=size, mode="bicubic", antialias=True, align_corners=False).to(device)
