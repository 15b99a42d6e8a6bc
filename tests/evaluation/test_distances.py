"""Distances whose values are known."""

import pytest
import torch

from unclip.errors import InputError
from unclip.evaluation.measures import frechet_distance, kernel_distance


def normal(count, width, seed, scale=1.0, shift=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double() * scale + shift


def test_frechet_of_gaussians_in_closed_form():
    # Independent dimensions: the sum of (m1 - m2)² + (s1 - s2)².
    found = frechet_distance(normal(200_000, 3, 0, scale=2.0), normal(200_000, 3, 1, scale=0.5, shift=3.0))
    assert found == pytest.approx(3 * (9 + 1.5**2), rel=0.01)


def test_frechet_by_the_definition_with_correlations():
    mix = normal(6, 6, 9)
    one, other = normal(500, 6, 0) @ mix, normal(400, 6, 1) @ mix.T + 1
    first, second = one.T.cov(), other.T.cov()
    roots = torch.linalg.eigvals(first @ second).real.clamp_min(0).sqrt().sum()
    wanted = (one.mean(0) - other.mean(0)).square().sum() + first.trace() + second.trace() - 2 * roots
    assert frechet_distance(one, other) == pytest.approx(wanted.item(), rel=1e-6)


def test_a_set_is_no_way_from_itself():
    features = normal(50, 80, 0)  # fewer than dimensions
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features.float(), features.flip(0).float()) == pytest.approx(0, abs=1e-4)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    same = [kernel_distance(normal(40, 8, seed), normal(60, 8, seed + 1000)) for seed in range(200)]
    mean, error = torch.tensor(same).mean().item(), torch.tensor(same).std().item() / 200**0.5
    assert abs(mean) < 4 * error
    assert min(same) < 0
    assert kernel_distance(normal(200, 8, 0), normal(200, 8, 1, shift=1.0)) > 50 * error


def test_kernel_distance_by_hand():
    one, other = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]])
    # k(0, 2) = 1; k(1, 1) = 8; the four crossings: 1, 1, 27, 27
    assert kernel_distance(one, other) == pytest.approx(1 + 8 - 2 * 14)


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(("one", "other"), [((1, 4), (5, 4)), ((5, 4), (5, 3)), ((0, 4), (5, 4))])
def test_sets_that_cannot_be_compared(measure, one, other):
    with pytest.raises(InputError, match="cannot be compared"):
        measure(torch.zeros(one), torch.zeros(other))
