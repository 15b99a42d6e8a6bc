"""Classifier-free guidance: the only place where null and given predictions are mixed.

Does not know what the condition is, nor the sampler or the schedule.
Stages wrap a denoiser in `guided` when `uses_guidance` says so; what predicts no noise mixes by `away`.
"""

import torch
from torch import Tensor

from unclip.diffusion.loop import Denoiser
from unclip.errors import InputError
from unclip.numbers import real

MAX_SCALE = 1000.0
"""Far above any useful scale; what lies beyond is a mistake."""


def check_scale(scale: object, name: str = "guidance scale") -> float:
    """`scale` as a float.

    Raises:
        InputError: it is not a number from 0 to `MAX_SCALE`; the message calls it `name`.
    """
    return real(scale, name, 0, MAX_SCALE)


def uses_guidance(scale: float) -> bool:
    """Whether `scale` asks for guidance, and so for a joined condition: it is above 1.

    Raises:
        InputError: `scale` is no finite number from 0 to `MAX_SCALE`.
    """
    return check_scale(scale) > 1


def away(null: Tensor, given: Tensor, scale: float) -> Tensor:
    """null + scale * (given - null): the given prediction, pushed away from the null one for a scale above 1."""
    return null + scale * (given - null)


def guided(denoiser: Denoiser, scale: float) -> Denoiser:
    """A denoiser that mixes two predictions: null + scale * (given - null).

    Ho & Salimans 2207.12598, eq. 6, whose w is scale - 1.

    Args:
        denoiser: prepared with the joined condition [null; given], so that it takes twice the batch.
        scale: above 1; not above 1 needs no null prediction, and `denoiser` comes back as it is.

    Returns:
        A denoiser of x_t [batch, channels, ...]: one call of the wrapped one with x_t twice. The mix is float32. A
        learned variance, the second half of doubled channels, is not mixed: the given branch's is kept.

    Raises:
        InputError: `scale` is no finite number from 0 to `MAX_SCALE`; or, when called, the wrapped denoiser's output
            is not for twice the batch with once or twice the channels.
    """
    if not uses_guidance(scale):
        return denoiser

    def mixed(x_t: Tensor, t: int) -> Tensor:
        output = denoiser(torch.cat([x_t, x_t]), t).float()
        batch, channels = x_t.shape[:2]
        if output.shape[0] != 2 * batch or output.shape[1] not in (channels, 2 * channels):
            raise InputError(
                f"a guided denoiser put out shape {tuple(output.shape)} for samples of shape {tuple(x_t.shape)}; it "
                f"must have {2 * batch} rows, null before given, and {channels} or {2 * channels} channels"
            )
        null, given = output.chunk(2)
        # Null carries a variance half too; only its first channels take part.
        mean = away(null[:, :channels], given[:, :channels], scale)
        return torch.cat([mean, given[:, channels:]], dim=1) if output.shape[1] > channels else mean

    return mixed
