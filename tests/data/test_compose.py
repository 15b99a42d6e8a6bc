"""Composed pictures: what the caption says is what is to be seen."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from unclip.data.emoji import compose as module
from unclip.data.emoji.compose import (
    BACKGROUNDS,
    HUES,
    Thing,
    colours_for,
    compose,
    is_held_out,
    kind_of,
    noun_of,
    on_background,
    own_hue,
    read_things,
    recoloured,
    scene,
    with_article,
)
from unclip.data.folder import Record, read_records
from unclip.errors import DataError, OutputExistsError


def disc(fill, leaf=None, size=64) -> Image.Image:
    image = Image.new("RGBA", (size, size), (255, 255, 255, 0))
    pen = ImageDraw.Draw(image)
    pen.ellipse((8, 8, size - 8, size - 8), fill=fill)
    if leaf:
        pen.rectangle((size // 2 - 4, 0, size // 2 + 4, 10), fill=leaf)
    return image


def hue_at(image, x, y) -> float:
    return image.convert("RGB").convert("HSV").getpixel((x, y))[0] / 255 * 360


@pytest.mark.parametrize(
    ("label", "noun"),
    [
        ("red apple", "apple"), ("cat face", "cat"), ("Christmas tree", "christmas tree"), ("face", "face"),
        ("large blue diamond", None), ("man: red hair", None), ("keycap: 1", None), ("person running", None),
        ("face with tears of joy", None), ("red", None), ("", None), ("light blue heart", "heart"),
    ],
)  # fmt: skip
def test_nouns(label, noun):
    assert noun_of(label) == noun


def test_articles():
    assert [with_article(n) for n in ("apple", "cat", "scissors", "dress")] == [
        "an apple",
        "a cat",
        "scissors",
        "a dress",
    ]


def test_a_hue_of_its_own():
    assert own_hue(disc("#e03030")) == pytest.approx(0, abs=15)
    assert own_hue(disc("#3070e0")) == pytest.approx(218, abs=15)
    assert own_hue(disc("#e03030", leaf="#30a040")) == pytest.approx(0, abs=15)
    for grey in ("#808080", "#ffffff", "#101010"):
        assert own_hue(disc(grey)) is None
    rainbow = Image.new("RGBA", (60, 10), (0, 0, 0, 0))
    for k, colour in enumerate(("red", "yellow", "lime", "cyan", "blue", "magenta")):
        rainbow.paste(colour, (10 * k, 0, 10 * k + 10, 10))
    assert own_hue(rainbow) is None


@pytest.mark.parametrize("colour", list(HUES))
def test_recoloured_is_that_colour_and_the_leaf_stays(colour):
    apple = disc("#3070e0", leaf="#e09030")
    done = recoloured(apple, own_hue(apple), colour)
    assert abs((hue_at(done, 32, 40) - HUES[colour] + 180) % 360 - 180) < 15
    assert done.getpixel((32, 2)) == pytest.approx(apple.getpixel((32, 2)), abs=4)
    assert np.array_equal(np.asarray(done)[..., 3], np.asarray(apple)[..., 3])


def test_light_and_shade_stay():
    image = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    image.paste("#e06060", (0, 0, 10, 10))
    image.paste("#801010", (10, 0, 20, 10))
    done = recoloured(image, own_hue(image), "green").convert("HSV")
    before = image.convert("RGB").convert("HSV")
    for x in (5, 15):
        assert done.getpixel((x, 5))[1:] == pytest.approx(before.getpixel((x, 5))[1:], abs=3)


def test_backgrounds():
    apple = disc("#e03030")
    assert on_background(apple, None).getpixel((0, 0)) == (255, 255, 255)
    for colour, code in BACKGROUNDS.items():
        done = on_background(apple, colour)
        assert "#{:02x}{:02x}{:02x}".format(*done.getpixel((0, 0))) == code
        assert done.getpixel((32, 32)) == (0xE0, 0x30, 0x30)


@pytest.mark.parametrize(
    ("place", "at"), [("left of", (16, 32)), ("right of", (48, 32)), ("above", (32, 16)), ("below", (32, 48))]
)
def test_scenes(place, at):
    done = scene(disc("#e03030"), disc("#3070e0"), place)
    assert hue_at(done, *at) == pytest.approx(0, abs=5)
    assert hue_at(done, 64 - at[0], 64 - at[1]) == pytest.approx(218, abs=5)
    assert done.getpixel((0, 63))[3] == 0


def test_an_object_is_never_called_by_its_own_colour():
    thing = Thing(Record("a.png", ("a",)), disc("#e03030"), "apple", 5.0)
    assert set(colours_for(thing)) == {"yellow", "green", "blue", "purple", "pink"}
    assert not colours_for(Thing(thing.record, thing.image, "stone", None))


@pytest.fixture
def objects(tmp_path):
    folder = tmp_path / "objects"
    folder.mkdir()
    lines = []
    for name, colour in (("apple", "#e03030"), ("sea", "#3070e0"), ("leaf", "#30a040"), ("stone", "#808080")):
        disc(colour).save(folder / f"{name}.png")
        lines.append({"file_name": f"{name}.png", "label": name, "concept": name, "captions": [name]})
    lines[2]["held_out"] = True
    Image.new("RGB", (64, 64), "red").save(folder / "full.png")
    lines.append({"file_name": "full.png", "label": "wall", "concept": "wall", "captions": ["wall"]})
    lines.append(lines[0] | {"style": "other"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_what_can_be_composed(objects):
    assert [thing.noun for thing in read_things(objects)] == ["apple", "sea", "stone"]


def test_a_composed_set(objects, tmp_path):
    counts = compose(objects, tmp_path / "out", count=200, seed=1, weight=0.5)
    records = read_records(tmp_path / "out")
    assert len(records) == 200 == sum(counts[kind] for kind in module.KINDS)
    assert sum(record.held_out for record in records) == counts["held out"]
    assert all(counts[kind] == pytest.approx(200 * share, abs=25) for kind, share in module.KINDS.items())
    assert all(sum(kind_of(r.captions[0]) == kind for r in records) == counts[kind] for kind in module.KINDS)
    assert {record.weight for record in records} == {0.5}
    texts = [record.captions[0] for record in records]
    assert not any("leaf" in text for text in texts)
    for record in records:
        text = record.captions[0]
        with Image.open(tmp_path / "out" / record.file_name) as image:
            corner, middle = image.getpixel((0, 0)), image.getpixel((64, 64) if image.width > 64 else (32, 32))
        if "background" in text:
            assert BACKGROUNDS[text.split()[-2]] == "#{:02x}{:02x}{:02x}".format(*corner)
        else:
            assert corner == (255, 255, 255)
        colour = next((name for name in HUES if text.split(" on ")[0].split()[1] == name), None)
        if colour:
            hue = Image.new("RGB", (1, 1), middle).convert("HSV").getpixel((0, 0))[0] / 255 * 360
            assert abs((hue - HUES[colour] + 180) % 360 - 180) < 15, text
    with pytest.raises(OutputExistsError):
        compose(objects, tmp_path / "out", count=1)


def test_the_same_seed_makes_the_same_set(objects, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        compose(objects, tmp_path / name, count=12, seed=seed)
    a, b, c = ((tmp_path / name / "metadata.jsonl").read_text() for name in "abc")
    assert a == b != c


def test_a_held_out_combination_is_never_trained_on(objects, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HELD_OUT_SHARE", 0.4)
    compose(objects, tmp_path / "out", count=300)
    told: dict[frozenset[str], set[bool]] = {}
    for record in read_records(tmp_path / "out"):
        if "background" not in record.captions[0]:
            names = frozenset(record.captions[1].split(" and "))  # in either order
            told.setdefault(names, set()).add(record.held_out)
    assert all(len(answers) == 1 for answers in told.values())
    assert any(len(names) == 2 for names in told)
    assert {True} in told.values()
    assert {False} in told.values()
    assert is_held_out("apple", "green") == is_held_out("apple", "green")


def test_nothing_to_compose(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "t"}')
    with pytest.raises(DataError, match="0 pictures that can be composed"):
        compose(tmp_path, tmp_path / "out", count=3)


def test_kinds_are_read_from_captions():
    wanted = {
        "a purple apple": "colour",
        "red scissors": "colour",
        "a cat on a blue background": "background",
        "dress on an orange background": "background",
        "an orange cat on a grey background": "colour on background",
        "a cat left of a star": "scene",
        "a man on the moon below scissors": "scene",
        "a cat above an owl on an orange background": "scene on background",
        "a cat": None,
        "blueberries": None,
        "a cat on a white background": None,
        "a": None,
    }
    assert {caption: kind_of(caption) for caption in wanted} == wanted
