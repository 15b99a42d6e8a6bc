"""How much a picture is like another: in a CLIP's space, and pixel by pixel.

Knows pictures and embeddings; knows not who made them. Called by the measures of variations and of the decoder.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unclip.data.folder import square_pixels
from unclip.errors import InputError
from unclip.images import rgb

SSIM_WINDOW_PX = 11
SSIM_SIGMA = 1.5
PSNR_LIMIT_DB = 100.0
"""What equal pictures are given, whose ratio is infinite."""


def cosines(made: Tensor, real: Tensor) -> tuple[float, float]:
    """Mean cosine of each row of `made` to its own row of `real`, and to all the others.

    Both are [number, width], normalised. A single row has no other; its second figure is its first.
    """
    count = len(made)
    own = (made * real).sum().item()
    everything = (made.sum(dim=0) * real.sum(dim=0)).sum().item()
    others = (everything - own) / (count * (count - 1)) if count > 1 else own
    return round(own / count, 4), round(others, 4)


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of pixels in [0, 1], at the size of the second."""
    resized = one.convert("RGB").resize(other.size, Image.Resampling.LANCZOS)
    pair = [np.asarray(image.convert("RGB"), dtype=np.float64) for image in (resized, other)]
    return float(np.abs(pair[0] - pair[1]).mean() / 255)


def pixel_measures(real: Sequence[Image.Image], made: Sequence[Image.Image]) -> dict[str, float]:
    """Means over pairs of square pictures: `mae` and `psnr_db` of values in [0, 1], and `ssim`.

    Real pictures are made square on white and brought to the size of the made ones, as training does it.

    Raises: InputError for no pairs, or for made pictures of several sizes.
    """
    sizes = {image.size for image in made}
    if len(sizes) != 1 or len(real) != len(made):
        raise InputError(f"{len(real)} and {len(made)} pictures of the sizes {sorted(sizes)} make no pairs of one size")
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
    """Structural similarity of each pair [batch] (Wang et al. 2004, eq. 13), over each colour and place.

    Args:
        one, other: [batch, channels, height, width] in [0, 1]. The window is Gaussian, 11 pixels wide (or as wide as a
            smaller picture allows), of a standard deviation of 1.5 pixels.
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
