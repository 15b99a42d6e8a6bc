"""How far two sets of pictures are apart in a feature space.

Knows features, and spaces by their name alone: from which network they come decides what a distance may be called.
Called by the measures.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from unclip.errors import InputError

JUDGES_SPACE = "the judge's image embeddings"


Pair = tuple[Tensor, Tensor]
"""Features of two sets of pictures, each [number, width]."""


class FeatureSpace(Protocol):
    """A network that turns pictures into features, beside the judge.

    Attributes:
        name: which network it is, in words.
        is_fid: whether a Fréchet distance in it is what the literature calls FID.
    """

    name: str
    is_fid: bool

    def look(self, images: Sequence[Image.Image]) -> Tensor:
        """Features [num_images, width]."""
        ...


def distances(looked: Pair, features: FeatureSpace | None = None, featured: Pair | None = None) -> dict[str, Any]:
    """Fréchet and kernel distance of two sets of pictures, as a report has them; none for fewer than two pictures.

    Args:
        looked: the judge's features of both sets.
        features: a space beside the judge's, and `featured`, its features of both sets.

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

    |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½), in float64. It shrinks with the number of features: compare only figures of
    equal numbers. It is called FID only where the features are those of Inception.

    Raises: InputError when a set has fewer than two rows, or the widths differ.
    """
    one, other = _checked(one, other)
    gap = (one.mean(dim=0) - other.mean(dim=0)).square().sum()
    first, second = one.T.cov(), other.T.cov()
    # The trace of (C1 C2)^½ is the sum of the singular values of R1 R2ᵀ for any factors C = Rᵀ R.
    cross = torch.linalg.matrix_norm(_factor(one) @ _factor(other).T, ord="nuc")
    return max(0.0, float(gap + first.trace() + second.trace() - 2 * cross))


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel (x·y / width + 1)³, unbiased (Bińkowski et al. 1801.01401, §4).

    About 0 for two samples of one distribution, whatever their numbers; it can be a little below.

    Raises: InputError when a set has fewer than two rows, or the widths differ.
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
            f"{tuple(one.shape)} and {tuple(other.shape)} features cannot be compared: give each two rows of one width"
        )
    return one.double(), other.double()
