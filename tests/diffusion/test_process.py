"""The process: its settings, its reading of outputs, its variances and its loss."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from unclip.diffusion.process import DiffusionProcess, Prediction, PredictionType
from unclip.errors import ConfigError, InputError

SHAPE = (4, 3, 2, 2)


def draws(count: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_timesteps", 0),
        ("num_timesteps", 10**9),
        ("num_timesteps", 2.0),
        ("num_timesteps", True),
        ("beta_schedule", "cosine"),
        ("beta_start", 0.0),
        ("beta_end", 1.0),
        ("beta_end", float("nan")),
        ("beta_end", "0.02"),
        ("prediction_type", "noise"),
        ("prediction_type", None),
        ("variance_type", "learned"),
        ("clip_range", 0.0),
        ("clip_range", -1.0),
        ("clip_range", math.inf),
        ("clip_range", float("nan")),
        ("clip_range", True),
        ("clip_range", "1"),
    ],
)
def test_a_bad_field_is_refused_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        DiffusionProcess(**{field: value})
    assert str(value) in str(caught.value)


def test_a_schedule_that_leaves_no_signal_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves"):
        DiffusionProcess(num_timesteps=10_000, beta_schedule="linear", beta_end=0.02)


@pytest.mark.parametrize("num_steps", [0, -1, 1001, 1.5, float("nan"), True, "25", None])
def test_a_bad_number_of_steps_names_value_and_limit(num_steps) -> None:
    with pytest.raises(InputError) as caught:
        DiffusionProcess().spaced_timesteps(num_steps)
    assert str(num_steps) in str(caught.value)
    assert "1000" in str(caught.value)


@pytest.mark.parametrize("t", [-1, 1000, True, 1.0, torch.tensor([0, 1, 2, 1000]), torch.tensor([-1, 0, 0, 0])])
def test_a_timestep_outside_the_schedule_is_refused(t) -> None:
    process = DiffusionProcess()
    x, noise = draws(2)
    with pytest.raises(InputError, match="999"):
        process.add_noise(x, noise, t)


@pytest.mark.parametrize("t", [torch.tensor([1.0, 2, 3, 4]), torch.tensor([[1], [2], [3], [4]])])
def test_timesteps_that_are_no_batch_of_integers_are_refused(t: Tensor) -> None:
    x, noise = draws(2)
    with pytest.raises(InputError, match="must be integers"):
        DiffusionProcess().add_noise(x, noise, t)


def test_the_number_of_timesteps_must_fit_the_batch() -> None:
    x, noise = draws(2)
    with pytest.raises(InputError, match="2 timesteps for 4 samples"):
        DiffusionProcess().add_noise(x, noise, torch.tensor([1, 2]))


def test_noise_of_another_shape_is_refused() -> None:
    x, noise = draws(2)
    with pytest.raises(InputError, match="shape"):
        DiffusionProcess().add_noise(x, noise[:1], 3)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_an_int_and_a_tensor_say_the_same(prediction_type: str, t: int) -> None:
    process = DiffusionProcess(prediction_type=prediction_type, clip_range=None)
    x0, noise, output = draws(3)
    many = torch.full((4,), t)
    assert torch.allclose(process.add_noise(x0, noise, t), process.add_noise(x0, noise, many))
    assert torch.allclose(process.add_noise(x0, noise, t), process.add_noise(x0, noise, many[:1]))
    assert torch.allclose(process.target(x0, noise, t), process.target(x0, noise, many))
    one, other = process.predict(output, x0, t), process.predict(output, x0, many)
    assert torch.allclose(one.x0, other.x0, rtol=1e-5)
    assert torch.allclose(one.noise, other.noise, rtol=1e-4, atol=1e-4)
    assert process.snr(t) == pytest.approx(process.snr(many)[0].item())
    assert torch.allclose(process.loss(output, x0, noise, x0, t), process.loss(output, x0, noise, x0, many))


def test_targets() -> None:
    x0, noise = draws(2)
    t = 300
    alpha, sigma = DiffusionProcess().tables.alpha[t], DiffusionProcess().tables.sigma[t]
    assert torch.equal(DiffusionProcess(prediction_type="epsilon").target(x0, noise, t), noise)
    assert torch.equal(DiffusionProcess(prediction_type="sample").target(x0, noise, t), x0)
    v = DiffusionProcess(prediction_type="v_prediction").target(x0, noise, t)
    assert torch.allclose(v, alpha * noise - sigma * x0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_float32_whatever_comes_in(dtype: torch.dtype) -> None:
    process = DiffusionProcess(variance_type="learned_range")
    x0, noise, output = (one.to(dtype) for one in draws(3))
    assert process.add_noise(x0, noise, 500).dtype == torch.float32
    assert process.target(x0, noise, 500).dtype == torch.float32
    doubled = torch.cat([output, output], dim=1)
    prediction = process.predict(doubled, x0, 500)
    upcast = process.predict(doubled.float(), x0.float(), 500)
    assert prediction.log_variance is not None
    assert {one.dtype for one in (prediction.x0, prediction.noise, prediction.log_variance)} == {torch.float32}
    assert torch.equal(prediction.x0, upcast.x0)
    assert process.loss(doubled, x0, noise, x0, 500).dtype == torch.float32


def test_tables_first_used_in_inference_mode_still_train() -> None:
    process = DiffusionProcess(num_timesteps=37)
    x0, noise = draws(2)
    t = torch.tensor([0, 5, 10, 36])
    with torch.inference_mode():
        process.add_noise(x0, noise, t)
    output = torch.zeros(SHAPE, requires_grad=True)
    x_t = process.add_noise(x0, noise, t) + output
    process.loss(output * x_t, x0, noise, x_t, t, weighting="min_snr").sum().backward()
    assert output.grad is not None


def test_clipping_moves_the_noise_with_x0() -> None:
    process = DiffusionProcess(clip_range=1.0)
    x_t, output = draws(2)
    prediction = process.predict(output, x_t, 900)
    assert prediction.x0.abs().max() == 1.0
    assert not torch.allclose(prediction.noise, output)
    assert torch.allclose(process.add_noise(prediction.x0, prediction.noise, 900), x_t, atol=1e-6)


@pytest.mark.parametrize("variance_type", ["fixed_small_log", "learned_range"])
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 6, 2, 2), (4, 9, 2, 2), (2, 3, 2, 2), (4, 3, 2), (2, 6, 2, 2)])
def test_only_the_right_output_shape_is_read(variance_type: str, shape: tuple[int, ...]) -> None:
    process = DiffusionProcess(variance_type=variance_type)
    right = (4, 6, 2, 2) if variance_type == "learned_range" else (4, 3, 2, 2)
    if shape == right:
        assert process.predict(torch.zeros(shape), torch.zeros(SHAPE), 5).x0.shape == SHAPE
    else:
        with pytest.raises(InputError) as caught:
            process.predict(torch.zeros(shape), torch.zeros(SHAPE), 5)
        assert str(shape) in str(caught.value)
        assert variance_type in str(caught.value)


def test_the_learned_half_is_the_second() -> None:
    process = DiffusionProcess(variance_type="learned_range", prediction_type="sample", clip_range=None)
    mean, fraction, x_t = draws(3)
    prediction = process.predict(torch.cat([mean, fraction], dim=1), x_t, 5)
    assert torch.equal(prediction.x0, mean)
    assert prediction.log_variance is not None
    assert torch.equal(prediction.log_variance, fraction)


@pytest.mark.parametrize(("t", "t_next"), [(1, 0), (500, 499), (999, 957), (42, 0), (999, 0)])
def test_the_posterior_is_bayes_rule(t: int, t_next: int) -> None:
    # q(x_next | x_t, x0) is proportional to q(x_t | x_next) q(x_next | x0): precisions add.
    process = DiffusionProcess()
    kept, kept_next = process.tables.alphas_cumprod[t], process.tables.alphas_cumprod[t_next]
    step = kept / kept_next
    precision = 1 / (1 - kept_next) + step / (1 - step)
    posterior = process.posterior(t, t_next)
    assert posterior.variance == pytest.approx(1 / precision, rel=1e-9)
    assert posterior.x0_weight == pytest.approx(math.sqrt(kept_next) / (1 - kept_next) / precision, rel=1e-9)
    assert posterior.x_t_weight == pytest.approx(math.sqrt(step) / (1 - step) / precision, rel=1e-9)
    assert posterior.beta == pytest.approx(1 - step)
    if t_next == t - 1:
        assert posterior.beta == pytest.approx(process.tables.betas[t], rel=1e-9)


def test_the_posterior_of_the_clean_sample_is_x0() -> None:
    assert DiffusionProcess().posterior(400, -1)[:3] == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(("t", "t_next"), [(5, 5), (5, 6), (5, -2), (1000, 5), (-1, -2)])
def test_a_step_that_is_none_is_refused(t: int, t_next: int) -> None:
    with pytest.raises(InputError):
        DiffusionProcess().posterior(t, t_next)


def test_log_variances() -> None:
    nothing = Prediction(torch.zeros(1), torch.zeros(1))
    posterior = DiffusionProcess().posterior(500, 480)
    small, large = math.log(posterior.variance), math.log(posterior.beta)
    for variance_type, expected, at_the_end in (
        ("fixed_small_log", small, math.log(1e-20)),
        ("fixed_small", small, -math.inf),
        ("fixed_large", large, math.log(DiffusionProcess().posterior(500, -1).beta)),
    ):
        process = DiffusionProcess(variance_type=variance_type)
        assert process.log_variance(nothing, 500, 480) == pytest.approx(expected)
        assert process.log_variance(nothing, 500, -1) == pytest.approx(at_the_end)
    learned = DiffusionProcess(variance_type="learned_range")
    fraction = Prediction(torch.zeros(3), torch.zeros(3), torch.tensor([-1.0, 0.0, 1.0]))
    got = learned.log_variance(fraction, 500, 480)
    assert isinstance(got, Tensor)
    assert got.tolist() == pytest.approx([small, (small + large) / 2, large], rel=1e-6)
    with pytest.raises(InputError, match="learns its variance"):
        learned.log_variance(nothing, 500, 480)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_the_simple_loss_is_the_mean_squared_error_of_each_sample(prediction_type: str) -> None:
    process = DiffusionProcess(prediction_type=prediction_type)
    x0, noise, output = draws(3)
    t = torch.tensor([0, 10, 500, 999])
    x_t = process.add_noise(x0, noise, t)
    loss = process.loss(output, x0, noise, x_t, t)
    target = process.target(x0, noise, t)
    assert loss.shape == (4,)
    for index in range(4):
        assert loss[index].item() == pytest.approx(torch.nn.functional.mse_loss(output[index], target[index]).item())
    assert torch.equal(process.loss(target, x0, noise, x_t, t), torch.zeros(4))


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_min_snr_weighs_the_error_of_x0(prediction_type: str) -> None:
    process = DiffusionProcess(prediction_type=prediction_type, clip_range=None)
    x0, noise, off = draws(3)
    t = torch.tensor([5, 200, 500, 800])
    x_t = process.add_noise(x0, noise, t)
    output = process.target(x0, noise, t) + 0.1 * off
    error = (process.predict(output, x_t, t).x0 - x0).pow(2).flatten(1).mean(1)
    weight = process.snr(t).clamp(max=5)
    loss = process.loss(output, x0, noise, x_t, t, weighting="min_snr")
    assert torch.allclose(loss, weight * error, rtol=1e-2)


def test_an_unknown_weighting_is_refused() -> None:
    x0, noise, output = draws(3)
    with pytest.raises(InputError, match="'p2'"):
        DiffusionProcess().loss(output, x0, noise, x0, 5, weighting="p2")


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_the_hybrid_loss_is_the_divergence_of_the_posteriors(prediction_type: str) -> None:
    process = DiffusionProcess(prediction_type=prediction_type, variance_type="learned_range", clip_range=1.0)
    x0, noise, off, fraction = draws(4)
    t = torch.tensor([1, 40, 500, 900])
    x_t = process.add_noise(x0, noise, t)
    mean = process.target(x0, noise, t) + 0.1 * off
    fraction = fraction.tanh()
    loss = process.loss(torch.cat([mean, fraction], dim=1), x0, noise, x_t, t)
    plain = DiffusionProcess(prediction_type=prediction_type, clip_range=None)
    simple = plain.loss(mean, x0, noise, x_t, t)
    for index in range(4):
        posterior = process.posterior(int(t[index]), int(t[index]) - 1)
        guess = plain.predict(mean, x_t, t).x0[index].double()
        learned = process.log_variance(
            Prediction(x0, noise, fraction[index].double()), int(t[index]), int(t[index]) - 1
        )
        assert isinstance(learned, Tensor)
        true = Normal(posterior.x0_weight * x0[index].double(), math.sqrt(posterior.variance))
        own = Normal(posterior.x0_weight * guess, torch.exp(0.5 * learned))
        bound = kl_divergence(true, own).mean().item() / math.log(2)
        assert loss[index].item() == pytest.approx(simple[index].item() + 0.001 * 1000 * bound, rel=2e-3)


def test_the_last_term_of_the_bound_is_a_likelihood_of_levels() -> None:
    process = DiffusionProcess(variance_type="learned_range", prediction_type="sample")
    levels = torch.linspace(-1, 1, 256)
    x0 = levels[[0, 100, 254, 255]].view(1, 4)
    guess = x0 + 0.002
    fraction = torch.full_like(x0, 0.5)
    loss = process.loss(torch.cat([guess, fraction], dim=1), x0, x0, x0, 0, vlb_weight=0.001)
    log_variance = 0.75 * process.tables.max_log_variance[0] + 0.25 * process.tables.min_log_variance[0]
    normal = Normal(guess.double(), math.exp(0.5 * log_variance))
    above, below = normal.cdf(x0.double() + 1 / 255), normal.cdf(x0.double() - 1 / 255)
    above[0, 3], below[0, 0] = 1.0, 0.0
    bits = -(above - below).log().mean().item() / math.log(2)
    assert loss.item() == pytest.approx(0.002**2 + bits, rel=1e-3)


def test_the_bound_teaches_the_variance_alone() -> None:
    process = DiffusionProcess(variance_type="learned_range")
    x0, noise, mean = draws(3)
    t = torch.tensor([0, 1, 500, 999])
    x_t = process.add_noise(x0, noise, t)
    output = torch.cat([mean, torch.zeros(SHAPE)], dim=1).requires_grad_()
    process.loss(output, x0, noise, x_t, t).sum().backward()
    plain = mean.clone().requires_grad_()
    DiffusionProcess().loss(plain, x0, noise, x_t, t).sum().backward()
    assert output.grad is not None
    assert plain.grad is not None
    assert torch.allclose(output.grad[:, :3], plain.grad)
    assert output.grad[:, 3:].abs().amax(dim=(1, 2, 3)).min() > 0
    assert torch.isfinite(output.grad).all()


def test_without_its_weight_the_bound_is_left_out() -> None:
    process = DiffusionProcess(variance_type="learned_range")
    x0, noise, mean = draws(3)
    output = torch.cat([mean, mean], dim=1)
    expected = DiffusionProcess().loss(mean, x0, noise, x0, 500)
    assert torch.equal(process.loss(output, x0, noise, x0, 500, vlb_weight=0.0), expected)


def test_processes_are_values() -> None:
    assert DiffusionProcess() == DiffusionProcess()
    assert hash(DiffusionProcess()) == hash(DiffusionProcess())
    with pytest.raises(AttributeError):
        DiffusionProcess().clip_range = 2.0  # type: ignore[misc]


def test_tables_made_under_another_default_device_are_right():
    """`with torch.device("meta")` is how networks are built without memory; a table must not be lost there."""
    process = DiffusionProcess(num_timesteps=997)  # of no other test, so that nothing is kept from one
    with torch.device("meta"):
        alpha = process.tables.on("alpha", torch.device("cpu"))
    assert alpha.device.type == "cpu"
    assert 0.99 < alpha[0] <= 1
