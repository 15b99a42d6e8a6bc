"""Likeness of pictures whose measures are known."""

import pytest
import torch
from PIL import Image

from unclip.errors import InputError
from unclip.evaluation.measures import cosines, pixel_measures, ssim


def grey(value, size=(16, 16)):
    return Image.new("RGB", size, (value,) * 3)


def test_equal_pictures():
    found = pixel_measures([grey(90), grey(7)], [grey(90), grey(7)])
    assert found == {"size_px": 16, "mae": 0.0, "psnr_db": 100.0, "ssim": 1.0}


def test_plain_pictures_by_hand():
    found = pixel_measures([grey(0)], [grey(51)])  # 0.2 apart
    assert found["mae"] == pytest.approx(0.2)
    assert found["psnr_db"] == pytest.approx(13.98, abs=0.01)  # -10 log10(0.04)
    assert found["ssim"] == pytest.approx(1e-4 / (0.04 + 1e-4), abs=1e-4)  # no variance: of the means alone


def test_real_pictures_are_made_square_on_white_and_resized():
    wide = grey(255, (64, 32))
    assert pixel_measures([wide], [grey(255, (8, 8))])["mae"] == 0
    black = pixel_measures([grey(0, (64, 32))], [grey(0, (8, 8))])
    assert black["mae"] == pytest.approx(0.5)


def test_ssim_by_the_definition():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(2, 3, 11, 11, generator=generator).double() for _ in range(2))
    place = torch.arange(11).double() - 5
    weights = torch.exp(-(place[:, None] ** 2 + place[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    wanted = []
    for a, b in zip(one, other, strict=True):
        values = []
        for x, y in zip(a, b, strict=True):
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            c = (weights * (x - mx) * (y - my)).sum()
            top = (2 * mx * my + 0.01**2) * (2 * c + 0.03**2)
            values.append(top / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2)))
        wanted.append(torch.stack(values).mean())
    torch.testing.assert_close(ssim(one, other), torch.stack(wanted))


def test_ssim_sees_structure_and_not_only_brightness():
    line = torch.linspace(0, 1, 32).double().expand(1, 3, 32, 32)
    assert ssim(line, line.flip(-1)).item() < 0.5 < ssim(line, (line + 0.02).clamp(0, 1)).item()
    assert ssim(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)).item() == 1  # smaller than the window


def test_pairs_that_do_not_fit():
    with pytest.raises(InputError, match="do not form pairs"):
        pixel_measures([grey(0)], [grey(0), grey(0)])
    with pytest.raises(InputError, match="do not form pairs"):
        pixel_measures([grey(0), grey(0)], [grey(0), grey(0, (8, 8))])
    with pytest.raises(InputError, match="do not form pairs"):
        pixel_measures([], [])


def test_cosines():
    made = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert cosines(made, made) == (1.0, 0.0)
    assert cosines(made, made.flip(0)) == (0.0, 1.0)
    three = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    every = three @ three.T
    others = every[~torch.eye(3, dtype=torch.bool)].mean().item()
    assert cosines(three, three) == (1.0, pytest.approx(others, abs=1e-4))
    assert cosines(made[:1], made[:1]) == (1.0, 1.0)
