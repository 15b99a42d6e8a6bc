"""A sentence encoder as a teacher: it selects pictures for phrases by their similarity to the pictures' captions.

CLIP's text encoder learns the teacher's distribution over pictures for phrases that are not captions. Prior and decoder
are trained on such phrases with pictures sampled from it.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from unclip.data.batches import Rows
from unclip.data.folder import Record
from unclip.data.source import FolderSource
from unclip.errors import ConfigError, DataError
from unclip.models.kernels import is_emulated
from unclip.training.embedding_cache import Progress, cache_folder, cached
from unclip.training.recipe import TeacherSettings

AT_ONCE, COMPARED_AT_ONCE = 256, 1024
"""Batch sizes of the teacher, and of the comparison with captions."""
PART = 16_384
"""Number of texts per file of the cache; an interruption costs at most the time of one part, about a minute."""
MAX_TOKENS = 64
NUM_UNKNOWN = 256
"""Number of different sets of pictures for phrases without meaning."""
TOKEN_SPREAD = 0.02
"""Standard deviation of a new CLIP's token embeddings."""
NUM_COMPARED, NUM_PICTURES = 48, 24
"""Number of pictures per phrase that are selected by similarity, and then by similarity and weight."""

Meaning = tuple[tuple[str, ...], tuple[str, ...]]
"""The texts that the teacher reads for a phrase, and the concepts that the phrase names."""


class Teacher:
    """A sentence encoder in transformers' format. An embedding is the normalised mean of the last layer's tokens.

    This is the pooling of Sentence-BERT (arXiv 1908.10084, §3).

    Raises: ConfigError when the folder does not contain an encoder and its tokenizer.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu"):
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.encoder: Any = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"teacher.encoder is {folder}, which transformers cannot load: {error}") from error
        self.device = torch.device(device)
        self.dtype = torch.float32 if is_emulated(torch.bfloat16, self.device) else torch.bfloat16
        self.encoder.to(self.device, self.dtype)
        digest = hashlib.sha256(f"{self.dtype} {MAX_TOKENS}".encode())
        for path in sorted(Path(folder).glob("*.safetensors")):
            digest.update(path.read_bytes())
        self.fingerprint = digest.hexdigest()

    def read(self, texts: Sequence[str], progress: Progress | None = None) -> Tensor:
        """Normalised embeddings float16 [num_texts, width], on the CPU. Full parts of long lists are cached."""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # similar lengths together: less padding
        parts = [[texts[row] for row in order[start : start + PART]] for start in range(0, len(order), PART)]
        shown = progress(parts, desc="encoding by the teacher", unit="part") if progress else parts
        return torch.cat([self._read_part(part) for part in shown])[torch.tensor(order).argsort()]

    def _read_part(self, texts: list[str]) -> Tensor:
        if len(texts) < PART:
            return self._encode(texts)
        name = hashlib.sha256(json.dumps([self.fingerprint, texts]).encode()).hexdigest()
        path = cache_folder().parent / "teacher" / f"{name}.safetensors"
        return cached(path, {"embeddings"}, len(texts), lambda: {"embeddings": self._encode(texts)})["embeddings"]

    @torch.inference_mode()
    def _encode(self, texts: list[str]) -> Tensor:
        found = []
        for start in range(0, len(texts), AT_ONCE):
            how: dict[str, Any] = {"padding": True, "truncation": True, "max_length": MAX_TOKENS}
            tokens = self.tokenizer(texts[start : start + AT_ONCE], return_tensors="pt", **how).to(self.device)
            hidden = self.encoder(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"][..., None].float()
            found.append(F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1).half().cpu())
        return torch.cat(found)

    def words(self, texts: Sequence[str], width: int) -> Tensor:
        """Initial token embeddings for a text encoder, float32 [num_texts, width], in which similar words are similar.

        They are the teacher's embeddings projected onto `width` principal axes, scaled to CLIP's initial spread.
        """
        embeds = self.read(texts).float()
        axes = torch.linalg.svd(embeds - embeds.mean(dim=0), full_matrices=False)[2][:width]
        found = (embeds - embeds.mean(dim=0)) @ axes.T
        found = F.pad(found, (0, width - found.shape[1]))
        return found * (TOKEN_SPREAD / found.square().mean().sqrt())


@dataclass(frozen=True)
class Phrase:
    """A line of a corpus: the text, the texts that the teacher reads in its place, and the concepts that it names.

    A phrase without meaning, so that the teacher reads nothing, stands for any picture.
    """

    text: str
    means: tuple[str, ...]
    concepts: tuple[str, ...] = ()


def read_phrases(path: Path) -> Iterator[Phrase]:
    """The lines of a corpus: plain text, or JSON objects with `text` and optionally `means` and `concepts`.

    Raises: DataError for a file that cannot be read, or for an invalid line.
    """
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _phrase(line.strip(), f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the phrases in {path} cannot be read: {error}") from error


def _phrase(line: str, where: str) -> Phrase:
    if not line.startswith("{"):
        return Phrase(line, (line,))
    try:
        entry = json.loads(line)
        text, means, concepts = entry["text"], entry.get("means", [entry["text"]]), entry.get("concepts", [])
        are_lists = isinstance(means, list) and isinstance(concepts, list)
        if not are_lists or not all(isinstance(each, str) and each.strip() for each in [text, *means, *concepts]):
            raise ValueError("text must be a string; means and concepts must be lists of strings")
    except (ValueError, KeyError, RecursionError) as error:
        raise DataError(f"{where} is not a JSON object with a text: {error!r}") from error
    return Phrase(text, tuple(means), tuple(concepts))


class TeacherPhrases:
    """Phrases with the teacher's embeddings and its distributions over pictures.

    Without a corpus, the phrases are the captions.

    Attributes:
        teacher: the teacher.
        texts: the phrases.
        rows: int [num_phrases], the row of each phrase in the following tables. Phrases with one meaning share a row.
        pictures: int32 [num_meanings, k], indices of the source's pictures.
        probabilities: float32 [num_meanings, k], of these pictures.
        embeddings: float16 [num_meanings, width], normalised.
    """

    def __init__(
        self, settings: TeacherSettings, source: FolderSource, device: torch.device, progress: Progress | None = None
    ):
        teacher = self.teacher = Teacher(settings.encoder, device)
        self.source, self.share = source, settings.share
        usable = [row for row, record in enumerate(source.records) if record.weight]
        usable = [row for row in usable if source.records[row].concept] or usable
        records = [source.records[row] for row in usable]
        captions = sorted({text for record in records for text in record.captions})
        phrases = [Phrase(text, (text,)) for text in captions]
        if settings.phrases is not None:
            phrases = list(read_phrases(settings.phrases))
        self.texts = [phrase.text for phrase in phrases]
        numbers: dict[Meaning, int] = {}
        meant = [each for each in phrases if each.means]
        if not meant:
            raise DataError("no phrase has a text for the teacher")
        for each in meant:
            numbers.setdefault((each.means, each.concepts), len(numbers))
        unknown = itertools.cycle(range(len(numbers), len(numbers) + NUM_UNKNOWN))
        self.rows = torch.tensor(
            [numbers[each.means, each.concepts] if each.means else next(unknown) for each in phrases]
        )
        meanings, bonus = list(numbers), settings.named_bonus
        digest = hashlib.sha256(json.dumps([teacher.fingerprint, NUM_COMPARED, bonus, meanings]).encode())
        digest.update(json.dumps([(each.captions, each.concept) for each in records]).encode())
        path = cache_folder().parent / "teacher" / f"{digest.hexdigest()}.safetensors"
        names = {"similar", "pictures", "embeddings"}
        found = cached(path, names, len(meanings), lambda: _compared(meanings, records, teacher, bonus, progress))
        self.embeddings, closest = found["embeddings"], found["pictures"].long()
        logits = found["similar"] / settings.temperature + source.weights[usable].log()[closest]
        values, order = logits.topk(min(NUM_PICTURES, logits.shape[1]), dim=1)
        self.probabilities = values.softmax(dim=1)
        self.pictures = torch.tensor(usable, dtype=torch.int32)[closest.gather(1, order)]
        if len(meant) < len(phrases):
            self._add_unknown(source.weights[usable], torch.tensor(usable, dtype=torch.int32))

    def _add_unknown(self, weights: Tensor, usable: Tensor) -> None:
        """Add the rows of phrases without meaning: random pictures, equally probable, and a zero embedding."""
        size = NUM_UNKNOWN, self.pictures.shape[1]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.multinomial(weights.expand(size[0], -1), size[1], replacement=True, generator=generator)
        self.pictures = torch.cat([self.pictures, usable[drawn]])
        self.probabilities = torch.cat([self.probabilities, torch.full(size, 1 / size[1])])
        self.embeddings = F.pad(self.embeddings, (0, 0, 0, NUM_UNKNOWN))

    def draw(self, count: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
        """Random phrases, and their rows in the tables [count]."""
        chosen = torch.randint(len(self.texts), (count,), generator=generator)
        return [self.texts[number] for number in chosen.tolist()], self.rows[chosen]

    def targets(self, rows: Tensor) -> dict[str, Tensor]:
        """The entries of a batch that `PhraseLosses` needs, for these rows of the tables."""
        tables = {"pictures": self.pictures, "probabilities": self.probabilities, "teacher_embeds": self.embeddings}
        return {name: table[rows] for name, table in tables.items()}

    def mixed(self, rows: Rows, generator: torch.Generator) -> Rows:
        """A batch of the source in which a share of the rows are phrases with pictures sampled by the teacher."""
        count = len(rows.captions)
        phrases, own = self.draw(count, generator)
        column = torch.multinomial(self.probabilities[own], 1, generator=generator)
        pictures = self.pictures[own].gather(1, column)[:, 0].long()
        is_phrase = torch.rand(count, generator=generator) < self.share
        index = torch.where(is_phrase, pictures, rows.index)
        captions = [p if t else c for p, t, c in zip(phrases, is_phrase.tolist(), rows.captions, strict=True)]
        return Rows(captions, {part.pixels.shape[-1]: part.images(index) for part in self.source.pictures}, index)


def _compared(
    meanings: Sequence[Meaning], records: Sequence[Record], teacher: Teacher, bonus: float, progress: Progress | None
) -> dict[str, Tensor]:
    """The closest pictures of each meaning.

    Args:
        meanings: of the phrases.
        records: the pictures, with their captions and concepts.
        teacher: reads the texts.
        bonus: added to the similarity of a picture whose concept is named.
        progress: wraps an iterable, as `tqdm` does.

    Returns: `similar` float32 [num_meanings, k], the similarity of each picture's most similar caption; `pictures`
        int32 [num_meanings, k], indices of `records`; and `embeddings` float16 [num_meanings, width], normalised.
    """
    captions = sorted({text for record in records for text in record.captions})
    texts = sorted({text for means, _ in meanings for text in means} | set(captions))
    place = {text: row for row, text in enumerate(texts)}
    read = teacher.read(texts, progress)
    known = read[[place[text] for text in captions]].to(teacher.dtype)
    row_of = {text: row for row, text in enumerate(captions)}
    own = [[row_of[text] for text in record.captions] for record in records]
    longest = max(map(len, own))
    columns = torch.tensor([rows + rows[:1] * (longest - len(rows)) for rows in own]).T
    named: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        named.setdefault(record.concept, []).append(row)
    found = []
    parts = [meanings[start : start + COMPARED_AT_ONCE] for start in range(0, len(meanings), COMPARED_AT_ONCE)]
    for part in progress(parts, desc="comparing with the captions", unit="part") if progress else parts:
        mean = torch.stack([read[[place[text] for text in means]].float().mean(dim=0) for means, _ in part])
        similar = (known @ mean.to(teacher.dtype).T).float()  # a row per caption, because selecting rows is fast
        best = similar[columns[0]]
        for column in columns[1:]:
            torch.maximum(best, similar[column], out=best)
        best = best.T.contiguous()
        for row, (_, concepts) in enumerate(part):
            for concept in concepts:
                best[row, named.get(concept, [])] += bonus
        values, order = best.topk(min(NUM_COMPARED, best.shape[1]), dim=1)
        found.append((values, order.int(), F.normalize(mean, dim=-1).half()))
    columns_of = zip(("similar", "pictures", "embeddings"), zip(*found, strict=True), strict=True)
    return {name: torch.cat(column) for name, column in columns_of}
