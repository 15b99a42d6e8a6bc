"""Classifier-free guidance: combines predictions with and without a condition."""

import torch
from torch import Tensor

from unclip.diffusion.loop import Denoiser
from unclip.errors import InputError
from unclip.numbers import real
from unclip.settings import MAX_SCALE


def check_scale(scale: object, name: str = "guidance scale") -> float:
    """`scale` as a float.

    Raises:
        InputError: it is not a number from 0 to `MAX_SCALE`. The message contains `name`.
    """
    return real(scale, name, 0, MAX_SCALE)


def uses_guidance(scale: float) -> bool:
    """Whether `scale` is above 1, so that guidance is on and the denoiser needs the joined condition.

    Raises:
        InputError: `scale` is not a number from 0 to `MAX_SCALE`.
    """
    return check_scale(scale) > 1


def away(null: Tensor, given: Tensor, scale: float) -> Tensor:
    """null + scale * (given - null): a scale above 1 pushes the given prediction away from the null one."""
    return null + scale * (given - null)


def guided(denoiser: Denoiser, scale: float) -> Denoiser:
    """A denoiser that combines two predictions: null + scale * (given - null).

    Ho & Salimans 2207.12598, eq. 6, whose w is scale - 1.

    Args:
        denoiser: prepared with the joined condition [null; given], so it takes twice the batch.
        scale: the guidance scale; at 1 or below, `denoiser` is returned unchanged.

    Returns:
        A denoiser of x_t [batch, channels, ...]: it calls `denoiser` once with x_t twice. The result is
        float32. A learned variance (the second half of doubled channels) is taken from the given branch.

    Raises:
        InputError: `scale` is not a number from 0 to `MAX_SCALE`; or, when called, the wrapped denoiser's output
            is not for twice the batch with once or twice the channels.
    """
    if not uses_guidance(scale):
        return denoiser

    def mixed(x_t: Tensor, t: int) -> Tensor:
        output = denoiser(torch.cat([x_t, x_t]), t).float()
        batch, channels = x_t.shape[:2]
        if output.shape[0] != 2 * batch or output.shape[1] not in (channels, 2 * channels):
            raise InputError(
                f"a guided denoiser returned shape {tuple(output.shape)} for samples of shape {tuple(x_t.shape)}; it "
                f"must have {2 * batch} rows, null before given, and {channels} or {2 * channels} channels"
            )
        null, given = output.chunk(2)
        # The null branch has a variance half too, which is not used.
        mean = away(null[:, :channels], given[:, :channels], scale)
        return torch.cat([mean, given[:, channels:]], dim=1) if output.shape[1] > channels else mean

    return mixed
