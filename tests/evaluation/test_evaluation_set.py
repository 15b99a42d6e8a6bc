"""What is asked for, and how it is chosen."""

import json

import pytest
import torch
from PIL import Image

from unclip.data.emoji.evaluation_set import EvaluationSet, batches, concepts_of
from unclip.data.folder import Record, load_sizes, square_pixels
from unclip.errors import DataError, ImageError, InputError, UnsafeFileError


def write(folder, rows):
    for row in rows:
        Image.new("RGB", (8, 8), "red").save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def composed(number, caption, held_out=False):
    return {"file_name": f"{number}.png", "captions": [caption], "style": "composed", "held_out": held_out}


@pytest.fixture
def scenes(tmp_path):
    """Composed pictures: one caption twice, four held out."""
    rows = [composed(0, "a red cat"), composed(1, "a red cat"), composed(2, "a cat left of a star")]
    return write(tmp_path, rows + [composed(n, f"a blue thing{n}", held_out=True) for n in range(3, 7)])


def test_every_composed_caption_counts_once(scenes):
    evaluation_set = EvaluationSet.prepare(scenes, num_seen=10, seed=0)
    assert evaluation_set.composed
    assert sorted(evaluation_set.captions_of("seen")) == ["a cat left of a star", "a red cat"]
    assert evaluation_set.captions_of("held_out") == [f"a blue thing{n}" for n in range(3, 7)]
    assert len(evaluation_set.captions) == 6
    assert evaluation_set.about("held_out") == {"num": 4, "drawn": "all", "num_in_all": 4}
    assert evaluation_set.about("seen") == {"num": 2, "drawn": "at random, each caption once at most"}


def test_a_caption_that_training_saw_once_is_not_held_out():
    rows = [
        Record("a", ("a red cat",), style="composed", held_out=True),
        Record("b", ("a red cat",), style="composed"),
        Record("c", ("a red cat",), style="composed", held_out=True),
    ]
    assert [each.file_name for each in concepts_of(rows)] == ["b"]


def test_some_of_the_held_out_ones(scenes):
    chosen = [
        tuple(EvaluationSet.prepare(scenes, num_seen=2, num_held_out=2, seed=s).captions_of("held_out"))
        for s in range(12)
    ]
    assert chosen[0] == tuple(EvaluationSet.prepare(scenes, num_seen=2, num_held_out=2, seed=0).captions_of("held_out"))
    assert all(len(set(each)) == 2 for each in chosen)
    assert len(set(chosen)) > 1
    evaluation_set = EvaluationSet.prepare(scenes, num_seen=2, num_held_out=0, seed=0)
    assert evaluation_set.about("held_out") == {"num": 0, "drawn": "at random", "num_in_all": 4}
    assert EvaluationSet.prepare(scenes, num_seen=2, num_held_out=99, seed=0).drawn["held_out"] == "all"


def test_fewer_held_out_ones_leave_the_seen_ones_as_they_are(scenes):
    asked = [
        EvaluationSet.prepare(scenes, num_seen=1, num_held_out=n, seed=4).captions_of("seen") for n in (None, 0, 2)
    ]
    assert asked[0] == asked[1] == asked[2]


def test_a_set_with_concepts_is_not_composed(tmp_path):
    rows = [composed(0, "a red cat"), {"file_name": "1.png", "captions": ["cat"], "concept": "cat", "style": "flat"}]
    evaluation_set = EvaluationSet.prepare(write(tmp_path, rows), num_seen=9, seed=0)
    assert not evaluation_set.composed
    assert evaluation_set.captions_of("seen") == ["cat"]
    assert evaluation_set.captions == ["a red cat", "cat"]


@pytest.mark.parametrize("numbers", [{"num_seen": 0}, {"num_seen": 1, "num_held_out": -1}])
def test_numbers(scenes, numbers):
    with pytest.raises(InputError, match="must be"):
        EvaluationSet.prepare(scenes, **numbers, seed=0)


def test_too_many_pictures_that_cannot_be_read(scenes, tmp_path):
    evaluation_set = EvaluationSet.prepare(scenes, num_seen=9, seed=0)
    assert [image.size for image in evaluation_set.pictures("held_out")] == [(8, 8)] * 4
    assert evaluation_set.left_out() == {}
    (tmp_path / "3.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"3\.png"):  # it was broken since
        evaluation_set.pictures("held_out")
    with pytest.raises(DataError, match=r"1 of 6 chosen pictures .* more than the 1% allowed: 3\.png: .*3\.png"):
        EvaluationSet.prepare(scenes, num_seen=9, seed=0)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "../other.png", "text": "x"}')
    with pytest.raises(UnsafeFileError, match="leads out"):
        EvaluationSet.prepare(tmp_path, num_seen=1, seed=0)
    with pytest.raises(DataError):
        EvaluationSet.prepare(tmp_path / "nowhere", num_seen=1, seed=0)


@pytest.fixture
def many(tmp_path):
    """A trained concept, and 120 that were held out."""
    rows = [{"file_name": f"{n}.png", "captions": [f"thing {n}"], "held_out": n > 0} for n in range(121)]
    return write(tmp_path, rows)


def test_a_few_pictures_that_cannot_be_read_are_left_out(many):
    (many / "7.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"1 of 121 chosen pictures .* are skipped: 7\.png: "):
        evaluation_set = EvaluationSet.prepare(many, num_seen=1, seed=0)
    assert (len(evaluation_set.pictures("seen")), len(evaluation_set.pictures("held_out"))) == (1, 119)
    assert "thing 7" not in evaluation_set.captions_of("held_out")
    assert "thing 7" in evaluation_set.captions
    assert evaluation_set.about("held_out")["num"] == 119
    assert evaluation_set.left_out()["num_skipped"] == 1
    assert "7.png" in evaluation_set.left_out()["skipped"]["7.png"]


def test_no_picture_that_training_knew_can_be_read(many):
    (many / "0.png").unlink()
    with pytest.raises(DataError, match=r"none of the seen chosen pictures .* can be read: 0\.png"):
        EvaluationSet.prepare(many, num_seen=1, seed=0)


@pytest.mark.parametrize("size", [(24, 10), (11, 30)])
def test_pictures_are_square_as_in_training(tmp_path, size):
    picture = Image.effect_noise(size, 90).convert("RGB")
    picture.save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}')
    (found,) = EvaluationSet.prepare(tmp_path, num_seen=1, seed=0).pictures("seen")
    assert found.size == (max(size), max(size))
    assert found.getpixel((0, 0)) == (255, 255, 255)
    trained = load_sizes(tmp_path, [8])[0].pixels[0]
    assert torch.equal(square_pixels(found, 8), trained)


def test_batches():
    assert list(batches(5, 2, seed=7)) == [(slice(0, 2), [7, 8]), (slice(2, 4), [9, 10]), (slice(4, 5), [11])]
    assert list(batches(0, 2, seed=7)) == []
