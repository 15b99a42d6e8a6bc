"""Classifier-free guidance: combines predictions with and without a condition."""

import torch
from torch import Tensor

from unclip.diffusion.loop import Denoiser


def away(null: Tensor, given: Tensor, scale: float) -> Tensor:
    """null + scale * (given - null). A scale above 1 moves the prediction away from the null one."""
    return null + scale * (given - null)


def guided(denoiser: Denoiser, scale: float) -> Denoiser:
    """A denoiser that combines two predictions: null + scale * (given - null).

    Ho & Salimans 2207.12598, eq. 6, whose w is scale - 1.

    Args:
        denoiser: prepared with the joined condition [null; given], so it takes twice the batch.
        scale: the guidance scale.

    Returns:
        A denoiser of x_t [batch, channels, ...]: it calls `denoiser` once with x_t twice. The result is
        float32. A learned variance (the second half of doubled channels) is taken from the given branch.
    """

    def mixed(x_t: Tensor, t: int) -> Tensor:
        null, given = denoiser(torch.cat([x_t, x_t]), t).float().chunk(2)
        channels = x_t.shape[1]
        mean = away(null[:, :channels], given[:, :channels], scale)
        return torch.cat([mean, given[:, channels:]], dim=1) if given.shape[1] > channels else mean

    return mixed
