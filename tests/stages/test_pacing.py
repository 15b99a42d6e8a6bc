"""Where frames stand: in equal turns, and where pictures differ equally."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unclip.errors import InputError
from unclip.stages.pacing import equal_jumps, equal_turns, jumps


def grey(values):
    """Pictures [count, 3, 2, 2] of one grey each: a jump is the difference of two."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)


def test_equal_turns():
    assert equal_turns(3, 1) == [0, 0.5, 1, 1.5, 2]
    assert equal_turns(2, 0) == [0, 1]


@pytest.mark.parametrize(
    ("points", "between", "words"),
    [(1, 3, "two or more"), (2, -1, "num_between"), (2, 0.5, "num_between"), (2, True, "num_between")],
)
def test_turns_that_there_are_none_of(points, between, words):
    with pytest.raises(InputError, match=words):
        equal_turns(points, between)


def test_jumps_are_root_mean_squares():
    assert jumps(grey([0, 0.5, 0.25])).tolist() == [0.5, 0.25]


def test_frames_go_where_the_picture_changes():
    """All of the change lies between a half and three quarters of the first leg; the second is even."""
    places = [0, 0.25, 0.5, 0.75, 1, 1.5, 2]
    found = equal_jumps(places, grey([0, 0, 0, 1, 1, 1.5, 2]), 3)
    assert found == pytest.approx([0, 0.5625, 0.625, 0.6875, 1, 1.25, 1.5, 1.75, 2])


def test_a_leg_without_change_keeps_its_turns():
    assert equal_jumps([0, 0.5, 1, 2], grey([1, 1, 1, 0]), 1) == pytest.approx([0, 0.5, 1, 1.5, 2])


def test_none_between():
    assert equal_jumps([0, 0.5, 1], grey([0, 1, 5]), 0) == [0, 1]


@given(steep=st.floats(0.5, 20), at=st.floats(0.2, 0.8), between=st.integers(1, 12))
def test_of_a_known_way_all_jumps_are_equal(steep, at, between):
    """Where the way is known closely: grey along a sigmoid, as steep as may be."""

    def drawn(places):
        return grey(torch.sigmoid((torch.tensor(places, dtype=torch.float64) - at) * steep).tolist())

    known = torch.linspace(0, 1, 2001, dtype=torch.float64).tolist()
    found = equal_jumps(known, drawn(known), between)
    assert found[0] == 0
    assert found[-1] == 1
    assert found == sorted(found)
    steps = jumps(drawn(found))
    assert float(steps.max() / steps.min()) < 1.02
