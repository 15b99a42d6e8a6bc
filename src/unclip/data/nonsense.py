"""Make captions without meaning, to train a model to recognise unknown captions, and to test this."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

KEY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm", "1234567890")
"""Rows of a keyboard."""
SIGNS = "".join(KEY_ROWS) + "!?.,#*-"
LENGTHS = (3, 11)
MAX_LENGTH = 16
KINDS = {"pronounceable": 0.55, "letters": 0.25, "keys": 0.15, "one sign": 0.05}
"""The share of each kind of word."""
COUNTS = (0.5, 0.25, 0.15, 0.1)
"""How often a caption has one word, two words and so on."""


class Nonsense:
    """Makes random words that are not in a vocabulary.

    Args:
        vocabulary: real words. Pronounceable nonsense follows their sequences of three letters.
        draw: the random source.
    """

    def __init__(self, vocabulary: Iterable[str], draw: np.random.Generator) -> None:
        self.vocabulary, self.draw = frozenset(vocabulary), draw
        self.following: dict[str, list[str]] = defaultdict(list)
        for word in sorted(word for word in self.vocabulary if word.isalpha()):
            for end in range(len(word) + 1):
                self.following[f"^^{word}"[end : end + 2]].append(f"{word}$"[end])

    def words(self) -> str:
        """One to four words."""
        return " ".join(self.word() for _ in range(1 + int(self.draw.choice(len(COUNTS), p=COUNTS))))

    def word(self) -> str:
        """A word of three letters or more."""
        while True:
            word = self._word(str(self.draw.choice(list(KINDS), p=list(KINDS.values()))))
            if len(word) > 2 and word not in self.vocabulary:
                return word

    def _word(self, kind: str) -> str:
        length = int(self.draw.integers(*LENGTHS))
        if kind == "one sign":
            return self._one_of(SIGNS) * length
        if kind == "letters" or (kind == "pronounceable" and not self.following):
            return "".join(self._one_of("abcdefghijklmnopqrstuvwxyz") for _ in range(length))
        if kind == "keys":
            row = self._one_of(KEY_ROWS)
            if self.draw.random() < 0.3:
                return "".join(self._one_of(row) for _ in range(length))
            start = int(self.draw.integers(len(row) - 3))
            return (row + row[::-1])[start : start + length]
        word = "^^"
        while word[-1] != "$" and len(word) < MAX_LENGTH:
            word += self._one_of(self.following[word[-2:]])
        return word.strip("^$")

    def _one_of(self, choices: "list[str] | tuple[str, ...] | str") -> str:
        return choices[int(self.draw.random() * len(choices))]
