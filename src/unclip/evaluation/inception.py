"""Inception-V3 as a feature space: the 2048 features of pool3, with weights from the user's safetensors file.

The layout of the network is that of Szegedy et al. (1512.00567), figures 5 to 7 and table 1.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from unclip.checkpoints.weights import PICKLE_SUFFIXES, WeightsIndex, fill, open_weights, read_header
from unclip.errors import MissingFileError, UnsafeFileError, WeightsError
from unclip.images import rgb

INPUT_PX = 299
FEATURES = 2048
FID_CLASSES, IMAGENET_CLASSES = 1008, 1000
"""The outputs of the last layer, `fc`, in the two known sets of weights."""
STEMS = ("inception", "model", "diffusion_pytorch_model")
BATCH = 32

Padding = int | tuple[int, int]


class InceptionFeatures:
    """An Inception-V3 that computes features of pictures (a `FeatureSpace`)."""

    def __init__(self, network: "Inception", name: str, *, is_fid: bool) -> None:
        self.network, self.name, self.is_fid = network.eval(), name, is_fid

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "InceptionFeatures":
        """Read a safetensors file, or a folder with inception.safetensors or model.safetensors (or shards of it).

        Names and shapes are those of pytorch-fid and torchvision, which agree. FID is defined with the weights whose
        `fc` has 1008 outputs. Torchvision's ImageNet weights have 1000 outputs and give another distance.

        Raises: MissingFileError if the file does not exist; UnsafeFileError for a pickle or TorchScript, which can run
            code; WeightsError for another layout, damaged weights, or weights without `fc`, which could be either.
        """
        index = _open(Path(path))
        classes = index["fc.weight"].shape[0] if "fc.weight" in index and index["fc.weight"].shape else None
        if classes not in (FID_CLASSES, IMAGENET_CLASSES):
            raise WeightsError(
                f"{path} has no fc.weight with {FID_CLASSES} (FID's weights) or {IMAGENET_CLASSES} outputs "
                "(torchvision's), so the kind of Inception is unknown; use a file of the whole network"
            )
        is_fid = classes == FID_CLASSES
        with torch.device("meta"):
            network = Inception(fid=is_fid)
        fill(network, WeightsIndex((n, info) for n, info in index.items() if _is_used(n)), path)
        name = "Inception-V3 pool3, FID's weights" if is_fid else "Inception-V3 pool3, torchvision's weights"
        return cls(network.to(device), name, is_fid=is_fid)

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image]) -> Tensor:
        """Features [num_images, 2048], on the CPU.

        Pictures are resized to 299×299 by bilinear interpolation without antialiasing, as in pytorch-fid.
        """
        device = self.network.Conv2d_1a_3x3.conv.weight.device
        found = []
        for start in range(0, len(images), BATCH):
            sized = []
            for image in images[start : start + BATCH]:
                picture = rgb(image)
                pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
                pixels = pixels.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2).float() / 255
                sized.append(F.interpolate(pixels, (INPUT_PX, INPUT_PX), mode="bilinear", align_corners=False))
            found.append(self.network(torch.cat(sized).to(device) * 2 - 1).cpu())
        return torch.cat(found)


class Norm(nn.Module):
    """Batch norm with running statistics only. It has no batch counter, which some files do not contain."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.001)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: Padding = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = Norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Parallel branches, the last of them after a pooling; their outputs are concatenated along the channels.

    The original network, and therefore FID's weights, excludes the padding from its averages and takes the maximum in
    the last block. Torchvision's network counts the padding as zeros and averages in every block.
    """

    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling

    def pooled(self, x: Tensor) -> Tensor:
        """The input of the pooling branch, with the shape of x."""
        if self.pooling == "max":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=self.pooling == "average with border")


class BlockA(Block):
    """35×35: 1×1, 5×5, two 3×3, pooling."""

    def __init__(self, inputs: int, pool_features: int, pooling: str) -> None:
        super().__init__(pooling)
        self.branch1x1 = ConvNorm(inputs, 64, 1)
        self.branch5x5_1 = ConvNorm(inputs, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1)
        self.branch_pool = ConvNorm(inputs, pool_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), wide, double, self.branch_pool(self.pooled(x))], dim=1)


class BlockB(nn.Module):
    """35×35 to 17×17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockC(Block):
    """17×17: 1×1, a factorised 7×7, two factorised 7×7, pooling."""

    def __init__(self, inputs: int, width: int, pooling: str) -> None:
        super().__init__(pooling)
        self.branch1x1 = ConvNorm(inputs, 192, 1)
        self.branch7x7_1 = ConvNorm(inputs, width, 1)
        self.branch7x7_2 = ConvNorm(width, width, (1, 7), padding=(0, 3))
        self.branch7x7_3 = ConvNorm(width, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = ConvNorm(inputs, width, 1)
        self.branch7x7dbl_2 = ConvNorm(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = ConvNorm(width, width, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = ConvNorm(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = ConvNorm(width, 192, (1, 7), padding=(0, 3))
        self.branch_pool = ConvNorm(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = x
        for part in (1, 2, 3, 4, 5):
            double = getattr(self, f"branch7x7dbl_{part}")(double)
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(self.pooled(x))], dim=1)


class BlockD(nn.Module):
    """17×17 to 8×8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(inputs, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(inputs, 192, 1)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), wide, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockE(Block):
    """8×8: 1×1, a 3×3 in two halves, a double 3×3 in two halves, pooling."""

    def __init__(self, inputs: int, pooling: str) -> None:
        super().__init__(pooling)
        self.branch1x1 = ConvNorm(inputs, 320, 1)
        self.branch3x3_1 = ConvNorm(inputs, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvNorm(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvNorm(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pooled(x))]
        return torch.cat(parts, dim=1)


class Inception(nn.Module):
    """Pictures [batch, 3, 299, 299] in [-1, 1] → features [batch, 2048], the mean of the last block.

    Args:
        fid: whether to pool as FID's weights need (see `Block`).
    """

    def __init__(self, *, fid: bool) -> None:
        super().__init__()
        average, last = ("average", "max") if fid else ("average with border", "average with border")
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32, average)
        self.Mixed_5c = BlockA(256, 64, average)
        self.Mixed_5d = BlockA(288, 64, average)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128, average)
        self.Mixed_6c = BlockC(768, 160, average)
        self.Mixed_6d = BlockC(768, 160, average)
        self.Mixed_6e = BlockC(768, 192, average)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, average)
        self.Mixed_7c = BlockE(2048, last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean(dim=(2, 3))


def _open(path: Path) -> WeightsIndex:
    if path.is_dir():
        stem = next((s for s in STEMS if any(path.glob(f"{s}.safetensors*"))), STEMS[0])
        return open_weights(path, stem=stem)
    if not path.exists():
        raise MissingFileError(f"{path} does not exist; it must be a safetensors file of Inception-V3, or its folder")
    if path.suffix != ".safetensors":
        kind = (
            "a pickle or TorchScript, which can run code when it is read"
            if path.suffix in PICKLE_SUFFIXES
            else "unknown"
        )
        raise UnsafeFileError(
            f"{path} is {kind}; only safetensors are read. To convert a state dict that you trust, save it as "
            "pytorch_model.bin in a new folder and run: unclip convert pickle FOLDER --out NEW"
        )
    return read_header(path)


def _is_used(name: str) -> bool:
    """Whether pool3's features need a tensor. The classifiers and the batch counters are not needed."""
    return not name.startswith(("fc.", "AuxLogits.")) and not name.endswith(".num_batches_tracked")
