"""Settings that leave out a part of the computation, in the calls of the pipelines."""

import inspect
import json

import pytest
import torch

from unclip import UnCLIPImageVariationPipeline, UnCLIPInpaintPipeline, UnCLIPPipeline
from unclip.errors import ConfigError, InputError
from unclip.pipelines.samplers import sampler_name, sampler_switch
from unclip.pipelines.session import FASTER, Compute, Session
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


def test_compiled_networks_without_graph_breaks(own_pipeline):
    steps = {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 3, "super_res_num_inference_steps": 4}

    def draw():
        return own_pipeline("a cat", seed=1, output_type="pt", **steps, decoder_reuse=2, super_res_reuse=2).images

    plain = draw()
    for name in ("decoder", "super_res_first"):
        setattr(own_pipeline, name, torch.compile(own_pipeline.networks[name], backend="eager", fullgraph=True))
    torch.testing.assert_close(draw(), plain)


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


# ---- presets ----

PRESETS = {
    "decoder_num_inference_steps": 4,
    "prior_num_inference_steps": 2,
    "super_res_num_inference_steps": 2,
    "presets": {"fast": {"decoder_reuse": 2, "decoder_num_inference_steps": 3, "sampler": "ddim"}, "plain": {}},
}


@pytest.fixture
def folder(tiny_inpaint, tmp_path):
    tiny_inpaint.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_defaults.json").write_text(json.dumps(PRESETS))
    return tmp_path / "model"


def test_a_call_with_a_preset(folder):
    pipe = UnCLIPPipeline.from_pretrained(folder)
    seen = []

    def draw(**more):
        told = lambda pipe, *rest: seen.append(sampler_name(pipe))  # noqa: E731
        return pipe("a cat", seed=1, output_type="pt", callback_on_step_end=told, **more).images

    exact = draw(preset="exact")
    assert torch.equal(exact, draw(**pipe.recommended))
    assert torch.equal(exact, draw(preset="plain"))
    assert set(seen) == {"ancestral"}
    fast = draw(preset="fast")
    assert seen[-1] == "ddim"
    assert sampler_name(pipe) == "ancestral"
    values = {"decoder_reuse": 2, "decoder_num_inference_steps": 3}
    assert torch.equal(draw(preset="fast", **values), fast)
    overridden = draw(preset="fast", decoder_reuse=1)
    assert not torch.equal(overridden, fast)
    sampler_switch(pipe)("ddim")
    assert torch.equal(fast, draw(**pipe.recommended | values))
    assert torch.equal(overridden, draw(**pipe.recommended | values | {"decoder_reuse": 1}))
    with pytest.raises(InputError, match="preset is 'slow'; this model has exact, fast, plain"):
        draw(preset="slow")


def test_presets_are_kept(folder, tmp_path):
    pipe = UnCLIPPipeline.from_pretrained(folder)
    assert pipe.presets["fast"] == pipe.recommended | PRESETS["presets"]["fast"]
    pipe.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_defaults.json").read_text()) == PRESETS
    variation = UnCLIPImageVariationPipeline.from_pipe(pipe)
    assert variation.presets["fast"] == {
        name: value for name, value in pipe.presets["fast"].items() if "prior" not in name
    }


def test_a_session_with_a_preset(folder):
    session = Session(str(folder), Compute(device="cpu"), preset="fast", progress=False)
    given = {"decoder_num_inference_steps": None, "decoder_reuse": None, "decoder_guidance_scale": 2.0}
    assert session.settings(UnCLIPPipeline, given) == {
        "decoder_num_inference_steps": 3, "decoder_reuse": 2, "decoder_guidance_scale": 2.0
    }  # fmt: skip
    assert session.settings(UnCLIPPipeline, given, "exact")["decoder_num_inference_steps"] == 4
    assert sampler_name(session.pipeline(UnCLIPPipeline)) == "ddim"
    own = Session(str(folder), Compute(device="cpu"), preset="fast", sampler="dpm", progress=False)
    assert sampler_name(own.pipeline(UnCLIPPipeline)) == "dpm"
    with pytest.raises(InputError, match="preset is 'faster'; this model has exact, fast, plain"):
        Session(str(folder), preset="faster")


@pytest.mark.parametrize(
    ("presets", "message"),
    [
        (3, "presets must be"),
        ({"exact": {}}, "is not 'exact'"),
        ({"Fast": {}}, "small letters"),
        ({"fast": 1}, "presets must be"),
        ({"fast": {"sampler": "euler"}}, "fast has the sampler 'euler'"),
        ({"fast": {"steps": 2}}, "fast has the unknown key 'steps'"),
        ({"fast": {"decoder_reuse": 0}}, "decoder_reuse is 0"),
    ],
)
def test_broken_presets(folder, presets, message):
    (folder / "generation_defaults.json").write_text(json.dumps({"presets": presets}))
    with pytest.raises(ConfigError, match=message):
        UnCLIPPipeline.from_pretrained(folder)
