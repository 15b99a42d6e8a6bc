"""Schedule tables and timesteps, held to numbers worked out apart from the code (math module, exact fractions)."""

import math
from fractions import Fraction

import pytest

from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.schedule import spaced_timesteps, tables
from unclip.errors import ConfigError

COSINE = tables(1000, "squaredcos_cap_v2", 0.0001, 0.02)


def alpha_bar(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def test_cosine_table() -> None:
    # Below the cap the product telescopes: alphas_cumprod[t] = alpha_bar((t + 1) / T) / alpha_bar(0).
    for t in (0, 1, 10, 250, 500, 750, 990, 998):
        assert COSINE.alphas_cumprod[t] == pytest.approx(alpha_bar((t + 1) / 1000) / alpha_bar(0), rel=1e-9)
    assert COSINE.betas[999] == 0.999
    assert COSINE.alphas_cumprod[999] == pytest.approx(COSINE.alphas_cumprod[998] * 0.001, rel=1e-9)


def test_frozen_cosine_values() -> None:
    assert COSINE.betas[0] == pytest.approx(4.128422482196914e-05, rel=1e-11)
    assert COSINE.alphas_cumprod[0] == pytest.approx(0.999958715775178, rel=1e-14)
    assert COSINE.alphas_cumprod[1] == pytest.approx(0.9999125759273678, rel=1e-14)
    assert COSINE.alphas_cumprod[500] == pytest.approx(0.4922851724488026, rel=1e-12)
    assert COSINE.alphas_cumprod[999] == pytest.approx(2.4287669070e-09, rel=1e-9)


def test_linear_tables() -> None:
    linear = tables(1000, "linear", 0.0001, 0.02)
    scaled = tables(1000, "scaled_linear", 0.00085, 0.012)
    for t in (0, 1, 499, 999):
        beta = Fraction(1, 10_000) + (Fraction(2, 100) - Fraction(1, 10_000)) * t / 999
        assert linear.betas[t] == pytest.approx(float(beta), rel=1e-12)
        root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * t / 999
        assert scaled.betas[t] == pytest.approx(root * root, rel=1e-12)
    assert linear.alphas_cumprod[999] == pytest.approx(4.035829765375694e-05, rel=1e-9)
    product = Fraction(1)
    for t in range(50):
        product *= 1 - Fraction(1, 10_000) - Fraction(199, 10_000) * t / 999
    assert linear.alphas_cumprod[49] == pytest.approx(float(product), rel=1e-12)


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_the_other_columns_follow_from_alphas_cumprod(t: int) -> None:
    kept, before, beta = COSINE.alphas_cumprod[t], COSINE.alphas_cumprod[t - 1], COSINE.betas[t]
    assert COSINE.alpha[t] ** 2 == pytest.approx(kept)
    assert COSINE.sigma[t] ** 2 == pytest.approx(1 - kept)
    assert COSINE.snr[t] == pytest.approx(kept / (1 - kept))
    assert COSINE.half_log_snr[t] == pytest.approx(math.log(COSINE.alpha[t] / COSINE.sigma[t]))
    assert COSINE.x0_weight[t] == pytest.approx(math.sqrt(before) * beta / (1 - kept))
    assert math.exp(COSINE.min_log_variance[t]) == pytest.approx(beta * (1 - before) / (1 - kept))
    assert math.exp(COSINE.max_log_variance[t]) == pytest.approx(beta)


def test_the_first_timestep_borrows_the_second_s_posterior_variance() -> None:
    assert COSINE.min_log_variance[0] == COSINE.min_log_variance[1]
    assert COSINE.x0_weight[0] == pytest.approx(1)
    single = tables(1, "linear", 0.1, 0.1)
    assert math.exp(single.min_log_variance[0]) == pytest.approx(0.1)


def test_tables_are_computed_once() -> None:
    assert DiffusionProcess().tables is DiffusionProcess(prediction_type="sample").tables


def test_karlo_s_timesteps() -> None:
    # The default steps of the prior and decoder, and of super-resolution.
    assert DiffusionProcess().spaced_timesteps(25) == (
        *(999, 957, 916, 874, 832, 791, 749, 708, 666, 624, 583, 541, 500),
        *(458, 416, 375, 333, 291, 250, 208, 166, 125, 83, 42, 0),
    )
    assert DiffusionProcess().spaced_timesteps(7) == (999, 832, 666, 500, 333, 166, 0)
    assert DiffusionProcess().spaced_timesteps(1) == (999,)
    assert DiffusionProcess().spaced_timesteps(2) == (999, 0)
    assert DiffusionProcess(num_timesteps=1).spaced_timesteps(1) == (0,)


@pytest.mark.parametrize(
    ("spacing", "includes_zero", "expected"),
    [
        ("linspace", True, (9, 6, 3, 0)),
        ("linspace", False, (9, 7, 4, 2)),
        ("leading", True, (6, 4, 2, 0)),
        ("leading", False, (8, 6, 4, 2)),
        ("trailing", True, (9, 7, 4, 1)),
        ("trailing", False, (9, 7, 4, 1)),
    ],
)
def test_spacings(spacing: str, includes_zero: bool, expected: tuple[int, ...]) -> None:
    assert spaced_timesteps(10, 4, spacing, includes_zero=includes_zero) == expected
    assert spaced_timesteps(10, 10, spacing, includes_zero=includes_zero) == tuple(range(9, -1, -1))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="'karras'"):
        spaced_timesteps(10, 4, "karras")
    with pytest.raises(ConfigError, match="'sigmoid'"):
        tables(1000, "sigmoid", 0.0001, 0.02)
