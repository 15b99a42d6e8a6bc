"""Sessions: shared parts, settings, samplers and metadata, without the command line."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from unclip import UnCLIPImageVariationPipeline, UnCLIPInpaintPipeline, UnCLIPPipeline
from unclip.checkpoints.recommended import write_recommended
from unclip.errors import CheckpointError, InputError, UnclipError
from unclip.pipelines.session import MADE_WITH, Compute, Session, environment, png_texts, read_texts
from unclip.settings import SAMPLERS

CPU = Compute(device="cpu")
KINDS = (UnCLIPPipeline, UnCLIPImageVariationPipeline, UnCLIPInpaintPipeline)


@pytest.fixture(scope="module")
def folder(tiny_inpaint, tmp_path_factory):
    """A folder with all components."""
    folder = tmp_path_factory.mktemp("session") / "tiny"
    tiny_inpaint.save_pretrained(folder)
    write_recommended(folder, {"decoder_num_inference_steps": 3, "num_prior_candidates": 2})
    return folder


def test_pipelines_share_their_parts(folder):
    session = Session(str(folder), CPU, progress=False)
    pipes = [session.pipeline(kind) for kind in KINDS]
    assert [type(pipe) for pipe in pipes] == list(KINDS)
    for pipe in pipes:
        assert session.pipeline(type(pipe)) is pipe
        for name, part in pipe.components.items():
            assert all(other.components.get(name, part) is part for other in pipes)
    manipulator = session.manipulator(captions=True)
    assert (manipulator.text, manipulator.variation) == (pipes[0], pipes[1])


def test_each_kind_makes_the_pictures_of_a_pipeline_that_is_loaded_alone(folder, few):
    session = Session(str(folder), CPU, progress=False)
    session.manipulator()
    images = [
        pipe("a cat", seed=1, output_type="pt", **few).images
        for pipe in (session.pipeline(UnCLIPPipeline), UnCLIPPipeline.from_pretrained(folder))
    ]
    assert torch.equal(*images)


def test_a_manipulator_without_captions_loads_no_prior(folder):
    manipulator = Session(str(folder), CPU, progress=False).manipulator()
    assert manipulator.text is None
    assert "prior" not in manipulator.variation.components


def test_threads_load_a_pipeline_once(folder):
    session = Session(str(folder), CPU, progress=False)
    with ThreadPoolExecutor(4) as pool:
        pipes = list(pool.map(session.pipeline, [UnCLIPPipeline] * 4))
    assert len({id(pipe) for pipe in pipes}) == 1


def test_given_settings_count_before_recommended_ones_and_defaults(folder):
    names = ("prior_num_inference_steps", "decoder_num_inference_steps", "num_prior_candidates", "prior_top_p")
    session = Session(str(folder), CPU)
    found = session.settings(UnCLIPPipeline, dict.fromkeys(names))
    assert found == {
        "prior_num_inference_steps": 25,
        "decoder_num_inference_steps": 3,
        "num_prior_candidates": 2,
    }  # prior_top_p is neither given nor recommended
    given = dict.fromkeys(names, 1)
    assert session.settings(UnCLIPPipeline, given) == given


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder_num_inference_steps", 0),
        ("super_res_num_inference_steps", [2, 1001]),
        ("prior_guidance_scale", float("nan")),
        ("prior_top_p", 0),
    ],
)
def test_settings_outside_their_limits(folder, name, value):
    with pytest.raises(InputError, match=name):
        Session(str(folder), CPU).settings(UnCLIPPipeline, {name: value})


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_stages_of_all_pipelines_have_the_sampler(folder, name):
    session = Session(str(folder), CPU, sampler=name, progress=False)
    for kind in (UnCLIPImageVariationPipeline, UnCLIPPipeline):  # the second one reads the prior's scheduler
        found = [part for part in session.pipeline(kind).components.items() if part[0].endswith("scheduler")]
        assert {type(part).__name__ for _, part in found} == {SAMPLERS[name].scheduler}
    assert session.pipeline(UnCLIPPipeline).prior_scheduler.config.prediction_type == "sample"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("compute", "sampler", "words"),
    [
        (Compute(device="abacus"), None, "abacus"),
        (Compute(device="cpu", dtype="int8"), None, "int8"),
        (CPU, "euler", "ancestral, ddim, dpm"),
    ],
)
def test_what_does_not_exist(folder, compute, sampler, words):
    with pytest.raises(InputError, match=words):
        Session(str(folder), compute, sampler=sampler).pipeline(UnCLIPPipeline)


def test_a_model_that_does_not_exist(tmp_path):
    with pytest.raises(CheckpointError):
        Session(str(tmp_path / "none"))


def test_metadata_is_read_as_it_was_written(folder, tmp_path):
    session = Session(str(folder), Compute(device="cpu", tile=16), progress=False)
    pipe = session.pipeline(UnCLIPPipeline)
    facts = session.metadata(pipe, {"decoder_guidance_scale": 2.0}, {"command": "generate"})
    assert facts == {
        "model": "tiny",
        "settings": {"decoder_guidance_scale": 2.0, "super_res_tile_px": 16, "dtype": "float32"},
        MADE_WITH: {"command": "generate", **environment(pipe)},
    }
    words = {"prompt": "größer\0", "negative": None}
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=png_texts({**words, **facts}))
    texts = read_texts(tmp_path / "a.png")
    assert texts.pop("Software").startswith("unclip ")
    assert texts == {"prompt": "größer\N{REPLACEMENT CHARACTER}", **json.loads(json.dumps(facts))}


def test_the_fingerprint_tells_weights_from_others(folder):
    first, second = (Session(str(folder), CPU, progress=False).pipeline(UnCLIPImageVariationPipeline) for _ in range(2))
    assert environment(first) == environment(second)
    second.decoder.conv_in.weight.data += 1
    assert environment(first)["model_fingerprint"] != environment(second)["model_fingerprint"]


def test_damaged_texts_are_left_out_and_other_files_refused(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=png_texts({"settings": "{", "seed": 3}))
    assert read_texts(tmp_path / "a.png")["seed"] == "3"
    assert "settings" not in read_texts(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UnclipError):
        read_texts(tmp_path / "b.png")


def test_it_prints_nothing_and_needs_no_command_line(folder):
    code = f"""
import sys
from unclip.pipelines.session import Compute, Session
session = Session({str(folder)!r}, Compute(device="cpu"), sampler="ddim")
session.manipulator(captions=True)
assert not [name for name in sys.modules if name.startswith("unclip.cli")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
