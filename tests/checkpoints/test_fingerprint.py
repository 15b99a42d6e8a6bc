"""Fingerprints of weights: the same in every type, another for other weights, and those of before."""

import pytest
import torch

from unclip.checkpoints.tensor_file import OLD_THRESHOLD, THRESHOLD, _digest, fingerprint, may_be_of


def state():
    generator = torch.Generator().manual_seed(0)
    return {"weight": torch.randn(40, 30, generator=generator), "bias": torch.randn(7, generator=generator)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_rounding_leads_across_the_threshold(dtype):
    steps = torch.tensor([-8.0, -1, 0, 1, 8]) * 2.0**-41
    near = torch.cat([THRESHOLD + steps, torch.tensor([0.0, 1e-9, 3e-8, 5.9e-8, 6e-6, 7e-6, 8e-6, 6e-5])])
    assert ((near.to(dtype).float() > THRESHOLD) == (near > THRESHOLD)).all()
    every = torch.logspace(-12, 0, 20_001)
    assert ((every.to(dtype).float() > THRESHOLD) == (every > THRESHOLD)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_value_that_a_smaller_type_does_not_hold(dtype):
    weights = state()
    weights["bias"][0] = 1e-9
    small = {name: tensor.to(dtype) for name, tensor in weights.items()}
    assert fingerprint([small]) == fingerprint([weights])
    assert may_be_of(fingerprint([weights]), [small])


def test_other_weights():
    weights = state()
    one = fingerprint([weights])
    assert fingerprint([dict(reversed(weights.items()))]) == one
    for other in ({"weight": -weights["weight"]}, {"bias": weights["bias"][:6]}, {"scale": torch.ones(1)}):
        assert fingerprint([weights | other]) != one
        assert not may_be_of(one, [weights | other])
    assert fingerprint([weights, weights]) != one


def test_fingerprints_from_before_are_still_known():
    weights = state()
    weights["bias"][0] = 1e-9
    old = _digest([weights], OLD_THRESHOLD)
    assert old != fingerprint([weights])
    assert may_be_of(old, [weights])
    assert not may_be_of(old, [weights | {"bias": -weights["bias"]}])


def test_what_cannot_be_known_passes():
    away = {name: tensor.to("meta") for name, tensor in state().items()}
    assert fingerprint([away]) == ""
    assert may_be_of(fingerprint([state()]), [away])
    assert may_be_of("", [state()])
