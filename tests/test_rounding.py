"""The bound for comparisons takes other orders of summation, and nothing that is computed less precisely."""

import pytest
import torch

from .rounding import assert_equal_but_rounding


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(40, 300, generator=generator), torch.randn(300, 50, generator=generator)]


def in_parts(x, weight):
    return sum(x[:, start : start + 20] @ weight[start : start + 20] for start in range(0, 300, 20))


def rounded(x, weight):
    return (x.half().float() @ weight.half().float()).half()


def test_another_order_is_taken(operands):
    before = [x.clone() for x in operands]
    difference = assert_equal_but_rounding(in_parts(*operands), lambda: torch.matmul(*operands), operands)
    assert 0 < difference < 1e-4
    assert all(torch.equal(x, kept) for x, kept in zip(operands, before, strict=True))


def test_a_coarser_type_is_taken_only_as_such(operands):
    compared = rounded(*operands), lambda: torch.matmul(*operands), operands
    assert_equal_but_rounding(*compared, dtype=torch.float16)
    with pytest.raises(AssertionError, match="result 0 differs by"):
        assert_equal_but_rounding(*compared)


def test_each_result_has_its_own_bound(operands):
    def results():
        return torch.matmul(*operands), 1e-6 * operands[0]

    got = results()
    got[1][0, 0] += 1e-10
    with pytest.raises(AssertionError, match="result 1 differs by"):
        assert_equal_but_rounding(got, results, operands)


def test_a_normalisation_with_another_epsilon_is_refused():
    norm, x = torch.nn.LayerNorm(16), torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    got = torch.nn.functional.layer_norm(x, (16,), norm.weight, norm.bias, eps=1e-4)
    with pytest.raises(AssertionError, match="differs by"):
        assert_equal_but_rounding(got, lambda: norm(x), [norm, x])
