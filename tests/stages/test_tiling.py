"""Tiles: their places and weights, and that a tiled picture equals a whole one where it should."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from unclip import InputError
from unclip.diffusion.loop import NoiseSource, generators_from_seed
from unclip.diffusion.process import DiffusionProcess
from unclip.diffusion.sampler import AncestralSampler
from unclip.stages.stage import SuperResCondition, sample
from unclip.stages.super_res import SuperResStage, Tiling, tiled


@pytest.mark.parametrize(
    ("size", "starts"), [(10, [0]), (32, [0]), (33, [0, 1]), (56, [0, 24]), (57, [0, 24, 25]), (80, [0, 24, 48])]
)
def test_tiles_cover_a_side(size, starts):
    assert Tiling(32, 8).starts(size) == starts


@pytest.mark.parametrize("size", [20, 33, 56, 70, 97])
@pytest.mark.parametrize("overlap", [1, 2, 5, 8, 16])
def test_weights_sum_to_1_in_overlaps_and_are_positive_everywhere(size, overlap):
    tiling = Tiling(32, overlap)
    total = torch.zeros(size)
    for start in tiling.starts(size):
        weights = tiling.weights(start, size)
        assert weights.min() >= 0
        assert weights.max() <= 1
        total[start : start + 32] += weights
    assert total.min() > 0.99
    if size == 56 and overlap == 8:
        torch.testing.assert_close(total, torch.ones(size))


def test_a_tile_fades_only_towards_its_neighbours():
    tiling = Tiling(32, 8)
    first, middle = tiling.weights(0, 80), tiling.weights(24, 80)
    assert (first[:24] == 1).all()
    assert (middle[:2] == 0).all()  # its border's quarter counts for nothing
    assert (middle[2:6].diff() > 0).all()
    torch.testing.assert_close(middle, middle.flip(0))


class Sharp(nn.Module):
    """A network of receptive field 2 px: two 3×3 convolutions with zero padding that depend on the timestep."""

    dtype = torch.float32
    config = SimpleNamespace(sample_size=64, in_channels=6, num_levels=1)

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.randn(8, 6, 3, 3, generator=generator) / 7
        self.second = torch.randn(3, 8, 3, 3, generator=generator) / 7
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x, t):
        self.shapes.append(tuple(x.shape[2:]))
        hidden = torch.conv2d(x, self.first, padding=1).relu() + t / 1000
        return SimpleNamespace(sample=torch.conv2d(hidden, self.second, padding=1))


def draw(network, tiling, size):
    stage = SuperResStage(network, network, DiffusionProcess(prediction_type="v_prediction"), size, tiling)
    low_res = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return sample(
        stage,
        SuperResCondition(low_res),
        sampler=AncestralSampler(stage.process),
        timesteps=(600, 300, 100, 0),
        noise=NoiseSource(generators_from_seed(3, 2), 2),
    )


@pytest.mark.parametrize("size", [(64, 96), (61, 50), (20, 96), (32, 32)])
def test_tiles_change_nothing_for_a_receptive_field_of_a_quarter_of_the_overlap(size):
    """After all steps only rounding differs (receptive field 2 px, overlap 8 px)."""
    whole, parts = Sharp(), Sharp()
    expected, result = draw(whole, None, size), draw(parts, Tiling(32, 8), size)
    assert expected.std() > 0.1
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)
    assert set(whole.shapes) == {size}
    assert all(max(shape) <= 32 for shape in parts.shapes)
    assert set(parts.shapes) == {(min(32, size[0]), min(32, size[1]))}


def test_borders_show_when_the_overlap_is_too_small():
    """The same network with tiles that only touch, which shows that the test above can fail."""
    expected, result = draw(Sharp(), None, (64, 64)), draw(Sharp(), Tiling(32, 1), (64, 64))
    assert (result - expected).abs().max() > 0.02


def test_a_network_with_a_large_receptive_field_has_no_visible_border():
    """Tiles that return their own mean (as with group normalisation) have no step at their borders."""
    ramp = torch.linspace(-1, 1, 96).expand(1, 1, 32, 96)
    result = tiled(lambda part: part.mean((2, 3), keepdim=True).expand_as(part), ramp, Tiling(32, 16))
    steps = result.diff(dim=3).abs()
    between_means = 16 / 96 * 2
    assert steps.max() < 1.2 * between_means / 8  # spread over the middle half of the overlap
    assert result[0, 0, 0, 0] == pytest.approx(ramp[..., :32].mean().item())


def test_memory_is_that_of_a_tile():
    """The network's input is limited by the tile, for pictures of any size."""
    seen = []

    @dataclass
    class Watching:
        sizes: list[int] = field(default_factory=list)

        def __call__(self, part):
            self.sizes.append(part.numel())
            return part

    for size in (64, 256):
        network = Watching()
        x = torch.randn(1, 3, size, size)
        torch.testing.assert_close(tiled(network, x, Tiling(32, 8)), x)
        seen.append(max(network.sizes))
    assert seen == [3 * 32 * 32] * 2


@pytest.mark.parametrize("sizes", [(0, 8), (32, 0), (32.0, 8), (True, 1), (32, 17), ("32", 8)])
def test_invalid_sizes(sizes):
    with pytest.raises(InputError):
        Tiling(*sizes)


@pytest.mark.parametrize("sizes", [(30, 8), (32, 6)])
def test_sizes_that_no_network_can_halve(sizes):
    with pytest.raises(InputError, match="must be multiples of 4"):
        Tiling(*sizes).check_multiple(4)
