"""The decoder's measure, by networks whose answers are known."""

import types

import pytest
from PIL import Image

from unclip.errors import InputError
from unclip.evaluation.retrieval import Plan
from unclip.evaluation.stages import decoder

from .test_retrieval import COLOURS, FakeJudge
from .test_variations import data  # noqa: F401  (a fixture)


class Decodes:
    """Gives a picture back, small and large, or always one of a colour."""

    def __init__(self, always=None):
        self.always, self.prompts, self.seeds = always, [], []

    def __call__(self, images, *, prompt, seed, return_intermediates):
        assert return_intermediates
        self.prompts.append(prompt)
        self.seeds += seed

        def sized(side):
            return [Image.new("RGB", (side, side), self.always or image.getpixel((0, 0))) for image in images]

        return types.SimpleNamespace(images=sized(16), small_images=sized(4))


def test_a_perfect_decoder(data, tmp_path):  # noqa: F811
    pipeline = Decodes()
    found = decoder(pipeline, FakeJudge(), FakeJudge(), Plan(data, batch_size=2, seed=5, sheet=tmp_path / "s" / "x"))
    seen = found["seen"]
    assert found["captions"] is False
    assert (seen["num"], found["held_out"]["num"], seen["seeds"]) == (3, 1, [5, 7])
    assert seen["own"]["decoded"] == seen["judge"]["decoded"] == 1
    assert seen["own"]["other"] < 0.5
    assert seen["small"] == {"size_px": 4, "mae": 0.0, "psnr_db": 100.0, "ssim": 1.0}
    assert seen["large"] == {"size_px": 16, "mae": 0.0, "psnr_db": 100.0, "ssim": 1.0}
    assert pipeline.prompts == [None, None, None]
    assert pipeline.seeds == [5, 6, 7, 5]
    with Image.open(tmp_path / "s" / "x-seen.png") as sheet:
        assert sheet.height == 16 + 18
        assert sheet.getpixel((2, 2)) == sheet.getpixel((16 + 2 + 2, 2))


def test_captions_are_told_when_asked(data):  # noqa: F811
    pipeline = Decodes()
    found = decoder(pipeline, FakeJudge(), FakeJudge(), Plan(data), captions=True)
    assert found["captions"] is True
    assert sorted(pipeline.prompts[0]) == ["blue", "green", "red"]
    assert pipeline.prompts[1] == ["black"]


def test_a_decoder_of_one_picture(data):  # noqa: F811
    seen = decoder(Decodes(always=COLOURS["red"]), FakeJudge(), FakeJudge(), Plan(data))["seen"]
    assert seen["own"]["decoded"] == pytest.approx(seen["own"]["other"], abs=1e-3)
    assert seen["large"]["mae"] == pytest.approx(4 / 9, abs=1e-3)
    assert seen["large"]["psnr_db"] < 50


def test_numbers(data):  # noqa: F811
    with pytest.raises(InputError, match="batch_size is 0"):
        decoder(Decodes(), FakeJudge(), FakeJudge(), Plan(data, batch_size=0))
