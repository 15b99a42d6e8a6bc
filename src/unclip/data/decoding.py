"""Decode one sample of a shard: its captions, its picture and its image embedding."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.data.folder import read_pixels, texts_of, weight_in
from unclip.data.shards import EMBEDDING, RawSample, about
from unclip.errors import DataError, ImageError
from unclip.images import PICTURE_SUFFIXES, open_image

IMAGE_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)
CLIP = "clip"
"""What a sample's .json calls the fingerprint of the CLIP that its embedding is of."""


@dataclass(frozen=True)
class Sample:
    """As `decode` gives it: pixels are uint8 [3, size, size] by size, the embedding float32 [width].

    `clip` is the fingerprint of the CLIP that the embedding is of; None where the sample does not say it.
    """

    name: str
    captions: tuple[str, ...]
    pixels: dict[int, Tensor]
    embedding: Tensor | None
    clip: str | None = None


def decode(raw: RawSample, sizes: Sequence[int]) -> Sample:
    """Captions, pixels at each size (uint8) and the embedding of a sample, as far as it has them.

    Raises: DataError for a sample without caption, with neither picture nor embedding, or with a broken one; and for a
        weight that cannot be used.
    """
    captions = read_captions(raw)
    weight_in(about(raw))
    image = _image(raw)
    embedding = _embedding(raw.parts[EMBEDDING]) if EMBEDDING in raw.parts else None
    if image is None and embedding is None:
        raise DataError(f"it has no picture (.{', .'.join(IMAGE_EXTENSIONS)}) and no .{EMBEDDING}{_found(raw)}")
    pixels = {}
    if image is not None and sizes:
        try:
            pixels = read_pixels(io.BytesIO(image), raw.key, sizes)
        except ImageError as error:
            raise DataError(str(error)) from error
    clip = about(raw).get(CLIP) if embedding is not None else None
    return Sample(raw.name, captions, pixels, embedding, clip if isinstance(clip, str) else None)


def read_picture(raw: RawSample) -> Image.Image:
    """Its picture, RGB.

    Raises: DataError when it has none, or one that cannot be read.
    """
    image = _image(raw)
    if image is None:
        raise DataError(f"it has no picture (.{', .'.join(IMAGE_EXTENSIONS)}){_found(raw)}")
    try:
        return open_image(io.BytesIO(image), raw.key)
    except ImageError as error:
        raise DataError(str(error)) from error


def _image(raw: RawSample) -> bytes | None:
    return next((raw.parts[extension] for extension in IMAGE_EXTENSIONS if extension in raw.parts), None)


def read_captions(raw: RawSample) -> tuple[str, ...]:
    """Of "captions" or "caption" in .json, else of .txt, else of "text" or "prompt" in .json; the plain one first.

    Raises: DataError when there is none, or one that is not Unicode text.
    """
    try:
        told = json.loads(raw.parts.get("json", b"{}"))
        entry = told if isinstance(told, dict) else {}
        text = raw.parts.get("txt", b"").decode("utf-8-sig").strip()
        captions = texts_of(entry, ("captions", "caption")) or texts_of({"txt": text}, ("txt",))
        captions = captions or texts_of(entry, ("text", "prompt"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"its caption cannot be read: {error}") from error
    if not captions:
        raise DataError(f"it has no caption (.txt, or .json with captions, caption, text or prompt){_found(raw)}")
    return captions


def recaptioned(raw: RawSample, key: str | None) -> RawSample:
    """The sample with what stands under `key` in its .json as its captions; unchanged where `key` is None.

    Raises: DataError where there is no caption under it.
    """
    if key is None:
        return raw
    told = about(raw)
    if not (captions := texts_of(told, (key,))):
        raise DataError(f"it has no caption under {key!r} in its .json{_found(raw)}")
    return replace(raw, parts={**raw.parts, "json": json.dumps(told | {"captions": captions}).encode()})


def _found(raw: RawSample) -> str:
    """What a sample has, for a message that says what it lacks; with the rule where a name has several dots."""
    listed = ", ".join(f".{extension}" for extension in list(raw.parts)[:6])
    if all(extension.endswith(EMBEDDING) or "." not in extension for extension in raw.parts):
        return f"; it has {listed}"
    return (
        f"; it has {listed}: the name of a sample ends at the first dot of its files' names, and the kind of file "
        "follows, so name files with one dot"
    )


def _embedding(content: bytes) -> Tensor:
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # a damaged header is parsed as Python, which fails in many ways
        raise DataError(f".{EMBEDDING} cannot be read: {type(error).__name__}: {error}") from error
    if array.ndim != 1 or array.dtype.kind != "f":
        raise DataError(f".{EMBEDDING} is no list of finite numbers but {array.dtype} {array.shape}")
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise DataError(f".{EMBEDDING} is no list of finite numbers: float32 holds not all of them")
    return torch.from_numpy(numbers)
