"""Inception-V3 as a feature space: the 2048 features of pool3, with weights from the user's safetensors file.

The layout of the network is that of Szegedy et al. (1512.00567), figures 5 to 7 and table 1.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from unclip.checkpoints.weights import WeightsIndex, fill, open_weights, read_header
from unclip.errors import MissingFileError, UnsafeFileError, WeightsError
from unclip.images import rgb

INPUT_PX = 299
FEATURES = 2048
FID_CLASSES, IMAGENET_CLASSES = 1008, 1000
"""The outputs of the last layer, `fc`, in the two known sets of weights."""
STEMS = ("inception", "model", "diffusion_pytorch_model")
BATCH = 32

Kernel = int | tuple[int, int]


class InceptionFeatures:
    """An Inception-V3 that computes features of pictures.

    Attributes:
        name: a description of the network.
        is_fid: whether the Fréchet distance in this space is FID.
    """

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
                "(torchvision's), so the kind of Inception is unknown; use a file with the whole network"
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

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, padding: int | str = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = Norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


Layer = tuple[int, Kernel]
"""Output channels and kernel of a convolution."""
Branches = Mapping[str, Sequence[Layer | list[Layer]]]
"""Convolutions in a row by the name of their branch; two in one place get the same input and are concatenated."""


def block_a(pool: int) -> Branches:
    """35×35: 1×1, 5×5, two 3×3."""
    double = [(64, 1), (96, 3), (96, 3)]
    return {"1x1": [(64, 1)], "5x5": [(48, 1), (64, 5)], "3x3dbl": double, "_pool": [(pool, 1)]}


def block_c(width: int) -> Branches:
    """17×17: 1×1, a factorised 7×7, two factorised 7×7."""
    w, across, down = width, (1, 7), (7, 1)
    return {
        "1x1": [(192, 1)],
        "7x7": [(w, 1), (w, across), (192, down)],
        "7x7dbl": [(w, 1), (w, down), (w, across), (w, down), (192, across)],
        "_pool": [(192, 1)],
    }


BLOCK_B: Branches = {"3x3": [(384, 3)], "3x3dbl": [(64, 1), (96, 3), (96, 3)]}
"""35×35 to 17×17."""
BLOCK_D: Branches = {"3x3": [(192, 1), (320, 3)], "7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]}
"""17×17 to 8×8."""
BLOCK_E: Branches = {
    "1x1": [(320, 1)],
    "3x3": [(384, 1), [(384, (1, 3)), (384, (3, 1))]],
    "3x3dbl": [(448, 1), (384, 3), [(384, (1, 3)), (384, (3, 1))]],
    "_pool": [(192, 1)],
}
"""8×8: 1×1, a 3×3 in two halves, a double 3×3 in two halves."""


class Block(nn.Module):
    """Parallel branches, the last of them after a pooling; their outputs are concatenated along the channels.

    A block without convolutions after its pooling halves the size: there and at the end of each branch the stride is 2.

    The original network, and therefore FID's weights, excludes the padding from its averages and takes the maximum in
    the last block. Torchvision's network counts the padding as zeros and averages in every block.

    Args:
        inputs: channels.
        branches: the convolutions.
        pooling: "average", "average with border" or "max".
    """

    def __init__(self, inputs: int, branches: Branches, pooling: str) -> None:
        super().__init__()
        self.pooling, self.halves = pooling, "_pool" not in branches
        self.names: dict[str, list[list[str]]] = {}
        for branch, places in branches.items():
            width, self.names[branch] = inputs, []
            for number, place in enumerate(places, 1):
                layers = place if isinstance(place, list) else [place]
                stem = f"branch{branch}_{number}" if len(places) > 1 else f"branch{branch}"
                names = [f"{stem}a", f"{stem}b"] if len(layers) > 1 else [stem]
                stride, padding = (2, 0) if self.halves and number == len(places) else (1, "same")
                for name, (outputs, kernel) in zip(names, layers, strict=True):
                    self.add_module(name, ConvNorm(width, outputs, kernel, stride, padding))
                self.names[branch].append(names)
                width = layers[0][0]

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, places in self.names.items():
            parts = [self.pooled(x) if branch == "_pool" else x]
            for names in places:
                parts = [self.get_submodule(name)(parts[0]) for name in names]
            outputs += parts
        return torch.cat([*outputs, F.max_pool2d(x, 3, stride=2)] if self.halves else outputs, dim=1)

    def pooled(self, x: Tensor) -> Tensor:
        """The input of the pooling branch, with the shape of x."""
        if self.pooling == "max":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=self.pooling == "average with border")


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
        blocks = {
            "5b": (192, block_a(32)), "5c": (256, block_a(64)), "5d": (288, block_a(64)),
            "6a": (288, BLOCK_B), "6b": (768, block_c(128)), "6c": (768, block_c(160)), "6d": (768, block_c(160)),
            "6e": (768, block_c(192)), "7a": (768, BLOCK_D), "7b": (1280, BLOCK_E), "7c": (2048, BLOCK_E),
        }  # fmt: skip
        self.blocks = [f"Mixed_{name}" for name in blocks]
        for name, (inputs, branches) in blocks.items():
            self.add_module(f"Mixed_{name}", Block(inputs, branches, last if name == "7c" else average))

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))


def _open(path: Path) -> WeightsIndex:
    if path.is_dir():
        return open_weights(path, stem=next((s for s in STEMS if any(path.glob(f"{s}.safetensors*"))), STEMS[0]))
    if not path.exists():
        raise MissingFileError(f"{path} does not exist; it must be a safetensors file of Inception-V3, or its folder")
    if path.suffix != ".safetensors":
        raise UnsafeFileError(
            f"{path} may be a pickle or TorchScript, which can run code; only safetensors are read. To convert a state "
            "dict that you trust, save it as pytorch_model.bin in a new folder and run: unclip convert pickle FOLDER "
            "--out NEW"
        )
    return read_header(path)


def _is_used(name: str) -> bool:
    """Whether pool3's features need a tensor. The classifiers and the batch counters are not needed."""
    return not name.startswith(("fc.", "AuxLogits.")) and not name.endswith(".num_batches_tracked")
