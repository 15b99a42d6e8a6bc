"""Numbers of every kind are taken, and what is not a number is refused with a message."""

import enum
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from unclip import ConfigError, InputError
from unclip.numbers import plain, real, reals, several, whole


class Three(enum.IntEnum):
    THREE = 3


class Index:
    def __index__(self):
        return 3


class Float:
    def __float__(self):
        return 3.0


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no representation")


WHOLE = [
    *(3, Three.THREE, Index(), np.array(3), np.array([3]), torch.tensor(3), torch.tensor([3], dtype=torch.uint8)),
    *(kind(3) for kind in (np.int8, np.uint8, np.int32, np.int64, np.uint64)),
    np.array(3, dtype=object),
    np.array(3, dtype=">i8"),
    np.random.default_rng(0).integers(3, 4),
]
REAL = [
    *(3.0, Float(), Fraction(3), Decimal(3), np.array(3.0), torch.tensor(3.0), torch.tensor(3.0, dtype=torch.bfloat16)),
    *(kind(3) for kind in (np.float16, np.float32, np.float64, np.longdouble)),
    torch.tensor(3.0, requires_grad=True),
]
NONE = [
    *(True, False, np.True_, np.array(True), torch.tensor(True), np.array(True, dtype=object)),
    *("3", b"3", np.str_("3"), np.array("3"), None, [3], (3,), {3}, {}, [], int, object(), Unspeakable()),
    *(3j, 3 + 0j, np.complex64(3), torch.tensor(3 + 0j), np.datetime64(3, "s")),
    *(np.arange(2), torch.arange(2), np.zeros(0), torch.tensor(3.0, device="meta")),
]
NOT_FINITE = [math.nan, math.inf, -math.inf, np.float32("nan"), torch.tensor(math.inf), Decimal("nan")]
HUGE = [10**400, -(10**400), 10**5000, Fraction(10**400)]


def told(value):
    return f"{type(value).__module__}.{type(value).__name__}"


@pytest.mark.parametrize("value", WHOLE, ids=told)
def test_whole_numbers_of_any_kind(value):
    number = whole(value, "it", 3, 3)
    assert type(number) is int
    assert number == 3
    assert type(real(value, "it", 3, 3)) is float
    assert type(plain(value)) is int


@pytest.mark.parametrize("value", REAL, ids=told)
def test_real_numbers_of_any_kind(value):
    number = real(value, "it")
    assert type(number) is float
    assert number == 3
    with pytest.raises(InputError, match=r"it is .*; it must be a whole number of at least 1"):
        whole(value, "it")


@pytest.mark.parametrize("value", NONE, ids=told)
def test_what_is_not_a_number(value):
    for check in (whole, real):
        with pytest.raises(InputError, match=r"it is .*; it must be a "):
            check(value, "it", 0)
    with pytest.raises(ConfigError, match="it is"):
        real(value, "it", error=ConfigError)


@pytest.mark.parametrize("value", NOT_FINITE + HUGE, ids=told)
def test_what_is_not_finite(value):
    for check in (whole, real):
        with pytest.raises(InputError, match=r"it is .*; it must be a "):
            check(value, "it", 0, 5)
    with pytest.raises(InputError, match="a finite number"):
        real(value, "it")


def test_limits():
    assert (whole(0, "it", 0), whole(5, "it", 5, 5), whole(-3, "it", -3)) == (0, 5, -3)
    assert (real(0, "it", 0), real(1, "it", 0, 1), real(5e-324, "it", 0, above=True)) == (0, 1, 5e-324)
    for wrong in (lambda: whole(0, "it"), lambda: whole(6, "it", 1, 5)):
        with pytest.raises(InputError, match="it must be a whole number"):
            wrong()
    for limits, words in (
        ({"low": 1}, "a number from 1$"),
        ({"low": 0, "above": True}, "a number above 0$"),
        ({"low": -2, "high": 0, "below": True}, "a number from -2 to below 0$"),
        ({"high": -1}, "a number to -1$"),
    ):
        with pytest.raises(InputError, match=words):
            real(0, "it", **limits)


def test_one_or_several():
    for value in (5, 5.0, "ab", b"ab", None, np.int64(3), np.array(3), torch.tensor(3), {1: 2}):
        assert several(value) is None
    for value in ([1, 2], (1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2])):
        assert [int(one) for one in several(value)] == [1, 2]
        assert reals(value, "they") == [1.0, 2.0]
    assert several([]) == several(np.zeros(0)) == []
    assert reals(np.float32(0.5), "they") == [0.5]
    for wrong in ([], None, "1", ["1"], [1, None], [True], np.zeros((2, 2)), [math.nan], torch.tensor([0.0, 3.0])):
        with pytest.raises(InputError, match=r"they are .*; give one or more, each a number from 0 to 2"):
            reals(wrong, "they", 0, 2)


def test_text_and_lists_stay_as_they_are():
    for value in ("3", b"3", None, [3], True, 3j):
        assert plain(value) is value
