"""The loop: its calls, its order of draws, its callbacks; and the samplers' paths."""

import pytest
import torch
from torch import Tensor

from unclip.diffusion.loop import NoiseSource, StepInfo, run
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.sampler import AncestralSampler, DDIMSampler
from unclip.diffusion.scheduler import DPMSolverPlusPlus2MSampler
from unclip.errors import Cancelled, ConfigError, InputError

PROCESS = DiffusionProcess()
QUIET = NoiseSource(None, 2)
START = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


def denoiser(x: Tensor, t: int) -> Tensor:
    return 0.5 * x


def test_the_network_is_given_float32_and_python_ints() -> None:
    seen: list[tuple[torch.dtype, type]] = []

    def watching(x: Tensor, t: int) -> Tensor:
        seen.append((x.dtype, type(t)))
        return x.to(torch.bfloat16)

    end = run(watching, DDIMSampler(PROCESS), (999, 500, 0), START.to(torch.float16), noise=QUIET)
    assert seen == [(torch.float32, int)] * 3
    assert end.dtype == torch.float32


def test_noise_comes_after_the_forward_and_not_at_the_end() -> None:
    events: list[str] = []

    class Watched(NoiseSource):
        def draw(self, shape, device) -> Tensor:
            events.append("noise")
            return super().draw(shape, device)

    def watching(x: Tensor, t: int) -> Tensor:
        events.append("network")
        return x

    run(watching, AncestralSampler(PROCESS), (999, 500, 0), START, noise=Watched(None, 2))
    assert events == ["network", "noise", "network", "noise", "network"]
    events.clear()
    run(watching, AncestralSampler(PROCESS), (999,), START, noise=Watched(None, 2))
    run(watching, DDIMSampler(PROCESS), (999, 0), START, noise=Watched(None, 2))
    run(watching, DPMSolverPlusPlus2MSampler(PROCESS), (999, 500), START, noise=Watched(None, 2))
    assert set(events) == {"network"}


def test_every_step_is_told() -> None:
    told: list[StepInfo] = []
    end = run(denoiser, DDIMSampler(PROCESS), (999, 500, 0), START, noise=QUIET, on_step=told.append)
    assert [(info.index, info.num_steps, info.t) for info in told] == [(0, 3, 999), (1, 3, 500), (2, 3, 0)]
    assert torch.equal(told[-1].x, end)
    assert torch.equal(told[-1].x0, end)
    assert told[0].x0.abs().max() <= 1


def test_a_callback_may_replace_the_state() -> None:
    replacement = torch.full((2, 3), 0.25, dtype=torch.float64)
    end = run(
        denoiser,
        DDIMSampler(PROCESS),
        (999, 0),
        START,
        noise=QUIET,
        on_step=lambda info: replacement if info.index == 1 else None,
    )
    assert torch.equal(end, replacement.float())
    assert end.dtype == torch.float32


@pytest.mark.parametrize("replacement", [torch.zeros(2, 4), 5, "stop"])
def test_a_replacement_of_another_kind_is_refused(replacement) -> None:
    with pytest.raises(InputError, match="on_step returned"):
        run(denoiser, DDIMSampler(PROCESS), (999, 0), START, noise=QUIET, on_step=lambda info: replacement)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_a_replacement_that_is_not_finite_is_refused(value: float) -> None:
    replacement = torch.zeros(2, 3, dtype=torch.float64)
    replacement[1, 2] = value
    with pytest.raises(InputError, match=r"on_step returned a tensor with NaN or infinity in torch\.float32"):
        run(denoiser, DDIMSampler(PROCESS), (999, 0), START, noise=QUIET, on_step=lambda info: replacement)
    with pytest.raises(InputError, match=r"on_step returned .* with values"):
        run(denoiser, DDIMSampler(PROCESS), (999, 0), START, noise=QUIET, on_step=lambda info: START.to("meta"))


def test_a_callback_is_not_blamed_for_what_was_lost_before() -> None:
    lost = run(
        lambda x, t: x * float("nan"),
        DDIMSampler(PROCESS),
        (999, 0),
        START,
        noise=QUIET,
        on_step=lambda info: info.x + 1,
    )
    assert lost.isnan().all()


def test_a_callback_may_cancel() -> None:
    calls: list[int] = []

    def counting(x: Tensor, t: int) -> Tensor:
        calls.append(t)
        return x

    def stop(info: StepInfo) -> None:
        if info.index == 1:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        run(counting, DDIMSampler(PROCESS), (999, 500, 250, 0), START, noise=QUIET, on_step=stop)
    assert calls == [999, 500]


def test_progress_wraps_the_steps() -> None:
    passed: list[tuple[int, int]] = []

    def progress(steps):
        for step in steps:
            yield step
            passed.append(step)

    plain = run(denoiser, DDIMSampler(PROCESS), (999, 500, 0), START, noise=QUIET)
    wrapped = run(denoiser, DDIMSampler(PROCESS), (999, 500, 0), START, noise=QUIET, progress=progress)
    assert passed == [(999, 500), (500, 0), (0, -1)]
    assert torch.equal(plain, wrapped)


def test_the_start_is_left_alone() -> None:
    start = START.clone()
    run(denoiser, AncestralSampler(PROCESS), (999, 0), start, noise=QUIET)
    assert torch.equal(start, START)


@pytest.mark.parametrize("make", [AncestralSampler, DDIMSampler, DPMSolverPlusPlus2MSampler])
@pytest.mark.parametrize("timesteps", [(), (0, 999), (5, 5), (1000, 0), (5, -1), (True, 0), (5.0, 0)])
def test_a_path_that_does_not_descend_is_refused(make, timesteps) -> None:
    with pytest.raises(InputError):
        run(denoiser, make(PROCESS), timesteps, START, noise=QUIET)


def test_long_paths_are_shortened_in_messages() -> None:
    with pytest.raises(InputError, match=r"\(0, 1, 2, 3, 4, 5, 6, 7, …\)"):
        DDIMSampler(PROCESS).steps(tuple(range(100)))


def test_steps_of_the_wrong_direction_are_refused() -> None:
    prediction = PROCESS.predict(START, START, 500)
    for sampler in (AncestralSampler(PROCESS), DDIMSampler(PROCESS), DPMSolverPlusPlus2MSampler(PROCESS)):
        with pytest.raises(InputError, match="next timestep is 600"):
            sampler.step(prediction, START, 500, 600)


@pytest.mark.parametrize("sampler", [AncestralSampler(PROCESS), DDIMSampler(PROCESS, 0.5)])
def test_missing_noise_is_named(sampler) -> None:
    with pytest.raises(InputError, match="from 500 to 400 needs noise"):
        sampler.step(PROCESS.predict(START, START, 500), START, 500, 400)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), True, "0"])
def test_a_bad_eta_is_refused(eta) -> None:
    with pytest.raises(ConfigError, match="eta"):
        DDIMSampler(PROCESS, eta)


@pytest.mark.parametrize("order", [0, 3, True, 1.5, None])
def test_a_bad_order_is_refused(order) -> None:
    with pytest.raises(ConfigError, match="order"):
        DPMSolverPlusPlus2MSampler(PROCESS, order)
