"""unclip's own reader of CLIP's tokenizers gives transformers' numbers, or refuses the folder."""

import importlib.resources
import json
import random
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from unclip import CheckpointError, ConfigError, InputError, MissingFileError
from unclip.clip.encoders import TextEncoder
from unclip.clip.tokenizer import END, START, CaptionTokenizer
from unclip.pipelines.component import read_component

BUILT_IN = importlib.resources.files("unclip") / "assets" / "emoji" / "tokenizer"
CONTEXT = 32
FULL = {"padding": "max_length", "max_length": CONTEXT, "truncation": True}
CAPTIONS = [
    "",
    " ",
    "\n\t\u00a0\u3000",
    "a strawberry",
    "  A   red\tapple\n on\r\na  TABLE ",
    "it's the dog's 3rd, isn't it? they'll we've I'm you'd 've",
    "IT'S THE DOG'S",
    "2024 ½ ٣ 四 12345",
    "café cafe\u0301 naïve Straße İstanbul ıI ſ ﬁ",
    "漢字とかな 한국어 русский العربية हिन्दी",
    "🍓 👩‍🚀 🏳️‍🌈 ☀️ 1️⃣",
    "\u200b\u200d\ufeff\x00\x1f\x85\u2028\ue000\U0010ffff",
    "...!!! ??? <|> </w> a</w> __ -- ’s “x”",
    "<|startoftext", "endoftext|>",
    "word " * 200,
    "a" * 5000,
    "🍓" * 300,
]  # fmt: skip


@pytest.fixture(scope="module")
def pair():
    return CLIPTokenizer.from_pretrained(BUILT_IN), CaptionTokenizer.from_pretrained(str(BUILT_IN))


def folder_of(path, *, vocabulary=True, **tokenizer_config):
    """A folder in the layout of 2022 (vocab.json, merges.txt) with the built-in vocabulary, and these settings."""
    path.mkdir(exist_ok=True)
    model = json.loads((BUILT_IN / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    if vocabulary:
        (path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
        lines = ["#version: 0.2", *(m if isinstance(m, str) else " ".join(m) for m in model["merges"])]
        (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
    return path


def token(content, **flags):
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False} | flags


def old_settings():
    special = {"bos_token": token(START), "eos_token": token(END), "unk_token": token(END), "pad_token": END}
    config = {
        name: {"__type": "AddedToken", **value} if name != "pad_token" else value for name, value in special.items()
    }
    more = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": CONTEXT}
    return special, config | more | {"name_or_path": "somewhere", "tokenizer_class": "CLIPTokenizer"}


def agree(theirs, ours, texts, **arguments):
    """Numbers, masks, lengths and texts again."""
    expected, found = theirs(texts, **arguments), ours(texts, **arguments)
    for name in ("input_ids", "attention_mask"):
        if isinstance(found[name], torch.Tensor):
            assert found[name].dtype == expected[name].dtype
            assert torch.equal(found[name], expected[name])
        else:
            assert found[name] == expected[name]
    return found


def test_it_is_as_large_and_reads_as_much(pair):
    theirs, ours = pair
    assert len(ours) == len(theirs) == 12288
    assert ours.model_max_length == theirs.model_max_length == CONTEXT
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


@pytest.mark.parametrize(
    "arguments",
    [
        FULL,
        {**FULL, "return_tensors": "pt"},
        {**FULL, "max_length": 7},
        {"add_special_tokens": False},
        {},
        {"padding": True},
        {"padding": True, "truncation": True, "max_length": 5, "return_tensors": "pt"},
    ],
    ids=str,
)
def test_the_same_tokens(pair, arguments):
    agree(*pair, CAPTIONS, **arguments)


@pytest.mark.parametrize("text", CAPTIONS, ids=ascii)
def test_one_caption(pair, text):
    theirs, ours = pair
    found = agree(*pair, text, add_special_tokens=False, verbose=False)
    assert ours.decode(found["input_ids"]) == theirs.decode(found["input_ids"])
    assert ours.decode(found["input_ids"][3:]) == theirs.decode(found["input_ids"][3:])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_any_text(pair, texts):
    agree(*pair, texts, **FULL)


def test_mixtures_of_what_is_odd(pair):
    letters = "abcK's're'LL12½٣<|>_-!?。漢字éÉßİı🍓👩‍🚀\u0301\u200d\x00\ufeff \t\n\u00a0\u3000"
    draw = random.Random(1)
    agree(*pair, ["".join(draw.choices(letters, k=draw.randrange(1, 60))) for _ in range(2000)], **FULL)


@pytest.mark.parametrize(
    "spelled", [END, START, "<|ENDOFTEXT|>", "<|StartOfText|>", f"a {END}{END} b", f"{START}cat{END}"]
)
@pytest.mark.parametrize("normalized", [False, True])
def test_special_tokens_that_a_person_spells_out(tmp_path, pair, tiny_pipeline, spelled, normalized):
    """They are text before any tokenizer sees them; in any case, for some look after they have made letters small."""
    _, ours = pair
    _, config = old_settings()
    for name in ("bos_token", "eos_token", "unk_token"):
        config[name]["normalized"] = normalized
    theirs = CLIPTokenizer.from_pretrained(folder_of(tmp_path / "old", **config))
    seen = []

    class Watched:
        device = torch.device("cpu")
        config = tiny_pipeline.text_encoder.config

        def __call__(self, ids):
            seen.append(ids)
            return tiny_pipeline.text_encoder(ids % len(tiny_pipeline.tokenizer))

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tiny context cuts them off
        for tokenizer in (theirs, ours):
            TextEncoder(Watched(), tokenizer).encode([f"a {spelled} b"])  # type: ignore[arg-type]
    assert torch.equal(*seen)
    inside = seen[0][0, 1:-1].tolist()
    assert ours.bos_token_id not in inside
    assert ours.eos_token_id not in inside[:5]


def test_special_tokens_are_text_here(pair):
    _, ours = pair
    assert not {ours.bos_token_id, ours.eos_token_id} & set(ours(f"a {END} b", add_special_tokens=False)["input_ids"])


def test_rows_of_different_lengths_are_no_tensor(pair):
    with pytest.raises(InputError, match="different lengths"):
        pair[1](["a", "a red apple on a table"], return_tensors="pt")


def test_threads_do_not_meet(pair):
    _, ours = pair
    wanted = ours(CAPTIONS, **FULL)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda i: ours(CAPTIONS, **FULL | {"max_length": CONTEXT - i % 2}), range(40)):
            assert found == wanted or len(found["input_ids"][0]) == CONTEXT - 1


# ---- folders ----


def test_the_layout_of_2022(tmp_path):
    special, config = old_settings()
    folder = folder_of(tmp_path / "old", **config)
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    theirs, ours = CLIPTokenizer.from_pretrained(folder), CaptionTokenizer.from_pretrained(folder)
    assert len(ours) == len(theirs)
    assert ours.model_max_length == theirs.model_max_length
    agree(theirs, ours, CAPTIONS, **FULL)


def test_added_tokens_in_the_settings(tmp_path):
    added = {"12286": token(START, special=True), "12287": token(END, special=True, normalized=False)}
    folder = folder_of(tmp_path / "old", added_tokens_decoder=added, model_max_length=CONTEXT)
    agree(CLIPTokenizer.from_pretrained(folder), CaptionTokenizer.from_pretrained(folder), CAPTIONS, **FULL)


def test_a_folder_that_names_no_length(tmp_path):
    folder = folder_of(tmp_path / "old")
    theirs, ours = CLIPTokenizer.from_pretrained(folder), CaptionTokenizer.from_pretrained(folder)
    assert min(ours.model_max_length, 77) == min(theirs.model_max_length, 77) == 77
    agree(theirs, ours, CAPTIONS, **FULL)


def test_what_it_writes_transformers_reads(tmp_path, pair):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "new")
    again = CLIPTokenizer.from_pretrained(tmp_path / "new")
    assert again.model_max_length == CONTEXT
    agree(again, CaptionTokenizer.from_pretrained(tmp_path / "new"), CAPTIONS, **FULL)
    assert again(CAPTIONS, **FULL)["input_ids"] == theirs(CAPTIONS, **FULL)["input_ids"]


@pytest.mark.parametrize(
    "setting",
    [
        {"padding_side": "left"},
        {"truncation_side": "left"},
        {"pad_token": "!"},
        {"bos_token": "<s>"},
        {"eos_token": token(END, lstrip=True)},
        {"extra_special_tokens": ["<cat-toy>"]},
        {"added_tokens_decoder": {"12288": token("<cat-toy>")}},
        {"added_tokens_decoder": {"7": token(END)}},
        {"added_tokens_decoder": ["no"]},
        {"tokenizer_class": "BertTokenizer"},
        {"split_special_tokens": True},
        {"add_bos_token": False},
        {"model_max_length": "many"},
        {"model_max_length": 1},
        {"something_new": 1},
    ],
    ids=str,
)
def test_settings_that_are_not_implemented(tmp_path, setting):
    with pytest.raises(ConfigError):
        CaptionTokenizer.from_pretrained(folder_of(tmp_path / "other", **{"model_max_length": CONTEXT, **setting}))


def test_files_that_hold_more(tmp_path):
    folder = folder_of(tmp_path / "more")
    (folder / "added_tokens.json").write_text('{"<cat-toy>": 12288}')
    with pytest.raises(ConfigError, match=r"added_tokens\.json"):
        CaptionTokenizer.from_pretrained(folder)
    (folder / "added_tokens.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"sep_token": "x"}')
    with pytest.raises(ConfigError, match="sep_token"):
        CaptionTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "Unigram", "vocab": []}},
        {"model": {"type": "BPE", "vocab": {}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {START: 0, END: 1}, "merges": ["a b"]}},
        {"model": {"type": "BPE", "vocab": {START: 0, END: 1}, "merges": ["a b c"]}},
        {"model": {"type": "BPE", "vocab": {START: "x", END: 1}, "merges": []}},
        {"model": None},
        {"added_tokens": [{"id": 12288, "content": "<cat-toy>"}]},
        {"added_tokens": [3]},
        {"added_tokens": {}},
    ],
    ids=str,
)
def test_a_tokenizer_json_of_another_kind(tmp_path, change):
    shutil.copytree(BUILT_IN, tmp_path / "kind")
    file = tmp_path / "kind" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change))
    with pytest.raises(ConfigError):
        CaptionTokenizer.from_pretrained(tmp_path / "kind")


@pytest.mark.parametrize("section", ["truncation", "padding"])
def test_sides_in_a_tokenizer_json_are_transformers_or_refused(tmp_path, section):
    parts = {
        "truncation": {"max_length": 5, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": "BatchLongest", "pad_to_multiple_of": 4, "pad_id": 1, "pad_type_id": 0}
        | {"pad_token": "!"},
    }
    shutil.copytree(BUILT_IN, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())  # it would have the last word
    settings = {name: value for name, value in config.items() if not name.endswith("_side")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    whole = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    ids = []
    for direction in ("Right", "Left"):
        changed = whole | {section: parts[section] | {"direction": direction}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
        theirs = CLIPTokenizer.from_pretrained(tmp_path)
        ids.append(theirs(CAPTIONS, **FULL)["input_ids"])
        if direction == "Right":
            assert CaptionTokenizer.from_pretrained(tmp_path)(CAPTIONS, **FULL)["input_ids"] == ids[0]
        else:
            with pytest.raises(ConfigError, match=section):
                CaptionTokenizer.from_pretrained(tmp_path)
    assert ids[0] != ids[1]
    place = tmp_path.parent, tmp_path.name
    read = read_component(*place, "CLIPTokenizer", torch_dtype=None, variant=None, own_clip=True)
    assert read(CAPTIONS, **FULL)["input_ids"] == ids[1]  # by transformers' class


def test_files_that_are_broken(tmp_path):
    folder = folder_of(tmp_path / "broken")
    (folder / "merges.txt").write_text("a b c\n")
    with pytest.raises(ConfigError, match="not a pair"):
        CaptionTokenizer.from_pretrained(folder)
    (folder / "merges.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError):
        CaptionTokenizer.from_pretrained(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(MissingFileError):
        CaptionTokenizer.from_pretrained(folder)
    with pytest.raises(MissingFileError):
        CaptionTokenizer.from_pretrained(folder_of(tmp_path / "empty", vocabulary=False))
