"""Samplers against closed forms: convergence orders, moments, a common limit, and the way there and back."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from unclip.diffusion.loop import NoiseSource, run
from unclip.diffusion.process import DiffusionProcess, PredictionType
from unclip.diffusion.sampler import (
    AncestralSampler,
    DDIMSampler,
    FixedPointInversionSampler,
    Sampler,
)
from unclip.diffusion.scheduler import DPMSolverPlusPlus2MSampler


@dataclass(frozen=True)
class Gaussian:
    """Data x0 ~ N(mean, std^2)."""

    mean: float
    std: float

    def x0(self, process: DiffusionProcess, x: Tensor, t: int) -> Tensor:
        """E[x0 | x_t = x]: the denoiser that training would end at."""
        alpha, sigma = process.tables.alpha[t], process.tables.sigma[t]
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)

    def output(self, process: DiffusionProcess, x: Tensor, t: int) -> Tensor:
        """The same in the terms of the process's prediction type."""
        alpha, sigma = process.tables.alpha[t], process.tables.sigma[t]
        x0 = self.x0(process, x, t)
        if process.prediction_type == "sample":
            return x0
        noise = (x - alpha * x0) / sigma
        return noise if process.prediction_type == "epsilon" else alpha * noise - sigma * x0

    def flow(self, process: DiffusionProcess, x: Tensor, t: int, t_end: int) -> Tensor:
        """Where the probability-flow ODE takes x from t to t_end (-1: clean): the deviation scales with the spread."""

        def spread(t: int) -> tuple[float, float]:
            alpha = process.tables.alpha[t] if t >= 0 else 1.0
            return alpha, (alpha**2 * self.std**2 + 1 - alpha**2) ** 0.5

        (alpha, wide), (alpha_end, wide_end) = spread(t), spread(t_end)
        return alpha_end * self.mean + wide_end / wide * (x - alpha * self.mean)


DATA = Gaussian(mean=0.4, std=0.3)
SILENT = NoiseSource(None, 4)


def walk(sampler: Sampler, timesteps: tuple[int, ...], x: Tensor, data: Gaussian = DATA) -> Tensor:
    """Along `timesteps` and no further: without the step to the clean sample."""
    process, memory = sampler.process, None
    for t, t_next in pairwise(timesteps):
        x, memory = sampler.step(process.predict(data.output(process, x, t), x, t), x, t, t_next, memory, None)
    return x


def orders(sampler: Sampler, data: Gaussian) -> list[float]:
    """Order measured between 32, 64 and 128 even steps over the inner 8 tenths of the schedule."""
    process = sampler.process
    start, end = process.num_timesteps * 9 // 10, process.num_timesteps // 10
    x = torch.tensor([[-2.0], [2.0]])
    exact = data.flow(process, x, start, end)
    errors = []
    for num_steps in (32, 64, 128):
        timesteps = tuple(range(start, end - 1, -(start - end) // num_steps))
        assert len(timesteps) == num_steps + 1
        errors.append((walk(sampler, timesteps, x, data) - exact).abs().max().item())
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
@pytest.mark.parametrize("std", [0.1, 0.6])
@pytest.mark.parametrize(("make", "order"), [(DDIMSampler, 1), (DPMSolverPlusPlus2MSampler, 2)])
def test_convergence_order(make, order: int, std: float, prediction_type: str) -> None:
    # 6400 timesteps, so that every number of steps has a whole stride.
    process = DiffusionProcess(num_timesteps=6400, prediction_type=prediction_type, clip_range=None)
    measured = orders(make(process), Gaussian(mean=0.4, std=std))
    assert all(abs(one - order) < 0.1 for one in measured), measured


def test_dpm_solver_of_order_one_is_ddim() -> None:
    process = DiffusionProcess(clip_range=None)
    x = torch.tensor([[-1.0], [0.3], [1.0], [2.0]])
    timesteps = process.spaced_timesteps(12)
    assert torch.allclose(
        walk(DPMSolverPlusPlus2MSampler(process, order=1), timesteps, x),
        walk(DDIMSampler(process), timesteps, x),
        atol=1e-5,
    )


def test_deterministic_samplers_share_the_flow_s_limit() -> None:
    process = DiffusionProcess(clip_range=None)
    x = torch.tensor([[-1.5], [-0.2], [0.9], [1.6]])
    exact = DATA.flow(process, x, process.num_timesteps - 1, -1)

    def denoiser(x: Tensor, t: int) -> Tensor:
        return DATA.output(process, x, t)

    for sampler, limit in ((DDIMSampler(process), 4e-3), (DPMSolverPlusPlus2MSampler(process), 1e-3)):
        end = run(denoiser, sampler, process.spaced_timesteps(1000), x, noise=SILENT)
        assert (end - exact).abs().max() < limit


@pytest.mark.parametrize("variance_type", ["fixed_small_log", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("make", [AncestralSampler, lambda process: DDIMSampler(process, eta=1.0)])
def test_stochastic_samplers_reach_the_data_s_moments(make, variance_type: str) -> None:
    process = DiffusionProcess(clip_range=None, variance_type=variance_type)
    source = NoiseSource(torch.Generator().manual_seed(0), 20_000)

    def denoiser(x: Tensor, t: int) -> Tensor:
        return DATA.output(process, x, t)

    start = source.draw((20_000, 1), "cpu")
    end = run(denoiser, make(process), process.spaced_timesteps(400), start, noise=source)
    assert abs(end.mean().item() - DATA.mean) < 0.01
    assert abs(end.std().item() / DATA.std - 1) < 0.03


def test_ddim_eta_one_is_ancestral_sampling() -> None:
    # Song et al. 2010.02502, section 4.1: with eta = 1 the generative process becomes a DDPM.
    process = DiffusionProcess()
    x, output, noise = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t, t_next in ((999, 957), (500, 499), (40, 0)):
        prediction = process.predict(output, x, t)
        ancestral, _ = AncestralSampler(process).step(prediction, x, t, t_next, None, noise)
        ddim, _ = DDIMSampler(process, eta=1.0).step(prediction, x, t, t_next, None, noise)
        assert torch.allclose(ancestral, ddim, atol=2e-5)


def test_inversion_then_sampling_returns_the_start() -> None:
    process = DiffusionProcess(clip_range=None)
    picture = torch.tensor([[-0.3], [0.2], [0.4], [1.1]])

    def denoiser(x: Tensor, t: int) -> Tensor:
        return DATA.output(process, x, t)

    def round_trip(num_steps: int) -> float:
        timesteps = process.spaced_timesteps(num_steps)[::-1]
        noisy = run(denoiser, FixedPointInversionSampler(process), timesteps, picture, noise=SILENT)
        back = run(denoiser, DDIMSampler(process), process.spaced_timesteps(num_steps), noisy, noise=SILENT)
        return (back - picture).abs().max().item()

    assert round_trip(1000) < 5e-3
    assert round_trip(1000) < round_trip(100) < round_trip(20) < 0.3


def test_inversion_of_data_is_standard_noise() -> None:
    process = DiffusionProcess(clip_range=None)
    data = DATA.mean + DATA.std * torch.randn(4000, 1, generator=torch.Generator().manual_seed(3))
    noisy = run(
        lambda x, t: DATA.output(process, x, t),
        FixedPointInversionSampler(process),
        process.spaced_timesteps(500)[::-1],
        data,
        noise=NoiseSource(None, 4000),
    )
    assert abs(noisy.mean().item()) < 0.05
    assert abs(noisy.std().item() - 1) < 0.05
