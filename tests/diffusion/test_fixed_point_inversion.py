"""The fixed-point inversion undoes DDIM's walk, and does so better with every round."""

import pytest
import torch

from unclip import ConfigError, DiffusionProcess, InputError
from unclip.diffusion.loop import NoiseSource, run
from unclip.diffusion.sampler import DDIMSampler, FixedPointInversionSampler

MIX = torch.randn(12, 12, generator=torch.Generator().manual_seed(3)) / 4


def network(process):
    """A crooked function of x_t, of a Jacobian that couples every two numbers, as a network's output."""

    def denoise(x, t):
        v = torch.tanh(x @ MIX) * (0.3 + t / 1500)
        alpha, sigma = process.tables.alpha[t], process.tables.sigma[t]
        return v if process.prediction_type == "v_prediction" else alpha * v + sigma * x

    return denoise


def error(process, sampler, num_steps, x0):
    """How far from x0 the walk down ends that starts at the inversion of x0."""
    denoiser, noise = network(process), NoiseSource(None, len(x0))
    path = process.spaced_timesteps(num_steps)
    x_T = run(denoiser, sampler, path[::-1], x0, noise=noise)
    back = run(denoiser, DDIMSampler(process), path, x_T, noise=noise)
    return float((back - x0).abs().max())


@pytest.fixture
def x0():
    return torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.6


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("num_steps", [10, 40])
def test_every_round_is_nearer(x0, prediction, num_steps):
    process = DiffusionProcess(prediction_type=prediction, clip_range=None)
    errors = [error(process, FixedPointInversionSampler(process, rounds), num_steps, x0) for rounds in (1, 3, 9)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 1e-2


def test_the_path_is_that_of_the_walk_down():
    process = DiffusionProcess()
    down = DDIMSampler(process).steps((999, 500, 0))
    up = FixedPointInversionSampler(process, 2).steps((0, 500, 999))
    assert up == tuple(step for step in down[::-1] for _ in range(2))
    assert not FixedPointInversionSampler(process).needs_noise(500, 0)


def test_where_x0_is_clipped(x0):
    """White all over is where the clip bites: the walk down comes back to it nevertheless."""
    process = DiffusionProcess(prediction_type="v_prediction", clip_range=1.0)
    white = torch.ones_like(x0)
    assert error(process, FixedPointInversionSampler(process, 5), 40, white) <= 1.0
    assert torch.isfinite(
        run(
            network(process),
            FixedPointInversionSampler(process, 5),
            process.spaced_timesteps(40)[::-1],
            white,
            noise=NoiseSource(None, 3),
        )
    ).all()


@pytest.mark.parametrize("rounds", [0, 21, 1.5, True])
def test_rounds_that_there_are_none_of(rounds):
    with pytest.raises(ConfigError, match="num_rounds"):
        FixedPointInversionSampler(DiffusionProcess(), rounds)


@pytest.mark.parametrize("path", [(), (5,), (5, 5), (900, 0), (0, 1000)])
def test_paths_that_do_not_go_up(path):
    with pytest.raises(InputError):
        FixedPointInversionSampler(DiffusionProcess()).steps(path)
