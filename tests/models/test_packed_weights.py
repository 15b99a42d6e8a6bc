"""Layers with packed weights compute what PyTorch's layers do, and change nothing where they do not apply."""

import pytest
import torch
import torch.nn.functional as F

from unclip.models.kernels import Conv2d, GroupNorm, Linear, _packed, packed_weights
from unclip.models.layers import ResnetBlock


def layers_packed():
    return sum(run is not None for _, run in _packed.get().runs.values())


def errors(layer, x, reference, **how):
    """The largest differences from float64, with and without packing, as shares of the largest value."""
    with torch.no_grad():
        plain = layer(x, **how)
        with packed_weights(25):
            packed, again = layer(x, **how), layer(x, **how)
            count = layers_packed()
    assert torch.equal(packed, again)
    scale = reference.abs().max()
    return *(((each.double() - reference).abs().max() / scale).item() for each in (packed, plain)), count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype, bias):
    torch.manual_seed(0)
    layer, x = Linear(96, 160, bias=bias).to(dtype), torch.randn(3, 5, 96).to(dtype)
    own = None if layer.bias is None else layer.bias.double()
    packed, plain, count = errors(layer, x, F.linear(x.double(), layer.weight.double(), own))
    assert count == (dtype == torch.float32)
    assert packed <= 4 * plain + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "settings"), [(3, {"padding": 1}), (1, {}), (3, {"padding": 1, "stride": 2})])
@pytest.mark.parametrize("doubled", [False, True])
def test_convolution(dtype, size, settings, doubled):
    if doubled and (size == 1 or "stride" in settings):
        pytest.skip("only plain 3×3 layers double their input")
    torch.manual_seed(0)
    layer = Conv2d(24, 40, size, **settings).to(dtype).to(memory_format=torch.channels_last)
    x = torch.randn(2, 24, 12, 12).to(dtype).contiguous(memory_format=torch.channels_last)
    wide = F.interpolate(x.double(), scale_factor=2.0, mode="nearest") if doubled else x.double()
    reference = F.conv2d(wide, layer.weight.double(), layer.bias.double(), **settings)
    packed, plain, count = errors(layer, x, reference, **({"doubled": True} if doubled else {}))
    assert count == (torch.ops.mkldnn._is_mkldnn_bf16_supported() or dtype == torch.float32)
    assert packed <= 4 * plain + torch.finfo(dtype).eps


@pytest.mark.parametrize("doubled", [False, True])
def test_many_pixels_of_float32_become_a_winograd_convolution(doubled):
    torch.manual_seed(0)
    layer = Conv2d(128, 136, 3, padding=1)
    x = torch.randn(2, 128, 32, 64)
    wide = F.interpolate(x, scale_factor=2.0, mode="nearest") if doubled else x
    reference = F.conv2d(wide.double(), layer.weight.double(), layer.bias.double(), padding=1)
    packed, _, count = errors(layer, x, reference, doubled=doubled)
    assert count == 1
    assert packed < 64 * torch.finfo(torch.float32).eps * 36**0.5  # its transforms amplify rounding


def test_changed_weights_are_not_packed_ones():
    layer, x = Linear(8, 8), torch.randn(2, 8)
    with torch.no_grad(), packed_weights(25):
        layer(x)
        assert layers_packed() == 1
        layer.weight.data = torch.zeros(8, 8)
        layer.bias.zero_()
        assert layer(x).eq(0).all()


def test_gradients_and_few_calls_need_plain_weights():
    layer, x = Linear(8, 8), torch.randn(2, 8)
    with packed_weights(25):
        layer(x).sum().backward()
        assert not _packed.get().runs
    with torch.no_grad(), packed_weights(2):
        layer(x)
        assert not layers_packed()
    assert layer.weight.grad is not None
    assert _packed.get() is None


def test_a_hook_sees_what_a_layer_returned():
    torch.manual_seed(0)
    block = ResnetBlock(
        8, 8, embedding_width=4, num_groups=2, eps=1e-5, act_fn="silu", dropout=0.0, scale_shift=True
    ).eval()
    x, embedding, seen = torch.randn(1, 8, 4, 4), torch.randn(1, 4), {}
    with torch.no_grad():
        free = block(x, embedding)
        for name in ("norm1", "norm2", "conv2"):
            layer = getattr(block, name)
            layer.register_forward_hook(
                lambda _, inputs, output, name=name: seen.update({name: (output, output.clone())})
            )
        hooked = block(x, embedding)
    torch.testing.assert_close(hooked, free)
    assert len(seen) == 3
    assert all(torch.equal(output, copy) for output, copy in seen.values())


@pytest.mark.parametrize("side", [8, 32])
def test_normalisation_of_half_types(side):
    torch.manual_seed(0)
    norm, x = GroupNorm(4, 16).to(torch.bfloat16), torch.randn(2, 16, side, side).to(torch.bfloat16)
    reference = F.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), norm.eps)
    with torch.no_grad():
        assert (norm(x).double() - reference).abs().max() < 4 * torch.finfo(torch.bfloat16).eps
