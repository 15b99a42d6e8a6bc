"""Properties that hold for every sampler, prediction type, variance kind and input."""

import concurrent.futures
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unclip.diffusion.loop import NoiseSource, generators_from_seed, run
from unclip.diffusion.process import DiffusionProcess, PredictionType, VarianceType
from unclip.diffusion.sampler import (
    AncestralSampler,
    DDIMSampler,
    Sampler,
)
from unclip.diffusion.schedule import BetaSchedule, Spacing, spaced_timesteps
from unclip.diffusion.scheduler import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverPlusPlus2MSampler,
    UnCLIPScheduler,
)

processes = st.builds(
    DiffusionProcess,
    num_timesteps=st.integers(2, 1000),
    beta_schedule=st.sampled_from(get_args(BetaSchedule)),
    beta_end=st.sampled_from([0.001, 0.02]),
    prediction_type=st.sampled_from(get_args(PredictionType)),
    variance_type=st.sampled_from(get_args(VarianceType)),
    clip_range=st.sampled_from([None, 1.0, 5.0]),
)
makers = st.sampled_from(
    [
        AncestralSampler,
        DDIMSampler,
        lambda process: DDIMSampler(process, 0.5),
        lambda process: DDIMSampler(process, 1.0),
        DPMSolverPlusPlus2MSampler,
        lambda process: DPMSolverPlusPlus2MSampler(process, 1),
    ]
)
shapes = st.sampled_from([(1, 1), (2, 8), (3, 2, 4), (2, 3, 2, 2)])
quick = settings(max_examples=60, deadline=None)


def network(process: DiffusionProcess, calls: list[int] | None = None):
    """A stand-in with the right number of channels."""

    def denoiser(x: Tensor, t: int) -> Tensor:
        if calls is not None:
            calls.append(t)
        output = torch.tanh(x * 0.7 + t / 1000)
        return torch.cat([output, torch.sin(x)], dim=1) if process.learns_variance else output

    return denoiser


def sample(sampler: Sampler, timesteps: tuple[int, ...], shape: tuple[int, ...], seed: int, **arguments) -> Tensor:
    source = NoiseSource(torch.Generator().manual_seed(seed), shape[0])
    denoiser = arguments.pop("denoiser", network(sampler.process))
    return run(denoiser, sampler, timesteps, source.draw(shape, "cpu"), noise=source, **arguments)


@quick
@given(processes, makers, shapes, st.integers(1, 12), st.integers(0, 2**32))
def test_n_steps_are_n_calls_and_the_same_inputs_give_the_same_output(process, make, shape, num_steps, seed) -> None:
    timesteps = process.spaced_timesteps(min(num_steps, process.num_timesteps))
    calls: list[int] = []
    first = sample(make(process), timesteps, shape, seed, denoiser=network(process, calls))
    assert tuple(calls) == timesteps
    assert first.shape == shape
    assert first.dtype == torch.float32
    assert torch.isfinite(first).all()
    assert torch.equal(first, sample(make(process), timesteps, shape, seed))


@quick
@given(processes, makers, shapes, st.data())
def test_a_step_changes_none_of_its_inputs(process, make, shape, data) -> None:
    t = data.draw(st.integers(0, process.num_timesteps - 1))
    t_next = data.draw(st.integers(-1, t - 1))
    sampler = make(process)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(t))
    prediction = process.predict(network(process)(x, t), x, t)
    noise = torch.ones(shape)
    tensors = [x, prediction.x0, prediction.noise, noise]
    before = [tensor.clone() for tensor in tensors]
    stepped, memory = sampler.step(prediction, x, t, t_next, None, noise)
    again, _ = sampler.step(prediction, x, t, t_next, None, noise)
    assert torch.equal(stepped, again)
    assert stepped.shape == x.shape
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))
    if t_next >= 1:
        x0 = prediction.x0.clone()
        sampler.step(
            process.predict(network(process)(stepped, t_next), stepped, t_next), stepped, t_next, 0, memory, noise
        )
        assert torch.equal(prediction.x0, x0)
    if t_next == -1:
        assert not sampler.needs_noise(t, t_next)
        assert torch.allclose(stepped, prediction.x0, atol=1e-6)


@quick
@given(processes, shapes, st.data())
def test_x0_and_noise_lead_back_to_x_t(process, shape, data) -> None:
    t = data.draw(st.integers(0, process.num_timesteps - 1))
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(t))
    prediction = process.predict(network(process)(x, t), x, t)
    again = process.add_noise(prediction.x0, prediction.noise, t)
    assert torch.allclose(again, x, atol=1e-4)
    if process.clip_range is not None:
        assert prediction.x0.abs().max() <= process.clip_range
    assert (prediction.log_variance is not None) == process.learns_variance


@quick
@given(processes, shapes, st.data())
def test_the_true_output_predicts_the_truth(process, shape, data) -> None:
    t = data.draw(st.integers(0, process.num_timesteps - 1))
    generator = torch.Generator().manual_seed(t)
    x0 = torch.rand(shape, generator=generator) * 2 - 1
    noise = torch.randn(shape, generator=generator)
    x_t = process.add_noise(x0, noise, t)
    output = process.target(x0, noise, t)
    if process.learns_variance:
        output = torch.cat([output, torch.zeros(shape)], dim=1)
    prediction = process.predict(output, x_t, t)
    # Rounding in x_t is amplified by 1 / alpha on the way to x0, and by 1 / sigma on the way to the noise.
    assert (prediction.x0 - x0).abs().max() < 1e-6 + 2e-6 / process.tables.alpha[t]
    assert (prediction.noise - noise).abs().max() < 1e-5 + 5e-6 / process.tables.sigma[t]


@quick
@given(processes, st.integers(1, 1000), st.sampled_from(get_args(Spacing)), st.booleans())
def test_timesteps_descend_inside_the_schedule(process, num_steps, spacing, includes_zero) -> None:
    num_steps = min(num_steps, process.num_timesteps)
    timesteps = spaced_timesteps(process.num_timesteps, num_steps, spacing, includes_zero=includes_zero)
    assert len(timesteps) == len(set(timesteps)) == num_steps
    assert list(timesteps) == sorted(timesteps, reverse=True)
    assert 0 <= timesteps[-1] <= timesteps[0] < process.num_timesteps
    if spacing == "linspace":
        assert timesteps[0] == process.num_timesteps - 1


@quick
@given(processes, makers, st.integers(0, 2**64 - 1), st.integers(1, 4), st.integers(1, 5))
def test_a_picture_does_not_depend_on_its_batch(process, make, seed, batch_size, num_steps) -> None:
    timesteps = process.spaced_timesteps(min(num_steps, process.num_timesteps))

    def pictures(seed: int, batch_size: int) -> Tensor:
        source = NoiseSource(generators_from_seed(seed, batch_size), batch_size)
        start = source.draw((batch_size, 4), "cpu")
        return run(network(process), make(process), timesteps, start, noise=source)

    together = pictures(seed, batch_size)
    for index in range(batch_size):
        alone = pictures((seed + index) % 2**64, 1)
        assert torch.allclose(together[index], alone[0], atol=1e-6)


@quick
@given(processes, st.data())
def test_clean_samples_invert_and_return_in_one_pair_of_steps(process, data) -> None:
    # With x0 and noise held fixed, a step up and the step down again is the identity.
    t = data.draw(st.integers(0, process.num_timesteps - 2))
    t_up = data.draw(st.integers(t + 1, process.num_timesteps - 1))
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(t))
    prediction = process.predict(network(process)(x, t), x, t)
    up = process.add_noise(prediction.x0, prediction.noise, t_up)
    down, _ = DDIMSampler(process).step(prediction, up, t_up, t)
    assert torch.allclose(down, x, atol=1e-4)


@pytest.mark.parametrize("make", [UnCLIPScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_one_scheduler_serves_eight_threads(make) -> None:
    scheduler = make(num_train_timesteps=1000)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        timesteps = list(pool.map(lambda _: scheduler.spaced_timesteps(25), range(8)))
        samples = list(pool.map(lambda _: sample(scheduler.sampler(), timesteps[0], (2, 3, 4, 4), 11), range(8)))
    assert len(set(timesteps)) == 1
    assert all(torch.equal(one, samples[0]) for one in samples)
