"""The emoji data set: made end to end from small packages, and the rules of captions and weights."""

import hashlib
import io
import json
import sys
import tarfile
from dataclasses import replace

import pytest
from PIL import Image

from unclip.data.emoji import build
from unclip.data.emoji.phrases import PHRASES
from unclip.data.folder import load_sizes, read_records
from unclip.errors import DataError, MissingDependencyError, OutputExistsError

DOT = '<circle cx="16" cy="16" r="15" fill="{}"/>'
LABELS = [
    {"hexcode": "1F34E", "label": "red apple", "tags": ["apple", "fruit"], "group": 4, "subgroup": 33},
    {"hexcode": "2764-FE0F", "label": "red heart", "group": 8, "subgroup": 14},
    {"hexcode": "1F9D1", "label": "person", "group": 1, "subgroup": 21, "gender": 0},
    {"hexcode": "1F1E6", "label": "a flag", "group": 9, "subgroup": 100},
    {"hexcode": "1F999", "label": "drawn by nobody", "group": 3, "subgroup": 39},
]
ICONS = {
    "flat": {"1f34e": "apple", "2764": "heart", "1f9d1": "walker"},
    "noto": {"1f34e": "apple", "2764-fe0f": "heart", "1f1e6": "apple", "1f999": "lost"},
    "twemoji": {"1f34e": "apple"},
}


def tarball(files):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            about = tarfile.TarInfo(f"package/{name}")
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return held.getvalue()


def icon_set(style):
    return {
        "icons": {"apple": {"body": DOT.format("red")}, "heart": {"body": DOT.format("#c00"), "width": 64}},
        "aliases": {
            "walker": {"parent": "turned"},
            "turned": {"parent": "half", "hFlip": True},
            "lost": {"parent": "no"},
        },
        "width": 32,
        "height": 32,
    } | ({} if style != "flat" else {"icons": ICON_BODIES})


ICON_BODIES = {
    "apple": {"body": DOT.format("red")},
    "heart": {"body": DOT.format("#c00"), "width": 64},
    "half": {"body": '<rect width="16" height="32" fill="black"/>'},
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of four small tarballs, their hashes put in place of the pinned ones."""
    folder = tmp_path / "packages"
    folder.mkdir()

    def put(package, files):
        content = tarball(files)
        (folder / package.tarball).write_bytes(content)
        return replace(package, sha256=hashlib.sha256(content).hexdigest())

    monkeypatch.setattr(build, "LABELS", put(build.LABELS, {"en/data.json": LABELS}))
    styles = {
        style: put(package, {"icons.json": icon_set(style), "chars.json": ICONS[style]})
        for style, package in build.STYLES.items()
    }
    monkeypatch.setattr(build, "STYLES", styles)
    return folder


# -- end to end ----------------------------------------------------------------------------------------------------


def test_made_end_to_end(packages, tmp_path):
    pytest.importorskip("resvg_py")
    counts = build.build_emoji(tmp_path / "set", packages=packages)
    records = {record.file_name: record for record in read_records(tmp_path / "set")}
    assert counts == {
        "pictures": 6,
        "concepts": 3,
        "held_out_concepts": sum(map(build.is_held_out, ("1f34e", "2764", "1f9d1"))),
    }
    assert sorted(records) == [
        "images/flat/1f34e.png",
        "images/flat/1f9d1.png",
        "images/flat/2764.png",
        "images/noto/1f34e.png",
        "images/noto/2764.png",
        "images/twemoji/1f34e.png",
    ]
    apple = records["images/noto/1f34e.png"]
    assert (apple.concept, apple.label, apple.style) == ("1f34e", "red apple", "noto")
    assert apple.captions[0] == "red apple, noto style"
    assert apple.weight == pytest.approx(3.5 * 0.13)
    pictures = load_sizes(tmp_path / "set", [128])[0]
    places = {record.file_name: row for row, record in enumerate(pictures.records)}
    red = pictures.pixels[places["images/flat/1f34e.png"]]
    assert red[:, 64, 64].tolist() == [255, 0, 0]
    assert red[:, 0, 0].tolist() == [255, 255, 255]
    turned = pictures.pixels[places["images/flat/1f9d1.png"]]  # the left half, flipped
    assert turned[0, 64, 20] == 255
    assert turned[0, 64, 108] == 0
    sources = json.loads((tmp_path / "set" / "SOURCES.json").read_text())
    assert [source["licence"] for source in sources] == ["MIT", "MIT", "Apache-2.0", "CC-BY-4.0"]


def test_progress_wraps_the_concepts(packages, tmp_path):
    pytest.importorskip("resvg_py")
    told = []
    build.build_emoji(tmp_path / "set", packages=packages, progress=lambda them, **about: told.append(about) or them)
    assert told == [{"desc": "rendering", "unit": "concept"}]


def test_a_folder_that_is_there(packages, tmp_path):
    pytest.importorskip("resvg_py")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").write_text("x")
    with pytest.raises(OutputExistsError):
        build.build_emoji(tmp_path / "set", packages=packages)
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["mine"]


def test_another_hash(packages, tmp_path):
    pytest.importorskip("resvg_py")
    (packages / build.STYLES["noto"].tarball).write_bytes(tarball({"icons.json": {}, "chars.json": {}}))
    with pytest.raises(DataError, match="not the pinned"):
        build.build_emoji(tmp_path / "set", packages=packages)
    assert not (tmp_path / "set").exists()


def test_a_package_that_is_not_there(packages, tmp_path):
    pytest.importorskip("resvg_py")
    (packages / build.STYLES["twemoji"].tarball).unlink()
    with pytest.raises(DataError, match="get it with: npm pack @iconify-json/twemoji@"):
        build.build_emoji(tmp_path / "set", packages=packages)


def test_a_package_without_its_file(packages, tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    content = tarball({"other.json": {}})
    (packages / build.LABELS.tarball).write_bytes(content)
    monkeypatch.setattr(build, "LABELS", replace(build.LABELS, sha256=hashlib.sha256(content).hexdigest()))
    with pytest.raises(DataError, match=r"does not contain package/en/data\.json"):
        build.build_emoji(tmp_path / "set", packages=packages)


def test_without_resvg(packages, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[train\]'"):
        build.build_emoji(tmp_path / "set", packages=packages)


# -- fetching ------------------------------------------------------------------------------------------------------


def test_without_npm(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependencyError, match="npm; or download the tarballs"):
        build.build_emoji(tmp_path / "set")


def fake_npm(folder, script):
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    return str(npm)


def test_npm_fetches(packages, tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    npm = fake_npm(tmp_path, f'echo "$@" >> {tmp_path}/asked; cp {packages}/*.tgz .')
    monkeypatch.setattr(build.shutil, "which", lambda name: npm)
    assert build.build_emoji(tmp_path / "set")["pictures"] == 6
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0] == "pack --silent emojibase-data@17.0.0"
    assert len(asked) == 4


def test_npm_fails(packages, tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    npm = fake_npm(tmp_path, "echo no network >&2; exit 1")
    monkeypatch.setattr(build.shutil, "which", lambda name: npm)
    with pytest.raises(DataError, match=r"npm could not fetch emojibase-data@17\.0\.0: no network"):
        build.build_emoji(tmp_path / "set")


# -- rules ---------------------------------------------------------------------------------------------------------


def test_captions():
    entry = {"label": "Evil “Eye”", "tags": ["Blue", "bead", "charm"]}
    flat = list(build.captions(entry, "flat"))
    assert flat[:4] == ["evil eye", "an evil eye", "an emoji of an evil eye", "a picture of an evil eye"]
    assert flat[4:] == [
        "evil eye, blue",
        "evil eye, bead",
        "evil eye, charm",
        "blue bead",
        "evil eye, blue, bead, charm",
        "evil eye, flat style",
    ]
    assert list(build.captions(entry, "noto")) == [f"{text}, noto style" for text in flat[:-1]]
    assert list(build.captions({"label": "cat"}, "flat"))[-1] == "cat, flat style"


def test_phrases_and_colours_are_captions_too():
    found = list(build.captions({"label": "pizza", "tags": ["cheese"], "group": 4}, "flat", "orange"))
    assert found[0] == "pizza"
    assert {"slice of pizza", "orange pizza", "an orange pizza"} <= set(found)
    assert len(found) == len(set(found))
    faces = list(build.captions({"label": "sleepy face", "tags": ["good", "night", "zzz…"], "group": 0}, "noto"))
    assert {"good face, noto style", "night face, noto style"} <= set(faces)
    assert not any("zzz… face" in face for face in faces)
    told = list(build.captions({"label": "red apple"}, "flat", "red"))  # its colour stands in the label already
    assert "an apple" in told
    assert "red red apple" not in told
    assert not [text for text in told if text.startswith("a red red")]


def test_every_phrase_belongs_to_a_label_that_may_be_drawn():
    assert all(phrases and all(phrase == phrase.lower() for phrase in phrases) for phrases in PHRASES.values())
    assert all(len(set(phrases)) == len(phrases) for phrases in PHRASES.values())


@pytest.mark.parametrize(
    ("colour", "word"),
    [
        ("#e02020", "red"), ("#ff822d", "orange"), ("#fcd53f", "yellow"), ("#44911b", "green"), ("#86d72f", "green"),
        ("#0074ba", "blue"), ("#8d65c5", "purple"), ("#f59fb0", "pink"), ("#a56953", "brown"), ("#ffffff", "white"),
        ("#9b9b9b", "grey"), ("#1c1c1c", "black"), ("#2d1b1b", None),
    ],
)  # fmt: skip
def test_colours_have_the_names_that_people_give_them(colour, word):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste(Image.new("RGBA", (10, 10), colour), (3, 3))
    assert build.colour_of(image) == word
    assert build.colour_of(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) is None


def test_hexcode():
    assert build.hexcode("2764-FE0F-200D-1F525") == "2764-200d-1f525"


def test_weights():
    assert build.concept_weight({"group": 4, "subgroup": 33}) == 3.5
    assert build.concept_weight({"group": 4}) == 3.5
    assert build.concept_weight({"group": 8, "subgroup": 14}) == 3.0
    assert build.concept_weight({"group": 1, "subgroup": 26, "gender": 1}) == pytest.approx(0.2)


def test_held_out_concepts_never_change():
    codes = [f"{code:x}" for code in range(0x1F300, 0x1F700)]
    held_out = [code for code in codes if build.is_held_out(code)]
    assert 0.03 < len(held_out) / len(codes) < 0.07
    assert hashlib.sha256(" ".join(held_out).encode()).hexdigest()[:8] == "95f380f6"


def test_pins():
    for package in (build.LABELS, *build.STYLES.values()):
        assert len(package.sha256) == 64
    assert build.STYLES["flat"].tarball == "iconify-json-fluent-emoji-flat-1.2.6.tgz"
    assert sum(build.STYLE_WEIGHTS.values()) == pytest.approx(1.0)
