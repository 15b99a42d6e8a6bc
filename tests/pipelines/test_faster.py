"""Settings that leave out a part of the computation, in the calls of the pipelines."""

import inspect

import pytest
import torch

from unclip import UnCLIPImageVariationPipeline, UnCLIPInpaintPipeline, UnCLIPPipeline
from unclip.errors import InputError
from unclip.pipelines.session import FASTER
from unclip.settings import SETTINGS


@pytest.mark.parametrize("kind", [UnCLIPPipeline, UnCLIPImageVariationPipeline, UnCLIPInpaintPipeline])
def test_every_call_has_them_and_is_exact_by_default(kind):
    parameters = inspect.signature(kind.__call__).parameters
    assert {name: parameters[name].default for name in FASTER} == {name: SETTINGS[name].default for name in FASTER}


@pytest.mark.parametrize("setting", [{"decoder_guidance_high": 0.5}, {"decoder_reuse": 2}, {"super_res_reuse": 2}])
def test_each_changes_the_picture(tiny_inpaint, setting):
    steps = {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 4, "super_res_num_inference_steps": 4}
    with torch.no_grad():
        image = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(0)).numpy()
    embedding = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    variation = UnCLIPImageVariationPipeline.from_pipe(tiny_inpaint)
    of_variation = {name: value for name, value in steps.items() if "prior" not in name}
    calls = {
        "generate": lambda **more: UnCLIPPipeline.from_pipe(tiny_inpaint)("a cat", seed=1, **steps, **more),
        "vary": lambda **more: variation(image_embeddings=embedding, seed=1, **of_variation, **more),
        "decode": lambda **more: variation.decode(embedding, seed=1, **of_variation, **more),
        "inpaint": lambda **more: tiny_inpaint("a cat", image, strength=0.9, seed=1, **steps, **more),
    }
    for name, call in calls.items():
        exact, faster = (call(output_type="pt", **more).images for more in ({}, setting))
        assert not torch.equal(exact, faster), name
        assert (exact - faster).abs().mean() < 0.5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"decoder_guidance_low": 0.6, "decoder_guidance_high": 0.5}, "low is 0.6; it must not be above .*high, 0.5"),
        ({"decoder_guidance_low": -0.1}, "decoder_guidance_low is -0.1"),
        ({"decoder_guidance_high": 500}, "decoder_guidance_high is 500"),
        ({"decoder_reuse": 0}, "decoder_reuse is 0"),
        ({"super_res_reuse": 1.5}, "super_res_reuse is 1.5"),
    ],
)
def test_wrong_values(tiny_pipeline, few, setting, message):
    with pytest.raises(InputError, match=message):
        tiny_pipeline("a cat", **few, **setting)
