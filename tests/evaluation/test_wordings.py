"""Free wordings, judged by a judge whose answers are known; and the built-in list."""

import json
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

import unclip
from unclip.data.emoji.language import plain
from unclip.data.emoji.phrases import PHRASES
from unclip.errors import DataError
from unclip.evaluation.wordings import Wording, read_wordings, wordings

BUILT_IN = Path(unclip.__file__).parent / "assets" / "emoji-judge" / "wordings.json"
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Judge:
    """Sees a picture's colour; a caption is the colour it names."""

    def read(self, captions):
        return torch.nn.functional.normalize(torch.tensor([COLOURS[c] for c in captions], dtype=torch.float), dim=-1)

    def look(self, images):
        seen = [image.resize((1, 1)).getpixel((0, 0)) for image in images]
        return torch.nn.functional.normalize(torch.tensor(seen, dtype=torch.float), dim=-1)


class Pipeline:
    """Draws blood red and everything else green."""

    def __init__(self):
        self.seeds = []
        self.concepts = None

    def __call__(self, prompts, *, seed):
        self.seeds += seed
        images = [Image.new("RGB", (8, 8), COLOURS["red" if "blood" in prompt else "green"]) for prompt in prompts]
        return types.SimpleNamespace(images=images)


@pytest.fixture
def data(tmp_path):
    rows = [{"file_name": f"{c}.png", "concept": c, "style": "flat", "captions": [c, f"a {c}"]} for c in COLOURS]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


LISTED = [
    Wording("blood", "words", frozenset({"red"})),
    Wording("grass", "words", frozenset({"green", "blue"})),
    Wording("the sky", "phrases", frozenset({"blue"})),
]


def test_what_is_found(data, tmp_path):
    pipeline = Pipeline()
    found = wordings(pipeline, Judge(), data, LISTED, batch_size=2, seed=4, sheet=tmp_path / "sheet.png")
    assert pipeline.seeds == [4, 5, 6]
    assert (found["num"], found["at_1"], found["at_5"]) == (3, 0.6667, 1.0)
    assert found["kinds"] == {
        "words": {"num": 2, "at_1": 1.0, "at_5": 1.0},
        "phrases": {"num": 1, "at_1": 0.0, "at_5": 1.0},
    }
    assert found["first_captions"]["blood"][0] == "red"
    assert found["chance_at_1"] == pytest.approx(4 / 3 / 3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 3 * 8


def test_what_is_reported(data):
    pipeline = Pipeline()
    pipeline.device = "cpu"
    pipeline.caption_encoder = types.SimpleNamespace(encode=lambda texts, device: types.SimpleNamespace(embeds=texts))
    pipeline.concepts = types.SimpleNamespace(reports=lambda texts, embeds: [text for text in texts if "x" in text])
    nonsense = [Wording(text, "nonsense", frozenset()) for text in ("xyzzy", "fnord")]
    found = wordings(pipeline, Judge(), data, LISTED + nonsense)
    assert found["num"] == 3
    assert found["reported"] == {"wordings": 0.0, "nonsense": 0.5}
    assert "nonsense" not in found["kinds"]
    assert wordings(pipeline, Judge(), data, LISTED)["reported"]["nonsense"] is None


def test_a_label_that_is_nobodys(data):
    with pytest.raises(DataError, match="has no concept called purple"):
        wordings(Pipeline(), Judge(), data, [Wording("plum", "words", frozenset({"purple"}))])


@pytest.mark.parametrize("content", ["{}", '{"words": ["a"]}', '{"nonsense": {"a": []}}', '{"words": {"a": "red"}}'])
def test_a_list_that_is_refused(tmp_path, content):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(DataError):
        read_wordings(tmp_path / "list.json")


def test_the_built_in_list():
    listed = read_wordings(BUILT_IN)
    assert len(listed) >= 300
    texts = [plain(wording.text) for wording in listed]
    assert len(set(texts)) == len(texts)
    known = {phrase.lower() for phrases in PHRASES.values() for phrase in phrases}
    assert not known & {wording.text for wording in listed}
    assert not {wording.text for wording in listed} & {label for wording in listed for label in wording.accepted}
