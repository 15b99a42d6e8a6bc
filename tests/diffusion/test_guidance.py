"""Guidance: the mix, the learned variance, and scales that are none."""

import pytest
import torch
from torch import Tensor

from unclip.diffusion.guidance import check_scale, guided, uses_guidance
from unclip.errors import InputError


def test_the_mix_and_one_call_for_both() -> None:
    calls: list[tuple[int, ...]] = []

    def denoiser(x: Tensor, t: int) -> Tensor:
        calls.append(tuple(x.shape))
        null, given = x.chunk(2)
        return torch.cat([null * 0 + 1, given * 2])

    x = torch.randn(2, 3, 4, 4)
    mixed = guided(denoiser, 4.0)(x, 7)
    assert calls == [(4, 3, 4, 4)]
    assert torch.allclose(mixed, 1 + 4 * (2 * x - 1))


def test_the_given_branch_s_variance_is_kept() -> None:
    null = torch.cat([torch.full((2, 3, 1, 1), 1.0), torch.full((2, 3, 1, 1), -0.5)], dim=1)
    given = torch.cat([torch.full((2, 3, 1, 1), 2.0), torch.full((2, 3, 1, 1), 0.25)], dim=1)
    mixed = guided(lambda x, t: torch.cat([null, given]), 8.0)(torch.zeros(2, 3, 1, 1), 5)
    assert torch.equal(mixed[:, :3], torch.full((2, 3, 1, 1), 9.0))
    assert torch.equal(mixed[:, 3:], given[:, 3:])


def test_the_mix_is_float32() -> None:
    mixed = guided(lambda x, t: torch.ones(2, 5, dtype=torch.bfloat16), 1.003)(torch.zeros(1, 5), 5)
    assert mixed.dtype == torch.float32


@pytest.mark.parametrize("scale", [0, 0.5, 1, 1.0])
def test_no_guidance_wraps_nothing(scale: float) -> None:
    def denoiser(x: Tensor, t: int) -> Tensor:
        return x

    assert not uses_guidance(scale)
    assert guided(denoiser, scale) is denoiser


@pytest.mark.parametrize("scale", [1.0001, 2, 8.0, 1000])
def test_above_one_is_guidance(scale: float) -> None:
    assert uses_guidance(scale)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf"), 1e9, -1, -0.001, True, "4", None])
def test_what_is_no_scale_is_refused_by_name(scale) -> None:
    with pytest.raises(InputError, match="prior_guidance_scale is"):
        check_scale(scale, "prior_guidance_scale")
    with pytest.raises(InputError, match="1000"):
        uses_guidance(scale)
    with pytest.raises(InputError):
        guided(lambda x, t: x, scale)


@pytest.mark.parametrize("shape", [(2, 3), (4, 5), (4, 9)])
def test_an_output_that_cannot_be_split_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="4 rows"):
        guided(lambda x, t: torch.zeros(shape), 2.0)(torch.zeros(2, 3), 0)
