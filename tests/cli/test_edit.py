"""`unclip inpaint` and `unclip redraw`: picture files edited, and what goes wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip.pipelines import steps as steps_module

from .conftest import FEW_STEPS


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "My photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def mask(tmp_path) -> Path:
    """The left half, white."""
    path = tmp_path / "mask.png"
    image = Image.new("L", (32, 32), 0)
    image.paste(255, (0, 0, 16, 32))
    image.save(path)
    return path


@pytest.fixture
def edit(unclip, model, tmp_path):
    def run(command, *arguments, model=model):
        before = ["--model", model, *FEW_STEPS, "--device", "cpu", "--out", tmp_path / "out"]
        return unclip(command, *before, *arguments)

    return run


def test_what_the_mask_marks_is_drawn_and_the_rest_stays(edit, photo, mask):
    done = edit("inpaint", photo, "--mask", mask, "--prompt", "a cat", "-n", 2, "--seed", 5, "--grid")
    assert (done.code, done.err) == (0, "")
    names = ["my-photo-inpaint-5.png", "my-photo-inpaint-6.png", "my-photo-inpaint-5-grid.png"]
    assert [Path(path).name for path in done.lines] == names
    first, second = (pixels(path) for path in done.lines[:2])
    for result in (first, second):
        assert np.array_equal(result[:, 16:], pixels(photo)[:, 16:])
        assert (result[:, :16] != pixels(photo)[:, :16]).any(-1).mean() > 0.9
    assert not np.array_equal(first, second)


def test_facts(edit, photo, mask):
    done = edit("inpaint", photo, "--mask", mask, "--prompt", "a cat 🐈", "--resamples", 2, "--strength", 0.8, "--json")
    facts = json.loads(done.out)
    with Image.open(facts["path"]) as image:
        texts = image.text
    assert (texts["image"], texts["mask"], texts["prompt"]) == ("My photo.png", "mask.png", "a cat 🐈")
    settings = json.loads(texts["settings"])
    assert settings == facts["settings"]
    assert (settings["num_resamples"], settings["jump_length"], settings["strength"]) == (2, 1, 0.8)
    assert "embedding_from" not in settings
    again = edit(
        *("inpaint", photo, "--mask", mask, "--prompt", "a cat 🐈", "--resamples", 2, "--strength", 0.8),
        *("--seed", texts["seed"]),
    )
    assert np.array_equal(pixels(again.lines[0]), pixels(facts["path"]))


def test_transparency_is_a_mask(edit, photo, mask, tmp_path):
    holed = tmp_path / "holed.png"
    with Image.open(photo) as image:
        picture = image.convert("RGBA")
    picture.paste((255, 255, 255, 0), (0, 0, 16, 32))
    picture.save(holed)
    done = edit("inpaint", holed, "--prompt", "a cat", "--seed", 5)
    assert done.code == 0
    by_mask = edit("inpaint", photo, "--mask", mask, "--prompt", "a cat", "--seed", 5)
    assert np.array_equal(pixels(done.lines[0]), pixels(by_mask.lines[0]))


def test_transparency_outside_a_mask_stays_to_the_bit(edit, mask, tmp_path):
    given = np.random.default_rng(1).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    given[:8, :, 3] = 0
    Image.fromarray(given).save(tmp_path / "cut.png")
    done = edit("inpaint", tmp_path / "cut.png", "--mask", mask, "--prompt", "a cat", "--seed", 5, "--grid")
    assert done.code == 0
    with Image.open(done.lines[0]) as image:
        assert image.mode == "RGBA"
        result = np.asarray(image)
    assert np.array_equal(result[:, 16:], given[:, 16:])
    assert (result[:, :16, 3] == 255).all()
    assert (pixels(done.lines[1])[:8, 16:] == 255).all()  # the sheet, on white


def test_a_mask_as_editors_save_it(edit, photo, mask, tmp_path):
    with Image.open(mask) as image:
        image.convert("RGBA").save(tmp_path / "opaque.png")
    found = [
        edit("inpaint", photo, "--mask", each, "--prompt", "a cat", "--seed", 5)
        for each in (mask, tmp_path / "opaque.png")
    ]
    assert [done.code for done in found] == [0, 0]
    assert np.array_equal(*(pixels(done.lines[0]) for done in found))


def test_options_of_inpainting_matter(edit, photo, mask):
    def run(*more):
        done = edit("inpaint", photo, "--mask", mask, "--seed", 5, *more)
        assert done.code == 0, done.err
        return pixels(done.lines[0])

    plain = run("--prompt", "a cat")
    for more in (
        ("--prompt", "a red apple"),
        (),
        ("--prompt", "a cat", "--embedding-from", "image"),
        ("--prompt", "a cat", "--resamples", 1),
        ("--prompt", "a cat", "--strength", 0.5),
        ("--prompt", "a cat", "--negative", "an apple"),
    ):
        assert not np.array_equal(run(*more), plain), more


@pytest.mark.parametrize(("command", "more"), [("inpaint", ["--mask", "MASK"]), ("redraw", [])])
def test_sizes_and_tiles(edit, photo, mask, command, more):
    more = [mask if part == "MASK" else part for part in more]
    done = edit(command, photo, *more, "--prompt", "a cat", "--height", 16, "--width", 48, "--tile", 16)
    assert done.code == 0, done.err
    assert pixels(done.lines[0]).shape == (16, 48, 3)
    with Image.open(done.lines[0]) as image:
        assert json.loads(image.text["settings"])["super_res_tile_px"] == 16  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["inpaint", "redraw"])
def test_the_default_size_is_as_the_help_says(edit, unclip, photo, mask, command):
    text = " ".join(unclip(command, "--help").out.split())
    assert text.count("(the picture's shape, in the model's size)") == 2
    assert "needs --width" in text
    assert "needs --height" in text
    for path in (photo, mask):
        with Image.open(path) as image:
            image.resize((64, 16)).save(path)
    done = edit(command, photo, *(["--mask", mask] if command == "inpaint" else []), "--prompt", "a cat")
    assert done.code == 0, done.err
    assert pixels(done.lines[0]).shape == (16, 64, 3)


def test_redrawing_stays_nearer_the_lower_the_strength(edit, photo):
    distances = []
    for strength in (0.1, 0.9):
        done = edit("redraw", photo, "--prompt", "a cat", "--strength", strength, "--seed", 3, "--decoder-steps", 10)
        assert Path(done.lines[0]).name.startswith("my-photo-redraw-3")
        distances.append(np.abs(pixels(done.lines[0]).astype(float) - pixels(photo)).mean())
    assert 0 < distances[0] < distances[1]


@pytest.mark.parametrize(("command", "more"), [("inpaint", ["--mask", "MASK"]), ("redraw", [])])
def test_how_the_prior_draws(edit, photo, mask, model, tmp_path, monkeypatch, command, more):
    more = [mask if part == "MASK" else part for part in more]
    folder = shutil.copytree(model, tmp_path / "recommending")
    (folder / "generation_defaults.json").write_text('{"num_prior_candidates": 4}')
    asked, original = [], steps_module.sample_best

    def spy(*given, num_candidates, **named):
        asked.append(num_candidates)
        return original(*given, num_candidates=num_candidates, **named)

    monkeypatch.setattr(steps_module, "sample_best", spy)
    for options, wanted in (((), 4), (("--candidates", 3), 3)):
        done = edit(command, photo, *more, "--prompt", "a cat", *options, "--json", model=folder)
        assert json.loads(done.out)["settings"]["num_prior_candidates"] == wanted
        assert asked.pop() == wanted
    edit(command, photo, *more, "--prompt", "a cat")
    assert asked == [1]
    for option, value in (("--prior-temperature", 0.5), ("--prior-top-p", 0.9)):
        done = edit(command, photo, *more, "--prompt", "a cat", option, value)
        assert (done.code, "a diffusion prior samples no codes" in done.err) == (1, True)
    for without in ((), ("--prompt", "a cat", "--embedding-from", "image")):
        done = edit(command, photo, *more, *without, "--candidates", 3, model=folder)
        assert (done.code, "leave out --candidates" in done.err) == (1, True)
        done = edit(command, photo, *more, *without, "--json", model=folder)
        assert "num_prior_candidates" not in json.loads(done.out)["settings"]


def test_redrawing_by_the_pictures_own_content(edit, photo):
    own = edit("redraw", photo, "--seed", 3)
    assert own.code == 0
    assert not np.array_equal(
        pixels(own.lines[0]), pixels(edit("redraw", photo, "--seed", 3, "--prompt", "a cat").lines[0])
    )


def test_steps_of_several_stages_in_a_model_of_one(edit, photo):
    done = edit("redraw", photo, "--prompt", "a cat", "--super-res-steps", "2,3")
    assert (done.code, done.out) == (1, "")
    assert "2 values for 1 super-resolution stages" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inpaint", "PHOTO", "--prompt", "a cat"], 1, "give --mask, or make it transparent"),
        (["inpaint", "OPAQUE", "--prompt", "a cat"], 1, "give --mask, or make it transparent"),
        (["inpaint", "PHOTO", "--mask", "PHOTO.none"], 1, "does not exist"),
        (["inpaint", "PHOTO", "--mask", "SMALL"], 1, "the mask is 8×8 pixels, its picture 32×32"),
        (["inpaint", "PHOTO", "--mask", "MASK", "--strength", "0"], 2, "--strength is 0"),
        (["inpaint", "PHOTO", "--mask", "MASK", "--resamples", "0"], 2, "resamples"),
        (["inpaint", "PHOTO", "--mask", "MASK", "--super-res-steps", "2,x"], 2, "'2,x' must be a number"),
        (["redraw", "PHOTO", "--prompt", "a cat", "--strength", "1"], 2, "below 1"),
        (["redraw", "PHOTO", "--prompt", "a cat", "--height", "30", "--width", "32"], 1, "height is 30"),
        (["redraw", "PHOTO", "--prompt", "a cat", "--height", "32"], 1, "height and width, or neither"),
        (["inpaint", "PHOTO", "--mask", "MASK", "--width", "32"], 1, "height and width, or neither"),
        (["redraw", "PHOTO", "--prompt", "a cat", "--tile", "3"], 1, "must be multiples of 2"),
        (["redraw"], 2, "Missing argument"),
    ],
)
def test_wrong_arguments(edit, photo, mask, tmp_path, arguments, code, message):
    Image.new("L", (8, 8), 255).save(tmp_path / "small.png")
    Image.new("RGBA", (32, 32), "red").save(tmp_path / "opaque.png")
    places = {"OPAQUE": tmp_path / "opaque.png"} | {
        "PHOTO": photo,
        "MASK": mask,
        "SMALL": tmp_path / "small.png",
        "PHOTO.none": tmp_path / "none.png",
    }
    done = edit(*(places.get(part, part) for part in arguments))
    assert (done.code, done.out) == (code, "")
    assert message in " ".join(done.err.split())


def test_models_that_lack_something(edit, photo, text_to_image, variation):
    done = edit("redraw", photo, model=text_to_image)
    assert (done.code, done.out) == (1, "")
    assert "has no image_encoder" in done.err
    assert edit("redraw", photo, "--prompt", "a cat", model=text_to_image).code == 0
    done = edit("redraw", photo, "--prompt", "a cat", model=variation)
    assert done.code == 1
    assert "has no prior" in done.err
