"""Variations by a judge whose answers are known."""

import json
import types

import pytest
from PIL import Image

from unclip.errors import InputError
from unclip.evaluation.measures import difference
from unclip.evaluation.retrieval import Plan, variations

from .test_retrieval import COLOURS, FakeJudge


class Copies:
    """Gives a picture back as it is, or always one."""

    def __init__(self, always=None):
        self.always, self.seeds = always, []

    def __call__(self, images, *, seed):
        self.seeds += seed
        assert len(seed) == len(images)
        made = [Image.new("RGB", (8, 8), self.always) if self.always else image.resize((8, 8)) for image in images]
        return types.SimpleNamespace(images=made)


@pytest.fixture
def data(tmp_path):
    rows = []
    for name in ("red", "green", "blue", "black"):
        Image.new("RGB", (16, 16), COLOURS[name]).save(tmp_path / f"{name}.png")
        rows.append(
            {"file_name": f"{name}.png", "concept": name, "style": "flat", "text": name, "held_out": name == "black"}
        )
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_copies_keep_everything(data, tmp_path):
    pipeline = Copies()
    found = variations(
        pipeline, FakeJudge(), Plan(data, batch_size=2, seed=5, sheet=tmp_path / "sheets" / "s", progress=list)
    )
    seen = found["seen"]
    assert (seen["num"], found["held_out"]["num"], found["num_captions"]) == (3, 1, 4)
    assert seen["variations"] == seen["real"] == {"at_1": 1.0, "at_5": 1.0, "clip_score": 1.0}
    assert (seen["similarity"], seen["pixel_difference"]) == (1.0, 0.0)
    assert seen["similarity_of_others"] < 0.5
    assert pipeline.seeds == [5, 6, 7, 5]
    with Image.open(tmp_path / "sheets" / "s-seen.png") as sheet:
        assert sheet.size == (3 * 8 + 2 * 4, 2 * 8 + 4)
        assert sheet.getpixel((0, 0)) == sheet.getpixel((0, 12))
    assert (tmp_path / "sheets" / "s-held-out.png").is_file()


def test_one_picture_for_all_keeps_little(data):
    seen = variations(Copies(always=COLOURS["red"]), FakeJudge(), Plan(data))["seen"]
    assert seen["variations"]["at_1"] == pytest.approx(1 / 3, abs=1e-3)
    assert seen["real"]["at_1"] == 1
    assert seen["similarity"] < 0.9
    assert seen["pixel_difference"] == pytest.approx(2 / 3 * 2 / 3, abs=1e-3)


def test_difference():
    black, white = Image.new("RGB", (4, 4)), Image.new("L", (8, 8), 255)
    assert difference(black, white) == 1.0
    assert difference(black, black) == 0.0


@pytest.mark.parametrize("wrong", [{"num_seen": 0}, {"batch_size": 0}])
def test_numbers(data, wrong):
    with pytest.raises(InputError, match="at least 1"):
        variations(Copies(), FakeJudge(), Plan(data, **wrong))
