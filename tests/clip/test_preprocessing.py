"""unclip's own preprocessing gives exactly the pixels of transformers', or refuses the folder."""

import importlib.resources
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from unclip import ConfigError, MissingFileError
from unclip.clip.preprocessing import PicturePreprocessor
from unclip.training.clip import image_processor

BUILT_IN = importlib.resources.files("unclip") / "assets" / "emoji" / "feature_extractor"
SETTINGS = [
    {},
    {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}},
    {"size": {"shortest_edge": 21}, "crop_size": {"height": 20, "width": 20}, "resample": 2},
    {"size": 20, "crop_size": 20, "feature_extractor_type": "CLIPFeatureExtractor", "do_convert_rgb": True},
    {"size": {"height": 13, "width": 29}, "do_center_crop": False},
    {"do_resize": False, "crop_size": {"height": 33, "width": 18}},
    {"do_resize": False, "do_center_crop": False},
    {"size": 20, "crop_size": 20, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 0.5], "rescale_factor": 0.01},
]
SIZES = [(20, 20), (41, 17), (17, 41), (3, 5), (100, 99), (18, 33), (19, 34)]


def written(folder, settings):
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def compare(folder, sizes=SIZES):
    theirs, ours = CLIPImageProcessorPil.from_pretrained(folder), PicturePreprocessor.from_pretrained(folder)
    for name in ("do_resize", "do_center_crop", "resample"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("size", "crop_size"):
        assert dict(getattr(ours, name)) == {key: px for key, px in dict(getattr(theirs, name)).items() if px}
    random = np.random.default_rng(0)
    for width, height in sizes:
        picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found = ours(images=[picture, picture], return_tensors="pt")["pixel_values"]
        expected = theirs(images=[picture, picture], return_tensors="pt")["pixel_values"]
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        assert torch.equal(found, expected), (width, height)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_pixels(tmp_path, settings):
    compare(written(tmp_path / "one", settings))


def test_the_built_in_models():
    compare(BUILT_IN, [(64, 64), (300, 200), (10, 90)])


def test_what_a_clip_run_writes(tmp_path):
    image_processor(16).save_pretrained(tmp_path)
    compare(tmp_path)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_is_written_as_it_was_read(tmp_path, settings):
    ours = PicturePreprocessor.from_pretrained(written(tmp_path / "one", settings))
    ours.save_pretrained(tmp_path / "two")
    assert PicturePreprocessor.from_pretrained(tmp_path / "two") == ours
    compare(tmp_path / "two")


@pytest.mark.parametrize(
    "settings",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_convert_rgb": False},
        {"do_pad": True},
        {"do_resize": "yes"},
        {"size": {"longest_edge": 4}},
        {"size": {"shortest_edge": 4, "longest_edge": 8}},
        {"size": "large"},
        {"size": {"height": 4.5, "width": 4}},
        {"crop_size": {"shortest_edge": 4}},
        {"resample": 17},
        {"resample": "bicubic"},
        {"image_mean": [0.5]},
        {"image_mean": 0.5},
        {"image_std": [1, 1, "x"]},
        {"rescale_factor": True},
        {"something_new": 1},
    ],
    ids=str,
)
def test_settings_that_are_not_implemented(tmp_path, settings):
    with pytest.raises(ConfigError):
        PicturePreprocessor.from_pretrained(written(tmp_path / "one", settings))


def test_pictures_that_come_out_in_different_sizes(tmp_path):
    ours = PicturePreprocessor.from_pretrained(written(tmp_path / "one", {"do_resize": False, "do_center_crop": False}))
    with pytest.raises(ValueError, match="shape"):
        ours(images=[Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))])


def test_a_folder_without_settings(tmp_path):
    with pytest.raises(MissingFileError):
        PicturePreprocessor.from_pretrained(tmp_path)
