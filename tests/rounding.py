"""How far two ways of computing the same result may differ, whatever processor computes them.

A result computed with rounding is the exact result of slightly different operands (backward error analysis: Higham
2002, "Accuracy and Stability of Numerical Algorithms", section 1.5). So a computation that rounds at other places moves
the result about as far as changing every operand by one unit in the last place does. That distance is the conditioning
of the operation times the unit; it is measured here with random changes (Parker 1997, "Monte Carlo Arithmetic"), and a
comparison allows a multiple of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

UNIT = torch.finfo(torch.float32).eps
"""A unit of the last place, relative to the number."""

TIMES = 10
"""Multiple of the distance of random changes of one unit; two ways of computing differ by 0.4 to 2 times as much."""


def assert_equal_but_rounding(
    got: Any,
    run: Callable[[], Any],
    operands: list[nn.Module | Tensor],
    times: float = TIMES,
    dtype: torch.dtype = torch.float32,
) -> float:
    """`got`, an array or a tuple of them, is the result of `run()` with its operands, except for rounding.

    `dtype` is what `got` was computed in; `run()` computes in float32. Returns the largest difference. The operands,
    tensors or networks, are changed in place and put back.
    """
    found, wanted = _arrays(got), _arrays(run())
    assert [x.shape for x in found] == [x.shape for x in wanted]
    differences = [_largest(x - y) for x, y in zip(found, wanted, strict=True)]
    for place, moved in enumerate(moved_by_rounding(wanted, run, operands, torch.finfo(dtype).eps)):
        assert differences[place] <= times * moved, (
            f"result {place} differs by {differences[place]:.2e}; one unit in every operand moves it by {moved:.2e}"
        )
    return max(differences)


def moved_by_rounding(
    results: list[Tensor], run: Callable[[], Any], operands: list[nn.Module | Tensor], unit: float, num_draws: int = 2
) -> list[float]:
    """How far each result of `run()` moves at most when every operand moves up or down by one unit, at random."""
    tensors = [x for given in operands for x in (given.parameters() if isinstance(given, nn.Module) else [given])]
    kept = [x.detach().clone() for x in tensors]
    furthest = [unit * _largest(x) for x in results]  # the result itself is rounded
    for seed in range(num_draws):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for x in tensors:
                x *= 1 + unit * (2 * torch.randint(2, x.shape, generator=generator) - 1)
        try:
            moved = [_largest(x - y) for x, y in zip(_arrays(run()), results, strict=True)]
        finally:
            with torch.no_grad():
                for x, value in zip(tensors, kept, strict=True):
                    x.copy_(value)
        furthest = [max(pair) for pair in zip(moved, furthest, strict=True)]
    return furthest


def _arrays(results: Any) -> list[Tensor]:
    results = results if isinstance(results, tuple | list) else (results,)
    return [torch.as_tensor(x).detach().double() for x in results]


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
