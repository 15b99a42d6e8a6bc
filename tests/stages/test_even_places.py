"""Places of frames at which neighbouring pictures differ equally."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unclip.errors import InputError, NonFiniteError
from unclip.stages.arithmetic import equal_turns
from unclip.stages.manipulation import BipartiteLatent, equal_jumps, even_places, jumps, path_at


def grey(values):
    """Pictures [count, 3, 2, 2] of one grey each, so a jump is the difference of two greys."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)


def test_jumps_are_root_mean_squares():
    assert jumps(grey([0, 0.5, 0.25])).tolist() == [0.5, 0.25]


def test_frames_are_placed_where_the_picture_changes():
    """The first leg changes only between a half and three quarters; the second changes evenly."""
    places = [0, 0.25, 0.5, 0.75, 1, 1.5, 2]
    found = equal_jumps(places, grey([0, 0, 0, 1, 1, 1.5, 2]), 3)
    assert found == pytest.approx([0, 0.5625, 0.625, 0.6875, 1, 1.25, 1.5, 1.75, 2])


def test_a_leg_without_change_is_divided_by_the_angle():
    assert equal_jumps([0, 0.5, 1, 2], grey([1, 1, 1, 0]), 1) == pytest.approx([0, 0.5, 1, 1.5, 2])


def test_none_between():
    assert equal_jumps([0, 0.5, 1], grey([0, 1, 5]), 0) == [0, 1]


@given(steep=st.floats(0.5, 20), at=st.floats(0.2, 0.8), between=st.integers(1, 12))
def test_all_jumps_of_a_known_path_are_equal(steep, at, between):
    """A path with many known pictures: grey along a sigmoid of any steepness."""

    def drawn(places):
        return grey(torch.sigmoid((torch.tensor(places, dtype=torch.float64) - at) * steep).tolist())

    known = torch.linspace(0, 1, 2001, dtype=torch.float64).tolist()
    found = equal_jumps(known, drawn(known), between)
    assert found[0] == 0
    assert found[-1] == 1
    assert found == sorted(found)
    steps = jumps(drawn(found))
    assert float(steps.max() / steps.min()) < 1.02


def points(rows):
    """Latents with a right angle between neighbours, in embedding and noise."""
    eye = torch.eye(rows)
    return BipartiteLatent(eye, eye[:, None, None, :].expand(-1, 3, rows, -1).contiguous())


class Drawing:
    """Pictures of one grey that depends on the angle to the first row, steeply at 30 degrees; counts its batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, latent):
        self.batches.append(len(latent))
        angle = torch.atan2(latent.image_embedding[:, 1], latent.image_embedding[:, 0])
        noise = latent.decoder_latents[:, 0, 0, 0]  # so that the noise counts too
        return grey((torch.sigmoid((angle - torch.pi / 6) * 40) + noise * 0.1).tolist())


@pytest.mark.parametrize("one_noise", [False, True])
def test_each_round_makes_the_jumps_more_even(one_noise):
    draw, latent, found = Drawing(), points(2), []
    for drawings in range(5):
        places = even_places(latent, 7, draw, one_noise=one_noise, num_drawings=drawings)
        assert len(places) == 9
        steps = jumps(draw(path_at(latent, places, one_noise=one_noise)))
        found.append(float(steps.max() / steps.median()))
    assert found[0] > 5
    assert found[2] < 2.2
    assert found[4] < 1.1
    assert even_places(latent, 7, draw, num_drawings=0) == equal_turns(2, 7)
    defaults = even_places(latent, 7, draw)
    assert defaults == even_places(latent, 7, draw, num_drawings=2)
    assert defaults != even_places(latent, 7, draw, one_noise=True)


def test_the_frames_that_are_decoded():
    draw = Drawing()
    places = even_places(points(2), 7, draw, batch_size=4)
    assert draw.batches == [4, 4, 1, 4, 3]  # the path, then the frames between the ends once more
    assert even_places(points(2), 7, draw, batch_size=100) == pytest.approx(places, abs=1e-6)
    draw.batches.clear()
    assert even_places(points(3), 0, draw) == [0, 1, 2]
    even_places(points(2), 7, draw, num_drawings=0)
    assert draw.batches == []


def test_each_leg_is_placed_on_its_own():
    draw, three = Drawing(), points(3)
    places = even_places(three, 4, draw)
    assert places[::5] == [0, 1, 2]
    assert places[:6] == pytest.approx(even_places(three.select([0, 1]), 4, draw), abs=1e-6)


def test_a_path_without_any_change():
    """Pictures of batches of different sizes differ in their last bits."""
    same = points(2).select([0, 0, 1])
    draw = Drawing()
    places = even_places(same, 9, lambda latent: draw(latent) + 1e-7 * len(latent))
    assert places[:11] == equal_turns(2, 9)
    assert places[11:] != equal_turns(3, 9)[11:]
    assert len(set(draw.batches)) > 1


def test_latents_are_decoded_without_super_resolution_noise():
    seen, draw, plain = [], Drawing(), points(2)
    latent = BipartiteLatent(plain.image_embedding, plain.decoder_latents, torch.ones(2, 3, 8, 8))

    def spy(part):
        seen.append(part.super_res_noise)
        return draw(part)

    assert even_places(latent, 2, spy) == even_places(plain, 2, draw)
    assert set(seen) == {()}


@pytest.mark.parametrize(
    ("draw", "error", "words"),
    [
        (lambda latent: Drawing()(latent)[:1], InputError, "3 pictures"),
        (lambda latent: None, InputError, "must return a tensor"),
        (lambda latent: Drawing()(latent) * torch.nan, NonFiniteError, "NaN"),
    ],
)
def test_decoders_that_return_no_pictures(draw, error, words):
    with pytest.raises(error, match=words):
        even_places(points(2), 1, draw)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_between": -1}, "num_between"),
        ({"num_drawings": -1}, "num_drawings"),
        ({"num_drawings": 0.5}, "num_drawings"),
        ({"batch_size": 0}, "batch_size"),
        ({"latent": points(2).select([0])}, "two or more"),
    ],
)
def test_invalid_arguments(wrong, words):
    with pytest.raises(InputError, match=words):
        even_places(**{"latent": points(2), "num_between": 2, "draw": Drawing(), **wrong})
