"""Writes a data set with its CLIP image embeddings as tar shards."""

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unclip.data.folder import USUAL_KEYS, Keys
from unclip.data.samples import CLIP, EMBEDDING, IMAGE_EXTENSIONS, decode, escaped, raw_samples, settle
from unclip.data.shard_writer import Portion, Unfinished
from unclip.data.shards import Damage, RawSample, about
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
    keys: Keys = USUAL_KEYS,
    device: torch.device | str = "cpu",
    progress: Callable[..., Any] | None = None,
) -> Damage:
    """Write shards with the captions and the CLIP image embedding of each sample, to train a prior or a decoder.

    The .json of a sample contains the fingerprint of the CLIP.

    The folder `out` appears when it is complete. Until then, its shards are in `unfinished_folder(out)`. The same call
    resumes from them: it reads their samples again to check that they did not change, and computes the rest.

    Args:
        data: a folder or shards.
        clip: a model's folder with `image_encoder` and `text_encoder`, or a `CLIPModel`.
        out: the folder to create.
        keep_pictures: also copy the pictures, which a decoder needs.
        per_shard: samples per shard.
        max_skipped_share: the share of samples, and of shards, that may be unreadable; they are listed as by
            `samples.pack`. If there are more, the unfinished shards are kept.
        batch_size: batch size of the image encoder.
        keys: as for `samples.raw_samples`.
        device: the device of the image encoder.
        progress: wraps an iterable, as `tqdm` does.

    Returns: the number of samples, and those that could not be read.

    Raises:
        DataError: the data set is missing, all or too many of its samples are unreadable, or its samples differ from
            those of the unfinished shards.
        OutputExistsError: `out` exists, or was started with other settings.
    """
    encoder, damage = FrozenClip(clip, device=device), Damage()
    pixels_as = json.loads(encoder.feature_extractor.to_json_string())
    settings = {"clip": encoder.fingerprint, "feature_extractor": pixels_as}
    shards = Unfinished(out, settings | {"keep_pictures": keep_pictures, "per_shard": per_shard})
    samples = raw_samples(data, damage, keys=keys)
    stream = iter(progress(samples, desc="embedding", unit="sample") if progress else samples)
    for number in itertools.count():
        portion = Portion(stream, per_shard)
        broken = shards.finished(number, portion)
        if broken is None:
            broken = {}
            shards.add(portion, _embedded(portion, encoder, keep_pictures, broken, batch_size), broken)
        damage.broken |= broken
        if portion.count < per_shard:
            break
    if is_empty := not shards.shards:
        shards.discard()
    settle(damage, data, out, is_empty=is_empty, max_skipped_share=max_skipped_share)
    shards.finish()
    return damage


def _embedded(
    samples: Iterable[RawSample], encoder: FrozenClip, keep_pictures: bool, broken: dict[str, str], batch_size: int
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Shard entries of the readable samples. The others are added to `broken`."""
    stream, size = iter(samples), encoder.image_size
    while batch := list(itertools.islice(stream, batch_size)):
        good = []
        for raw in batch:
            try:
                sample = decode(raw, [size])
                if not sample.pixels:
                    raise DataError("it has no picture")
                good.append((raw, sample.captions, sample.pixels[size]))
            except DataError as error:
                broken[escaped(raw.name)] = escaped(str(error))
        if not good:
            continue
        embeddings = encoder.embed(torch.stack([pixels for _, _, pixels in good]).float() / 127.5 - 1)
        for (raw, captions, _), embedding in zip(good, embeddings.numpy().astype(np.float16), strict=True):
            content = io.BytesIO()
            np.save(content, embedding)
            entry = about(raw) | {"captions": captions, CLIP: encoder.fingerprint}
            entry_json = json.dumps(entry).encode()  # ASCII, which preserves lone surrogates
            pictures = {name: raw.parts[name] for name in IMAGE_EXTENSIONS if keep_pictures and name in raw.parts}
            yield raw.key, {**pictures, "json": entry_json, EMBEDDING: content.getvalue()}
