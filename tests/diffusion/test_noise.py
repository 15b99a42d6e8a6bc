"""Noise and seeds: the reference's draws, and pictures that do not depend on their batch."""

import pytest
import torch

from unclip.diffusion.loop import NoiseSource, generators_from_seed
from unclip.errors import InputError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_generator_draws_the_whole_batch_at_once() -> None:
    source = NoiseSource(seeded(5), 3)
    reference = seeded(5)
    for _ in range(2):
        assert torch.equal(source.draw((3, 2, 4), "cpu"), torch.randn(3, 2, 4, generator=reference))


def test_a_list_draws_for_one_image_each() -> None:
    source = NoiseSource([seeded(1), seeded(2)], 2)
    first, second = source.draw((2, 3), torch.device("cpu"))
    assert torch.equal(first, torch.randn(1, 3, generator=seeded(1))[0])
    assert torch.equal(second, torch.randn(1, 3, generator=seeded(2))[0])


def test_no_generator_is_torch_s_own() -> None:
    torch.manual_seed(3)
    drawn = NoiseSource(None, 2).draw((2, 2), "cpu")
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.randn(2, 2))


def test_noise_is_float32_under_any_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        for generator in (None, seeded(0), [seeded(0)]):
            assert NoiseSource(generator, 1).draw((1, 2), "cpu").dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_cpu_noise_moves_to_where_it_is_wanted() -> None:
    assert NoiseSource(seeded(0), 2).draw((2, 3), "meta").device.type == "meta"


@pytest.mark.parametrize("generators", [[], [seeded(0)], [seeded(0)] * 3])
def test_a_list_must_have_one_generator_an_image(generators: list[torch.Generator]) -> None:
    with pytest.raises(InputError, match=f"{len(generators)} generators for 2 images"):
        NoiseSource(generators, 2)


@pytest.mark.parametrize("generator", [5, "ab", [None, None], [1, 2]])
def test_what_is_no_generator_is_refused(generator) -> None:
    with pytest.raises(InputError, match=r"torch\.Generator"):
        NoiseSource(generator, 2)


def test_seeds_count_up_and_wrap() -> None:
    assert [one.initial_seed() for one in generators_from_seed(7, 3)] == [7, 8, 9]
    assert [one.initial_seed() for one in generators_from_seed([5, 5, 0], 3)] == [5, 5, 0]
    last = generators_from_seed(2**64 - 1, 2)
    assert torch.equal(torch.rand(3, generator=last[1]), torch.rand(3, generator=seeded(0)))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, float("nan"), True, None, "7", [1, -1], [1, True]])
def test_what_is_no_seed_is_refused(seed) -> None:
    with pytest.raises(InputError, match="seed"):
        generators_from_seed(seed, 2)


def test_there_must_be_one_seed_an_image() -> None:
    with pytest.raises(InputError, match="3 seeds for 2 images"):
        generators_from_seed([1, 2, 3], 2)


def test_branches_are_independent_reproducible_and_leave_the_source_where_it_is():
    def source(seeds):
        return NoiseSource([torch.Generator().manual_seed(seed) for seed in seeds], len(seeds))

    three, five = source([1, 2]), source([1, 2])
    draws = [branch.draw((2, 64), "cpu") for branch in five.branches(5)]
    for own, others in zip(three.branches(3), draws, strict=False):
        assert torch.equal(own.draw((2, 64), "cpu"), others)
    assert torch.equal(five.draw((2, 64), "cpu"), source([1, 2]).draw((2, 64), "cpu"))
    rows = torch.cat([*draws, source([1, 2]).draw((2, 64), "cpu")])
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 0.6
    alone = source([2]).branches(2)[1].draw((1, 64), "cpu")
    assert torch.equal(alone[0], draws[1][1])
    moved = five.branches(1)[0].draw((2, 64), "cpu")
    assert not torch.equal(moved, draws[0])  # of another state
    assert three.branches(0) == []
    shared = NoiseSource(None, 2)
    assert shared.branches(2) == [shared, shared]
