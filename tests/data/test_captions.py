"""Captions of a folder of pictures: from names, from texts beside them, from a CSV; nothing replaced unasked."""

import json
import os
import unicodedata

import pytest
from typer.testing import CliRunner

from unclip.cli.main import app
from unclip.data.captions import captions_of_names, write_captions
from unclip.data.folder import Keys, load_sizes
from unclip.errors import DataError, OutputExistsError

from .conftest import png


@pytest.fixture
def pictures(tmp_path):
    """Makes a folder of pictures; names with a text are files that hold it."""

    def make(*names: str, **texts: str):
        root = tmp_path / "pictures"
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(png(len(name)))
        for name, text in texts.items():
            (root / name.replace("_dot_", ".")).write_text(text, encoding="utf-8")
        return root

    return make


def told(root) -> dict[str, tuple[str, ...]]:
    """Captions by picture, as training reads them."""
    return {record.file_name: record.captions for record in load_sizes(root, [8])[0].records}


@pytest.mark.parametrize(
    ("names", "captions"),
    [
        (["red_apple.png"], ["red apple"]),
        (["red-apple.png", "a t-shirt.png", "a_t-shirt.png"], ["red apple", "a t-shirt", "a t-shirt"]),
        (["red.apple.png", "red+apple.png", "red%20apple.png"], ["red apple"] * 3),
        (["red_apple-02.png", "red apple (3).png", "red_apple_0.png"], ["red apple"] * 3),
        (["cat_1.png", "cat_2.png", "sub/dog 7.png"], ["cat", "cat", "dog 7"]),
        (["boeing_747.jpg"], ["boeing 747"]),
        (["3_apples.png", "два_кота.png"], ["3 apples", "два кота"]),
        (["IMG_2041.jpg", "DSC00012.JPG", "00017.png", "3f9a04b1c2d4.png", "image (2).png", "__.png"], [None] * 6),
        (["Screenshot 2026-05-01 at 10.22.33.png", "IMG-20240101-WA0003.jpg"], [None] * 2),
        (["photo of a cat 2.jpg", "cafe.png"], ["photo of a cat 2", "cafe"]),
    ],
)
def test_captions_of_names(names, captions):
    assert captions_of_names(names) == captions


def test_texts_where_there_are_some_else_names(pictures):
    root = pictures(
        *("cat.png", "dog.jpg", "sub/red_apple-01.webp", "IMG_0001.png", "empty.png", ".hidden.png", ".trash/a.png"),
        cat_dot_txt="\ufeffa cat\n\n a black cat \n",
        dog_dot_jpg_dot_txt="a dog",
        empty_dot_txt=" \n",
        notes_dot_md="no picture",
    )
    found = write_captions(root)
    assert told(root) == {
        "cat.png": ("a cat", "a black cat"),
        "dog.jpg": ("a dog",),
        "sub/red_apple-01.webp": ("red apple",),
    }
    assert found.counts == {"texts": 2, "names": 1}
    assert found.left_out == {"IMG_0001.png": "its name has no words", "empty.png": "empty.txt is empty"}


def test_texts_alone_and_names_alone_and_folders(pictures):
    root = pictures("cats/a.png", "cats/b.png", "big_dogs/001.png")
    (root / "cats/a.txt").write_text("a cat")
    assert write_captions(root, origin="texts").left_out["cats/b.png"] == "b.txt is missing"
    assert told(root) == {"cats/a.png": ("a cat",)}
    write_captions(root, origin="names", overwrite=True)
    assert told(root) == {"cats/a.png": ("a",), "cats/b.png": ("b",)}
    write_captions(root, origin="folders", overwrite=True)
    assert told(root) == {"big_dogs/001.png": ("big dogs",), "cats/a.png": ("cats",), "cats/b.png": ("cats",)}


def test_a_csv(pictures, tmp_path):
    root = pictures("cat.png", "sub/dog.png", "bird.png", unicodedata.normalize("NFD", "\u00e9t\u00e9.png"))
    rows = ["cat,a cat", "cat.png,a black cat", "cat.png,a cat", "sub\\\\dog.png,a dog", "none.png,x", "bird.png,"]
    rows += [unicodedata.normalize("NFC", "\u00e9t\u00e9.png") + ",summer"]
    csv = tmp_path / "list.csv"
    csv.write_text("\n".join(["image,caption", *rows]).replace("\\\\", "\\"), encoding="utf-8")
    found = write_captions(root, csv=csv)
    assert told(root) == {
        "cat.png": ("a cat", "a black cat"),
        "sub/dog.png": ("a dog",),
        unicodedata.normalize("NFD", "\u00e9t\u00e9.png"): ("summer",),
    }
    assert sorted(found.left_out) == ["bird.png", "list.csv, line 7", "list.csv: none.png"]


def test_a_csv_that_names_pictures_from_its_own_place(pictures, tmp_path, monkeypatch):
    root = pictures("cat.png", "dog.png")
    csv = tmp_path / "list.csv"
    csv.write_text(f"Photo;Title;weight\npictures/cat.png;a cat;2\n{root / 'dog.png'};a dog;1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="--image-key"):
        write_captions(root, csv=csv)
    write_captions(root.relative_to(tmp_path), csv=csv.relative_to(tmp_path), keys=Keys("photo", "title"))
    assert told(root) == {"cat.png": ("a cat",), "dog.png": ("a dog",)}
    assert json.loads((root / "metadata.jsonl").read_text().split("\n")[0]) == {
        "file_name": "cat.png", "text": "a cat", "weight": 2.0
    }  # fmt: skip


def test_what_exists_is_replaced_only_when_asked(pictures):
    root = pictures("cat.png", metadata_dot_csv="file_name,text\ncat.png,of the CSV\n")
    with pytest.raises(OutputExistsError, match=r"metadata\.csv already exists"):
        write_captions(root)
    assert not (root / "metadata.jsonl").exists()
    write_captions(root, csv=root / "metadata.csv")
    assert told(root) == {"cat.png": ("of the CSV",)}
    before = (root / "metadata.jsonl").read_bytes()
    with pytest.raises(OutputExistsError, match=r"metadata\.jsonl already exists; give --overwrite"):
        write_captions(root, origin="names")
    assert (root / "metadata.jsonl").read_bytes() == before
    write_captions(root, origin="names", overwrite=True)
    assert told(root) == {"cat.png": ("cat",)}


def test_nothing_to_caption(pictures, tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        write_captions(tmp_path / "none")
    with pytest.raises(DataError, match="has no usable pictures"):
        write_captions(tmp_path)
    root = pictures("0001.png")
    with pytest.raises(DataError, match=r"no picture in .* has a caption: 0001\.png: its name has no words"):
        write_captions(root)
    assert not (root / "metadata.jsonl").exists()


def test_pictures_that_no_metadata_can_name(pictures, tmp_path):
    root = pictures("cat.png")
    (tmp_path / "outside.png").write_bytes(png(1))
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    with open(os.fsencode(root) + b"/\xff cat.png", "wb") as file:
        file.write(png(1))
    found = write_captions(root)
    assert told(root) == {"cat.png": ("cat",)}
    assert len(found.left_out) == 2


def test_by_the_command_line(pictures, tmp_path):
    root = pictures("red_apple.png", "IMG_1.png")

    def run(*words):
        return CliRunner().invoke(app, ["data", *map(str, words)])

    done = run("inspect", root)
    assert done.exit_code == 1
    assert f"unclip data caption {root}" in done.stderr
    done = run("caption", root)
    assert (done.exit_code, done.stdout) == (0, f"{root / 'metadata.jsonl'}\n")
    assert "warning: IMG_1.png: its name has no words" in done.stderr
    assert "captions of 1 pictures: 1 from names" in done.stderr
    assert "red apple" in done.stderr
    assert "samples                      1" in run("inspect", root).stdout
    assert run("caption", root).exit_code == 1
    assert run("caption", root, "--from", "folders", "--overwrite", "-q").stderr == ""
    assert run("caption", root, "--image-key", "x").exit_code == 2
    (root / "metadata.jsonl").write_text(json.dumps({"photo": "red_apple.png", "title": "an apple"}))
    keys = ("--image-key", "photo", "--caption-key", "title")
    assert "samples                      1" in run("inspect", root, *keys).stdout
    assert run("pack", root, "--out", tmp_path / "shards", *keys, "-q").exit_code == 0
    assert "captions                     1" in run("inspect", tmp_path / "shards").stdout
    assert run("inspect", tmp_path / "shards", "--caption-key", "title").exit_code == 1
