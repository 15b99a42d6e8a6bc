"""Guidance: the mix, the learned variance, and scales that are none."""

import torch
from torch import Tensor

from unclip.diffusion.guidance import guided


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
