"""CLIP's tokenizer, read from a folder with the `tokenizers` library only.

The output equals that of transformers' `CLIPTokenizer`, but this module imports much faster. Folders with settings
that are not implemented are refused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from unclip.checkpoints.files import atomic_file, output_folder, read_json, safe_join, write_json
from unclip.clip.config import max_length_of
from unclip.errors import ConfigError, InputError, MissingFileError

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
UNLIMITED = 10**30
"""`model_max_length` if a folder does not set it."""

# Splits a caption before merging: special tokens, English contractions, words, single digits, the rest.
PIECES = rf"{re.escape(START)}|{re.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"

_SPECIAL = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
# Settings with neutral values, which have no effect here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_prefix_space": (False,),
    "additional_special_tokens": ([], None),
    "backend": ("tokenizers",),
    "do_lower_case": (True,),
    "extra_special_tokens": ([], {}, None),
    "pad_to_multiple_of": (None,),
    "padding_side": ("right",),
    "split_special_tokens": (False,),
    "stride": (0,),
    "tokenizer_class": ("CLIPTokenizer", "CLIPTokenizerFast", None),
    "truncation_side": ("right",),
}
# Settings that have no effect here at any value.
_IGNORED = {
    "added_tokens_decoder", "clean_up_tokenization_spaces", "errors", "is_local", "local_files_only", "max_length",
    "model_max_length", "name_or_path", "pad_token_type_id", "processor_class", "special_tokens_map_file",
    "truncation_strategy",
}  # fmt: skip
_PLAIN = ("lstrip", "rstrip", "single_word")


class CaptionTokenizer:
    """Converts captions to CLIP's token numbers: lower case, byte pairs, with start and end tokens.

    Call arguments are those of transformers' tokenizers that encoders use. Special tokens written in a caption are
    treated as text. A tokenizer keeps no state between calls, so several threads may share it.

    Args:
        vocabulary: token → number; contains the two special tokens.
        merges: pairs of tokens, in the order of merging.
        model_max_length: number of tokens that the text encoder reads.

    Raises: ConfigError for an invalid vocabulary or invalid merges.
    """

    def __init__(
        self, vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]], model_max_length: int = UNLIMITED
    ) -> None:
        self.model_max_length = model_max_length
        self._vocabulary, self._merges = dict(vocabulary), list(merges)
        try:
            self.bos_token_id, self.eos_token_id = self._vocabulary[START], self._vocabulary[END]
            model = BPE(
                vocab=self._vocabulary,
                merges=self._merges,
                unk_token=END,
                continuing_subword_prefix="",
                end_of_word_suffix=WORD_END,
                fuse_unk=False,
            )
        except Exception as problem:  # the library raises plain exceptions
            raise ConfigError(f"this is not a vocabulary of CLIP: {problem!r:.200}") from problem
        self._tokenizer = Tokenizer(model)
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._tokenizer.decoder = decoders.ByteLevel()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The tokenizer of a folder: tokenizer.json, or vocab.json and merges.txt, with their settings.

        Raises: ConfigError for a setting that is not implemented, such as further tokens or padding on the left
            (transformers' class must then be used); CheckpointError for files that cannot be read.
        """
        folder = Path(folder)
        settings = _optional_json(safe_join(folder, "tokenizer_config.json"))
        _check_settings(settings)
        _check_special(_optional_json(safe_join(folder, "special_tokens_map.json")), "special_tokens_map.json")
        if (folder / "added_tokens.json").exists():
            raise ConfigError(f"{folder} has added_tokens.json")
        limit = max_length_of(settings, str(folder / "tokenizer_config.json"))
        whole = safe_join(folder, "tokenizer.json")
        if whole.is_file():
            vocabulary, merges = _read_whole(whole)
        else:
            vocabulary = read_json(safe_join(folder, "vocab.json"))
            merges = _read_merges(safe_join(folder, "merges.txt"))
        made = cls(vocabulary, merges, UNLIMITED if limit is None else limit)
        _check_added(settings.get("added_tokens_decoder", {}), vocabulary)
        return made

    def save_pretrained(self, folder: str | Path) -> None:
        """Write vocab.json, merges.txt and the settings, which transformers can read."""
        folder = output_folder(folder)
        settings: dict[str, Any] = {"tokenizer_class": "CLIPTokenizer", **_SPECIAL}
        if self.model_max_length < UNLIMITED:
            settings["model_max_length"] = self.model_max_length
        write_json(folder / "vocab.json", self._vocabulary)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self._merges)]
        with atomic_file(folder / "merges.txt") as draft:
            draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(folder / "tokenizer_config.json", settings)

    def __len__(self) -> int:
        return len(self._vocabulary)

    def get_vocab(self) -> dict[str, int]:
        """Token → number."""
        return dict(self._vocabulary)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        max_length: int | None = None,
        truncation: bool = False,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> dict[str, Any]:
        """Token numbers, and a mask of the caption's own tokens.

        Args:
            text: one caption, or several.
            padding: "max_length" pads with end-of-text tokens to `max_length`, True to the longest caption.
            max_length: tokens, the special ones included; the model's by default.
            truncation: cut off tokens beyond `max_length`; the end-of-text token stays.
            add_special_tokens: add the start and end tokens.
            return_tensors: "pt" gives integer tensors [batch, tokens]; None gives lists, for one caption one list.
            verbose: no effect; an argument of transformers' tokenizers.

        Returns: `input_ids`, and `attention_mask` with 1 for the caption's tokens and 0 for padding.

        Raises: InputError for rows of different lengths as a tensor.
        """
        texts = [text] if isinstance(text, str) else list(text)
        limit = self.model_max_length if max_length is None else max_length
        around = 2 if add_special_tokens else 0
        rows = [found.ids for found in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        if truncation:
            rows = [row[: max(0, limit - around)] for row in rows]
        if add_special_tokens:
            rows = [[self.bos_token_id, *row, self.eos_token_id] for row in rows]
        length = limit if padding == "max_length" else max(map(len, rows), default=0) if padding else 0
        masks = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        rows = [row + [self.eos_token_id] * (length - len(row)) for row in rows]
        if return_tensors == "pt":
            if len({len(row) for row in rows}) > 1:
                raise InputError("captions of different lengths cannot form a tensor: set padding and truncation")
            return {"input_ids": _tensor(rows), "attention_mask": _tensor(masks)}
        if isinstance(text, str):
            return {"input_ids": rows[0], "attention_mask": masks[0]}
        return {"input_ids": rows, "attention_mask": masks}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text.replace(WORD_END, " ").strip()


def _tensor(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.long)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _check_settings(settings: Mapping[str, Any]) -> None:
    _check_special(settings, "tokenizer_config.json")
    for name, value in settings.items():
        if name not in {*_SPECIAL, *_IGNORED} and value not in _NEUTRAL.get(name, ()):
            raise ConfigError(f"{name} = {value!r:.80} in tokenizer_config.json is not implemented")


def _check_special(settings: Mapping[str, Any], file: str) -> None:
    for name, wanted in _SPECIAL.items():
        value = settings.get(name, wanted)
        if isinstance(value, Mapping):
            _check_plain(value, file)
            value = value.get("content")
        if value != wanted:
            raise ConfigError(f"{name} in {file} is {value!r:.80}, not {wanted!r}")
    if file != "tokenizer_config.json" and (other := set(settings) - set(_SPECIAL)):
        raise ConfigError(f"{file} has {', '.join(sorted(other)):.80}")


def _check_plain(token: Mapping[str, Any], file: str) -> None:
    if any(token.get(flag) for flag in _PLAIN):
        raise ConfigError(f"{file} has a special token that is not plain")


def _check_added(added: Any, vocabulary: Mapping[str, int]) -> None:
    """Raises: ConfigError for a token that is not one of the two special tokens with its number."""
    for number, token in added.items() if isinstance(added, Mapping) else [("?", None)]:
        content = token.get("content") if isinstance(token, Mapping) else None
        if not isinstance(token, Mapping) or content not in (START, END) or str(number) != str(vocabulary[content]):
            raise ConfigError(f"the added token {content!r:.80} is not one of CLIP's two special tokens")
        _check_plain(token, "added_tokens_decoder")


def _read_whole(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a tokenizer.json.

    Of its other settings, transformers' class uses only the sides of truncation and padding.

    Raises: ConfigError unless both are on the right.
    """
    parsed = read_json(path)
    for section in ("truncation", "padding"):
        value = parsed.get(section)
        if value is not None and (not isinstance(value, dict) or value.get("direction", "Right") != "Right"):
            raise ConfigError(f"{section} in {path} is {value!r:.200}; only the direction Right is implemented")
    try:
        model = parsed["model"]
        parts = vocabulary, merges, added = model["vocab"], model["merges"], parsed.get("added_tokens", [])
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
        is_bpe = model["type"] == "BPE" and [type(part) for part in parts] == [dict, list, list]
        if not is_bpe or any(len(pair) != 2 for pair in pairs):
            raise ConfigError(f"{path} does not contain a byte-pair encoding")
        _check_added({token["id"]: token for token in added}, vocabulary)
    except (KeyError, TypeError) as problem:
        raise ConfigError(f"{path} is not a tokenizer of CLIP: {problem!r:.80}") from problem
    return vocabulary, pairs  # type: ignore[return-value]


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise MissingFileError(f"{path} cannot be read: {problem}") from problem
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise ConfigError(f"{path} has a line that is not a pair")
    return pairs  # type: ignore[return-value]
