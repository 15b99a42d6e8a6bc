"""Defaults of options: the environment, the configuration file, and what counts first; short names; help."""

import json
import os

import pytest
import typer

from unclip import __version__
from unclip.cli import defaults

from .conftest import FEW_STEPS


@pytest.fixture
def configure(tmp_path, monkeypatch):
    def write(text: str):
        path = tmp_path / "config.toml"
        path.write_text(text)
        monkeypatch.setenv("UNCLIP_CONFIG", str(path))
        return path

    return write


def test_what_counts_first(unclip, text_to_image, tmp_path, monkeypatch, configure):
    """Option, environment, file, the model's own."""
    common = ["generate", "a cat", "--json", "--prior-steps", 2, "--super-res-steps", 2]

    def steps(*more) -> int:
        done = unclip(*common, *more)
        assert done.code == 0, done.err
        return json.loads(done.out)["settings"]["decoder_num_inference_steps"]

    configure(f'model = "{text_to_image}"\nout = "{tmp_path / "file"}"\ndecoder_steps = 3\n')
    assert steps() == 3
    assert len(list((tmp_path / "file").iterdir())) == 1
    monkeypatch.setenv("UNCLIP_DECODER_STEPS", "4")
    monkeypatch.setenv("UNCLIP_OUT", str(tmp_path / "variable"))
    assert steps() == 4
    assert len(list((tmp_path / "variable").iterdir())) == 1
    assert steps("--steps", 5) == 5


def test_every_kind_of_value(unclip, text_to_image, tmp_path, configure):
    configure('json = true\nsuper-res-steps = [2]\nprior-guidance = 2\nnegative-prompt = "a"\nseed = 7\nsize = 32\n')
    done = unclip("generate", "a cat", "--model", text_to_image, "--out", tmp_path / "out", "--steps", 2)
    made = json.loads(done.out)
    assert (made["seed"], made["negative"], made["settings"]["prior_guidance_scale"]) == (7, "a", 2)
    assert (made["settings"]["height"], made["settings"]["width"]) == (32, 32)
    assert made["settings"]["super_res_num_inference_steps"] == 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("modle = 1", "unknown key 'modle'; did you mean 'model'?"),
        ("[generate]\nsteps = 3", "unknown key 'generate'"),
        ("model = {a = 1}", "model is {'a': 1}"),
        ("steps = [1", "cannot be read as TOML"),
        (f"steps = 0x{'f' * 16_000}", "steps is a value of type int; it must be finite"),
        ('dtype = "float8"', "'float8' is not one of 'auto', 'float32', 'bfloat16', 'float16' (from "),
        ("steps = 0", "Invalid value for '--decoder-steps' / '--steps': 0 is too small; it must be 1 or more (from "),
    ],
)
def test_mistakes_in_the_file(unclip, configure, monkeypatch, text, why):
    monkeypatch.delenv("UNCLIP_DTYPE")
    path = configure(text)
    done = unclip("generate", "a cat")
    assert done.code in (1, 2)
    assert why in done.err
    assert str(path) in done.err


@pytest.mark.parametrize("arguments", [["generate", "--help"], ["data", "pack", "-h"], ["help", "vary"]])
def test_a_broken_file_does_not_stop_the_help(unclip, configure, arguments):
    configure("steps = [1")
    done = unclip(*arguments)
    assert (done.code, done.err) == (0, "")
    assert "Examples:" in done.out
    assert "cannot be read as TOML" in unclip("generate", "--", "--help").err


def test_mistakes_in_the_environment(unclip, monkeypatch):
    monkeypatch.setenv("UNCLIP_STEPS", "few")
    done = unclip("generate", "a cat")
    assert done.code == 2
    assert done.err.endswith("'few' is not a whole number (from the environment variable UNCLIP_STEPS)\n")


def test_a_file_that_is_named_must_exist(unclip, tmp_path, monkeypatch):
    monkeypatch.setenv("UNCLIP_CONFIG", str(tmp_path / "none.toml"))
    done = unclip("generate", "a cat")
    assert done.err == f"error: {tmp_path / 'none.toml'} does not exist\n"
    assert unclip("--version").out == f"unclip {__version__}\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_in_place_of_the_file(unclip, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "config.toml")
    monkeypatch.setenv("UNCLIP_CONFIG", str(tmp_path / "config.toml"))
    assert "config.toml is not a regular file" in unclip("generate", "a cat").err


def test_where_the_file_is(monkeypatch):
    monkeypatch.delenv("UNCLIP_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/somewhere")
    assert str(defaults.config_file()) == f"{typer.get_app_dir('unclip')}/config.toml"


def test_options_of_one_command_have_no_variable(unclip, tmp_path, monkeypatch):
    """What is written elsewhere than pictures are does not move with UNCLIP_OUT."""
    monkeypatch.setenv("UNCLIP_OUT", str(tmp_path))
    assert "Missing option '--out'" in unclip("data", "pack", "some").err


@pytest.mark.parametrize("size", ["32x32", "32", "32X32"])
def test_size(unclip, text_to_image, tmp_path, size):
    done = unclip("generate", "a", "--model", text_to_image, "--size", size, "--json", "--out", tmp_path, *FEW_STEPS)
    assert done.code == 0, done.err
    settings = json.loads(done.out)["settings"]
    assert (settings["height"], settings["width"]) == (32, 32)


@pytest.mark.parametrize("size", ["0", "32x", "x32", "big", "32x32x3", "-1", "9999999"])
def test_sizes_that_are_none(unclip, size):
    done = unclip("generate", "a", f"--size={size}")
    assert done.code == 2
    assert "must be a number of pixels or WIDTHxHEIGHT" in done.err


def test_a_side_given_twice(unclip):
    assert "give either --size, or --height and --width" in unclip("generate", "a", "--size", 64, "--width", 64).err


def test_verbose_names_files_device_and_times(unclip, text_to_image, tmp_path):
    common = ["generate", "a cat", "--model", text_to_image, *FEW_STEPS, "--out", tmp_path, "--seed", 1]
    for done in (unclip(*common, "-v"), unclip("--verbose", *common)):
        assert f"model: {text_to_image}\n" in done.err
        assert "device: " in done.err
        assert "batch of 1: " in done.err
    assert unclip(*common).err == ""


def test_verbose_shows_where_an_error_came_from(unclip):
    assert "Traceback" in unclip("vary", "none.png", "--model", "/none", "-v").err
    assert "Traceback" not in unclip("vary", "none.png", "--model", "/none").err


def test_prompts_on_stdin(unclip, text_to_image, tmp_path):
    common = ["--model", text_to_image, *FEW_STEPS, "--out", tmp_path, "--seed", 1]
    done = unclip("generate", "a dog", "-", *common, stdin="a cat\n\na red apple\n")
    assert [line.rpartition("/")[2] for line in done.lines] == ["a-dog-1.png", "a-cat-2.png", "a-red-apple-3.png"]
    assert unclip("generate", "-", *common, stdin="").code == 2


def test_help_is_a_command(unclip):
    assert unclip("help").out == unclip("--help").out
    assert unclip("help", "data", "pack").out == unclip("data", "pack", "--help").out
    wrong = unclip("help", "generat")
    assert wrong.code == 2
    assert "generate" in wrong.err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--seed", "x"], "'x' is not a whole number"),
        (["--seed", "-1"], "-1 is too small; it must be 0 or more"),
        (["--guidance", "x"], "'x' is not a number"),
        (["--sampler", "x"], "'x' is not one of 'ancestral', 'ddim', 'dpm'"),
        (["--super-res-steps", "x"], "'x' must be a number from 1 to 1000"),
        (["--device"], "requires an argument"),
    ],
)
def test_no_words_of_a_validator(unclip, arguments, why):
    done = unclip("generate", "a cat", *arguments)
    assert done.code == 2
    assert why in done.err
    assert done.err.splitlines()[-1].startswith("error: ")
    for words in ("Error:", "Value error", "Input should"):
        assert words not in done.err


def test_completion(unclip):
    done = unclip("--show-completion")
    assert "completion" in done.out.lower() or "not supported" in done.err
