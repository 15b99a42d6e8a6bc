"""Inpainting: what is kept, the path that goes up again, and a correlated Gaussian whose conditional law is known."""

import pytest
import torch
from torch import Tensor

from unclip.diffusion.loop import NoiseSource, run
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.sampler import (
    AncestralSampler,
    DDIMSampler,
    InpaintingSampler,
    Sampler,
)
from unclip.diffusion.scheduler import DPMSolverPlusPlus2MSampler
from unclip.errors import InputError

PROCESS = DiffusionProcess(prediction_type="sample", clip_range=None)
SAMPLERS = [AncestralSampler(PROCESS), DDIMSampler(PROCESS), DPMSolverPlusPlus2MSampler(PROCESS)]
X0 = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
KEPT = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
START = torch.randn(X0.shape, generator=torch.Generator().manual_seed(2))


class Counted(NoiseSource):
    """Tells how often noise was drawn."""

    count = 0

    def draw(self, shape, device) -> Tensor:
        self.count += 1
        return super().draw(shape, device)


def noise(batch_size: int = 2, seed: int = 5) -> Counted:
    return Counted(torch.Generator().manual_seed(seed), batch_size)


# ---- the way up ----


def test_renoising_is_the_forward_process_from_there_on() -> None:
    """Noised to 100 and from there to 700: mean and variance are those of noising to 700 at once."""
    x0 = torch.full((50_000, 1), 0.5)
    draws = [torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    there = PROCESS.renoise(PROCESS.add_noise(x0, draws[0], 100), 100, 700, draws[1])
    assert there.mean().item() == pytest.approx(PROCESS.tables.alpha[700] * 0.5, abs=0.02)
    assert there.std().item() == pytest.approx(PROCESS.tables.sigma[700], rel=0.02)


def test_renoising_the_clean_sample_is_adding_noise() -> None:
    fresh = torch.randn(X0.shape)
    torch.testing.assert_close(PROCESS.renoise(X0, -1, 300, fresh), PROCESS.add_noise(X0, fresh, 300))


@pytest.mark.parametrize(("t", "t_up"), [(5, 5), (6, 5), (-2, 5), (0, 1000)])
def test_renoising_goes_up(t: int, t_up: int) -> None:
    with pytest.raises(InputError):
        PROCESS.renoise(X0, t, t_up, X0)


def test_renoising_with_noise_of_another_shape() -> None:
    with pytest.raises(InputError, match="noise has shape"):
        PROCESS.renoise(X0, 0, 5, X0[:1])


def test_the_loop_walks_up_without_the_network() -> None:
    """An up-going path: the network sees exactly what the forward process makes of the state before."""
    seen: list[tuple[int, Tensor]] = []

    def watching(x: Tensor, t: int) -> Tensor:
        seen.append((t, x))
        return 0.5 * x

    class Jumping(DDIMSampler):
        def steps(self, timesteps):
            return ((900, 500), (900, 500), (500, -1))

    end = run(watching, Jumping(PROCESS), (900,), START, noise=noise())
    assert [t for t, _ in seen] == [900, 900, 500]
    lower, _ = DDIMSampler(PROCESS).step(PROCESS.predict(0.5 * START, START, 900), START, 900, 500)
    expected = PROCESS.renoise(lower, 500, 900, noise().draw(START.shape, "cpu"))
    torch.testing.assert_close(seen[1][1], expected)
    torch.testing.assert_close(end, 0.5 * seen[2][1])


def test_a_multistep_sampler_forgets_what_lies_below() -> None:
    """After the way up the solver takes a first step of first order, as DDIM does."""
    seen: list[Tensor] = []
    steps = ((900, 700), (700, 500), (900, 700), (700, -1))

    class Jumping(DPMSolverPlusPlus2MSampler):
        def steps(self, timesteps):
            return steps

    def watching(x: Tensor, t: int) -> Tensor:
        seen.append(x)
        return 0.5 * x + t / 1000

    run(watching, Jumping(PROCESS), (900,), START, noise=noise())
    x = seen[2]
    first_order, _ = DDIMSampler(PROCESS).step(PROCESS.predict(0.5 * x + 0.9, x, 900), x, 900, 700)
    torch.testing.assert_close(seen[3], first_order, rtol=0, atol=1e-5)


# ---- the path ----


def test_the_path_is_walked_in_parts() -> None:
    def path(num_resamples: int, jump_length: int) -> tuple[tuple[int, int], ...]:
        return InpaintingSampler(SAMPLERS[1], X0, KEPT, num_resamples, jump_length).steps((9, 7, 5, 3, 0))

    plain = ((9, 7), (7, 5), (5, 3), (3, 0), (0, -1))
    assert path(1, 1) == path(1, 3) == plain
    assert path(2, 1) == ((9, 7),) * 2 + ((7, 5),) * 2 + ((5, 3),) * 2 + ((3, 0),) * 2 + ((0, -1),)
    assert path(2, 3) == plain[:3] * 2 + plain[3:4] * 2 + plain[4:]
    assert path(3, 99) == plain[:4] * 3 + plain[4:]
    assert InpaintingSampler(SAMPLERS[1], X0, KEPT, 5).steps((0,)) == ((0, -1),)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(("num_resamples", "jump_length"), [(1, 1), (3, 1), (2, 2)])
def test_what_is_known_stays_to_the_bit_and_the_rest_is_drawn(sampler: Sampler, num_resamples, jump_length) -> None:
    inpainting = InpaintingSampler(sampler, X0, KEPT, num_resamples, jump_length)
    end = run(lambda x, t: 0.5 * x - 2, inpainting, (999, 600, 300, 0), START, noise=noise())
    kept = KEPT.expand_as(X0)
    assert torch.equal(end[kept], X0[kept])
    assert (end[~kept] < -1).all()


def test_on_the_way_the_known_part_is_noised_as_far_as_the_rest() -> None:
    states = []
    sampler = InpaintingSampler(SAMPLERS[1], torch.full((2, 1, 80, 80), 0.5), torch.ones(1, dtype=torch.bool))
    start = torch.randn(2, 1, 80, 80)
    timesteps = (999, 600, 300, 0)
    run(lambda x, t: x, sampler, timesteps, start, noise=noise(), on_step=lambda info: states.append(info.x))
    for t, x in zip(timesteps[1:], states, strict=False):
        assert x.mean().item() == pytest.approx(0.5 * PROCESS.tables.alpha[t], abs=0.03)
        assert x.std().item() == pytest.approx(PROCESS.tables.sigma[t], rel=0.05)


def test_one_draw_a_step_and_one_a_way_up() -> None:
    source = noise()
    run(lambda x, t: x, InpaintingSampler(SAMPLERS[0], X0, KEPT, 3), (999, 500, 0), START, noise=source)
    assert source.count == 3 * 2 + 2 * 2


def test_a_step_without_its_noise() -> None:
    sampler = InpaintingSampler(SAMPLERS[1], X0, KEPT)
    with pytest.raises(InputError, match="needs noise, but none was given"):
        sampler.step(PROCESS.predict(X0, X0, 500), X0, 500, 100)


# ---- harmony ----


@pytest.mark.parametrize("sampler", SAMPLERS[:2], ids=lambda one: type(one).__name__)
def test_resampling_brings_the_drawn_part_to_its_conditional_law(sampler: Sampler) -> None:
    """Two correlated numbers, the first known: the second's mean given it is correlation × the first.

    The denoiser is the exact one of the joint law, so what is left is the error of putting the known part back.
    """
    correlation, known, rows = 0.9, 1.5, 4000
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]])

    def denoiser(x: Tensor, t: int) -> Tensor:
        alpha, sigma = PROCESS.tables.alpha[t], PROCESS.tables.sigma[t]
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2))
        return x @ gain.T

    def mean_and_std(num_resamples: int) -> tuple[float, float]:
        x0, kept = torch.full((rows, 2), known), torch.tensor([True, False])
        inpainting = InpaintingSampler(sampler, x0, kept, num_resamples)
        start = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
        end = run(denoiser, inpainting, PROCESS.spaced_timesteps(40), start, noise=noise(rows))
        return end[:, 1].mean().item(), end[:, 1].std().item()

    true_mean, true_std = correlation * known, (1 - correlation**2) ** 0.5
    errors = {count: abs(mean_and_std(count)[0] - true_mean) for count in (1, 4, 16)}
    assert errors[1] > 2 * errors[4] > 2 * errors[16]
    mean, std = mean_and_std(16)
    assert mean == pytest.approx(true_mean, abs=0.06)
    assert std == pytest.approx(true_std, rel=0.25)
