"""Arithmetic of embeddings and noise: spherical interpolation, mixtures and directions (paper §3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unclip.errors import InputError
from unclip.numbers import reals, whole

PARALLEL = 1e-6
"""The sine of the angle below which two directions count as the same or opposite."""


def slerp(start: Tensor, end: Tensor, share: float | Sequence[float] | Tensor) -> Tensor:
    """Spherical interpolation: `share` of the angle along the great circle from `start` to `end`.

    The norm is interpolated linearly. A tensor of one dimension is one vector; otherwise each row is one, of any shape.
    A share outside [0, 1] continues along the circle, with the norm of the nearer end.

    Args:
        start, end: floating point [dim] or [batch, ...], of one shape.
        share: one number, or [batch].

    Returns: float32, of the shape of `start`; exactly `start` at share 0 and `end` at 1.

    Raises: InputError for different shapes, a row of zeros, a row that is not finite, or two rows of opposite
        directions, between which the path is not unique.
    """
    if start.shape != end.shape or start.ndim < 1:
        raise InputError(f"slerp needs two tensors of one shape, not {_shape(start)} and {_shape(end)}")
    if start.ndim == 1:
        return slerp(start[None], end[None], share)[0]
    exact = exact_type(start.device)
    part = torch.tensor(reals(share, "the shares"), dtype=exact, device=start.device)
    if len(part) not in (1, len(start)):
        raise InputError(f"there are {len(part)} shares; slerp needs one, or one for each of {len(start)} rows")
    a, b = start.to(exact).flatten(1), end.to(exact).flatten(1)
    norm_a, norm_b = _norm(a, "start"), _norm(b, "end")
    unit_a, unit_b = a / norm_a, b / norm_b
    part = part.expand(len(start))[:, None]
    # Kahan's formula is accurate near 0 and pi too, where the arc cosine of the product loses half of its digits.
    angle = 2 * torch.atan2((unit_a - unit_b).norm(dim=1, keepdim=True), (unit_a + unit_b).norm(dim=1, keepdim=True))
    sine = angle.sin()
    near = sine.abs() < PARALLEL
    if bool((near & (angle > 1)).any()):
        raise InputError("slerp between opposite directions is not defined: give a third point between them")
    safe = torch.where(near, torch.ones_like(sine), sine)
    weight_a = torch.where(near, 1 - part, ((1 - part) * angle).sin() / safe)
    weight_b = torch.where(near, part, (part * angle).sin() / safe)
    norm = torch.lerp(norm_a, norm_b, part.clamp(0, 1))
    turned = (norm * (weight_a * unit_a + weight_b * unit_b)).float().view(start.shape)
    at = part.view(-1, *[1] * (start.ndim - 1))
    return torch.where(at == 0, start.float(), torch.where(at == 1, end.float(), turned))


def slerp_path(points: Tensor, places: Sequence[float]) -> Tensor:
    """Points on the path through all given points by `slerp`.

    Args:
        points: [num_points, ...], two or more.
        places: one or more numbers from 0, the first point, to num_points - 1, the last; 1.25 is a quarter of the angle
            from the second to the third.

    Returns: float32 [len(places), ...]; exactly the given point where a place is a whole number.

    Raises: InputError for fewer than two points, no place, or a place outside the path; otherwise as `slerp`.
    """
    last = len(points) - 1
    if last < 1:
        raise InputError(f"there are {len(points)} points; a path needs two or more")
    stops = reals(places, "places", 0, last)
    path = points.new_empty(len(stops), *points.shape[1:], dtype=torch.float32)
    for row, place in enumerate(stops):  # one at a time, as float64 needs many times the memory of the result
        leg = min(int(place), last - 1)
        path[row] = slerp(points[leg : leg + 1], points[leg + 1 : leg + 2], place - leg)[0]
    return path


def equal_turns(num_points: int, num_between: int) -> list[float]:
    """Places for `slerp_path`: every point, and `num_between` frames between neighbours in equal steps of the angle.

    Raises: InputError for fewer than two points, or a negative number.
    """
    if num_points < 2:
        raise InputError(f"there are {num_points} points; a path needs two or more")
    steps = whole(num_between, "num_between", 0) + 1
    return [leg + step / steps for leg in range(num_points - 1) for step in range(steps)] + [float(num_points - 1)]


def blend(embeddings: Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """A mixture of embeddings: the direction of the weighted sum of their directions, with their weighted mean norm.

    Negative weights subtract what an embedding shows (king - man + woman). Only the ratios of the weights matter, and
    the norms of the embeddings do not affect the direction.

    Args:
        embeddings: [count, dim].
        weights: [count].

    Returns: float32 [dim].

    Raises: InputError unless there is one finite weight for each embedding, when all are 0, or when the embeddings
        cancel out.
    """
    exact = exact_type(embeddings.device)
    factor = torch.tensor(reals(weights, "the weights"), dtype=exact, device=embeddings.device)
    if embeddings.ndim != 2 or factor.shape != embeddings.shape[:1] or len(embeddings) < 1:
        found = f"{_shape(embeddings)} and {_shape(factor)}"
        raise InputError(f"a blend needs embeddings [count, dim] and [count] weights, not {found}")
    if not factor.any():
        raise InputError(f"the weights are {factor.tolist()}; they must be finite numbers, not all 0")
    x = embeddings.to(exact)
    norms = _norm(x, "blend's embeddings")
    factor = (factor / factor.abs().sum())[:, None]
    total = (factor * x / norms).sum(dim=0)
    if float(total.norm()) < PARALLEL:
        raise InputError("the embeddings cancel out with these weights: change the weights")
    return (total / total.norm() * (factor.abs() * norms).sum()).float()


def difference(target: Tensor, source: Tensor) -> Tensor:
    """The direction from one embedding to another: normalise(target - source), of unit norm (paper §3.3's z_d).

    Both are normalised first, so that their norms do not matter.

    Args:
        target, source: [..., dim], of one shape.

    Returns: float32 [..., dim].

    Raises: InputError for different shapes, rows of zeros, or a target with the direction of the source.
    """
    if target.shape != source.shape or target.ndim < 1:
        raise InputError(f"a difference needs two tensors of one shape, not {_shape(target)} and {_shape(source)}")
    target, source = (x.to(exact_type(x.device)) for x in (target, source))
    apart = target / _norm(target, "target") - source / _norm(source, "source")
    norm = apart.norm(dim=-1, keepdim=True)
    if bool((norm < PARALLEL).any()):
        raise InputError("the two captions have the same embedding, so their difference is zero: use other captions")
    return (apart / norm).float()


def turn(embedding: Tensor, direction: Tensor, strength: float | Sequence[float] | Tensor) -> Tensor:
    """Turn embeddings towards a direction by a share of the angle, with their norms kept (paper §3.3, theta).

    Args:
        embedding: [batch, dim].
        direction: [dim] or [batch, dim], of any norm but 0.
        strength: theta, one or [batch]; 0 changes nothing, 1 leaves only the direction; the paper uses up to 0.25-0.5.

    Returns: float32 [batch, dim].

    Raises: as `slerp`; InputError for a direction of another width.
    """
    if not isinstance(direction, Tensor) or direction.ndim not in (1, 2) or direction.shape[-1] != embedding.shape[-1]:
        found = _shape(direction) if isinstance(direction, Tensor) else type(direction).__name__
        raise InputError(f"the direction is {found}; it must have the width of the embeddings {_shape(embedding)}")
    scale = embedding.float().norm(dim=-1, keepdim=True) / _norm(direction.float(), "direction")
    return slerp(embedding, direction.float() * scale, strength)


def exact_type(device: torch.device) -> torch.dtype:
    """The type for exact arithmetic: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _norm(rows: Tensor, what: str) -> Tensor:
    norm = rows.norm(dim=-1, keepdim=True)
    if not bool((norm.isfinite() & (norm > 0)).all()):
        raise InputError(f"{what} has a row without a direction: it is zero or not finite")
    return norm


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
