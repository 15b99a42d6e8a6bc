"""How visible the border between what was kept and what was drawn is.

Knows pixels and masks alone. Called by the editing guide's pictures and by tests.
"""

import torch
from torch import Tensor


def seam(picture: Tensor, drawn: Tensor) -> float:
    """The mean step from pixel to pixel across a region's border, over that inside and outside it; 1 is no seam.

    A step is the absolute difference of two neighbours, right or below, averaged over channels.

    Args:
        picture: float [channels, height, width].
        drawn: bool [height, width], the region, of which some pixel has a neighbour outside.

    Returns: above 1 where the border's steps are larger than the others; infinity where only they are not 0.
    """
    across, within = [], []
    for dim in (0, 1):
        length = drawn.shape[dim] - 1
        step = (picture.narrow(dim + 1, 1, length) - picture.narrow(dim + 1, 0, length)).abs().mean(0)
        border = drawn.narrow(dim, 1, length) != drawn.narrow(dim, 0, length)
        across.append(step[border])
        within.append(step[~border])
    return (torch.cat(across).mean() / torch.cat(within).mean()).item()
