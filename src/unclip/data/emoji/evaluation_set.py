"""The evaluation set: captions of a data set that were seen in training, and captions that were held out."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from unclip.checkpoints.files import safe_join
from unclip.data.emoji.compose import STYLE as COMPOSED_STYLE
from unclip.data.folder import MAX_SKIPPED_SHARE, Record, check_share, read_records, some_of, square_pixels
from unclip.errors import DataError, ImageError, InputError
from unclip.images import MAX_PIXELS, open_image

PLAIN_STYLE = "flat"
"""The default style of the emoji set. Its plain captions are bare labels."""

Progress = Callable[[Iterable[int]], Iterable[int]]
"""Wraps an iterable of batches, as `tqdm` does."""


@dataclass(frozen=True)
class EvaluationSet:
    """The chosen concepts, and all concepts of the data set, whose captions a judge ranks.

    Attributes:
        data: the data set's folder.
        concepts: one record for each concept or composed caption of the data set.
        groups: the chosen records, by "seen" and "held_out".
        drawn: a description of how the records of each group were sampled.
        skipped: chosen files that could not be read, with the reasons. Their records are in no group.
    """

    data: Path
    concepts: list[Record]
    groups: dict[str, list[Record]]
    drawn: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def prepare(cls, data: Path, *, num_seen: int, num_held_out: int | None = None, seed: int) -> "EvaluationSet":
        """Choose at most `num_seen` concepts seen in training, by their weight, and `num_held_out` others (None: all).

        Only concepts in the plain style are chosen, or all in a data set without this style. Captions of the other
        concepts always name a style, but they are among those that a judge ranks.

        The pictures of the chosen concepts are opened. Unreadable ones are left out with a warning, up to the share
        that training allows.

        Raises: InputError for a number outside its limits; DataError if the data set cannot be used; UnsafeFileError
            for a name that leads out of the folder.
        """
        check_counts(num_seen=num_seen)
        if num_held_out is not None and num_held_out < 0:
            raise InputError(f"num_held_out is {num_held_out}; it must be 0 or more, or None for all")
        data = Path(data)
        concepts = concepts_of(read_records(data))
        plain = [record for record in concepts if record.style == PLAIN_STYLE] or list(concepts)
        seen = [record for record in plain if not record.held_out and record.weight > 0]
        if not seen:
            raise DataError("the data set has no concepts for training")
        generator = torch.Generator().manual_seed(seed)
        weights = torch.tensor([record.weight for record in seen], dtype=torch.float64)
        # torch.multinomial takes at most 2^24 weights, far more than a data set in memory has.
        chosen = torch.multinomial(weights, min(num_seen, len(seen)), generator=generator).tolist()
        held_out = [record for record in plain if record.held_out]
        drawn = {"seen": "by training weight, each concept once at most", "held_out": "all"}
        if num_held_out is not None and num_held_out < len(held_out):
            places = torch.randperm(len(held_out), generator=generator)[:num_held_out]
            held_out, drawn["held_out"] = [held_out[i] for i in places.tolist()], "at random"
        drawn["held_out"] += " that exist in the unmarked style"
        groups, skipped = _readable(data, {"seen": [seen[i] for i in chosen], "held_out": held_out})
        evaluation_set = cls(data, concepts, groups, drawn, skipped)
        if evaluation_set.composed:
            drawn["seen"] = "at random, each caption once at most"
            drawn["held_out"] = drawn["held_out"].removesuffix(" that exist in the unmarked style")
        return evaluation_set

    @property
    def captions(self) -> list[str]:
        """The distinct bare captions of all concepts."""
        return list(dict.fromkeys(bare_caption(record) for record in self.concepts))

    @property
    def composed(self) -> bool:
        """Whether captions name combinations (see `unclip.data.emoji.compose`), not single concepts."""
        return all(record.style == COMPOSED_STYLE for record in self.concepts)

    def captions_of(self, group: str) -> list[str]:
        """The bare captions of a group."""
        return [bare_caption(record) for record in self.groups[group]]

    def pictures(self, group: str) -> list[Image.Image]:
        """The real pictures of a group in the same order: RGB, padded to squares with white as in training.

        Raises: ImageError for a picture that can no longer be read.
        """
        return [squared(open_image(safe_join(self.data, record.file_name))) for record in self.groups[group]]

    def about(self, group: str) -> dict[str, object]:
        """The description of a group in a report: its number, how it was chosen, and how many were left out."""
        found: dict[str, object] = {"num": len(self.groups[group]), "drawn": self.drawn[group]}
        if group == "held_out":
            held_out = [record for record in self.concepts if record.held_out]
            found["num_in_all"] = len(held_out)
            if not self.composed:
                plain = any(record.style == PLAIN_STYLE for record in self.concepts)
                found["num_without_plain_style"] = sum(plain and record.style != PLAIN_STYLE for record in held_out)
        return found

    def left_out(self) -> dict[str, object]:
        """The unreadable pictures for a report: their number and the reasons; empty if all were readable."""
        return {"num_skipped": len(self.skipped), "skipped": self.skipped} if self.skipped else {}


def squared(image: Image.Image) -> Image.Image:
    """An RGB picture padded to a square with white, of the longer side, or of the largest side that can be read."""
    if image.width == image.height:
        return image
    side = min(max(image.size), math.isqrt(MAX_PIXELS))
    return Image.fromarray(square_pixels(image, side).permute(1, 2, 0).numpy())


def _readable(data: Path, groups: dict[str, list[Record]]) -> tuple[dict[str, list[Record]], dict[str, str]]:
    """The records with readable pictures by group, and the files of the others with the reasons.

    Raises: DataError if too many are unreadable, or all of the seen ones.
    """
    broken: dict[str, str] = {}
    for record in (record for records in groups.values() for record in records):
        path = safe_join(data, record.file_name)
        try:
            open_image(path)
        except ImageError as error:
            broken[record.file_name] = str(error)
    if not broken:
        return groups, broken
    kept = {name: [each for each in records if each.file_name not in broken] for name, records in groups.items()}
    count = sum(map(len, groups.values()))
    what = f"chosen pictures in {data}"
    if not kept["seen"]:
        raise DataError(f"none of the seen {what} can be read: {some_of(broken)}")
    check_share(broken, len(broken), count, MAX_SKIPPED_SHARE, what)
    warnings.warn(f"{len(broken)} of {count} {what} cannot be read and are skipped: {some_of(broken)}", stacklevel=4)
    return kept, broken


def batches(count: int, batch_size: int, *, seed: int, progress: Progress = iter) -> Iterator[tuple[slice, list[int]]]:
    """The rows of each batch with their seeds: row i has seed + i for every batch size."""
    for start in progress(range(0, count, batch_size)):
        end = min(start + batch_size, count)
        yield slice(start, end), list(range(seed + start, seed + end))


def check_counts(**counts: int) -> None:
    """Raises: InputError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} is {count}; it must be at least 1")


def concepts_of(records: Sequence[Record], plain_style: str = PLAIN_STYLE) -> list[Record]:
    """One record for each concept: that of the plain style, or the first.

    Composed pictures with the same caption are one concept, which is held out only if all of them are. Any other record
    without a concept counts as its own concept.
    """
    found: dict[str, Record] = {}
    for place, record in enumerate(records):
        composed = record.style == COMPOSED_STYLE
        key = f"={record.captions[0]}" if composed else record.concept or f"#{place}"
        known = found.get(key)
        better = known is not None and (
            known.held_out > record.held_out if composed else record.style == plain_style != known.style
        )
        if known is None or better:
            found[key] = record
    return list(found.values())


def bare_caption(record: Record, plain_style: str = PLAIN_STYLE) -> str:
    """The plain caption without the name of its style."""
    caption = record.captions[0]
    return caption if record.style == plain_style else caption.removesuffix(f", {record.style} style")
