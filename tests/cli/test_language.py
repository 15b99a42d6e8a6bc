"""`unclip data language`: what it asks for, and what it refuses."""

import json
from pathlib import Path

import pytest

import unclip as package
from unclip.data.emoji import language

WORDINGS = Path(package.__file__).parent / "assets" / "emoji-judge" / "wordings.json"


@pytest.fixture
def asked(monkeypatch):
    calls = []

    def build(data, out, **settings):
        calls.append((data, settings))
        out.write_text("{}\n")
        return 1

    monkeypatch.setattr(language, "build_language", build)
    return calls


def test_the_wordings_are_left_out(unclip, asked, tmp_path):
    done = unclip("data", "language", tmp_path, "--out", tmp_path / "corpus.jsonl", "--count", 7)
    assert done.code == 0, done.err
    assert done.lines == [str(tmp_path / "corpus.jsonl")]
    data, settings = asked[0]
    assert (data, settings["count"], settings["packages"]) == (tmp_path, 7, None)
    listed = json.loads(WORDINGS.read_text())
    assert settings["left_out"] == [wording for wordings in listed.values() for wording in wordings]


def test_an_existing_file_stays(unclip, asked, tmp_path):
    out = tmp_path / "corpus.jsonl"
    out.write_text("kept")
    done = unclip("data", "language", tmp_path, "--out", out)
    assert done.code == 1
    assert "already exists" in done.err
    assert (out.read_text(), asked) == ("kept", [])
    assert unclip("data", "language", tmp_path, "--out", out, "--overwrite").code == 0
