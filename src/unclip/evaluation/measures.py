"""Similarity of pictures by embedding and by pixel, and distances between sets of pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.data.folder import square_pixels
from unclip.errors import InputError
from unclip.evaluation.inception import InceptionFeatures
from unclip.images import rgb

SSIM_WINDOW_PX = 11
SSIM_SIGMA = 1.5
PSNR_LIMIT_DB = 100.0
"""The PSNR of equal pictures, which would be infinite."""


def cosines(made: Tensor, real: Tensor) -> tuple[float, float]:
    """Mean cosine of each row of `made` to its own row of `real`, and to all the others.

    Both are [number, width] and normalised. For a single row, both values are the same.
    """
    count = len(made)
    own = (made * real).sum().item()
    everything = (made.sum(dim=0) * real.sum(dim=0)).sum().item()
    others = (everything - own) / (count * (count - 1)) if count > 1 else own
    return round(own / count, 4), round(others, 4)


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of pixels in [0, 1], at the size of the second picture."""
    resized = one.convert("RGB").resize(other.size, Image.Resampling.LANCZOS)
    pair = [np.asarray(image.convert("RGB"), dtype=np.float64) for image in (resized, other)]
    return float(np.abs(pair[0] - pair[1]).mean() / 255)


def pixel_measures(real: Sequence[Image.Image], made: Sequence[Image.Image]) -> dict[str, float]:
    """Means over pairs of square pictures: `mae` and `psnr_db` of values in [0, 1], and `ssim`.

    Real pictures are padded to squares with white and resized to the size of the generated ones, as in training.

    Raises: InputError if the numbers differ, or the generated pictures have several sizes.
    """
    sizes = {image.size for image in made}
    if len(sizes) != 1 or len(real) != len(made):
        raise InputError(
            f"{len(real)} and {len(made)} pictures of the sizes {sorted(sizes)} do not form pairs of one size"
        )
    size_px = made[0].width
    one = torch.stack([square_pixels(rgb(image), size_px) for image in real]).double() / 255
    other = torch.stack([square_pixels(rgb(image), size_px) for image in made]).double() / 255
    psnr = -10 * (one - other).square().mean(dim=(1, 2, 3)).clamp_min(10 ** (-PSNR_LIMIT_DB / 10)).log10()
    return {
        "size_px": size_px,
        "mae": round((one - other).abs().mean().item(), 4),
        "psnr_db": round(psnr.mean().item(), 2),
        "ssim": round(ssim(one, other).mean().item(), 4),
    }


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Structural similarity of each pair [batch] (Wang et al. 2004, eq. 13), averaged over channels and positions.

    Args:
        one, other: [batch, channels, height, width] in [0, 1]. The window is Gaussian with a standard deviation of 1.5
            pixels, and 11 pixels wide, or as wide as a smaller picture allows.
    """
    channels, side = one.shape[1], min(SSIM_WINDOW_PX, *one.shape[2:])
    place = torch.arange(side, dtype=one.dtype, device=one.device) - (side - 1) / 2
    line = torch.exp(-place.square() / (2 * SSIM_SIGMA**2))
    line = line / line.sum()
    window = (line[:, None] * line).expand(channels, 1, side, side)

    def blurred(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=channels)

    mean_1, mean_2 = blurred(one), blurred(other)
    variance_1 = blurred(one * one) - mean_1.square()
    variance_2 = blurred(other * other) - mean_2.square()
    covariance = blurred(one * other) - mean_1 * mean_2
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * mean_1 * mean_2 + c1) * (2 * covariance + c2)
    return (alike / ((mean_1.square() + mean_2.square() + c1) * (variance_1 + variance_2 + c2))).mean(dim=(1, 2, 3))


def seam(picture: Tensor, drawn: Tensor) -> float:
    """The mean step between pixels across a region's border, divided by the mean of all other steps.

    A step is the absolute difference between a pixel and the one to its right or below, averaged over channels.

    Args:
        picture: float [channels, height, width].
        drawn: bool [height, width], the region. At least one of its pixels has a neighbour outside it.

    Returns: 1 without a seam; more if the border's steps are larger than the others; infinity if the others are 0.
    """
    across, within = [], []
    for dim in (0, 1):
        length = drawn.shape[dim] - 1
        step = (picture.narrow(dim + 1, 1, length) - picture.narrow(dim + 1, 0, length)).abs().mean(0)
        border = drawn.narrow(dim, 1, length) != drawn.narrow(dim, 0, length)
        across.append(step[border])
        within.append(step[~border])
    return (torch.cat(across).mean() / torch.cat(within).mean()).item()


JUDGES_SPACE = "the judge's image embeddings"

Pair = tuple[Tensor, Tensor]
"""Features of two sets of pictures, each [number, width]."""


def distances(looked: Pair, features: InceptionFeatures | None = None, featured: Pair | None = None) -> dict[str, Any]:
    """Fréchet and kernel distance of two sets of pictures for a report; empty if a set has fewer than two.

    Args:
        looked: the judge's features of both sets.
        features: another feature space.
        featured: its features of both sets.

    Returns: `distance` in the judge's space, and `feature_distance` in the other one.
    """
    if min(len(part) for part in looked) < 2:
        return {}
    found = {"distance": _both(JUDGES_SPACE, *looked, is_fid=False)}
    if features is not None and featured is not None:
        found["feature_distance"] = _both(features.name, *featured, is_fid=features.is_fid)
    return found


def _both(space: str, one: Tensor, other: Tensor, *, is_fid: bool) -> dict[str, Any]:
    return {
        "space": space,
        "num": [len(one), len(other)],
        "fid" if is_fid else "frechet": round(frechet_distance(one, other), 4),
        "kernel": round(kernel_distance(one, other), 6),
    }


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians fitted to features [number, width] (Heusel et al. 1706.08500, eq. 6).

    |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), in float64. It decreases with the number of pictures, so compare only
    sets of equal size. It is FID only if the features are those of FID's Inception.

    Raises: InputError if a set has fewer than two rows, or the widths differ.
    """
    one, other = _checked(one, other)
    gap = (one.mean(dim=0) - other.mean(dim=0)).square().sum()
    first, second = one.T.cov(), other.T.cov()
    # The trace of (C1 C2)^½ is the sum of the singular values of R1 R2ᵀ for any factors C = Rᵀ R.
    cross = torch.linalg.matrix_norm(_factor(one) @ _factor(other).T, ord="nuc")
    return max(0.0, float(gap + first.trace() + second.trace() - 2 * cross))


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel (x·y / width + 1)³, unbiased (Bińkowski et al. 1801.01401, §4).

    About 0 for two samples of one distribution of any size; it can be slightly negative.

    Raises: InputError if a set has fewer than two rows, or the widths differ.
    """
    one, other = _checked(one, other)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        among = kernel(x, x)
        return (among.sum() - among.trace()) / (len(x) * (len(x) - 1))

    return float(within(one) + within(other) - 2 * kernel(one, other).mean())


def _factor(features: Tensor) -> Tensor:
    """R with Rᵀ R the covariance, [width or fewer, width]."""
    centred = (features - features.mean(dim=0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R


def _checked(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if min(len(one), len(other)) < 2 or one.shape[1] != other.shape[1]:
        raise InputError(
            f"features of the shapes {tuple(one.shape)} and {tuple(other.shape)} cannot be compared: each must have "
            "two or more rows, and both the same width"
        )
    return one.double(), other.double()
