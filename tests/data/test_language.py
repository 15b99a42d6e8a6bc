"""The language corpus: made end to end from small packages, and its rules."""

import hashlib
import io
import json
import tarfile
from dataclasses import replace

import pytest

from unclip.data.emoji import language
from unclip.data.emoji.language import build_language, plain, plural
from unclip.errors import DataError

LABELS = [
    {"emoji": "🍎", "hexcode": "1F34E", "label": "red apple", "tags": ["fruit"], "group": 4},
    {"emoji": "🐶", "hexcode": "1F436", "label": "dog face", "tags": ["puppy", "pet"], "group": 3},
    {"emoji": "🦭", "hexcode": "1F9AD", "label": "seal", "tags": ["sea lion"], "group": 3},
]
CLDR = {"annotations": {"annotations": {"🐶": {"default": ["puppy", "pooch"]}, "🦭": {"default": ["flipper"]}}}}
GERMAN = {
    "annotations": {
        "annotations": {
            "🐶": {"default": ["Haustier", "Hund"], "tts": ["Hundegesicht"]},
            "🍎": {"default": ["Obst", "Haustier"], "tts": ["roter Apfel"]},
        }
    }
}
NOUNS = """\
  1 the licence
00000001 05 n 02 poodle 0 poodle_dog 0 001 @ 00000002 n 0000 | an intelligent dog with a curly coat (often clipped); "x"
00000002 05 n 01 seal 0 001 @ 00000001 n 0000 | a marine mammal
00000003 18 n 01 lincoln 0 001 @i 00000001 n 0000 | a president
00000004 09 n 01 idea 0 001 @ 00000001 n 0000 | the content of a thought
"""
SENSES = """\
poodle%1:05:00:: 00000001 1 3
seal%1:05:00:: 00000002 1 9
lincoln%1:18:00:: 00000003 1 9
idea%1:09:00:: 00000004 1 9
run%2:38:00:: 00000005 1 9
"""


def tarball(files):
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as tar:
        for name, content in files.items():
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            about = tarfile.TarInfo(f"package/{name}")
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return held.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Small tarballs, their hashes put in place of the pinned ones."""
    folder = tmp_path / "packages"
    folder.mkdir()
    contents = {
        "LABELS": {"en/data.json": LABELS},
        "KEYWORDS": {"annotations/en/annotations.json": CLDR, "annotations/de/annotations.json": GERMAN},
        "MORE_KEYWORDS": {"dist/emoji-en-US.json": {"🍎": ["red_apple", "school_snack"]}},
        "WORDNET": {"dict/data.noun": NOUNS, "dict/index.sense": SENSES},
    }
    for name, files in contents.items():
        package, content = getattr(language, name), tarball(files)
        (folder / package.tarball).write_bytes(content)
        monkeypatch.setattr(language, name, replace(package, sha256=hashlib.sha256(content).hexdigest()))
    return folder


@pytest.fixture
def data(tmp_path):
    rows = [
        {"concept": "1f34e", "label": "red apple", "captions": ["red apple", "an apple", "red apple, fruit"]},
        {"concept": "1f436", "label": "dog face", "captions": ["dog face", "a dog"], "weight": 2.0},
        {"concept": "1f9ad", "label": "seal", "captions": ["seal", "a seal"], "held_out": True},
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps({"file_name": f"{row['label']}.png", "style": "flat"} | row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def build(data, packages, tmp_path):
    def run(**settings):
        out = tmp_path / "corpus.jsonl"
        count = build_language(data, out, packages=packages, **{"count": 2000, **settings})
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(lines) == count
        return {line.pop("text"): line for line in lines}

    return run


def test_what_stands_in_it(build):
    corpus = build()
    assert corpus["red apple"] == {"concepts": ["1f34e"]}
    assert corpus["apple"] == {"concepts": ["1f34e"]}
    assert corpus["school snack"] == {"concepts": ["1f34e"]}  # emojilib's
    assert corpus["pooch"] == {"concepts": ["1f436"]}  # Unicode's
    gloss = "an intelligent dog with a curly coat"
    assert corpus[gloss] == {"means": [gloss, "poodle"]}
    poodle = corpus["a poodle"]
    assert poodle == {"means": ["poodle", f"poodle: {gloss}"]}
    dressed = [line for text, line in corpus.items() if text.endswith(" poodle") and text != "a poodle"]
    assert dressed
    assert poodle in dressed
    assert not any("lincoln" in text or "idea" in text for text in corpus)


def test_held_out_words_are_left_out(build):
    corpus = build()
    assert len(corpus) > 500
    for word in ("seal", "flipper", "sea lion"):
        assert not any(word in text for text in corpus)


def test_wordings_are_left_out(build):
    corpus = build(left_out=["A dog", "the red apple!"])
    assert not {"dog", "a dog", "the dog", "red apple", "a red apple"} & corpus.keys()
    assert "puppy" in corpus


def test_it_is_a_function_of_the_seed(build):
    one = build(seed=1, count=300)
    assert list(one) == list(build(seed=1, count=300))
    assert list(one) != list(build(seed=2, count=300))


def test_fewer_where_there_are_no_more(build, monkeypatch):
    monkeypatch.setattr(language, "SHARES", {"gloss": 1.0})
    monkeypatch.setattr(language, "SHARE_MISSPELT", 0.0)
    assert len(build(count=200)) < 20


def test_a_data_set_without_concepts(data, packages, tmp_path):
    (data / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    with pytest.raises(DataError, match="has no concepts with labels"):
        build_language(data, tmp_path / "out.jsonl", packages=packages)


def test_plain():
    assert plain("A Mug, of hot coffee!") == "mug of hot coffee"
    assert plain("the") == "the"


@pytest.mark.parametrize(("one", "many"), [("cat", "cats"), ("fox", "foxes"), ("cherry", "cherries"), ("key", "keys")])
def test_plural(one, many):
    assert plural(one) == many


def test_glasses_stay():
    assert (plural("glasses"), plural("glass")) == ("glasses", "glasses")


def test_nonsense_has_no_meaning(build):
    corpus = build()
    nonsense = [text for text, line in corpus.items() if line.get("means") == []]
    assert len(nonsense) > 10
    assert not any(word in text.split() for text in nonsense for word in ("poodle", "dog", "apple"))


def test_more_languages(build):
    corpus = build(languages=["de"])
    assert corpus["hundegesicht"] == corpus["hund"] == {"means": ["dog face"], "concepts": ["1f436"]}
    assert corpus["roter apfel"] == {"means": ["red apple"], "concepts": ["1f34e"]}
    assert "haustier" not in corpus  # of two emoji
    assert "hund" not in build()


def test_a_language_that_does_not_exist(build):
    with pytest.raises(DataError, match="annotations/xx"):
        build(languages=["xx"])
