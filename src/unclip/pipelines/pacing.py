"""Frames of a path placed where neighbouring pictures differ equally, by drawing the path first.

Knows a `Manipulator` and places; knows neither how a picture is decoded nor what a frame is for. Called by users and by
`unclip interpolate`.

    from unclip.pipelines.pacing import even_places
    from unclip.stages.manipulation import path_at
    latents = tool.invert([cat, dog])
    frames = tool.decode(path_at(latents, even_places(tool, latents, 7))).images
"""

from bisect import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unclip.errors import InputError
from unclip.pipelines.manipulation import Manipulator
from unclip.stages.manipulation import BipartiteLatent, path_at
from unclip.stages.pacing import equal_jumps, equal_turns

NUM_ROUNDS = 2


def even_places(
    tool: Manipulator,
    latent: BipartiteLatent,
    num_between: int,
    *,
    one_noise: bool = False,
    num_rounds: int = NUM_ROUNDS,
    batch_size: int = 8,
    **settings: Any,
) -> list[float]:
    """Where frames of a path stand so that neighbouring pictures differ by the same.

    In equal turns of the latents a picture may stay as it is for a while and then change within one step. So the path
    is drawn in equal turns, at the decoder's size; then, each round, its frames are placed by all that has been drawn
    (`equal_jumps`), and drawn there.

    Args:
        tool: the model.
        latent: two rows or more, the points of the path.
        num_between: frames from a row to the next one, 0 or more.
        one_noise: as of `path_at`.
        num_rounds: 0 or more; 0 is equal turns.
        batch_size: frames drawn at once.
        settings: steps, guidance and prompt, by `Manipulator.decode_small`'s names; the frames are to be decoded with
            the same.

    Returns: (rows - 1) * (num_between + 1) + 1 places for `path_at`; every row is among them.

    Raises: InputError for one row or a wrong number; else as `decode_small`.
    """
    for name, number, least in (("num_rounds", num_rounds, 0), ("batch_size", batch_size, 1)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise InputError(f"{name} is {number!r}; it must be a whole number from {least}")

    def drawn(places: Sequence[float]) -> list[Tensor]:
        pictures: list[Tensor] = []
        for start in range(0, len(places), batch_size):
            part = path_at(latent, places[start : start + batch_size], one_noise=one_noise)
            pictures += tool.decode_small(part, **settings)
        return pictures

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
