"""Train a byte-pair tokenizer for a CLIP text encoder on a data set's captions.

Knows captions and transformers' `CLIPTokenizer`; knows no network. Called by the CLIP task.
"""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from unclip.errors import ConfigError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(captions: Iterable[str], *, vocabulary_size: int, context_length: int) -> "CLIPTokenizer":
    """A `CLIPTokenizer` whose merges are learned from `captions`.

    Every byte is in the vocabulary, alone and at a word's end, so no text is ever unknown.

    Args:
        captions: the texts to learn from.
        vocabulary_size: at most this many tokens; fewer when the texts have no more to merge.
        context_length: the longest sequence in tokens, the start and end token included.

    Raises: ConfigError when the vocabulary is smaller than the bytes.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    num_merges = vocabulary_size - len(bytes_alone) - 2
    if num_merges < 0:
        raise ConfigError(f"vocabulary_size is {vocabulary_size}; the bytes alone need {len(bytes_alone) + 2}")
    learner = CLIPTokenizer().backend_tokenizer
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            # Named as special they get their numbers first, always the same: numbers decide between pairs that are
            # equally frequent, and else hang on a hash table's order, which changes from run to run.
            special_tokens=bytes_alone,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:num_merges]
    tokens = [*bytes_alone, *dict.fromkeys(a + b for a, b in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=context_length)
