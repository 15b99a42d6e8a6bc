"""A sentence encoder as a teacher: it selects pictures for phrases by their similarity to the pictures' captions.

CLIP's text encoder learns the teacher's distribution over pictures for phrases that are not captions. Prior and decoder
are trained on such phrases with pictures sampled from it. The teacher's embeddings are cached on disk in parts.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from unclip.checkpoints.files import atomic_file
from unclip.data.batches import Rows
from unclip.data.folder import Record
from unclip.data.source import FolderSource, Source
from unclip.errors import ConfigError, DataError, UnclipError
from unclip.models.kernels import is_emulated
from unclip.training.embedding_cache import cache_folder
from unclip.training.recipe import TeacherSettings

AT_ONCE = 256
"""Batch size of the teacher."""
PART = 16_384
"""Texts per cache file."""
MAX_TOKENS = 64
NUM_UNKNOWN = 256
"""Number of different sets of pictures for phrases without meaning."""
TOKEN_SPREAD = 0.02
"""Standard deviation of a new CLIP's token embeddings."""
NUM_COMPARED, NUM_PICTURES = 48, 24
"""Number of pictures per phrase that are selected by similarity, and then by similarity and weight."""


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
            raise ConfigError(
                f"teacher.encoder is {folder}, which transformers cannot load as an encoder: {error}"
            ) from error
        self.device = torch.device(device)
        self.dtype = torch.float32 if is_emulated(torch.bfloat16, self.device) else torch.bfloat16
        self.encoder.to(self.device, self.dtype)
        digest = hashlib.sha256(f"{self.dtype} {MAX_TOKENS}".encode())
        for path in sorted(Path(folder).glob("*.safetensors")):
            digest.update(path.read_bytes())
        self.fingerprint = digest.hexdigest()

    @torch.inference_mode()
    def read(self, texts: Sequence[str]) -> Tensor:
        """Normalised embeddings float16 [num_texts, width], on the CPU."""
        found: list[Tensor | None] = [None] * len(texts)
        order = sorted(
            range(len(texts)), key=lambda row: len(texts[row])
        )  # similar lengths together, to reduce padding
        for start in range(0, len(order), AT_ONCE):
            rows = order[start : start + AT_ONCE]
            tokens = self.tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(self.device)
            hidden = self.encoder(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"][..., None].float()
            embeds = F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1).half().cpu()
            for row, embed in zip(rows, embeds, strict=True):
                found[row] = embed
        return torch.stack([embed for embed in found if embed is not None])

    def words(self, texts: Sequence[str], width: int) -> Tensor:
        """Initial token embeddings for a text encoder, float32 [num_texts, width], in which similar words are similar.

        They are the teacher's embeddings projected onto `width` principal axes, scaled to CLIP's initial spread.
        """
        embeds = self.read(texts).float()
        axes = torch.linalg.svd(embeds - embeds.mean(dim=0), full_matrices=False)[2][:width]
        found = (embeds - embeds.mean(dim=0)) @ axes.T
        found = F.pad(found, (0, width - found.shape[1]))
        return found * (TOKEN_SPREAD / found.square().mean().sqrt())

    def read_once(self, texts: Sequence[str], progress: Callable[..., Any] | None = None) -> Tensor:
        """As `read`, for many texts, with a cache on disk."""
        parts = [texts[start : start + PART] for start in range(0, len(texts), PART)]
        found = []
        for part in progress(parts, desc="reading by the teacher", unit="part") if progress else parts:
            digest = hashlib.sha256(self.fingerprint.encode())
            digest.update("\n".join(part).encode(errors="backslashreplace"))
            path = teacher_folder() / f"{digest.hexdigest()}.safetensors"
            known = _remembered(path, lambda part=part: {"embeddings": self.read(part)}, len(part))
            found.append(known["embeddings"])
        return torch.cat(found)


def teacher_folder() -> Path:
    """The cache folder of the teacher's embeddings: `teacher`, beside that of the pictures' embeddings."""
    return cache_folder().parent / "teacher"


def _remembered(path: Path, compute: Callable[[], dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    """The content of a cache file; if it is missing or damaged, the result of `compute`, which is cached."""
    try:
        known = load_file(path)
        if all(len(value) == count and value.isfinite().all() for value in known.values()):
            return known
    except (OSError, SafetensorError):
        pass
    found = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as draft:
            save_file({name: value.contiguous() for name, value in found.items()}, draft)
    except (OSError, SafetensorError, UnclipError):
        pass  # the next run computes it again
    return found


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
        text, concepts = entry["text"], entry.get("concepts", [])
        means = entry.get("means", [text])
    except (ValueError, KeyError, RecursionError) as error:
        raise DataError(f"{where} is not a JSON object with a text: {error!r}") from error
    texts = [text, *means, *concepts] if isinstance(means, list) and isinstance(concepts, list) else [None]
    if not all(isinstance(each, str) and each.strip() for each in texts):
        raise DataError(f"{where} needs a text; means and concepts, if given, must be lists of texts")
    return Phrase(text, tuple(means), tuple(concepts))


class Lessons:
    """Phrases with the teacher's embeddings and its distributions over pictures.

    Attributes:
        teacher: the teacher.
        texts: the phrases.
        lesson: int [num_phrases], the row of each phrase in the following tables. Phrases with one meaning share a row.
        pictures: int32 [num_lessons, k], indices of the source's pictures.
        shares: float32 [num_lessons, k], their probabilities.
        embeddings: float16 [num_lessons, width], normalised.
    """

    def __init__(
        self,
        settings: TeacherSettings,
        source: FolderSource,
        *,
        device: torch.device | str = "cpu",
        progress: Callable[..., Any] | None = None,
    ):
        teacher = self.teacher = Teacher(settings.encoder, device)
        records = source.records
        bank = [row for row, record in enumerate(records) if record.concept and record.weight]
        bank = bank or [row for row, record in enumerate(records) if record.weight]
        self.texts: list[str] = []
        known: dict[tuple[tuple[str, ...], tuple[str, ...]], int] = {}
        numbers = []
        for phrase in _all_phrases(settings, [records[row] for row in bank]):
            self.texts.append(phrase.text)
            unknown = -1 - len(numbers) % NUM_UNKNOWN
            numbers.append(known.setdefault((phrase.means, phrase.concepts), len(known)) if phrase.means else unknown)
        self.lesson = torch.tensor(numbers)
        self.lesson[self.lesson < 0] = len(known) - 1 - self.lesson[self.lesson < 0]
        keys = list(known)
        if not keys:
            raise DataError("no phrase has a meaning that the teacher could read")
        compared = _Bank([records[row] for row in bank], settings.named_bonus)
        similar, found, self.embeddings = compared.closest(keys, teacher, progress)
        logits = similar / settings.temperature + source.weights[bank].log()[found.long()]
        values, order = logits.topk(min(NUM_PICTURES, logits.shape[1]), dim=1)
        self.shares = values.softmax(dim=1)
        self.pictures = torch.tensor(bank, dtype=torch.int32)[found.gather(1, order).long()]
        if min(numbers) < 0:
            self._add_unknown(source.weights[bank], torch.tensor(bank, dtype=torch.int32))

    def _add_unknown(self, weights: Tensor, bank: Tensor) -> None:
        """Add the rows of phrases without meaning: random pictures, equally probable, and a zero embedding."""
        size = NUM_UNKNOWN, self.pictures.shape[1]
        drawn = torch.multinomial(
            weights.expand(size[0], -1), size[1], True, generator=torch.Generator().manual_seed(0)
        )
        self.pictures = torch.cat([self.pictures, bank[drawn]])
        self.shares = torch.cat([self.shares, torch.full(size, 1 / size[1])])
        self.embeddings = F.pad(self.embeddings, (0, 0, 0, NUM_UNKNOWN))

    def __len__(self) -> int:
        return len(self.texts)

    def draw(self, count: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
        """Random phrases, and their rows in the tables [count]."""
        rows = torch.randint(len(self.texts), (count,), generator=generator)
        return [self.texts[row] for row in rows.tolist()], self.lesson[rows]


class _Bank:
    """The pictures with whose captions phrases are compared."""

    def __init__(self, records: Sequence[Record], named_bonus: float):
        self.named_bonus = named_bonus
        self.texts = sorted({text for record in records for text in record.captions})
        place = {text: row for row, text in enumerate(self.texts)}
        own = [[place[text] for text in record.captions] for record in records]
        longest = max(map(len, own))
        self.captions = torch.tensor([rows + rows[:1] * (longest - len(rows)) for rows in own])
        self.rows: dict[str, list[int]] = {}
        for row, record in enumerate(records):
            if record.concept:
                self.rows.setdefault(record.concept, []).append(row)
        digest = hashlib.sha256(f"{named_bonus} {NUM_COMPARED} {json.dumps([self.texts, self.rows])}".encode())
        digest.update(self.captions.numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def closest(
        self,
        lessons: Sequence[tuple[tuple[str, ...], tuple[str, ...]]],
        teacher: Teacher,
        progress: Callable[..., Any] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The closest pictures of each lesson, which is its meanings and the concepts that it names. They are cached.

        Returns: the similarities float32 [num_lessons, k], each that of the picture's most similar caption; the
            pictures int32 [num_lessons, k]; and the teacher's normalised embeddings float16 [num_lessons, width].
        """
        digest = hashlib.sha256(f"{self.fingerprint} {teacher.fingerprint} {json.dumps(lessons)}".encode())
        path = teacher_folder() / f"{digest.hexdigest()}.safetensors"
        known = _remembered(path, lambda: self._compare(lessons, teacher, progress), len(lessons))
        return known["similar"], known["pictures"], known["embeddings"]

    def _compare(
        self,
        lessons: Sequence[tuple[tuple[str, ...], tuple[str, ...]]],
        teacher: Teacher,
        progress: Callable[..., Any] | None,
    ) -> dict[str, Tensor]:
        texts = sorted({text for means, _ in lessons for text in means} | set(self.texts))
        place = {text: row for row, text in enumerate(texts)}
        read = teacher.read_once(texts, progress)
        captions = read[[place[text] for text in self.texts]].to(teacher.dtype)
        parts = [lessons[start : start + 1024] for start in range(0, len(lessons), 1024)]
        found: dict[str, list[Tensor]] = {"similar": [], "pictures": [], "embeddings": []}
        for part in progress(parts, desc="comparing with the captions", unit="part") if progress else parts:
            mean = torch.stack([read[[place[text] for text in means]].float().mean(dim=0) for means, _ in part])
            similar = (captions @ mean.to(teacher.dtype).T).float()  # a row per caption, because selecting rows is fast
            best = similar[self.captions[:, 0]]
            for column in self.captions.T[1:]:
                torch.maximum(best, similar[column], out=best)
            best = best.T.contiguous()
            for row, (_, concepts) in enumerate(part):
                for concept in concepts:
                    best[row, self.rows.get(concept, [])] += self.named_bonus
            values, order = best.topk(min(NUM_COMPARED, best.shape[1]), dim=1)
            for name, value in (("similar", values), ("pictures", order.int())):
                found[name].append(value)
            found["embeddings"].append(F.normalize(mean, dim=-1).half())
        return {name: torch.cat(values) for name, values in found.items()}


def _all_phrases(settings: TeacherSettings, records: Sequence[Record]) -> Iterator[Phrase]:
    """The phrases of the corpus; without one, the captions."""
    if settings.phrases is not None:
        yield from read_phrases(settings.phrases)
        return
    for text in sorted({text for record in records for text in record.captions}):
        yield Phrase(text, (text,))


def taught(
    settings: TeacherSettings,
    source: Source,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[..., Any] | None = None,
) -> "TaughtSource":
    """The data set with phrases in addition to its captions.

    Raises: ConfigError when the data are not in folders.
    """
    if not isinstance(source, FolderSource):
        raise ConfigError("[teacher] needs data in folders; it does not support shards")
    return TaughtSource(source, Lessons(settings, source, device=device, progress=progress), settings.share)


class TaughtSource(FolderSource):
    """A data set in which some rows are phrases with pictures selected by the teacher."""

    def __init__(self, source: FolderSource, lessons: Lessons, share: float):
        self.__dict__.update(source.__dict__)  # the same pictures, which are not read twice
        self.lessons, self.share = lessons, share

    def draw(self, step: int, count: int, generator: torch.Generator) -> Rows:
        rows = super().draw(step, count, generator)
        phrases, lesson = self.lessons.draw(count, generator)
        column = torch.multinomial(self.lessons.shares[lesson], 1, generator=generator)
        shown = self.lessons.pictures[lesson].gather(1, column)[:, 0].long()
        taught = torch.rand(count, generator=generator) < self.share
        index = torch.where(taught, shown, rows.index)
        captions = [p if t else c for p, t, c in zip(phrases, taught.tolist(), rows.captions, strict=True)]
        return Rows(captions, {part.pixels.shape[-1]: part.images(index) for part in self.pictures}, index)
