"""Where frames of a path stand so that neighbouring pictures differ equally.

Knows places on a path and pictures of what stands there; knows not how they are drawn. Called by users and by `unclip
interpolate`.

    from unclip import even_places, path_at
    latents = tool.invert([cat, dog])
    frames = tool.decode(path_at(latents, even_places(latents, 7, tool.decode_small))).images
"""

from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from unclip.errors import InputError, NonFiniteError
from unclip.numbers import whole
from unclip.stages.arithmetic import equal_turns
from unclip.stages.manipulation import BipartiteLatent, path_at

NUM_DRAWINGS = 2
LEAST_LENGTH = 1e-3
"""Of a leg on which frames are placed by pictures in [0, 1]: below, no picture of 8 bits changes, and what differs is
rounding."""


def even_places(
    latent: BipartiteLatent,
    num_between: int,
    draw: Callable[[BipartiteLatent], Tensor],
    *,
    one_noise: bool = False,
    num_drawings: int = NUM_DRAWINGS,
    batch_size: int = 8,
) -> list[float]:
    """Places for `path_at` at which neighbouring pictures differ by about the same.

    In equal turns of the latents a picture may stay as it is for a while and then change within one step. So the path
    is drawn in equal turns, and its frames are placed by what was drawn (`equal_jumps`); drawn there too, they are
    placed again by all that is known, and so on.

    Args:
        latent: two rows or more, the points of the path.
        num_between: frames from a row to the next one, 0 or more.
        draw: latents without super-resolution's noise to pictures [batch, ...] in [0, 1], as the frames will be:
            `Manipulator.decode_small`, or with settings of their own a `functools.partial` of it.
        one_noise: as of `path_at`.
        num_drawings: how often the path is drawn; more are nearer. 0 is equal turns.
        batch_size: frames drawn at once.

    Returns: (rows - 1) * (num_between + 1) + 1 places; every row is among them.

    Raises: InputError for one row, a wrong number, or a `draw` that gives no picture for each latent; NonFiniteError
        for pictures that are no numbers; what `draw` raises.
    """
    num_between, num_drawings = whole(num_between, "num_between", 0), whole(num_drawings, "num_drawings", 0)
    batch_size = whole(batch_size, "batch_size")
    points = BipartiteLatent(latent.image_embedding, latent.decoder_latents)

    def drawn(places: Sequence[float]) -> list[Tensor]:
        pictures: list[Tensor] = []
        for start in range(0, len(places), batch_size):
            batch = path_at(points, places[start : start + batch_size], one_noise=one_noise)
            made = draw(batch)
            if not isinstance(made, Tensor) or len(made) != len(batch):
                raise InputError(f"draw gave no tensor of {len(batch)} pictures, one for each latent")
            pictures += made
        return pictures

    found = equal_turns(len(latent), num_between)
    places: list[float] = []
    pictures: list[Tensor] = []
    for _ in range(num_drawings if num_between else 0):
        new = [place for place in found if place not in places]
        for place, picture in zip(new, drawn(new), strict=True):
            at = bisect(places, place)
            places.insert(at, place)
            pictures.insert(at, picture)
        found = equal_jumps(places, torch.stack(pictures), num_between)
    return found


def equal_jumps(places: Sequence[float], pictures: Tensor, num_between: int) -> list[float]:
    """Places of every point, and of `num_between` frames from each to the next that cut this leg in equal lengths.

    The length of a way is measured in pictures, by `jumps` from each known one to the next. Between two known pictures
    it counts as even, so the more are known where the way is steep, the nearer this comes. A leg on which nothing
    changes (`LEAST_LENGTH`) is cut in equal turns.

    Args:
        places: of the known pictures, in rising order; every point is among them.
        pictures: [len(places), ...] in [0, 1], what stands there.
        num_between: 0 or more.

    Raises: as `equal_turns`; InputError for places in another order or without a point; NonFiniteError for pictures
        that are no numbers.
    """
    known = list(places)
    num_points = round(known[-1]) + 1 if known else 0
    ends = [known.index(point) for point in range(num_points) if point in known]
    if not known or known != sorted(known) or len(ends) != num_points or len(pictures) != len(known):
        raise InputError("places must be those of the pictures, in rising order, with every point from 0 to the last")
    way = np.concatenate([[0.0], np.cumsum(jumps(pictures).double().cpu().numpy())])
    if not np.isfinite(way[-1]):
        raise NonFiniteError("the pictures that were drawn of the path have NaN or infinity")
    found = equal_turns(len(ends), num_between)
    for leg, (start, end) in enumerate(pairwise(ends)):
        if way[end] - way[start] > LEAST_LENGTH:
            marks = np.linspace(way[start], way[end], num_between + 2)[1:-1]
            first = leg * (num_between + 1) + 1
            found[first : first + num_between] = np.interp(marks, way[start : end + 1], known[start : end + 1]).tolist()
    return found


def jumps(pictures: Tensor) -> Tensor:
    """What neighbours [count, ...] differ by, root mean square, in their own units: [count - 1]."""
    return pictures.float().diff(dim=0).square().flatten(1).mean(dim=1).sqrt()
