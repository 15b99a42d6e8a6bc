"""The list of concepts of a data set, and nonsense."""

import json

import numpy as np
import pytest
import torch

from unclip.data.nonsense import Nonsense
from unclip.errors import DataError
from unclip.training.concepts import concepts_of
from unclip.training.conditions import FrozenClip


def test_a_list_of_a_data_set(clip_model, pictures):
    found = concepts_of(clip_model, pictures, name="shapes")
    assert len(found) == 10  # two are held out
    assert "green bar" not in found.labels
    assert found.names[0] == ("red circle",)
    clip = FrozenClip(clip_model)
    assert found.embeddings.shape == (10, clip.width)
    assert -1 <= found.threshold <= 1
    again = concepts_of(clip_model, pictures, name="shapes")
    assert again.threshold == found.threshold
    assert torch.equal(again.embeddings, found.embeddings)


def test_captions_are_concepts_where_nothing_has_a_name(clip_model, pictures, tmp_path):
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps({"file_name": str(pictures / r["file_name"]), "captions": r["captions"]}) for r in rows]
    for row in rows:
        (tmp_path / row["file_name"]).write_bytes((pictures / row["file_name"]).read_bytes())
    lines = [json.dumps({"file_name": row["file_name"], "captions": row["captions"]}) for row in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert len(concepts_of(clip_model, tmp_path)) == 12


def test_phrases_for_the_threshold(clip_model, pictures, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a crimson disc", "concepts": ["red circle"]}\n{"text": "zxcv", "means": []}\n')
    concepts_of(clip_model, pictures, phrases=corpus)
    corpus.write_text('{"text": "zxcv", "means": []}\n')
    with pytest.raises(DataError, match="has concepts"):
        concepts_of(clip_model, pictures, phrases=corpus)


def test_nonsense_is_in_no_vocabulary():
    vocabulary = ["apple", "banana", "cherry", "house", "mouse", "window", "table", "chair"]
    nonsense = Nonsense(vocabulary, np.random.default_rng(0))
    captions = [nonsense.words() for _ in range(300)]
    words = {word for caption in captions for word in caption.split()}
    assert not words & set(vocabulary)
    assert all(len(word) > 2 for word in words)
    assert len(set(captions)) > 200
    again = Nonsense(vocabulary, np.random.default_rng(0))
    assert [again.words() for _ in range(300)] == captions
