"""The trained tokenizer: no text is unknown, sizes are kept, the same captions give the same one."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from unclip.training.clip import END, START, train_tokenizer

CAPTIONS = ["a red apple", "a green apple", "a picture of a red cherry", "grinning face, flat style"] * 3
TRAINED = train_tokenizer(CAPTIONS, vocabulary_size=600, context_length=16)


def test_sizes():
    assert 514 < len(TRAINED) <= 600
    assert TRAINED.model_max_length == 16
    assert len(train_tokenizer(CAPTIONS, vocabulary_size=520, context_length=8)) == 520
    assert len(train_tokenizer([], vocabulary_size=600, context_length=8)) == 514


def test_start_and_end_are_the_last_two():
    ids = TRAINED.convert_tokens_to_ids([START, END])
    assert ids == [len(TRAINED) - 2, len(TRAINED) - 1]
    encoded = TRAINED("an apple")["input_ids"]
    assert [encoded[0], encoded[-1]] == ids


def test_merges_are_learned():
    assert TRAINED.tokenize("apple") == ["apple</w>"]
    assert len(TRAINED.tokenize("zzxqj")) == 5


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_no_text_is_unknown(text):
    ids = TRAINED(text, add_special_tokens=False)["input_ids"]
    assert all(0 <= i < len(TRAINED) for i in ids)
    inside = [i for i in ids if i >= len(TRAINED) - 2]
    assert not inside or "<|" in text.lower()


@pytest.mark.parametrize("text", ["👩‍🚀🏽", "שלום עולם", "مرحبا", "e\u0301", "日本", "naïve", "ﬁ"])
def test_text_comes_back(text):
    import unicodedata

    ids = TRAINED(text, add_special_tokens=False)["input_ids"]
    back = TRAINED.decode(ids, clean_up_tokenization_spaces=False).replace(" ", "")
    assert back == unicodedata.normalize("NFC", text).replace(" ", "").lower()


def test_deterministic_and_kept_by_saving(tmp_path):
    again = train_tokenizer(iter(CAPTIONS), vocabulary_size=600, context_length=16)
    assert again.get_vocab() == TRAINED.get_vocab()
    TRAINED.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    texts = ["a red apple, 🍎", "", "A  RED\tapple"]
    assert loaded(texts)["input_ids"] == TRAINED(texts)["input_ids"] == again(texts)["input_ids"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 16
