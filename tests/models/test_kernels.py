"""Ways of computing that PyTorch's own functions must agree with."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unclip.models import kernels
from unclip.models.kernels import MIN_PIXELS_TO_MERGE_WEIGHTS, Conv2d
from unclip.models.layers import ResnetBlock

from ..rounding import TIMES, assert_equal_but_rounding


def enlarged_then_convolved(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    enlarged = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.conv2d(enlarged, conv.weight, conv.bias, padding=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 32, 16), (3, 7, 31), (1, 2, 3), (512, 1, 1)])
def test_a_convolution_of_a_doubled_picture_is_that_of_the_enlarged_one(shape, layout, bias):
    batch, height, width = shape
    torch.manual_seed(0)
    conv = Conv2d(6, 5, 3, padding=1, bias=bias).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    x = torch.randn(batch, 6, height, width).to(memory_format=layout).requires_grad_()
    toward = torch.randn(batch, 5, 2 * height, 2 * width)

    def with_gradients(result):
        return (result, *torch.autograd.grad(result, (x, *conv.parameters()), toward))

    ours = with_gradients(conv(x, doubled=True))
    assert_equal_but_rounding(
        ours,
        lambda: with_gradients(enlarged_then_convolved(conv, x)),
        [conv, x, toward],
        # A gradient of the weights is a sum over all pixels; added one by one, n numbers lose √n units.
        times=max(TIMES, toward[:, 0].numel() ** 0.5),
    )


def transposed_calls(monkeypatch) -> list[tuple]:
    calls = []

    def counted(*args, **settings):
        calls.append(args)
        return F_CONV_TRANSPOSE(*args, **settings)

    monkeypatch.setattr(kernels.F, "conv_transpose2d", counted)
    return calls


F_CONV_TRANSPOSE = F.conv_transpose2d


def test_few_pixels_and_other_types_take_the_plain_way(monkeypatch):
    calls = transposed_calls(monkeypatch)
    conv = Conv2d(4, 4, 3, padding=1)
    side = int(MIN_PIXELS_TO_MERGE_WEIGHTS**0.5)
    conv(torch.randn(1, 4, side, side), doubled=True)
    assert not calls
    large = torch.randn(1, 4, side + 1, side + 1)
    conv.double()(large.double(), doubled=True)
    assert not calls
    conv.float()(large, doubled=True)
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        conv(large, doubled=True)
    assert len(calls) == 1


def test_a_half_type_that_is_emulated_is_doubled_in_float32(monkeypatch):
    calls = transposed_calls(monkeypatch)
    monkeypatch.setattr(kernels, "_cpu_computes", lambda _: False)
    conv = Conv2d(4, 4, 3, padding=1).bfloat16()
    x = torch.randn(1, 4, 32, 32).bfloat16()
    doubled = conv(x, doubled=True)
    assert doubled.dtype == torch.bfloat16
    assert [args[0].dtype for args in calls] == [torch.float32]
    exact = enlarged_then_convolved(conv.float(), x.float())
    assert (doubled.float() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_a_block_whose_convolution_is_wrapped_enlarges_first():
    block = ResnetBlock(
        4, 4, embedding_width=6, num_groups=2, eps=1e-5, act_fn="silu", dropout=0.0, scale_shift=True, resample="up"
    )
    x, embedding = torch.randn(1, 4, 32, 32), torch.randn(1, 6)
    before = block(x, embedding)
    block.conv1 = nn.Sequential(block.conv1)  # type: ignore[assignment]
    assert_equal_but_rounding(before, lambda: block(x, embedding), [block])
