"""Schedulers: settings from anywhere, files, and hand-written loops."""

import copy
import inspect
import json
import pickle
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from unclip.diffusion.loop import NoiseSource, run
from unclip.diffusion.sampler import AncestralSampler, DDIMSampler
from unclip.diffusion.scheduler import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverPlusPlus2MSampler,
    Scheduler,
    SchedulerOutput,
    UnCLIPScheduler,
)
from unclip.errors import ConfigError, InputError, UnclipError

ALL = (UnCLIPScheduler, DDIMScheduler, DPMSolverMultistepScheduler)
X = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
KARLO_DECODER = {
    "_class_name": "UnCLIPScheduler",
    "_diffusers_version": "0.15.0.dev0",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "variance_type": "learned_range",
}


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("name", ["num_train_timesteps", "prediction_type", "beta_schedule", "clip_sample_range"])
def test_defaults_are_the_ecosystem_s(make, name: str) -> None:
    theirs = getattr(diffusers, make.__name__)().config
    if name in theirs:
        assert make().config[name] == theirs[name]


def test_samplers_by_class() -> None:
    assert isinstance(UnCLIPScheduler().sampler(), AncestralSampler)
    assert DDIMScheduler(eta=0.3).sampler() == DDIMSampler(DDIMScheduler().process, 0.3)
    first_order = DPMSolverMultistepScheduler(solver_order=1)
    assert first_order.sampler() == DPMSolverPlusPlus2MSampler(first_order.process, 1)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("source", ALL)
def test_the_process_survives_any_exchange(make, source) -> None:
    first = source(
        num_train_timesteps=500,
        variance_type="learned_range",
        prediction_type="v_prediction",
        clip_sample=True,
        clip_sample_range=5.0,
        beta_schedule="scaled_linear",
        beta_start=0.0002,
        beta_end=0.01,
    )
    assert make.from_config(first.config).process == first.process
    assert make.from_config(dict(first.config)).process == first.process
    back = source.from_config(make.from_config(first.config).config)
    assert back.process == first.process


@pytest.mark.parametrize("make", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_karlo_s_defaults_and_spacing_are_kept(make) -> None:
    # Karlo's file names no beta schedule and no spacing: UnCLIPScheduler's own hold, not the taker's.
    scheduler = make.from_config(KARLO_DECODER)
    assert scheduler.process == UnCLIPScheduler.from_config(KARLO_DECODER).process
    assert scheduler.process.beta_schedule == "squaredcos_cap_v2"
    assert scheduler.process.learns_variance
    assert scheduler.spaced_timesteps(25)[0] == 999
    assert make.from_config(KARLO_DECODER, timestep_spacing="leading").config.timestep_spacing == "leading"
    if make is DDIMScheduler:
        assert scheduler.spaced_timesteps(25) == UnCLIPScheduler().spaced_timesteps(25)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("theirs", [diffusers.UnCLIPScheduler, diffusers.DDIMScheduler])
def test_the_ecosystem_s_configs_are_read(make, theirs) -> None:
    assert make.from_config(dict(theirs().config)).process.num_timesteps == 1000


def test_the_ecosystem_s_dpm_solver_config_is_read() -> None:
    config = dict(diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2").config)
    for make in ALL:
        scheduler = make.from_config({"_class_name": "DPMSolverMultistepScheduler", **config})
        assert scheduler.process.beta_schedule == "squaredcos_cap_v2"
        assert scheduler.process.clip_range is None
        assert scheduler.process.variance_type == "fixed_small_log"


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (UnCLIPScheduler, "thresholding", True),
        (UnCLIPScheduler, "trained_betas", [0.1, 0.2]),
        (DDIMScheduler, "trained_betas", np.array([0.1, 0.2])),
        (UnCLIPScheduler, "rescale_betas_zero_snr", True),
        (DDIMScheduler, "rescale_betas_zero_snr", True),
        (DPMSolverMultistepScheduler, "algorithm_type", "sde-dpmsolver++"),
        (DPMSolverMultistepScheduler, "solver_type", "heun"),
        (DPMSolverMultistepScheduler, "use_karras_sigmas", True),
        (DPMSolverMultistepScheduler, "lambda_min_clipped", -5.1),
        (DPMSolverMultistepScheduler, "final_sigmas_type", "sigma_min"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(make, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"does not implement {name}="):
        make.from_config({name: value})
    with pytest.raises(ConfigError, match=name):
        make(**{name: value})


def test_neutral_and_foreign_settings_are_let_through() -> None:
    UnCLIPScheduler(thresholding=False, sample_max_value=3.0)
    DDIMScheduler(set_alpha_to_one=True, steps_offset=0)
    foreign = {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "solver_order": 3, "_anything": 5}
    DDIMScheduler.from_config(foreign)
    UnCLIPScheduler.from_config({**foreign, "eta": 0.5, "timestep_spacing": "trailing", "set_alpha_to_one": False})


@pytest.mark.parametrize(
    ("make", "overrides", "named"),
    [
        (UnCLIPScheduler, {"timestep_spacing": "trailing"}, "timestep_spacing='trailing'"),
        (UnCLIPScheduler, {"eta": 0.5, "solver_order": 7}, "eta"),
        (UnCLIPScheduler, {"eta": 0.0}, "eta"),  # ancestral sampling is never without noise
        (DDIMScheduler, {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        (DDIMScheduler, {"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        (DDIMScheduler, {"solver_order": 2}, "solver_order=2"),
        (DPMSolverMultistepScheduler, {"eta": 1.0}, "eta=1.0"),
        (DPMSolverMultistepScheduler, {"set_alpha_to_one": False}, "set_alpha_to_one=False"),
        (DDIMScheduler, {"colour": "red"}, "colour"),
        (DDIMScheduler, {"_class_name": "UnCLIPScheduler"}, "_class_name"),
    ],
)
def test_what_a_caller_wrote_does_not_vanish(make, overrides: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        make.from_config(KARLO_DECODER, **overrides)
    UnCLIPScheduler().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=named):
        make.from_pretrained(tmp_path, **overrides)


@pytest.mark.parametrize(
    ("make", "overrides"),
    [
        (UnCLIPScheduler, {"timestep_spacing": "linspace", "solver_order": 1, "use_karras_sigmas": False}),
        (UnCLIPScheduler, {"steps_offset": 0, "set_alpha_to_one": True, "thresholding": False}),
        (DDIMScheduler, {"solver_order": 1, "use_karras_sigmas": False, "flow_shift": 2.0}),
        (DPMSolverMultistepScheduler, {"eta": 0.0, "set_alpha_to_one": True, "variance_type": "learned_range"}),
    ],
)
def test_overrides_that_ask_for_nothing_are_let_through(make, overrides: dict) -> None:
    assert dict(make.from_config(KARLO_DECODER, **overrides).config) == dict(make.from_config(KARLO_DECODER).config)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(
    "settings", [{}, {"variance_type": "learned_range"}, {"prediction_type": "sample", "clip_sample_range": 5.0}]
)
def test_a_config_without_a_class_is_known_by_its_settings(make, settings: dict) -> None:
    config = diffusers.UnCLIPScheduler(**settings).config  # never in a file: it names no class
    assert "_class_name" not in config
    made = make.from_config(config)
    assert made.process == UnCLIPScheduler(**settings).process
    assert make is DPMSolverMultistepScheduler or made.spaced_timesteps(2) == (999, 0)
    ours = {name: value for name, value in UnCLIPScheduler(**settings).config.items() if name != "_class_name"}
    assert make.from_config(ours).config == made.config
    assert make.from_config({name: value for name, value in KARLO_DECODER.items() if name != "_class_name"}).config == (
        make.from_config(KARLO_DECODER).config
    )


def test_settings_of_others_without_a_class_are_not_taken_for_unclip_s() -> None:
    plain = DDIMScheduler()
    for config in (
        {"clip_sample_range": 1.0},  # what a person writes
        {"variance_type": None, "prediction_type": "epsilon"},
        diffusers.DDIMScheduler().config,
        {name: value for name, value in diffusers.DDPMScheduler().config.items() if name != "timestep_spacing"},
    ):
        assert DDIMScheduler.from_config(config).process.beta_schedule == plain.process.beta_schedule
        assert DDIMScheduler.from_config(config).spaced_timesteps(2) == plain.spaced_timesteps(2) == (500, 0)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(
    "bad",
    [
        {"colour": "red"},
        {"prediction_type": "flow"},
        {"variance_type": "learned"},
        {"beta_schedule": "sigmoid"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": "1000"},
        {"clip_sample": "yes"},
        {"clip_sample": 1},
        {"clip_sample": True, "clip_sample_range": -1},
    ],
)
def test_bad_settings_are_refused(make, bad: dict) -> None:
    with pytest.raises(ConfigError):
        make.from_config(bad)
    with pytest.raises(ConfigError):
        make(**bad)


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (DDIMScheduler, {"timestep_spacing": "karras"}),
        (DDIMScheduler, {"eta": 2.0}),
        (DPMSolverMultistepScheduler, {"solver_order": 3}),
        (DPMSolverMultistepScheduler, {"timestep_spacing": None}),
    ],
)
def test_bad_settings_of_one_class_are_refused(make, bad: dict) -> None:
    with pytest.raises(ConfigError):
        make(**bad)


@pytest.mark.parametrize("config", [None, "folder", 5, []])
def test_what_is_no_config_is_refused(config) -> None:
    with pytest.raises(ConfigError, match="configuration"):
        UnCLIPScheduler.from_config(config)


def test_the_config_is_a_frozen_mapping_with_attributes() -> None:
    config = UnCLIPScheduler(clip_sample_range=5.0).config
    assert config.clip_sample_range == config["clip_sample_range"] == 5.0
    assert config._class_name == "UnCLIPScheduler"
    assert "prediction_type" in config
    assert len(config) == len(dict(config))
    assert config.get("steps_offset", 7) == 7
    with pytest.raises(AttributeError, match="from_config"):
        config.clip_sample_range = 1.0
    with pytest.raises(TypeError):
        config["clip_sample_range"] = 1.0  # type: ignore[index]
    with pytest.raises(AttributeError, match="no setting"):
        _ = config.colour
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert "clip_sample_range" in repr(config)


@pytest.mark.parametrize("make", ALL)
def test_schedulers_copy_and_show_themselves(make) -> None:
    scheduler = make(prediction_type="sample")
    assert repr(scheduler).startswith(f"{make.__name__}(")
    assert "prediction_type='sample'" in repr(scheduler)
    assert "_class_name" not in repr(scheduler)
    assert pickle.loads(pickle.dumps(scheduler)).process == scheduler.process
    assert len(scheduler) == 1000
    assert scheduler.order == 1
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.scale_model_input(X, 5) is X


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("subfolder", [None, "decoder_scheduler"])
def test_save_and_load(make, subfolder: str | None, tmp_path: Path) -> None:
    scheduler = make(variance_type="learned_range", prediction_type="v_prediction", clip_sample_range=2.0)
    scheduler.save_pretrained(tmp_path / (subfolder or ""))
    written = json.loads((tmp_path / (subfolder or "") / "scheduler_config.json").read_text())
    assert written["_class_name"] == make.__name__
    assert dict(make.from_pretrained(tmp_path, subfolder).config) == dict(scheduler.config)
    assert UnCLIPScheduler.from_pretrained(str(tmp_path), subfolder).process == scheduler.process
    changed = make.from_pretrained(tmp_path, subfolder, prediction_type="sample")
    assert changed.process.prediction_type == "sample"


def test_the_ecosystem_reads_what_we_save(tmp_path: Path) -> None:
    UnCLIPScheduler.from_config(KARLO_DECODER).save_pretrained(tmp_path)
    theirs = diffusers.UnCLIPScheduler.from_pretrained(tmp_path)
    assert theirs.config.variance_type == "learned_range"
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert set(written) - {"_class_name"} == set(diffusers.UnCLIPScheduler().config) - {"_use_default_values"}


@pytest.mark.parametrize("make", [diffusers.UnCLIPScheduler, diffusers.DDIMScheduler])
def test_we_read_what_the_ecosystem_saves(make, tmp_path: Path) -> None:
    make(prediction_type="sample").save_pretrained(tmp_path)
    for ours in ALL:
        assert ours.from_pretrained(tmp_path).process.prediction_type == "sample"


def test_a_missing_or_escaping_file_is_an_error_of_ours(tmp_path: Path) -> None:
    for subfolder in (None, "decoder_scheduler", "..", "/etc"):
        with pytest.raises(UnclipError):
            UnCLIPScheduler.from_pretrained(tmp_path, subfolder)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("num_steps", [0, -1, 1001, 1.5, float("nan"), True])
def test_a_bad_number_of_steps_is_refused(make, num_steps) -> None:
    scheduler = make()
    with pytest.raises(InputError, match="1000"):
        scheduler.set_timesteps(num_steps)
    assert scheduler.num_inference_steps is None


# Of the ancestral scheduler only where None for prev_timestep leads along the path: see the next test.
@pytest.mark.parametrize(
    ("make", "num_steps"),
    [
        (UnCLIPScheduler, 1),
        (UnCLIPScheduler, 1000),
        *((make, num_steps) for make in (DDIMScheduler, DPMSolverMultistepScheduler) for num_steps in (1, 2, 7, 1000)),
    ],
)
@pytest.mark.parametrize("variance_type", ["fixed_small_log", "learned_range"])
def test_a_hand_written_loop_is_the_loop(make, num_steps: int, variance_type: str) -> None:
    scheduler = make.from_config({**KARLO_DECODER, "variance_type": variance_type})
    copies = 2 if scheduler.process.learns_variance else 1

    def network(x, t):
        return torch.cat([torch.tanh(x)] * copies, dim=1)

    expected = run(
        network,
        scheduler.sampler(),
        scheduler.spaced_timesteps(num_steps),
        X,
        noise=NoiseSource(torch.Generator().manual_seed(1), 2),
    )
    for _ in range(2):  # nothing is left over from the first run
        generator = torch.Generator().manual_seed(1)
        scheduler.set_timesteps(num_steps)
        assert scheduler.num_inference_steps == num_steps
        x = X
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
        assert torch.equal(x, expected)


def test_a_hand_written_ancestral_loop_passes_the_next_timestep() -> None:
    scheduler = UnCLIPScheduler()
    noise = NoiseSource(torch.Generator().manual_seed(1), 2)
    expected = run(lambda x, t: torch.tanh(x), scheduler.sampler(), scheduler.spaced_timesteps(7), X, noise=noise)
    scheduler.set_timesteps(7, device="cpu")
    generator, x = torch.Generator().manual_seed(1), X
    for index, t in enumerate(scheduler.timesteps):
        following = scheduler.timesteps[index + 1] if index < 6 else None
        x = scheduler.step(torch.tanh(x), t, x, prev_timestep=following, generator=generator).prev_sample
    assert torch.equal(x, expected)


def test_a_step_out_of_the_path_forgets_the_one_before() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(10)
    fresh = DPMSolverMultistepScheduler().step(X, 500, X, prev_timestep=400).prev_sample
    scheduler.step(2 * X, 999, X, prev_timestep=899)
    assert torch.equal(scheduler.step(X, 500, X, prev_timestep=400).prev_sample, fresh)
    with pytest.raises(InputError, match="prev_timestep"):
        scheduler.step(X, 501, X)


def test_step_results() -> None:
    scheduler = UnCLIPScheduler()
    output = scheduler.step(X, 500, X, 400)
    assert isinstance(output, SchedulerOutput)
    assert output.prev_sample is output[0]
    plain = scheduler.step(X, 500, X, 400, return_dict=False)
    assert type(plain) is tuple
    assert torch.equal(plain[1], output.pred_original_sample)
    half = scheduler.step(X.to(torch.bfloat16), 500, X.to(torch.bfloat16), 400)
    assert half.prev_sample.dtype == torch.bfloat16
    assert half.pred_original_sample.dtype == torch.float32
    clean = DDIMScheduler().step(X, 5, X, prev_timestep=-7)
    assert torch.equal(clean.prev_sample, clean.pred_original_sample)


def test_eta_of_one_step() -> None:
    scheduler = DDIMScheduler()

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    noisy = scheduler.step(X, 500, X, 0.5, generator=generator(), prev_timestep=400).prev_sample
    setting = DDIMScheduler(eta=0.5).step(X, 500, X, generator=generator(), prev_timestep=400).prev_sample
    assert torch.equal(noisy, setting)
    assert not torch.equal(noisy, scheduler.step(X, 500, X, prev_timestep=400).prev_sample)
    still = DDIMScheduler(eta=0.5).step(X, 500, X, 0.0, prev_timestep=400).prev_sample
    assert torch.equal(still, scheduler.step(X, 500, X, prev_timestep=400).prev_sample)
    with pytest.raises(ConfigError, match="eta"):
        scheduler.step(X, 500, X, eta=2.0, prev_timestep=400)


@pytest.mark.parametrize("make", ALL)
def test_the_order_of_a_step_s_arguments_is_the_ecosystem_s(make) -> None:
    def positional(function) -> list[str]:
        parameters = inspect.signature(function).parameters.values()
        return [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]

    assert positional(make.step) == positional(getattr(diffusers, make.__name__).step)


def test_noise_that_was_drawn_before() -> None:
    scheduler = DDIMScheduler(eta=0.7)
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    drawn = scheduler.step(X, 500, X, generator=torch.Generator().manual_seed(1), prev_timestep=400)
    given = scheduler.step(X, 500, X, variance_noise=noise, prev_timestep=400)
    assert torch.equal(drawn.prev_sample, given.prev_sample)
    with pytest.raises(InputError, match="both"):
        scheduler.step(X, 500, X, generator=torch.Generator(), variance_noise=noise, prev_timestep=400)
    for bad in (noise[:1], noise.long(), 3.0):
        with pytest.raises(InputError, match="variance_noise"):
            scheduler.step(X, 500, X, variance_noise=bad, prev_timestep=400)
    solver = DPMSolverMultistepScheduler()
    plain = solver.step(X, 500, X, prev_timestep=400).prev_sample
    assert torch.equal(solver.step(X, 500, X, torch.Generator(), noise, prev_timestep=400).prev_sample, plain)


def test_noise_that_is_not_of_the_clipped_picture_is_refused() -> None:
    clipping, free = DDIMScheduler(), DDIMScheduler(clip_sample=False)
    with pytest.raises(ConfigError, match="use_clipped_model_output=False"):
        clipping.step(X, 500, X, use_clipped_model_output=False, prev_timestep=400)
    for scheduler, values in ((clipping, (None, True)), (free, (None, True, False))):
        made = [
            scheduler.step(X, 500, X, use_clipped_model_output=value, prev_timestep=400).prev_sample for value in values
        ]
        assert all(torch.equal(one, made[0]) for one in made)


@pytest.mark.parametrize("timestep", [1.0, True, "5", None, torch.tensor(5.0), torch.tensor([1, 2]), 1000, -1])
def test_a_bad_timestep_is_refused(timestep) -> None:
    with pytest.raises(InputError, match="timestep"):
        DDIMScheduler().step(X, timestep, X)


def test_timesteps_cannot_be_replaced() -> None:
    with pytest.raises(AttributeError):
        UnCLIPScheduler().timesteps = torch.tensor([5])  # type: ignore[misc]


def test_the_base_is_not_for_use() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Scheduler()  # type: ignore[abstract]
