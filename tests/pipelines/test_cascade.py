"""Pipelines with several super-resolution stages, other picture sizes, and tiles."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import (
    ConfigError,
    InputError,
    UnCLIPImageVariationPipeline,
    UnCLIPInpaintPipeline,
    UnCLIPPipeline,
    UnCLIPScheduler,
    UNet2DModel,
)
from unclip.errors import CheckpointError, MissingFileError
from unclip.pipelines.cascade import fitted_size
from unclip.pipelines.convert import convert_text_to_image_to_variation

CLOSE = {"rtol": 0, "atol": 1e-5}
NOISY = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def third(tiny_configs):
    """A third stage, 16 → 32 px, on the paper's linear schedule, with one network for all steps."""
    generator = torch.Generator().manual_seed(9)
    network = UNet2DModel(**tiny_configs["super_res"] | {"sample_size": 32}).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + float(parameter.dim() == 1))
    return {"super_res_2_first": network, "super_res_2_scheduler": UnCLIPScheduler(beta_schedule="linear")}


@pytest.fixture(scope="module")
def large(tiny_pipeline, third):
    return quiet(UnCLIPPipeline(**tiny_pipeline.components, **third))


@pytest.fixture
def draw(large, few):
    def run(pipe=large, **arguments):
        return pipe("a cat", **{"seed": 1, "output_type": "pt", **few, **arguments}).images

    return run


# ---- a further stage ----


def test_a_third_stage_enlarges_what_the_second_made(draw, make, large, third):
    picture = draw()
    assert picture.shape == (1, 3, 32, 32)
    changed = quiet(UnCLIPPipeline.from_pipe(large, super_res_2_scheduler=UnCLIPScheduler()))
    assert not torch.equal(picture, draw(changed))
    told = {}

    def callback(pipeline, step, timestep, about):
        told[about["stage"]] = about["x0"]

    draw(callback_on_step_end=callback)
    assert list(told) == ["prior", "decoder", "super_res", "super_res_2"]
    torch.testing.assert_close(told["super_res"] * 0.5 + 0.5, make("a cat", seed=1), **CLOSE)


def test_steps_are_for_each_stage(large, few):
    told = []
    steps = few | {"super_res_num_inference_steps": [2, 4]}
    large("a cat", seed=1, callback_on_step_end=lambda *given: told.append(given[3]["stage"]), **steps)
    assert (told.count("super_res"), told.count("super_res_2")) == (2, 4)
    told.clear()
    large("a cat", callback_on_step_end=lambda *given: told.append(given[3]["stage"]), **few)
    assert (told.count("super_res"), told.count("super_res_2")) == (2, 2)


def test_latents_are_for_each_stage(draw):
    steps = {"super_res_num_inference_steps": 1}
    first, second = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 32, 32)
    given = draw(super_res_latents=[first, second], **steps)
    assert not torch.equal(given, draw(super_res_latents=[first, second + 1], **steps))
    assert not torch.equal(given, draw(super_res_latents=[first + 1, second], **steps))
    assert torch.equal(draw(super_res_latents=first), draw(super_res_latents=[first, None]))
    with pytest.raises(InputError, match=r"super_res_2_latents have shape \(1, 3, 16, 16\)"):
        draw(super_res_latents=[first, first])
    with pytest.raises(InputError, match="super_res_latents has 3 values for 2"):
        draw(super_res_latents=[first, second, second])


def test_a_last_network_of_its_own(draw, large, tiny_configs, third):
    last = UNet2DModel(**tiny_configs["super_res"] | {"sample_size": 32}).eval()
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.zero_()
        last.conv_out.bias.fill_(0.25)
    own = quiet(UnCLIPPipeline.from_pipe(large, super_res_2_last=last))
    assert own.cascade["super_res_2"].last is last
    assert large.cascade["super_res_2"].last is third["super_res_2_first"]
    assert not torch.equal(draw(own), draw())


def test_variations_and_edits_have_it_too(tiny_variation, third, large, few):
    vary = quiet(UnCLIPImageVariationPipeline(**tiny_variation.components, **third))
    steps = {name: count for name, count in few.items() if not name.startswith("prior")}
    assert vary(NOISY, seed=1, **steps).images[0].size == (32, 32)
    edit = quiet(UnCLIPInpaintPipeline.from_pipe(large))
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (3, 5, 20, 21))
    result = np.asarray(edit("a cat", NOISY, mask, seed=1, num_resamples=1, **few).images[0])
    there = (result != np.asarray(NOISY)).any(-1)
    assert there[5:21, 3:20].mean() > 0.9
    there[5:21, 3:20] = False
    assert not there.any()


def test_progress_bars_name_the_stages(large, few, capsys):
    large.set_progress_bar_config()
    large("a cat", seed=1, **few)
    large.set_progress_bar_config(disable=True)
    assert "super-resolution 2" in capsys.readouterr().err


# ---- folders ----


@pytest.fixture(scope="module")
def saved(large, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade") / "model"
    large._presets = {"exact": {"super_res_num_inference_steps": [2, 3]}}
    large.save_pretrained(folder)
    large._presets = {"exact": {}}
    return folder


def test_saved_and_loaded(saved, draw, tiny_pipeline, third):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["super_res_2_first"] == ["diffusers", "UNet2DModel"]
    assert index["super_res_2_scheduler"] == ["diffusers", "UnCLIPScheduler"]
    assert not any(name.startswith(("super_res_2_last", "super_res_3")) for name in index)
    pipe = quiet(UnCLIPPipeline.from_pretrained(saved))
    assert list(pipe.components) == [*tiny_pipeline.components, "super_res_2_first", "super_res_2_scheduler"]
    assert isinstance(pipe.super_res_2_scheduler, UnCLIPScheduler)
    assert pipe.super_res_2_scheduler.config == third["super_res_2_scheduler"].config
    read = pipe.super_res_2_first.state_dict()
    assert all(torch.equal(value, read[name]) for name, value in third["super_res_2_first"].state_dict().items())
    assert pipe.recommended == {"super_res_num_inference_steps": [2, 3]}
    told = []
    draw(pipe, callback_on_step_end=lambda *given: told.append(given[3]["stage"]), **pipe.recommended)
    assert (told.count("super_res"), told.count("super_res_2")) == (2, 3)


def test_a_folder_without_one_is_as_before(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "plain")
    index = json.loads((tmp_path / "plain" / "model_index.json").read_text())
    assert not any(name.startswith("super_res_2") for name in index)
    (tmp_path / "plain" / "model_index.json").write_text(json.dumps(index | {"super_res_2_first": [None, None]}))
    pipe = UnCLIPPipeline.from_pretrained(tmp_path / "plain")
    assert pipe.super_res_2_first is None
    assert list(pipe.cascade) == ["super_res"]


def test_a_stage_that_the_folder_names_must_be_there(saved, tmp_path):
    broken = shutil.copytree(saved, tmp_path / "broken")
    shutil.rmtree(broken / "super_res_2_first")
    with pytest.raises(MissingFileError, match="component 'super_res_2_first'"):
        UnCLIPPipeline.from_pretrained(broken)
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps(index | {"super_res_2_first": "UNet2DModel"}))
    with pytest.raises(CheckpointError, match="without 'super_res_2_first'"):
        UnCLIPPipeline.from_pretrained(broken)


def test_the_loader_of_diffusers_would_ignore_it(saved):
    """diffusers ignores components that its pipeline's constructor does not take, with a warning."""
    from diffusers.pipelines.deprecated.unclip.pipeline_unclip import UnCLIPPipeline as Reference

    index = json.loads((saved / "model_index.json").read_text())
    _, unused, _ = Reference.extract_init_dict(dict(index))
    assert set(unused) >= {"super_res_2_first", "super_res_2_scheduler"}


def test_a_variation_folder_keeps_it(saved, tiny_variation, tmp_path):
    tiny_variation.save_pretrained(tmp_path / "clip")
    out = convert_text_to_image_to_variation(saved, tmp_path / "out", clip=tmp_path / "clip")
    assert list(UnCLIPImageVariationPipeline.from_pretrained(out).cascade) == ["super_res", "super_res_2"]


def test_offloading_includes_it(own_pipeline, third, draw):
    own = quiet(UnCLIPPipeline.from_pipe(own_pipeline, **copy.deepcopy(third)))
    expected = draw(own)
    own.enable_model_cpu_offload(device="cpu")
    assert all(hasattr(network, "_hf_hook") for network in own.networks.values())
    assert torch.equal(draw(own), expected)


# ---- what does not fit ----


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["super_res_2_first"], "super_res_2 has no super_res_2_scheduler"),
        (["super_res_2_scheduler"], "super_res_2 has no super_res_2_first"),
        (["super_res_2_last"], "super_res_2 has no super_res_2_first"),
        (["super_res_3_first", "super_res_3_scheduler"], "super_res_3 needs super_res_2, which is missing"),
    ],
)
def test_an_incomplete_stage(tiny_pipeline, third, names, message):
    parts = {name: third["super_res_2_" + ("scheduler" if "scheduler" in name else "first")] for name in names}
    with pytest.raises(ConfigError, match=message):
        UnCLIPPipeline(**tiny_pipeline.components, **parts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample_size": 16}, "super_res_2_first.sample_size is 16, no more than the 16"),
        ({"in_channels": 8}, "super_res_2_first.in_channels is 8"),
        ({"out_channels": 6}, "super_res_2_first.out_channels is 6"),
    ],
)
def test_a_stage_of_other_sizes(tiny_pipeline, tiny_configs, third, settings, message):
    network = UNet2DModel(**tiny_configs["super_res"] | {"sample_size": 32} | settings)
    with pytest.raises(ConfigError, match=message):
        UnCLIPPipeline(**tiny_pipeline.components, **third | {"super_res_2_first": network})


def test_a_first_stage_may_redraw_at_the_same_size(tiny_pipeline, tiny_configs, few):
    network = UNet2DModel(**tiny_configs["super_res"] | {"sample_size": 8}).eval()
    parts = {"super_res_first": network, "super_res_last": network}
    pipe = quiet(UnCLIPPipeline(**tiny_pipeline.components | parts))
    assert pipe("a cat", seed=1, **few).images[0].size == (8, 8)


def test_parts_of_another_kind(tiny_pipeline, third):
    with pytest.raises(ConfigError, match="component 'super_res_2_first' is a torch"):
        UnCLIPPipeline(**tiny_pipeline.components, **third | {"super_res_2_first": torch.nn.Identity()})
    with pytest.raises(InputError, match="no argument or component 'super_res_1_first'; did you mean 'super_res_"):
        UnCLIPPipeline.from_pretrained("unclip-emoji", super_res_1_first=third["super_res_2_first"])


# ---- sizes ----


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (32, 12), (4, 16)])
def test_heights_and_widths(make, size):
    height, width = size
    picture = make("a cat", seed=1, height=height, width=width)
    assert picture.shape == (1, 3, height, width)
    if size == (16, 16):
        assert torch.equal(picture, make("a cat", seed=1))


def test_one_side_alone_leaves_the_other(make, vary):
    assert make("a cat", seed=1, width=24).shape == (1, 3, 16, 24)
    assert vary(NOISY, seed=1, height=24).shape == (1, 3, 24, 16)


def test_every_stage_has_its_own_size(tiny_pipeline, few, draw):
    output = tiny_pipeline("a cat", seed=1, height=8, width=24, return_intermediates=True, **few)
    assert output.small_images[0].size == (12, 4)
    assert draw(height=16, width=48).shape == (1, 3, 16, 48)


def test_latents_of_another_size(make):
    latents = {"decoder_latents": torch.randn(1, 3, 4, 12), "super_res_latents": torch.randn(1, 3, 8, 24)}
    assert make("a cat", seed=1, height=8, width=24, **latents).shape == (1, 3, 8, 24)
    with pytest.raises(InputError, match=r"decoder_latents have shape \(1, 3, 4, 12\); this call needs \(1, 3, 8, 8\)"):
        make("a cat", **latents)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (10, "height is 10; for this model it must be a multiple of 4, such as 8"),
        (1, "height is 1; for this model it must be a multiple of 4, such as 4"),
        (0, "height is 0; it must be a whole number of pixels from 1 to 8192"),
        (-16, "height is -16"),
        (16.0, "height is 16.0"),
        (True, "height is True"),
        ("16", "height is '16'"),
        (8196, "height is 8196"),
    ],
)
def test_impossible_sides(make, side, message):
    with pytest.raises(InputError, match=message):
        make("a cat", height=side)


def test_the_multiple_is_that_of_the_deepest_network(draw):
    """8 → 16 → 32 px, each halved once: the decoder's 2 px are 8 px of the result."""
    with pytest.raises(InputError, match="multiple of 8, such as 16"):
        draw(height=20)


def test_the_last_network_may_be_the_deepest(tiny_pipeline, tiny_configs, few):
    levels = {
        "block_out_channels": (8,) * 4,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 4,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 4,
    }
    last = UNet2DModel(**tiny_configs["super_res"] | levels).eval()
    pipe = quiet(UnCLIPPipeline(**tiny_pipeline.components | {"super_res_last": last}))
    with pytest.raises(InputError, match="multiple of 8, such as"):
        pipe("a cat", height=12, **few)
    with pytest.raises(InputError, match="multiples of 8"):
        pipe.enable_super_res_tiling(12, 4)


@pytest.mark.parametrize(
    ("picture", "fitted"),
    [((100, 100), (128, 128)), ((300, 400), (112, 144)), ((400, 300), (144, 112)), ((10, 1000), (64, 256))],
)
def test_a_pictures_shape_in_the_models_pixels(picture, fitted):
    assert fitted_size(128, 16, picture) == fitted


# ---- tiles in a pipeline ----


def test_tiles_limit_the_inputs_of_a_network(large, draw, monkeypatch):
    expected, seen = draw(), []
    network = large.super_res_2_first
    original = network.forward

    def watching(sample, *args, **kwargs):
        seen.append(tuple(sample.shape[2:]))
        return original(sample, *args, **kwargs)

    monkeypatch.setattr(network, "forward", watching)
    monkeypatch.setattr(large, "_tiling", None)
    large.enable_super_res_tiling(16, 4)
    tiled = draw()
    assert set(seen) == {(16, 16)}
    assert tiled.shape == expected.shape
    assert not torch.equal(tiled, expected)  # normalised by tile
    large.disable_super_res_tiling()
    assert torch.equal(draw(), expected)


def test_tiles_that_do_not_fit(large):
    for sizes in ((15, 4), (16, 3), (16, 12), (0, 0)):
        with pytest.raises(InputError):
            large.enable_super_res_tiling(*sizes)
    assert large._tiling is None


# ---- Karlo's size ----


def test_256_to_1024_at_full_size_by_shapes(tiny_configs):
    """The paper's second upsampler in Karlo's widths, on the meta device, without memory."""
    config = tiny_configs["super_res"] | {
        "sample_size": 1024,
        "layers_per_block": 3,
        "block_out_channels": (320, 640, 960, 1280),
        "down_block_types": ("ResnetDownsampleBlock2D",) * 4,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 4,
        "norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift",
    }
    with torch.device("meta"):
        network = UNet2DModel(**config)
        output = network(torch.empty(1, 6, 1024, 1024), torch.tensor(999)).sample
        tile = network(torch.empty(1, 6, 256, 256), torch.tensor(999)).sample
    assert output.shape == (1, 3, 1024, 1024)
    assert tile.shape == (1, 3, 256, 256)
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(730e6, rel=0.05)
