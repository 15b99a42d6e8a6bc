"""Our schedulers and diffusers' give the same steps.

Diffusers keeps its tables in float32, where 1 - alphas_cumprod loses up to four digits at the least noise (its last
step returns x0 times 0.9995). So each comparison is made twice: with its tables replaced by float64 ones, where the
two agree to the last bits, and with them as they are, within what that rounding explains (measured: 6e-4 below
timestep 10, 5.5e-5 from 10 on, 6e-6 from 40 on).
"""

import diffusers
import pytest
import torch
from torch import Tensor

from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.sampler import AncestralSampler, DDIMSampler
from unclip.diffusion.scheduler import DDIMScheduler, DPMSolverMultistepScheduler, UnCLIPScheduler

from .reference import in_float64

# Diffusers' own: numpy warns of how it turns a tensor into an array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 3, 4, 4)
EXACT, ROUNDED = 2e-5, 1e-3


def outputs(variance_type: str, seed: int) -> tuple[Tensor, Tensor]:
    """A sample, and a network's output for it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator)
    output = torch.randn(SHAPE, generator=generator)
    if variance_type == "learned_range":
        output = torch.cat([output, torch.randn(SHAPE, generator=generator).tanh()], dim=1)
    return x, output


def pairs(spaced: tuple[int, ...]) -> list[tuple[int, int]]:
    every = [(t, t - 1) for t in range(1000)]
    return every + list(zip(spaced, (*spaced[1:], -1), strict=True))


@pytest.mark.parametrize("variance_type", ["fixed_small_log", "learned_range"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
@pytest.mark.parametrize("clip_range", [1.0, 5.0])
def test_ancestral_step(variance_type: str, prediction_type: str, clip_range: float) -> None:
    settings = {
        "variance_type": variance_type,
        "prediction_type": prediction_type,
        "clip_sample_range": clip_range,
    }
    ours = UnCLIPScheduler(**settings)
    theirs = diffusers.UnCLIPScheduler(**settings)
    precise = in_float64(diffusers.UnCLIPScheduler(**settings), ours.process.tables.betas)
    for t, t_next in pairs(ours.spaced_timesteps(25)):
        x, output = outputs(variance_type, t)
        got = ours.step(output, t, x, t_next, torch.Generator().manual_seed(t))
        scale = max(1.0, got.prev_sample.abs().max().item())
        for reference, limit in ((precise, EXACT), (theirs, ROUNDED)):
            expected = reference.step(output, t, x, prev_timestep=t_next, generator=torch.Generator().manual_seed(t))
            assert (got.prev_sample - expected.prev_sample).abs().max() <= limit * scale, (t, t_next)
            assert (got.pred_original_sample - expected.pred_original_sample).abs().max() <= limit * scale, (t, t_next)


def test_unclipped_ancestral_step() -> None:
    ours = UnCLIPScheduler(clip_sample=False)
    precise = in_float64(diffusers.UnCLIPScheduler(clip_sample=False), ours.process.tables.betas)
    for t in range(1000):
        x, output = outputs("fixed_small_log", t)
        got = ours.step(output, t, x, None, torch.Generator().manual_seed(t)).prev_sample
        expected = precise.step(output, t, x, generator=torch.Generator().manual_seed(t)).prev_sample
        assert (got - expected).abs().max() <= EXACT * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("num_steps", [2, 25])
def test_a_whole_ancestral_run_draws_the_same_noise(num_steps: int) -> None:
    ours, theirs = UnCLIPScheduler(), diffusers.UnCLIPScheduler()
    generators = [torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)]
    samples = [torch.randn(SHAPE, generator=generator) for generator in generators]
    ours.set_timesteps(num_steps)
    theirs.set_timesteps(num_steps)
    for t, t_next in zip(ours.timesteps, [*ours.timesteps[1:], None], strict=True):
        for index, scheduler in enumerate((ours, theirs)):
            output = torch.tanh(samples[index] * 2)
            samples[index] = scheduler.step(output, t, samples[index], t_next, generators[index]).prev_sample
    assert (samples[0] - samples[1]).abs().max() < 2e-3
    assert torch.equal(*(torch.rand(4, generator=generator) for generator in generators))


def test_a_list_of_generators_draws_the_same_noise() -> None:
    x, output = outputs("fixed_small_log", 0)
    got, expected = (
        scheduler.step(output, 500, x, 480, [torch.Generator().manual_seed(seed) for seed in (3, 4)]).prev_sample
        for scheduler in (UnCLIPScheduler(), diffusers.UnCLIPScheduler())
    )
    assert (got - expected).abs().max() < EXACT


def test_timesteps() -> None:
    ours, theirs = UnCLIPScheduler(), diffusers.UnCLIPScheduler()
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for num_steps in [*range(2, 61), 64, 100, 128, 250, 333, 500, 501, 667, 750, 998, 999, 1000]:
        ours.set_timesteps(num_steps)
        theirs.set_timesteps(num_steps)
        assert torch.equal(ours.timesteps, theirs.timesteps), num_steps


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize(
    ("make_ours", "make_theirs"),
    [
        (DDIMScheduler, diffusers.DDIMScheduler),
        (DPMSolverMultistepScheduler, diffusers.DPMSolverMultistepScheduler),
    ],
)
def test_timesteps_of_the_others(make_ours, make_theirs, spacing: str) -> None:
    ours = make_ours(timestep_spacing=spacing)
    theirs = make_theirs(timestep_spacing=spacing)
    for num_steps in [*range(1, 61), 100, 250, 333, 400, 499]:
        if spacing == "linspace" and num_steps == 1 and make_ours is DDIMScheduler:
            continue  # theirs is timestep 0, from which no picture comes; ours is the last
        if spacing == "trailing" and num_steps == 499:
            continue  # theirs are 500, down to timestep -1
        ours.set_timesteps(num_steps)
        theirs.set_timesteps(num_steps)
        assert len(ours.timesteps) == len(theirs.timesteps)
        # "trailing" counts down in numpy's accumulated strides there, so halves may round the other way.
        allowed = 1 if spacing == "trailing" else 0
        assert (ours.timesteps - theirs.timesteps).abs().max() <= allowed, num_steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("timesteps", [torch.tensor([0, 999]), torch.tensor([417]), torch.tensor(30)])
def test_add_noise(timesteps: Tensor, dtype: torch.dtype) -> None:
    x0, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = UnCLIPScheduler().add_noise(x0, noise, timesteps)
    expected = diffusers.UnCLIPScheduler().add_noise(x0, noise, timesteps)
    assert got.dtype == expected.dtype
    limit = 1e-4 if dtype == torch.float32 else 5e-2
    assert (got.float() - expected.float()).abs().max() < limit


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_step(prediction_type: str, beta_schedule: str, eta: float) -> None:
    settings = {"prediction_type": prediction_type, "beta_schedule": beta_schedule}
    ours = DDIMScheduler(**settings)
    theirs = diffusers.DDIMScheduler(**settings)
    precise = in_float64(diffusers.DDIMScheduler(**settings), ours.process.tables.betas)
    for scheduler in (ours, theirs, precise):
        scheduler.set_timesteps(25)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for t in ours.timesteps:
        x, output = outputs("fixed_small_log", int(t))
        got = ours.step(output, t, x, generator=torch.Generator().manual_seed(1), eta=eta).prev_sample
        for reference, limit in ((precise, EXACT), (theirs, ROUNDED)):
            expected = reference.step(
                output, t, x, eta, use_clipped_model_output=True, generator=torch.Generator().manual_seed(1)
            ).prev_sample
            assert (got - expected).abs().max() <= limit * max(1.0, expected.abs().max().item()), t


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("solver_order", "num_steps"), [(1, 10), (2, 4), (2, 20)])
def test_dpm_solver_run(prediction_type: str, beta_schedule: str, solver_order: int, num_steps: int) -> None:
    settings = {"prediction_type": prediction_type, "beta_schedule": beta_schedule, "solver_order": solver_order}
    ours, theirs = DPMSolverMultistepScheduler(**settings), diffusers.DPMSolverMultistepScheduler(**settings)
    samples = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))] * 2
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(num_steps)
    for t in ours.timesteps:
        # The same outputs for both: the comparison is of the solver, not of how a network spreads differences.
        x, output = outputs("fixed_small_log", int(t))
        output = 0.1 * output + 0.5 * x
        both = zip((ours, theirs), samples, strict=True)
        samples = [scheduler.step(output, t, sample).prev_sample for scheduler, sample in both]
        scale = max(1.0, samples[1].abs().max().item())
        assert (samples[0] - samples[1]).abs().max() <= 2e-4 * scale, t


@pytest.mark.parametrize("use_clipped_model_output", [True, False])
def test_ddim_s_arguments_mean_the_same_by_place(use_clipped_model_output: bool) -> None:
    settings = {"clip_sample": use_clipped_model_output, "beta_schedule": "linear"}
    ours, theirs = DDIMScheduler(**settings), diffusers.DDIMScheduler(**settings)
    precise = in_float64(diffusers.DDIMScheduler(**settings), ours.process.tables.betas)
    for scheduler in (ours, theirs, precise):
        scheduler.set_timesteps(25)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    for t in ours.timesteps:
        x, output = outputs("fixed_small_log", int(t))
        place = (output, t, x, 0.6, use_clipped_model_output, None, noise, False)
        got = ours.step(*place)[0]
        for reference, limit in ((precise, EXACT), (theirs, ROUNDED)):
            expected = reference.step(*place)[0]
            assert (got - expected).abs().max() <= limit * max(1.0, expected.abs().max().item()), t


def test_dpm_solver_s_arguments_mean_the_same_by_place() -> None:
    ours, theirs = DPMSolverMultistepScheduler(), diffusers.DPMSolverMultistepScheduler()
    x, output = outputs("fixed_small_log", 5)
    made = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        made.append(scheduler.step(output, scheduler.timesteps[0], x, torch.Generator().manual_seed(1), None, False)[0])
    assert (made[0] - made[1]).abs().max() < 2e-4 * max(1.0, made[1].abs().max().item())


def test_the_samplers_take_the_schedulers_steps() -> None:
    x, output = outputs("learned_range", 5)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    process = DiffusionProcess(variance_type="learned_range")
    prediction = process.predict(output, x, 600)
    ancestral, _ = AncestralSampler(process).step(prediction, x, 600, 560, None, noise)
    scheduler = UnCLIPScheduler(variance_type="learned_range")
    assert torch.equal(ancestral, scheduler.step(output, 600, x, 560, torch.Generator().manual_seed(9)).prev_sample)
    ddim, _ = DDIMSampler(process).step(prediction, x, 600, 560)
    ours = DDIMScheduler.from_config(scheduler.config)
    assert torch.equal(ddim, ours.step(output, 600, x, prev_timestep=560).prev_sample)


@pytest.mark.parametrize("name", ["UnCLIPScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_scheduler_saved_by_the_reference_loads_here(name, tmp_path):
    """diffusers writes -Infinity into the solver's file, which is not JSON but must be read."""
    theirs = getattr(diffusers, name)()
    theirs.save_pretrained(tmp_path)
    ours = globals()[name].from_pretrained(tmp_path)
    assert ours.config["beta_schedule"] == theirs.config.beta_schedule
