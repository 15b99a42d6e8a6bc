"""`unclip generate`: files, names, texts in them, seeds, streams and exit codes."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip import __version__
from unclip.cli.inputs import plain
from unclip.cli.output import slug

from .conftest import FEW_STEPS


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def alike(one: str | Path, other: str | Path) -> bool:
    return bool(np.abs(pixels(one) - pixels(other)).max() <= 1)  # batched arithmetic differs in the last bit


@pytest.fixture
def generate(unclip, text_to_image, tmp_path):
    def run(*arguments, stdin=None, model=text_to_image, out=tmp_path / "out"):
        return unclip("generate", *arguments, "--model", model, *FEW_STEPS, "--out", out, stdin=stdin)

    return run


def test_paths_on_stdout_and_nothing_else(generate, tmp_path):
    done = generate("Red apple!", "--seed", 42)
    assert done.code == 0
    assert done.lines == [str(tmp_path / "out" / "red-apple-42.png")]
    assert done.err == ""
    assert pixels(done.lines[0]).shape == (32, 32, 3)


def test_fresh_seed_is_told_on_stderr(generate):
    done = generate("a cat")
    seed = done.err.split()[1]
    assert done.err.startswith("seed ")
    assert done.lines[0].endswith(f"a-cat-{seed}.png")
    assert generate("a cat").err != done.err
    assert generate("a cat", "--quiet").err == ""


def test_picture_tells_how_it_was_made(generate):
    prompt = "ein Äpfelchen 🍎 تفاحة"
    done = generate(prompt, "--seed", 7, "--negative", "blåbær", "--sampler", "ddim", "--decoder-guidance", 3)
    assert done.code == 0
    with Image.open(done.lines[0]) as image:
        texts = image.text
    assert texts["prompt"] == prompt
    assert texts["negative"] == "blåbær"
    assert texts["seed"] == "7"
    assert texts["model"] == "tiny"
    assert texts["Software"] == f"unclip {__version__}"
    assert json.loads(texts["settings"]) == {
        "prior_num_inference_steps": 2,
        "decoder_num_inference_steps": 2,
        "super_res_num_inference_steps": 2,
        "prior_guidance_scale": 4.0,
        "decoder_guidance_scale": 3.0,
        "sampler": "ddim",
        "dtype": "float32",
    }


def test_tiles_are_told_of(generate):
    done = generate("a cat", "--tile", 16, "--json")
    assert json.loads(done.lines[0])["settings"]["super_res_tile_px"] == 16


def test_sampler_is_the_models_own_by_default(generate):
    done = generate("a cat", "--json")
    assert json.loads(done.out)["settings"]["sampler"] == "ancestral"


def test_sampler_and_negative_change_the_picture(generate):
    own = generate("a cat", "--seed", 1).lines[0]
    for more in (["--sampler", "dpm"], ["--sampler", "ddim"], ["--negative", "a red apple"]):
        done = generate("a cat", "--seed", 1, *more)
        assert done.code == 0
        assert not alike(own, done.lines[0])


def test_same_seed_same_picture_and_never_overwritten(generate, tmp_path):
    first = generate("a cat", "--seed", 3).lines[0]
    before = Path(first).read_bytes()
    second, third = generate("a cat", "--seed", 3).lines[0], generate("a cat", "--seed", 3).lines[0]
    assert [Path(path).name for path in (first, second, third)] == ["a-cat-3.png", "a-cat-3-2.png", "a-cat-3-3.png"]
    assert Path(first).read_bytes() == before == Path(second).read_bytes()


def test_a_dangling_link_is_not_written_through(generate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a-cat-3.png").symlink_to(tmp_path / "elsewhere.png")
    done = generate("a cat", "--seed", 3)
    assert done.lines[0].endswith("a-cat-3-2.png")
    assert not (tmp_path / "elsewhere.png").exists()


def test_overwrite_replaces(generate, tmp_path):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "a-cat-3.png"
    path.write_text("old")
    done = generate("a cat", "--seed", 3, "--overwrite")
    assert done.lines == [str(path)]
    assert pixels(path).shape == (32, 32, 3)
    assert [entry.name for entry in path.parent.iterdir()] == ["a-cat-3.png"]


def test_picture_i_is_that_of_seed_plus_i(generate, tmp_path):
    together = generate("a cat", "a red apple", "-n", 2, "--seed", 10, "--batch-size", 3)
    assert [Path(path).name for path in together.lines] == [
        "a-cat-10.png",
        "a-cat-11.png",
        "a-red-apple-12.png",
        "a-red-apple-13.png",
    ]
    alone = generate("a red apple", "--seed", 13, out=tmp_path / "alone")
    assert alike(alone.lines[0], together.lines[3])
    assert not alike(together.lines[2], together.lines[3])


def test_seeds_go_round(generate):
    done = generate("a cat", "-n", 2, "--seed", 2**64 - 1)
    assert [path.rpartition("-")[2] for path in done.lines] == [f"{2**64 - 1}.png", "0.png"]


def test_grid_comes_last_and_beside_the_pictures(generate):
    done = generate("a cat", "a red apple", "-n", 3, "--seed", 5, "--grid")
    assert len(done.lines) == 7
    assert Path(done.lines[-1]).name == "pictures-5-grid.png"
    assert pixels(done.lines[-1]).shape == (2 * 50 + 4, 3 * 32 + 8, 3)  # a row for each prompt, captions below
    single = generate("a cat", "-n", 4, "--seed", 5, "--grid", "--json")
    rows = [json.loads(line) for line in single.lines]
    assert rows[-1]["path"].endswith("a-cat-5-grid.png")
    assert rows[-1]["grid"] == 4
    assert pixels(rows[-1]["path"]).shape == (104, 68, 3)


def test_json_tells_path_and_facts(generate):
    rows = [json.loads(line) for line in generate("a cat", "ثعلب", "--seed", 5, "--json").lines]
    assert [row["prompt"] for row in rows] == ["a cat", "ثعلب"]
    assert [row["seed"] for row in rows] == [5, 6]
    assert all(Path(row["path"]).is_file() for row in rows)
    assert rows[0]["negative"] is None


def test_prompts_from_file_and_stdin(generate, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_bytes("\ufeffa cat\r\n\n  \na red apple\n".encode())
    assert len(generate("one", "--prompts-file", file).lines) == 3
    done = generate("--prompts-file", "-", "--seed", 1, stdin="a cat\nüber\n")
    assert [Path(path).name for path in done.lines] == ["a-cat-1.png", "über-2.png"]


def test_bad_prompts_file(generate, tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for path, words in ((tmp_path / "latin", "UTF-8"), (tmp_path / "none", "No such file"), (tmp_path, "directory")):
        done = generate("--prompts-file", path)
        assert (done.code, done.out) == (1, "")
        assert words in done.err
        assert done.err.startswith("error: ")


def test_an_enormous_or_binary_prompts_file(generate, tmp_path):
    """A terabyte, which no machine that runs this could read whole, and what never ends."""
    with (tmp_path / "enormous").open("wb") as file:
        file.truncate(2**40)
    places = [tmp_path / "enormous", *(path for path in [Path("/dev/zero")] if path.exists())]
    for path in places:
        done = generate("--prompts-file", path)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith(f"error: {path} has more than 16,777,216 bytes, the limit of a file of prompts")
    done = generate("--prompts-file", "-", stdin="a cat\n" * 2_800_000)
    assert done.err.startswith("error: stdin has more than 16,777,216 bytes")
    (tmp_path / "binary").write_bytes(b"a cat\0\0\x01\n")
    done = generate("--prompts-file", tmp_path / "binary")
    assert (done.code, done.out) == (1, "")
    assert "binary is not UTF-8 text" in done.err


def test_nothing_to_draw_is_wrong_usage(generate):
    assert generate().code == 2
    done = generate("--prompts-file", "-", stdin="\n\n")
    assert done.code == 2
    assert "unclip generate" in done.err


HARD = {
    "../../etc/passwd": "etc-passwd",
    "/abs/olute": "abs-olute",
    "a\0b": "a-b",
    "🍎👩‍👩‍👧❤️": "picture",
    "": "picture",
    "  \t ": "picture",
    "<|endoftext|>": "endoftext",
    "\u202eevil\u2066": "evil",
    "..": "picture",
    "con\x1b[31m": "con-31m",
}


def test_hard_prompts_get_safe_names(generate, tmp_path):
    prompts = [*HARD, "z̗̞a̳l͢g̸o " * 30, "ש" * 500]
    done = generate(*prompts, "--seed", 0, "--quiet")
    assert done.code == 0
    assert len(done.lines) == len(prompts)
    for path in map(Path, done.lines):
        assert path.parent == tmp_path / "out"
        assert path.is_file()
        assert len(path.name.encode()) < 160
    names = [Path(path).stem.rpartition("-")[0] for path in done.lines]
    assert names[: len(HARD)] == list(HARD.values())
    with Image.open(done.lines[2]) as image:
        assert image.text["prompt"] == "a\N{REPLACEMENT CHARACTER}b"


def test_too_long_a_prompt_fails_alone(generate):
    done = generate("--prompts-file", "-", "--seed", 4, stdin="a cat\n" + "a" * 100_001 + "\na dog\n")
    assert done.code == 3
    assert [Path(path).name for path in done.lines] == ["a-cat-4.png", "a-dog-6.png"]
    assert "prompt 2 of 3" in done.err
    assert generate("--prompts-file", "-", stdin="a" * 100_001).code == 1


def test_names_where_files_have_ascii_names_alone(monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert slug("un café à Paris") == "un-caf--paris"
    assert slug("ثعلب") == "picture"


def test_bytes_that_are_no_text_become_replacement_characters():
    assert plain("a\udcffb") == "a\N{REPLACEMENT CHARACTER}b"
    assert plain("a\ud800b") == "a?b"
    assert plain("ä🍎") == "ä🍎"


def test_cut_prompt_is_told_of_once(generate):
    done = generate("red " * 40, "-n", 3, "--batch-size", 1, "--seed", 1)
    assert done.code == 0
    assert done.err.count("warning: the prompt has") == 1
    assert len(done.lines) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "-1"],
        ["--seed", str(2**64)],
        ["-n", "0"],
        ["--prior-steps", "0"],
        ["--decoder-steps", "1001"],
        ["--super-res-steps", "1.5"],
        ["--decoder-guidance", "much"],
        ["--sampler", "best"],
        ["--dtype", "int8"],
        ["--batch-size", "0"],
        ["--nonsense"],
    ],
)
def test_wrong_usage_is_2(unclip, text_to_image, arguments):
    done = unclip("generate", "a cat", "--model", text_to_image, *arguments)
    assert (done.code, done.out) == (2, "")
    assert arguments[0] in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prior-guidance", "nan"], "nan"),
        (["--decoder-guidance", "inf"], "inf"),
        (["--device", "abacus"], "available devices: cpu"),
    ],
)
def test_errors_are_1_and_short(generate, tmp_path, arguments, words):
    done = generate("a cat", *arguments)
    assert (done.code, done.out) == (1, "")
    assert words in done.err
    assert "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.rglob("*.png"))


def test_no_such_model(generate):
    done = generate("a cat", model="no-such-model")
    assert (done.code, done.out) == (1, "")
    assert "unclip-emoji" in done.err


def test_out_that_is_a_file(generate, tmp_path):
    (tmp_path / "file").write_text("")
    done = generate("a cat", out=tmp_path / "file")
    assert (done.code, done.out) == (1, "")
    assert "name a folder" in done.err


def test_model_for_variations_alone(generate, variation):
    done = generate("a cat", model=variation)
    assert done.code == 1
    assert "unclip vary" in done.err


def test_defaults_of_the_model(unclip, text_to_image, tmp_path):
    folder = shutil.copytree(text_to_image, tmp_path / "model")
    defaults = {"prior_num_inference_steps": 3, "decoder_num_inference_steps": 1, "decoder_guidance_scale": 2}
    (folder / "generation_defaults.json").write_text(json.dumps(defaults))
    done = unclip(
        "generate", "x", "--model", folder, "--prior-steps", 2, "--super-res-steps", 2, "--out", tmp_path, "--json"
    )
    settings = json.loads(done.out)["settings"]
    assert settings["prior_num_inference_steps"] == 2
    assert settings["decoder_num_inference_steps"] == 1
    assert settings["decoder_guidance_scale"] == 2
    assert settings["prior_guidance_scale"] == 4.0


@pytest.mark.parametrize("defaults", ['{"steps": 3}', '{"decoder_num_inference_steps": 2.5}', "[1]", "{"])
def test_broken_defaults_of_the_model(unclip, text_to_image, tmp_path, defaults):
    folder = shutil.copytree(text_to_image, tmp_path / "model")
    (folder / "generation_defaults.json").write_text(defaults)
    done = unclip("generate", "x", "--model", folder, "--out", tmp_path / "out")
    assert done.code == 1
    assert "generation_defaults.json" in done.err


def test_half_precision_and_offload(generate):
    assert generate("a cat", "--dtype", "bfloat16", "--seed", 1).code == 0
    done = generate("a cat", "--cpu-offload", "--device", "cpu", "--seed", 1)
    assert done.code == 0


def test_candidates_are_told_of_where_they_are_asked_for(generate):
    plain = generate("a cat", "--seed", 1, "--json")
    assert "num_prior_candidates" not in json.loads(plain.out)["settings"]
    several = [generate("a cat", "--seed", 1, "--candidates", 8, "--json") for _ in range(2)]
    told = [json.loads(done.out) for done in several]
    assert told[0]["settings"]["num_prior_candidates"] == 8
    assert alike(told[0]["path"], told[1]["path"])
    assert generate("a cat", "--candidates", 0).code == 2


def test_models_recommend_candidates(generate, text_to_image, tmp_path):
    folder = shutil.copytree(text_to_image, tmp_path / "model")
    (folder / "generation_defaults.json").write_text('{"num_prior_candidates": 2}')
    done = generate("a cat", "--seed", 1, "--json", model=folder)
    assert json.loads(done.out)["settings"]["num_prior_candidates"] == 2
    done = generate("a cat", "--seed", 1, "--json", "--candidates", 1, model=folder)
    assert json.loads(done.out)["settings"]["num_prior_candidates"] == 1


def test_ways_to_draw_codes_are_for_an_autoregressive_prior(generate):
    for option, value in (("--prior-temperature", 0.5), ("--prior-top-p", 0.9)):
        done = generate("a cat", option, value)
        assert done.code == 1
        assert "a diffusion prior samples no codes" in done.err


def test_one_picture_goes_into_the_file_that_is_named(generate, tmp_path):
    path = tmp_path / "new" / "cat.PNG"
    done = generate("a cat", "--seed", 3, out=path)
    assert done.lines == [str(path)]
    before = path.read_bytes()
    again = generate("a cat", "--seed", 4, out=path)
    assert (again.code, again.out) == (1, "")
    assert again.err == f"error: {path} already exists: use --overwrite, or another --out\n"
    assert path.read_bytes() == before
    assert generate("a cat", "--seed", 4, "--overwrite", out=path).lines == [str(path)]
    assert path.read_bytes() != before


@pytest.mark.parametrize("more", [["a dog"], ["-n", 2], ["--grid"]])
def test_several_pictures_do_not_go_into_one_file(generate, tmp_path, more):
    done = generate("a cat", *more, out=tmp_path / "cat.png")
    assert done.code == 1
    assert "there are 2 or more files: name a folder" in done.err
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_kind_and_a_folder_of_such_a_name(generate, tmp_path):
    assert f"use {tmp_path / 'cat.png'}" in generate("a cat", out=tmp_path / "cat.jpg").err
    (tmp_path / "cats.png").mkdir()
    assert generate("a cat", "--seed", 3, out=tmp_path / "cats.png").lines == [
        str(tmp_path / "cats.png" / "a-cat-3.png")
    ]


def test_the_seed_is_not_told_before_an_error(generate):
    done = generate("a cat", "--height", 17)
    assert done.code == 1
    assert done.err.startswith("error: ")


def test_a_preset(unclip, text_to_image, tmp_path):
    """Its values are recorded, so that rerun needs no preset; given values override it."""
    folder = shutil.copytree(text_to_image, tmp_path / "model")
    fast = {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 3, "super_res_num_inference_steps": 2}
    fast |= {"decoder_reuse": 2, "sampler": "ddim"}
    file = folder / "generation_defaults.json"
    file.write_text(json.dumps({"presets": {"fast": fast}}))
    arguments = ["generate", "a cat", "--seed", 1, "--preset", "fast", "--model", folder, "--out", tmp_path, "--json"]
    told = json.loads(unclip(*arguments).out)
    assert fast.items() <= told["settings"].items()
    file.write_text("{}")
    again = unclip("rerun", told["path"], "--model", folder, "--out", tmp_path / "again")
    assert Path(again.lines[0]).read_bytes() == Path(told["path"]).read_bytes()
    done = unclip(*arguments)
    assert done.code == 1
    assert "preset is 'fast'; this model has exact" in done.err
    file.write_text(json.dumps({"presets": {"fast": fast, "faster": {**fast, "decoder_num_inference_steps": 2}}}))
    overridden = json.loads(unclip(*arguments, "--reuse", 1, "--sampler", "dpm").out)["settings"]
    assert (overridden["decoder_reuse"], overridden["sampler"]) == (1, "dpm")
    other = unclip("rerun", told["path"], "--model", folder, "--out", tmp_path, "--preset", "faster", "--json")
    assert json.loads(other.out)["settings"]["decoder_num_inference_steps"] == 2
    assert "preset fast: " in unclip("info", folder).out
