"""Where frames of a path stand so that neighbouring pictures differ equally.

Knows places on a path and pictures of what stands there; knows not how they are drawn. Called by users and by `unclip
interpolate`.

    from unclip.stages.pacing import even_places
    from unclip.stages.manipulation import path_at
    latents = tool.invert([cat, dog])
    frames = tool.decode(path_at(latents, even_places(latents, 7, tool.decode_small))).images
"""

from bisect import bisect
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from unclip.errors import InputError
from unclip.stages.arithmetic import equal_turns
from unclip.stages.manipulation import BipartiteLatent, path_at

NUM_ROUNDS = 2


def even_places(
    latent: BipartiteLatent,
    num_between: int,
    draw: Callable[[BipartiteLatent], Tensor],
    *,
    one_noise: bool = False,
    num_rounds: int = NUM_ROUNDS,
    batch_size: int = 8,
) -> list[float]:
    """Places for `path_at` at which neighbouring pictures differ by the same.

    In equal turns of the latents a picture may stay as it is for a while and then change within one step. So the path
    is drawn in equal turns first; then, each round, its frames are placed by all that has been drawn (`equal_jumps`),
    and drawn there.

    Args:
        latent: two rows or more, the points of the path.
        num_between: frames from a row to the next one, 0 or more.
        draw: latents to pictures [batch, ...], as the frames will be: `Manipulator.decode_small`, or with settings of
            their own a `functools.partial` of it.
        one_noise: as of `path_at`.
        num_rounds: 0 or more; 0 is equal turns, and draws nothing.
        batch_size: frames drawn at once.

    Returns: (rows - 1) * (num_between + 1) + 1 places; every row is among them.

    Raises: InputError for one row or a wrong number; what `draw` raises.
    """
    for name, number, least in (("num_rounds", num_rounds, 0), ("batch_size", batch_size, 1)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise InputError(f"{name} is {number!r}; it must be a whole number from {least}")

    def drawn(places: Sequence[float]) -> list[Tensor]:
        starts = range(0, len(places), batch_size)
        batches = (path_at(latent, places[start : start + batch_size], one_noise=one_noise) for start in starts)
        return [picture for batch in batches for picture in draw(batch)]

    found = equal_turns(len(latent), num_between)
    if not num_between or not num_rounds:
        return found
    places, pictures = found, drawn(found)
    for done in range(num_rounds):
        found = equal_jumps(places, torch.stack(pictures), num_between)
        new = [place for place in found if place not in places]
        if done == num_rounds - 1 or not new:
            break
        for place, picture in zip(new, drawn(new), strict=True):
            at = bisect(places, place)
            places, pictures = [*places[:at], place, *places[at:]], [*pictures[:at], picture, *pictures[at:]]
    return found


def equal_jumps(places: Sequence[float], pictures: Tensor, num_between: int) -> list[float]:
    """Places of every point, and of `num_between` frames from each to the next that cut this leg in equal lengths.

    The length of a way is measured in pictures, by `jumps` from each known one to the next. Between two known pictures
    it counts as even, so the more are known where the way is steep, the nearer this comes.

    Args:
        places: of the known pictures, in rising order; every point is among them.
        pictures: [len(places), ...], what stands there.
        num_between: 0 or more.

    Raises: as `equal_turns`.
    """
    way = np.concatenate([[0.0], np.cumsum(jumps(pictures).double().cpu().numpy())])
    found = equal_turns(round(places[-1]) + 1, num_between)
    for first in range(0, len(found) - 1, num_between + 1):
        leg = found[first]
        here = slice(places.index(leg), places.index(leg + 1) + 1)
        length = way[here.stop - 1] - way[here.start]
        if length > 0:  # nothing changes on a leg of no length, wherever its frames stand
            parts = np.linspace(0.0, 1.0, num_between + 2)[1:-1] * length + way[here.start]
            found[first + 1 : first + num_between + 1] = np.interp(parts, way[here], places[here]).tolist()
    return found


def jumps(pictures: Tensor) -> Tensor:
    """What neighbours [count, ...] differ by, root mean square, in their own units: [count - 1]."""
    return pictures.float().diff(dim=0).square().flatten(1).mean(dim=1).sqrt()
