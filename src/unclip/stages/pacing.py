"""Where frames stand on a path through several points: in equal turns, or where neighbouring pictures differ equally.

Knows places and what stands there; knows not how it is drawn. A place is a number from 0, the first point, to that of
the last one (see `slerp_path`); the way from one point to the next is a leg. Called by manipulations.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from unclip.errors import InputError


def equal_turns(num_points: int, num_between: int) -> list[float]:
    """Places of every point and of `num_between` frames on each leg, in equal steps of the angle.

    Raises: InputError for fewer than two points, or a number below 0.
    """
    if num_points < 2:
        raise InputError(f"there are {num_points} points; a path needs two or more")
    if isinstance(num_between, bool) or not isinstance(num_between, int) or num_between < 0:
        raise InputError(f"num_between is {num_between!r}; it must be a whole number from 0")
    steps = num_between + 1
    return [leg + step / steps for leg in range(num_points - 1) for step in range(steps)] + [float(num_points - 1)]


def equal_jumps(places: Sequence[float], pictures: Tensor, num_between: int) -> list[float]:
    """Places of every point and of `num_between` frames on each leg, so that the frames cut it in equally long parts.

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
