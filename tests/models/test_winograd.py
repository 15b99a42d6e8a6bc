"""Convolutions by minimal filtering: the plain ones' results and gradients, taken only where they pay."""

import pytest
import torch
import torch.nn.functional as F

from unclip.models import kernels
from unclip.models.kernels import Conv2d

from ..rounding import TIMES, assert_equal_but_rounding

WIDE = kernels.MIN_CHANNELS


def loss() -> float:
    """How many times as much as a plain convolution the transforms lose, at the pixel where they lose most.

    Each of a tile's 36 products is rounded relative to its own size, which for inputs and weights of unit variance is
    the squared norm of its transforms' rows. The output's transform adds them to a sum of nine products. Both axes are
    alike: the square of one axis's variance, and then the root.
    """
    inputs, weights, outputs = (torch.tensor(rows).square() for rows in (kernels.INPUT, kernels.WEIGHT, kernels.OUTPUT))
    products = inputs.sum(1) * weights.sum(1)
    return float((outputs.float() @ products).max() / 3)


def with_gradients(convolution, given, toward=None):
    """Its result from `given`, and the gradients of all of them, of the sum of squares unless told `toward`."""
    result = convolution(*given)
    return (result, *torch.autograd.grad(result, given, 2 * result.detach() if toward is None else toward))


def plain(*given):
    return F.conv2d(*given, padding=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 12), (2, 16, 4)])
def test_results_and_gradients_are_the_plain_ones(shape, layout, bias):
    batch, height, width = shape
    torch.manual_seed(0)
    x = torch.randn(batch, 6, height, width).to(memory_format=layout).requires_grad_()
    weight = torch.randn(5, 6, 3, 3).to(memory_format=layout).requires_grad_()
    given = (x, weight, torch.randn(5, requires_grad=True)) if bias else (x, weight)
    toward = torch.randn(batch, 5, height, width)
    ours = with_gradients(lambda *given: kernels.convolution(*given, *([] if bias else [None])), given, toward)
    assert_equal_but_rounding(
        ours, lambda: with_gradients(plain, given, toward), [*given, toward], times=TIMES * loss()
    )


def test_a_batch_in_chunks_is_the_batch_at_once(monkeypatch):
    torch.manual_seed(0)
    given = torch.randn(5, 6, 8, 8, requires_grad=True), torch.randn(7, 6, 3, 3, requires_grad=True)

    def ours():
        return with_gradients(lambda *given: kernels.convolution(*given, None), given)

    at_once = ours()
    monkeypatch.setattr(kernels, "MAX_CHUNK_BYTES", 2 * 4 * 36 * 4 * 7)  # two of the five pictures
    for found in (at_once, ours()):
        assert_equal_but_rounding(found, lambda: with_gradients(plain, given), [*given], times=TIMES * loss())


def test_a_gradient_that_is_a_slice_or_expanded_is_taken():
    x, weight = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(4, 4, 3, 3)
    for reduce in (torch.sum, lambda y: (torch.cat([y, y], 1) ** 2).sum()):
        (got,) = torch.autograd.grad(reduce(kernels.convolution(x, weight, None)), x)
        assert_equal_but_rounding(
            got,
            lambda reduce=reduce: torch.autograd.grad(reduce(plain(x, weight)), x),
            [x, weight],
            times=TIMES * loss(),
        )


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_only_the_gradient_asked_for_is_computed(frozen):
    x = torch.randn(1, 4, 8, 8, requires_grad=frozen != "input")
    weight = torch.randn(4, 4, 3, 3, requires_grad=frozen != "weight")
    kernels.convolution(x, weight, None).sum().backward()
    assert (x.grad is None) == (frozen == "input")
    assert (weight.grad is None) == (frozen == "weight")


def test_a_layer_takes_it_in_training_and_only_there(monkeypatch):
    calls = []
    monkeypatch.setattr(
        kernels, "convolution", lambda *given: calls.append(given[0].shape) or F.conv2d(*given, padding=1)
    )
    conv = Conv2d(WIDE, WIDE, 3, padding=1)
    x = torch.randn(4, WIDE, 16, 16)
    conv(x)
    assert calls == [(4, WIDE, 16, 16)]
    conv(x[:1, :, :, :], doubled=True)
    assert calls[1:] == [(1, WIDE, 32, 32)]
    with torch.no_grad():
        conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        conv(x)
    conv(x[:3])  # few pixels
    conv(x[:, :, :, :15].repeat(2, 1, 1, 1))  # no multiple of 4
    Conv2d(WIDE - 1, WIDE, 3, padding=1)(x[:, 1:])  # narrow
    Conv2d(WIDE, WIDE, 3, padding=1, stride=2)(x)
    Conv2d(WIDE, WIDE, 1)(x)
    conv.double()(x.double())
    assert len(calls) == 2
    conv.float().requires_grad_(False)(x)  # nothing to learn
    assert len(calls) == 2
    conv(x.requires_grad_())
    assert len(calls) == 3


def test_training_steps_by_either_way_stay_together(monkeypatch):
    """Ten steps of the same small network: the losses agree far beyond what the steps change."""

    def losses(min_channels: int) -> list[float]:
        monkeypatch.setattr(kernels, "MIN_CHANNELS", min_channels)
        torch.manual_seed(0)
        network = torch.nn.Sequential(Conv2d(8, 8, 3, padding=1), torch.nn.SiLU(), Conv2d(8, 8, 3, padding=1))
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        x, target = torch.randn(2, 16, 8, 32, 32)
        made = []
        for _ in range(10):
            loss = F.mse_loss(network(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            made.append(loss.item())
        return made

    ours, plain = losses(8), losses(9)
    assert plain[-1] < 0.98 * plain[0]
    assert ours == pytest.approx(plain, rel=1e-4)
