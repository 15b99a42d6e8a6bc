"""Arithmetic of embeddings and noise: its properties for any vectors, and invalid arguments."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unclip import InputError
from unclip.stages import arithmetic
from unclip.stages.arithmetic import blend, difference, equal_turns, slerp, slerp_path, turn

from ..rounding import TIMES, UNIT

quick = settings(deadline=None, max_examples=60)


def vectors(seed, rows=2, dim=16, norm=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator)
    return x / x.norm(dim=1, keepdim=True) * norm


@quick
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0, 1),
    dim=st.integers(2, 40),
    norm=st.sampled_from([1e-3, 1.0, 25.0, 1e4]),
)
def test_slerp_keeps_an_equal_norm_and_divides_the_angle(seed, share, dim, norm):
    a, b = vectors(seed, dim=dim, norm=norm), vectors(seed + 5000, dim=dim, norm=norm)
    cosine = torch.cosine_similarity(a.double(), b.double(), dim=1)
    assume(float(cosine.abs().max()) < 0.999)
    middle = slerp(a, b, share)
    torch.testing.assert_close(middle.norm(dim=1), torch.full((2,), norm), rtol=1e-5, atol=0)
    angle = torch.cosine_similarity(a.double(), middle.double(), dim=1).clamp(-1, 1).arccos()
    torch.testing.assert_close(angle, share * cosine.arccos(), rtol=0, atol=2e-3)


@quick
@given(seed=st.integers(0, 1000), share=st.floats(0, 1), low=st.floats(0.01, 10), high=st.floats(0.01, 10))
def test_slerp_between_any_norms(seed, share, low, high):
    a, b = vectors(seed, norm=low), vectors(seed + 5000, norm=high)
    wanted = (1 - share) * low + share * high
    torch.testing.assert_close(slerp(a, b, share).norm(dim=1), torch.full((2,), wanted), rtol=1e-4, atol=0)
    assert torch.equal(slerp(a, b, 0), a)
    assert torch.equal(slerp(a, b, 1), b)


@quick
@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_slerp_backwards_is_the_same_path(seed, share):
    a, b = vectors(seed, norm=3), vectors(seed + 5000, norm=3)
    torch.testing.assert_close(slerp(a, b, share), slerp(b, a, 1 - share), rtol=0, atol=1e-4)


def test_slerp_of_noise_is_noise():
    """A straight mixture of two noises would be too small by a third in the middle."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 3, 32, 32, generator=generator) for _ in range(2))
    assert float(slerp(a, b, 0.5).std()) == pytest.approx(1, abs=0.05)
    assert float(((a + b) / 2).std()) < 0.75


@pytest.mark.parametrize("apart", [0.0, 1e-9, 1e-7])
def test_slerp_of_one_direction(apart):
    a = vectors(0, norm=2)
    torch.testing.assert_close(slerp(a, (a + apart) * 3, 0.5), a * 2, rtol=0, atol=1e-5)


def test_one_share_for_each_row():
    a, b = vectors(0, rows=3), vectors(1, rows=3)
    found = slerp(a, b, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(found[0], a[0])
    torch.testing.assert_close(found[1:2], slerp(a[1:2], b[1:2], 0.25))
    assert torch.equal(found[2], b[2])


@pytest.mark.parametrize(
    ("a", "b", "share", "words"),
    [
        (torch.ones(2, 3), -torch.ones(2, 3), 0.5, "opposite"),
        (torch.ones(2, 3), torch.zeros(2, 3), 0.5, "zero"),
        (torch.ones(2, 3), torch.full((2, 3), math.nan), 0.5, "finite"),
        (torch.ones(2, 3), torch.ones(2, 4), 0.5, "one shape"),
        (torch.tensor(1.0), torch.tensor(1.0), 0.5, "one shape"),
        (torch.ones(3), torch.ones(3), [0.5, 0.7], "2 shares"),
        (torch.ones(2, 3), torch.ones(2, 3), True, "finite number"),
        (torch.ones(2, 3), torch.ones(2, 3), math.nan, "finite number"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.zeros(3), "each of 2 rows"),
    ],
)
def test_slerp_of_invalid_arguments(a, b, share, words):
    with pytest.raises(InputError, match=words):
        slerp(a, b, share)


@pytest.mark.parametrize("shape", [(16,), (2, 16), (2, 4, 4), (2, 3, 4, 4)])
def test_slerp_of_any_number_of_dimensions(shape):
    start, end = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    rows = (1, -1) if len(shape) == 1 else (len(start), -1)
    flat = slerp(start.reshape(rows), end.reshape(rows), 0.3)
    assert torch.equal(slerp(start, end, 0.3), flat.reshape(shape))
    assert torch.equal(slerp(start, end, 1), end)


@pytest.mark.parametrize(
    "share",
    [np.float64(0.25), np.array(0.25), torch.tensor(0.25), [0.25], Fraction(1, 4), np.array([0.25, 0.25])],
    ids=repr,
)
def test_shares_of_any_kind(share):
    start, end = vectors(0), vectors(1)
    assert torch.equal(slerp(start, end, share), slerp(start, end, 0.25))


def test_a_path_through_points():
    points = vectors(0, rows=3, norm=5)
    path = slerp_path(points, equal_turns(3, 3))
    assert path.shape == (9, 16)
    assert torch.equal(path[[0, 4, 8]], points)
    torch.testing.assert_close(path[5:6], slerp(points[1:2], points[2:3], 0.25))
    steps = torch.cosine_similarity(path[:-1], path[1:], dim=1).arccos()
    torch.testing.assert_close(steps[:4], steps[:1].expand(4), rtol=0, atol=1e-3)


def test_a_path_is_computed_one_place_at_a_time(monkeypatch):
    """Arithmetic in float64 needs many times the memory of the result, and all frames at once would multiply it."""
    points, rows = vectors(0, rows=3, norm=5), []

    def spy(start, end, share):
        rows.append(len(start))
        return slerp(start, end, share)

    monkeypatch.setattr(arithmetic, "slerp", spy)
    path = slerp_path(points, equal_turns(3, 9))
    assert rows == [1] * 21
    start, end = (part.repeat_interleave(10, dim=0) for part in (points[:-1], points[1:]))
    at_once = slerp(start, end, (torch.arange(10) / 10).double().repeat(2))
    torch.testing.assert_close(path[:-1], at_once, rtol=0, atol=TIMES * UNIT * float(at_once.abs().max()))


def test_equal_turns():
    assert equal_turns(3, 1) == [0, 0.5, 1, 1.5, 2]
    assert equal_turns(2, 0) == [0, 1]


@pytest.mark.parametrize(
    ("points", "between", "words"),
    [(1, 3, "two or more"), (2, -1, "num_between"), (2, 0.5, "num_between"), (2, True, "num_between")],
)
def test_equal_turns_of_invalid_numbers(points, between, words):
    with pytest.raises(InputError, match=words):
        equal_turns(points, between)


def test_places_anywhere_on_the_path():
    points = vectors(0, rows=3, norm=5)
    path = slerp_path(points, [1.7, 2, 0.25, 1, torch.pi / 4])
    assert torch.equal(path[[1, 3]], points[[2, 1]])
    torch.testing.assert_close(path[:1], slerp(points[1:2], points[2:], 0.7))
    torch.testing.assert_close(path[4:], slerp(points[:1], points[1:2], math.pi / 4))


@pytest.mark.parametrize(
    ("rows", "places", "words"),
    [
        (1, [0.0], "two or more"),
        (2, [], "give one or more"),
        (2, [0, 1.01], "from 0 to 1"),
        (3, [-0.1], "from 0 to 2"),
        (2, [math.nan], "nan"),
        (2, ["0.5"], "places are"),
    ],
)
def test_places_outside_the_path(rows, places, words):
    with pytest.raises(InputError, match=words):
        slerp_path(vectors(0, rows=rows), places)


@quick
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_a_blend_depends_on_ratios_and_not_on_norms(seed, scale):
    x = vectors(seed, rows=3, norm=7)
    weights = [0.5, 0.2, 0.3]
    found = blend(x, weights)
    torch.testing.assert_close(found, blend(x, [scale * weight for weight in weights]), rtol=0, atol=1e-4)
    assert float(found.norm()) == pytest.approx(7, rel=1e-5)
    longer = x * torch.tensor([[1.0], [3.0], [1.0]])
    assert float(torch.cosine_similarity(found, blend(longer, weights), dim=0)) == pytest.approx(1, abs=1e-5)


def test_blends():
    x = torch.eye(3) * 2
    torch.testing.assert_close(blend(x[:1], [9.0]), x[0])
    torch.testing.assert_close(blend(x, [1, 1, 0]), torch.tensor([1.0, 1, 0]) * math.sqrt(2))
    away = blend(x, [1, -0.5, 0])
    assert away[1] < 0 < away[0]


@pytest.mark.parametrize(
    ("weights", "words"),
    [([1.0], r"\[count\] weights"), ([0, 0], "not all 0"), ([1, math.nan], "finite"), ([1, -1], "cancel")],
)
def test_invalid_blends(weights, words):
    with pytest.raises(InputError, match=words):
        blend(torch.ones(2, 4), weights)


@quick
@given(seed=st.integers(0, 1000), norms=st.tuples(st.floats(0.1, 50), st.floats(0.1, 50)))
def test_a_difference_depends_on_directions_only(seed, norms):
    a, b = vectors(seed), vectors(seed + 5000)
    found = difference(a, b)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(found, difference(a * norms[0], b * norms[1]), rtol=0, atol=1e-4)
    torch.testing.assert_close(found, -difference(b, a), rtol=0, atol=1e-5)
    assert bool(((found * a).sum(dim=1) > (found * b).sum(dim=1)).all())


def test_no_difference():
    with pytest.raises(InputError, match="same embedding"):
        difference(torch.ones(4), torch.ones(4) * 3)
    with pytest.raises(InputError, match="one shape"):
        difference(torch.ones(4), torch.ones(5))


@quick
@given(seed=st.integers(0, 1000), theta=st.floats(0.05, 1), length=st.floats(0.1, 50))
def test_turning_keeps_the_norm_and_reduces_the_angle(seed, theta, length):
    x, direction = vectors(seed, rows=1, norm=20), vectors(seed + 5000, rows=1)[0]
    turned = turn(x, direction * length, theta)
    assert float(turned.norm()) == pytest.approx(20, rel=1e-5)
    before, after = (float(torch.cosine_similarity(each[0], direction, dim=0)) for each in (x, turned))
    assert after > before
    torch.testing.assert_close(turn(x, direction * length, 0.0), x)


@pytest.mark.parametrize("direction", [torch.ones(12), torch.ones(2, 12), torch.ones(()), None])
def test_a_direction_of_another_width(direction):
    with pytest.raises(InputError, match="the direction is"):
        turn(vectors(0), direction, 0.5)
