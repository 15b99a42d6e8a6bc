"""`unclip vary`: variations of picture files, good and bad."""

import json
import struct
from pathlib import Path

import pytest
from PIL import Image

from .conftest import FEW_DECODER_STEPS
from .test_generate import alike


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "My photo.jpg"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


@pytest.fixture
def vary(unclip, model, tmp_path):
    def run(*arguments, model=model):
        return unclip("vary", *arguments, "--model", model, *FEW_DECODER_STEPS, "--out", tmp_path / "out")

    return run


def test_variations_of_each_picture(vary, photo, tmp_path):
    other = tmp_path / "other.png"
    Image.new("LA", (20, 20), (10, 100)).save(other)
    done = vary(photo, other, "-n", 2, "--seed", 1, "--grid", "--batch-size", 3)
    assert done.code == 0
    assert done.err == ""
    assert [Path(path).name for path in done.lines] == [
        "my-photo-variation-1.png",
        "my-photo-variation-2.png",
        "other-variation-3.png",
        "other-variation-4.png",
        "pictures-variation-1-grid.png",
    ]


def test_facts_in_every_batch(vary, photo):
    done = vary(photo, "-n", 2, "--batch-size", 1, "--seed", 1, "--prompt", "a hat 🎩", "--negative", "a dog")
    for seed, path in zip((1, 2), done.lines, strict=True):
        with Image.open(path) as image:
            texts = image.text
        assert (texts["image"], texts["prompt"], texts["negative"]) == ("My photo.jpg", "a hat 🎩", "a dog")
        assert texts["seed"] == str(seed)
        settings = json.loads(texts["settings"])
        assert settings["decoder_num_inference_steps"] == 2
        assert "prior_num_inference_steps" not in settings


def test_caption_and_picture_matter(vary, photo, tmp_path):
    other = tmp_path / "other.png"
    Image.effect_noise((40, 40), 90).save(other)
    own = vary(photo, "--seed", 1).lines[0]
    assert not alike(own, vary(photo, "--seed", 1, "--prompt", "a cat").lines[0])
    assert not alike(own, vary(other, "--seed", 1).lines[0])


def test_folder_for_variations(vary, photo, variation):
    assert vary(photo, model=variation).code == 0


def test_bad_files_fail_alone(vary, photo, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nonsense")
    done = vary(broken, photo, tmp_path / "none.png", tmp_path, "--seed", 8)
    assert done.code == 3
    assert [Path(path).name for path in done.lines] == ["my-photo-variation-9.png"]
    errors = done.err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("error: ") for line in errors)
    assert "broken.png" in errors[0]


def test_damaged_exif_costs_no_picture(vary, photo, tmp_path):
    """XResolution is -1/0, which cannot be written again."""
    block = b"Exif\0\0MM\0*\0\0\0\x08\0\2"
    block += struct.pack(">HHI4s", 0x0112, 3, 1, b"\0\6\0\0") + struct.pack(">HHII", 0x011A, 10, 1, 38)
    bad = tmp_path / "bad.jpg"
    Image.new("RGB", (40, 30), "blue").save(bad, exif=block + bytes(4) + struct.pack(">ii", -1, 0))
    done = vary(bad, photo, "--seed", 8)
    assert (done.code, done.err) == (0, "")
    assert [Path(path).name for path in done.lines] == ["bad-variation-8.png", "my-photo-variation-9.png"]


@pytest.mark.parametrize("suffix", [".avif", ".jp2", ".tif"])
def test_other_formats(vary, tmp_path, suffix):
    Image.new("RGB", (40, 30), "blue").save(tmp_path / f"sea{suffix}")
    assert vary(tmp_path / f"sea{suffix}").code == 0


def test_only_bad_files(vary, tmp_path, monkeypatch):
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline

    monkeypatch.setattr(UnCLIPImageVariationPipeline, "from_pretrained", None)  # no weights are read for them
    done = vary(tmp_path / "none.png", "--grid")
    assert (done.code, done.out) == (1, "")
    assert "none.png" in done.err


def test_model_without_image_encoder(vary, photo, text_to_image):
    done = vary(photo, model=text_to_image)
    assert (done.code, done.out) == (1, "")
    assert "unclip convert variation" in done.err


def test_no_picture_is_wrong_usage(vary):
    assert vary().code == 2


def test_exact_inversion_refuses_faster_settings(vary, photo):
    done = vary(photo, "--keep-structure", "--decoder-reuse", 2)
    assert done.code == 2
    assert "leave out --preset" in done.err
