"""The seam measure: 1 where a border is like any other place, more where it shows."""

import math

import pytest
import torch

from unclip.evaluation.measures import seam

LEFT = torch.zeros(12, 12, dtype=torch.bool)
LEFT[:, :6] = True


def test_noise_has_no_seam():
    picture = torch.rand(3, 200, 200, generator=torch.Generator().manual_seed(0))
    drawn = torch.zeros(200, 200, dtype=torch.bool)
    drawn[50:150, 50:150] = True
    assert seam(picture, drawn) == pytest.approx(1, abs=0.05)


def test_a_slope_has_none_along_or_across():
    slope = torch.arange(12.0).expand(3, 12, 12)
    assert seam(slope, LEFT) == pytest.approx(2, abs=0.15)  # every border step is across the slope, half the others are
    assert seam(slope, LEFT.T) == 0


def test_a_pasted_patch_has_one():
    picture = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0)) * 0.1
    assert seam(picture + LEFT, LEFT) > 10
    assert seam(LEFT.expand(3, -1, -1).float(), LEFT) == math.inf
