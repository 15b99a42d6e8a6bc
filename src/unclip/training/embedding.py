"""CLIP image embeddings of a whole data set, computed once and kept as shards.

Knows CLIP and shards; knows no diffusion. Called by `unclip data embed`.
"""

import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unclip.checkpoints.files import atomic_folder
from unclip.data.samples import raw_samples, settle
from unclip.data.shards import Damage, RawSample, about, write_shards
from unclip.data.source import EMBEDDING, IMAGE_EXTENSIONS, decode
from unclip.errors import DataError
from unclip.training.conditions import FrozenClip


def embed(
    data: str | Path,
    clip: Path,
    out: Path,
    *,
    keep_pictures: bool = False,
    per_shard: int = 10_000,
    max_skipped_share: float = 0.01,
    batch_size: int = 128,
    progress: Callable[..., Any] | None = None,
) -> Damage:
    """Write shards with each sample's captions and CLIP image embedding, for training of a prior (or a decoder).

    Args:
        data: a folder or shards.
        clip: a model's folder with `image_encoder` and `text_encoder`.
        out: the folder to make; it appears whole or not at all.
        keep_pictures: copy the pictures too, which a decoder needs.
        per_shard: samples in a shard.
        max_skipped_share: of the samples, and of the shards, that may be broken; they are listed as by `samples.pack`.
        batch_size: pictures embedded at once.
        progress: wraps an iterable, as `tqdm` does.

    Returns: how many samples there were, and what could not be read.

    Raises:
        DataError: the data set is not there, nothing in it can be read, or too much cannot.
        OutputExistsError: `out` is there already.
    """
    encoder, damage = FrozenClip(clip), Damage()
    samples = raw_samples(data, damage)
    told = progress(samples, desc="embedding", unit="sample") if progress else samples

    def embedded() -> Iterator[tuple[str, dict[str, bytes]]]:
        while batch := list(itertools.islice(told, batch_size)):
            yield from _embedded(batch, encoder, keep_pictures, damage)

    with atomic_folder(out) as draft:
        written = write_shards(embedded(), draft, per_shard=per_shard)
        settle(damage, data, out, is_empty=not written, max_skipped_share=max_skipped_share)
    return damage


def _embedded(
    batch: list[RawSample], encoder: FrozenClip, keep_pictures: bool, damage: Damage
) -> Iterator[tuple[str, dict[str, bytes]]]:
    good = []
    for raw in batch:
        try:
            sample = decode(raw, [encoder.image_size])
            if not sample.pixels:
                raise DataError("it has no picture")
            good.append((raw, sample))
        except DataError as error:
            damage.broken[raw.name] = str(error)
    if not good:
        return
    pixels = torch.stack([sample.pixels[encoder.image_size] for _, sample in good])
    for (raw, sample), embedding in zip(good, encoder.embed(pixels.float() / 127.5 - 1), strict=True):
        content = io.BytesIO()
        np.save(content, embedding.numpy().astype(np.float16))
        told = json.dumps(about(raw) | {"captions": sample.captions}, ensure_ascii=False).encode()
        pictures = {name: raw.parts[name] for name in IMAGE_EXTENSIONS if keep_pictures and name in raw.parts}
        yield raw.key, {**pictures, "json": told, EMBEDDING: content.getvalue()}
