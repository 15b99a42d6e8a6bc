"""Schedulers of diffusers in a pipeline: converted where unclip has the sampler, otherwise refused with a remedy."""

import json

import diffusers
import pytest
import torch

from unclip import (
    ConfigError,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UnCLIPPipeline,
    UnCLIPScheduler,
)
from unclip.diffusion.foreign import converted, is_foreign

OURS = {
    "UnCLIPScheduler": UnCLIPScheduler,
    "DDPMScheduler": DDPMScheduler,
    "DDPMParallelScheduler": DDPMScheduler,
    "DDIMScheduler": DDIMScheduler,
    "DDIMParallelScheduler": DDIMScheduler,
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
}
OTHERS = [
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "DDIMInverseScheduler",
    "FlowMatchEulerDiscreteScheduler",
]


@pytest.fixture(autouse=True)
def quiet_diffusers():
    """Ignore the log of settings that a class does not have."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(before)


def picture(pipe, few):
    return pipe("a cat", seed=1, output_type="pt", **few).images


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("component", ["prior_scheduler", "decoder_scheduler", "super_res_scheduler"])
def test_a_scheduler_built_from_our_config(own_pipeline, few, name, component):
    """It gives the picture of unclip's own class, built from the same config."""
    config = getattr(own_pipeline, component).config
    theirs = getattr(diffusers, name).from_config(config)
    setattr(own_pipeline, component, OURS[name].from_config(config))
    expected, settings = picture(own_pipeline, few), dict(getattr(own_pipeline, component).config)
    setattr(own_pipeline, component, theirs)
    assert dict(getattr(own_pipeline, component).config) == settings
    assert torch.equal(picture(own_pipeline, few), expected)
    made = UnCLIPPipeline(**own_pipeline.components | {component: theirs})
    assert dict(getattr(made, component).config) == settings
    assert dict(getattr(UnCLIPPipeline.from_pipe(own_pipeline, **{component: theirs}), component).config) == settings


@pytest.mark.parametrize("source", [UnCLIPScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_the_diffusion_process_is_kept(source, name):
    first = source(variance_type="learned_range", prediction_type="v_prediction", beta_schedule="scaled_linear")
    theirs = getattr(diffusers, name).from_config(first.config)
    assert converted(theirs).process == OURS[name].from_config(first.config).process


def steps_of(theirs, ours, num_steps, eta=None):
    """What both make of the same noise with the same network."""
    theirs.set_timesteps(num_steps)
    assert ours.spaced_timesteps(num_steps) == tuple(theirs.timesteps.tolist())
    ours.set_timesteps(num_steps)
    results = []
    for scheduler, more in ((theirs, {} if eta is None else {"eta": eta}), (ours, {})):
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
        generator = torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            output = 0.3 * torch.tanh(x)
            noise = {} if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler) else {"generator": generator}
            x = scheduler.step(output.float(), t, x.float(), **noise, **more).prev_sample.double()
        results.append(x)
    return results


# Not DDIM with "linspace": there diffusers steps to t - 1000 // num_steps, which is not the next timestep.
@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        *(("DDIMScheduler", spacing) for spacing in ("leading", "trailing")),
        *(("DPMSolverMultistepScheduler", spacing) for spacing in ("leading", "linspace", "trailing")),
    ],
)
def test_a_scheduler_of_its_own_settings_takes_the_same_steps(name, spacing):
    clipping = {"clip_sample": False} if name == "DDIMScheduler" else {}
    theirs = getattr(diffusers, name)(timestep_spacing=spacing, beta_schedule="squaredcos_cap_v2", **clipping)
    expected, found = steps_of(theirs, converted(theirs), 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


KANDINSKY = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDIMScheduler", {**KANDINSKY, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}),
        ("DDIMScheduler", {**KANDINSKY, "set_alpha_to_one": False, "clip_sample": False}),
        ("DPMSolverMultistepScheduler", {**KANDINSKY, "timestep_spacing": "leading", "steps_offset": 1}),
        ("DDPMScheduler", {**KANDINSKY, "thresholding": True, "sample_max_value": 2.0}),
        ("DDPMScheduler", {**KANDINSKY, "thresholding": True, "dynamic_thresholding_ratio": 0.7}),
        ("DPMSolverMultistepScheduler", {**KANDINSKY, "thresholding": True, "sample_max_value": 1.5}),
    ],
)
def test_the_settings_of_latent_decoders(name, settings):
    theirs = getattr(diffusers, name)(**settings)
    ours = converted(theirs)
    assert all(ours.config[key] == value for key, value in settings.items())
    expected, found = steps_of(theirs, ours, 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddpm_of_any_spacing_takes_the_same_steps(spacing):
    theirs = diffusers.DDPMScheduler(timestep_spacing=spacing, beta_schedule="squaredcos_cap_v2")
    ours = converted(theirs)
    expected, found = steps_of(theirs, ours, 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_class_without_a_variance_takes_that_of_its_place(own_pipeline, few, name):
    assert own_pipeline.decoder_scheduler.process.learns_variance
    own_pipeline.decoder_scheduler = getattr(diffusers, name)()
    assert own_pipeline.decoder_scheduler.process.learns_variance
    assert own_pipeline.decoder_scheduler.config.beta_schedule == "linear"
    assert picture(own_pipeline, few).isfinite().all()


@pytest.mark.parametrize("name", OTHERS)
def test_a_class_whose_sampler_unclip_does_not_have(own_pipeline, name):
    before = own_pipeline.decoder_scheduler
    theirs = getattr(diffusers, name).from_config(before.config)
    words = rf"'decoder_scheduler': .*diffusers' {name}; .*from unclip import DDIMScheduler.*pipe\.decoder_scheduler"
    with pytest.raises(ConfigError, match=words):
        own_pipeline.decoder_scheduler = theirs
    with pytest.raises(ConfigError, match=words):
        UnCLIPPipeline(**own_pipeline.components | {"decoder_scheduler": theirs})
    assert own_pipeline.decoder_scheduler is before


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("UnCLIPScheduler", {"prediction_type": "flow"}),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}),
        ("DDPMScheduler", {"rescale_betas_zero_snr": True}),
        ("DDPMScheduler", {"steps_offset": 1}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ],
)
def test_a_setting_that_unclip_does_not_implement(own_pipeline, name, setting):
    theirs = getattr(diffusers, name).from_config(own_pipeline.decoder_scheduler.config, **setting)
    with pytest.raises(ConfigError, match=r"'decoder_scheduler': .*; instead: from unclip import"):
        own_pipeline.decoder_scheduler = theirs


def test_what_is_not_a_scheduler(own_pipeline):
    for wrong in ("DDIMScheduler", diffusers.DDIMScheduler, object(), 3):
        assert not is_foreign(wrong)
        with pytest.raises(ConfigError, match="decoder_scheduler"):
            own_pipeline.decoder_scheduler = wrong
    own_pipeline.decoder_scheduler = diffusers.UnCLIPScheduler()
    with pytest.raises(ConfigError, match=r"its scheduler's \(variance_type='fixed_small_log'\)"):
        own_pipeline("a cat")


def test_the_config_is_a_dict_that_cannot_be_changed():
    config = UnCLIPScheduler().config
    before = dict(config)
    for change in (
        lambda: config.update(eta=1),
        lambda: config.pop("clip_sample"),
        lambda: config.setdefault("eta", 1),
        lambda: config.clear(),
        lambda: config.popitem(),
        lambda: config.__delitem__("clip_sample"),
        lambda: config.__ior__({"eta": 1}),
    ):
        with pytest.raises(TypeError, match="from_config"):
            change()
    assert config == before
    assert isinstance(config, dict)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_a_folder_that_names_a_class_of_diffusers(own_pipeline, few, tmp_path, spacing):
    """The reference loads it too: all of its schedulers have the same interface."""
    own_pipeline.save_pretrained(tmp_path / "model")
    theirs = diffusers.DDPMScheduler(timestep_spacing=spacing, beta_schedule="squaredcos_cap_v2")
    theirs.save_pretrained(tmp_path / "model" / "super_res_scheduler")
    index = tmp_path / "model" / "model_index.json"
    entries = json.loads(index.read_text()) | {"super_res_scheduler": ["diffusers", "DDPMScheduler"]}
    index.write_text(json.dumps(entries))
    loaded = UnCLIPPipeline.from_pretrained(tmp_path / "model")
    assert type(loaded.super_res_scheduler) is DDPMScheduler
    own_pipeline.super_res_scheduler = theirs
    assert loaded.super_res_scheduler.config == own_pipeline.super_res_scheduler.config
