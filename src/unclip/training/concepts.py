"""Computes the concepts of a data set, and the threshold below which a caption is unknown."""

import itertools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.clip.concepts import Concepts, best_threshold
from unclip.data.folder import CaptionedPictures, load_sizes
from unclip.data.nonsense import Nonsense
from unclip.errors import DataError
from unclip.training.conditions import FrozenClip
from unclip.training.teacher import read_phrases

NUM_CAPTIONS = 4000
"""Number of known captions, and of unknown ones, from which the threshold is measured."""
MAX_NAMES = 12
AT_ONCE = 256


def concepts_of(
    model: Path | str,
    data: Path,
    *,
    name: str = "this model",
    phrases: Path | None = None,
    seed: int = 0,
    progress: Callable[..., Any] | None = None,
) -> Concepts:
    """The concepts of a data set in the space of a model's CLIP.

    A concept is all pictures of one `concept`, else of one `label`, else of one first caption. Pictures that are held
    out or have no weight are left out. Its embedding is the weighted mean of its pictures' embeddings, with their mean
    norm; its names are the label and its captions. The threshold separates known captions (the names, or phrases) from
    nonsense.

    Args:
        model: a folder with CLIP's encoders, such as a model's.
        data: the folder of a data set.
        name: the model's name in messages.
        phrases: a corpus such as `unclip data language` writes; its lines that name concepts are the known captions.
        seed: of the choice of captions, and of the nonsense.
        progress: wraps an iterable, as `tqdm` does.

    Raises: DataError for a data set or phrases that cannot be used; CheckpointError for a folder without CLIP.
    """
    clip = FrozenClip(model)
    pictures = load_sizes(data, [clip.image_size])[0]
    groups = _groups(pictures)
    embeds = clip.embeddings_of(pictures, progress)
    weights = torch.tensor([record.weight for record in pictures.records])
    means = torch.stack([_mean(embeds[rows], weights[rows]) for rows in groups.values()])
    names = tuple(_names(pictures, rows) for rows in groups.values())
    draw = np.random.default_rng(seed)
    captions = _known_captions(phrases) if phrases is not None else [text for each in names for text in each]
    chosen = draw.permutation(len(captions))[:NUM_CAPTIONS]
    known = [captions[row] for row in chosen]
    nonsense = Nonsense((word for text in itertools.chain(*names, captions) for word in text.split()), draw)
    unknown = [nonsense.words() for _ in range(NUM_CAPTIONS)]
    unknown = [f"a {text}" if draw.random() < 0.4 else text for text in unknown]
    found = Concepts(name, names, means, 0.0)
    threshold = best_threshold(_closeness(found, clip, known), _closeness(found, clip, unknown))
    return Concepts(name, names, means, threshold)


def _groups(pictures: CaptionedPictures) -> dict[str, list[int]]:
    """The rows of the pictures of each concept. Where some pictures have one, those without are left out."""
    used = [(row, record) for row, record in enumerate(pictures.records) if record.weight and not record.held_out]
    named = any(record.concept or record.label for _, record in used)
    groups: dict[str, list[int]] = {}
    for row, record in used:
        key = record.concept or record.label or ("" if named else record.captions[0])
        if key:
            groups.setdefault(key, []).append(row)
    if not groups:
        raise DataError("the data set has no pictures for training")
    return groups


def _mean(embeds: Tensor, weights: Tensor) -> Tensor:
    mean = (F.normalize(embeds, dim=-1) * weights[:, None]).sum(dim=0)
    return F.normalize(mean, dim=0) * embeds.norm(dim=-1).mean()


def _names(pictures: CaptionedPictures, rows: list[int]) -> tuple[str, ...]:
    """The label, then the other names in lower case without their articles; none repeats another with more words."""
    records = [pictures.records[row] for row in rows]
    captions = {re.sub(r"^(an?|the) ", "", text.lower()) for record in records for text in record.captions}
    label = next((record.label for record in records if record.label), records[0].captions[0])
    names = [re.sub(r"^(an?|the) ", "", label)]
    for text in sorted(captions, key=lambda text: (len(text), text)):
        if not any(re.search(rf"\b{re.escape(name.lower())}\b", text) for name in names):
            names.append(text)
    return tuple(names[:MAX_NAMES])


def _known_captions(phrases: Path) -> list[str]:
    """The phrases that name concepts.

    Raises: DataError when no phrase does.
    """
    found = [phrase.text for phrase in read_phrases(phrases) if phrase.concepts]
    if not found:
        raise DataError(f"no phrase in {phrases} has concepts")
    return found


def _closeness(concepts: Concepts, clip: FrozenClip, captions: list[str]) -> Tensor:
    """How close each caption is to the concepts."""
    parts = [captions[start : start + AT_ONCE] for start in range(0, len(captions), AT_ONCE)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of captions that are too long
        return torch.cat([concepts.nearest(clip.text.encode(part).embeds, 1)[0] for part in parts])
