"""`unclip concepts`: the list of a model, a search, a sheet, and writing the list."""

import json
import shutil

import pytest
import torch
from PIL import Image

from unclip import Concepts

NAMES = (("Cat face", "cat"), ("Red apple",), ("Dog",))


@pytest.fixture
def listed(model, tmp_path):
    folder = tmp_path / "listed"
    shutil.copytree(model, folder)
    Concepts("tiny", NAMES, torch.eye(3, 32), 2.0).write(folder)
    return folder


def test_a_list_and_a_search(unclip, listed):
    assert unclip("concepts", "--model", listed).lines == ["Cat face: cat", "Red apple", "Dog"]
    assert unclip("concepts", "--model", listed, "--limit", 1).lines == ["Cat face: cat"]
    assert unclip("concepts", "dog", "cat", "dog", "--model", listed).lines == ["Dog", "Cat face: cat"]
    found = [json.loads(line) for line in unclip("concepts", "cat", "--model", listed, "--json").lines]
    assert found == [{"label": "Cat face", "names": ["cat"]}]


def test_the_nearest_in_meaning(unclip, listed):
    done = unclip("concepts", "poodle", "--model", listed)
    assert len(done.lines) == 3
    assert "no name has 'poodle'; the nearest in meaning:" in done.err


def test_a_sheet(unclip, listed, tmp_path):
    sheet = tmp_path / "sheet.png"
    done = unclip("concepts", "dog", "cat", "--model", listed, "--sheet", sheet)
    assert done.code == 0, done.err
    assert done.lines[-1] == str(sheet)
    with Image.open(sheet) as image:
        assert image.width > image.height
    assert "already exists" in unclip("concepts", "dog", "--model", listed, "--sheet", sheet).err


def test_a_model_without_a_list(unclip, model):
    done = unclip("concepts", "--model", model)
    assert done.code == 1
    assert "unclip concepts --from DATA --model" in done.err


def test_a_list_is_written(unclip, model, tmp_path):
    folder, data = tmp_path / "mine", tmp_path / "data"
    shutil.copytree(model, folder)
    data.mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (16, 16), name).save(data / f"{name}.png")
    lines = [json.dumps({"file_name": f"{name}.png", "captions": [f"a {name} square"]}) for name in ("red", "blue")]
    (data / "metadata.jsonl").write_text("\n".join(lines))
    done = unclip("concepts", "--from", data, "--model", folder)
    assert done.code == 0, done.err
    assert done.lines == [str(folder / "concepts.safetensors")]
    assert "2 concepts; a caption is unknown below a closeness of" in done.err
    assert unclip("concepts", "--model", folder).lines == ["red square", "blue square"]
    assert "already exists" in unclip("concepts", "--from", data, "--model", folder).err
    assert unclip("concepts", "--from", data, "--model", folder, "--overwrite").code == 0


def test_generate_reports_once(unclip, listed, tmp_path):
    done = unclip("generate", "asdfgh", "-n", 2, "--model", listed, "--out", tmp_path / "o", "--seed", 1,
                  "--prior-steps", 2, "--decoder-steps", 2, "--super-res-steps", 2, "--batch-size", 1)  # fmt: skip
    assert done.code == 0, done.err
    assert done.err.count("warning: 'asdfgh' is not close to anything tiny knows; nearest: ") == 1


def test_phrases_need_a_data_set(unclip, listed):
    assert "--phrases needs --from" in unclip("concepts", "--phrases", "x.jsonl", "--model", listed).err
