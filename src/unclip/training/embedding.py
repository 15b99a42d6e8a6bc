"""CLIP image embeddings of a whole data set, computed once and kept as shards.

Knows CLIP and shards; knows no diffusion. Called by `unclip data embed`.
"""

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
    """Write shards with each sample's captions and CLIP image embedding, for training of a prior (or a decoder).

    The sample's .json says by a fingerprint which CLIP the embedding is of.

    The folder `out` appears once it is whole. Until then its shards lie in `unfinished_folder(out)`, and the same call
    goes on from them: it reads the samples that they were made of again, to see that they are the same, and computes
    the others.

    Args:
        data: a folder or shards.
        clip: a model's folder with `image_encoder` and `text_encoder`, or a `CLIPModel`.
        out: the folder to make.
        keep_pictures: copy the pictures too, which a decoder needs.
        per_shard: samples of which a shard is made.
        max_skipped_share: of the samples, and of the shards, that may be broken; they are listed as by `samples.pack`.
            With more, the unfinished shards stay.
        batch_size: pictures embedded at once.
        keys: as for `samples.raw_samples`.
        device: where they are embedded.
        progress: wraps an iterable, as `tqdm` does.

    Returns: how many samples there were, and what could not be read.

    Raises:
        DataError: the data set is not there, nothing in it can be read, too much cannot, or the samples are not those
            that unfinished shards were made of.
        OutputExistsError: `out` is there already, or was begun otherwise.
    """
    encoder, damage = FrozenClip(clip, device), Damage()
    pixels_as = json.loads(encoder.feature_extractor.to_json_string())
    asked = {"clip": encoder.fingerprint, "feature_extractor": pixels_as}
    shards = Unfinished(out, asked | {"keep_pictures": keep_pictures, "per_shard": per_shard})
    samples = raw_samples(data, damage, keys=keys)
    told = iter(progress(samples, desc="embedding", unit="sample") if progress else samples)
    for number in itertools.count():
        portion = Portion(told, per_shard)
        broken = shards.known(number, portion)
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
    """Parts of the samples that can be read; the others go into `broken`."""
    stream = iter(samples)
    while batch := list(itertools.islice(stream, batch_size)):
        yield from _batch(batch, encoder, keep_pictures, broken)


def _batch(
    batch: list[RawSample], encoder: FrozenClip, keep_pictures: bool, broken: dict[str, str]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    good = []
    for raw in batch:
        try:
            sample = decode(raw, [encoder.image_size])
            if not sample.pixels:
                raise DataError("it has no picture")
            good.append((raw, sample))
        except DataError as error:
            broken[escaped(raw.name)] = escaped(str(error))
    if not good:
        return
    pixels = torch.stack([sample.pixels[encoder.image_size] for _, sample in good])
    for (raw, sample), embedding in zip(good, encoder.embed(pixels.float() / 127.5 - 1), strict=True):
        content = io.BytesIO()
        np.save(content, embedding.numpy().astype(np.float16))
        said = about(raw) | {"captions": sample.captions, CLIP: encoder.fingerprint}
        told = json.dumps(said).encode()  # plain ASCII: half a character in it stays what it is
        pictures = {name: raw.parts[name] for name in IMAGE_EXTENSIONS if keep_pictures and name in raw.parts}
        yield raw.key, {**pictures, "json": told, EMBEDDING: content.getvalue()}
