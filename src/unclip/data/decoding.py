"""What one sample of a shard holds: captions, a picture, an image embedding.

Knows a sample's parts and their formats; knows no order and no batch. Called where shards are read and written.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.data.folder import read_pixels
from unclip.data.shards import RawSample, about
from unclip.errors import DataError, ImageError
from unclip.images import PICTURE_SUFFIXES, open_image

IMAGE_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)
EMBEDDING = "img_emb.npy"
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

    Raises: DataError for a sample without caption, with neither picture nor embedding, or with a broken one.
    """
    captions = read_captions(raw)
    image = _image(raw)
    embedding = _embedding(raw.parts[EMBEDDING]) if EMBEDDING in raw.parts else None
    if image is None and embedding is None:
        raise DataError(f"it has no picture (.{', .'.join(IMAGE_EXTENSIONS)}) and no .{EMBEDDING}")
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
        raise DataError(f"it has no picture (.{', .'.join(IMAGE_EXTENSIONS)})")
    try:
        return open_image(io.BytesIO(image), raw.key)
    except ImageError as error:
        raise DataError(str(error)) from error


def _image(raw: RawSample) -> bytes | None:
    return next((raw.parts[extension] for extension in IMAGE_EXTENSIONS if extension in raw.parts), None)


def read_captions(raw: RawSample) -> tuple[str, ...]:
    """Of .txt, or of .json with "captions" or "caption"; the plain one first.

    Raises: DataError when there is none, or one that is no Unicode text.
    """
    try:
        if "json" in raw.parts:
            told = json.loads(raw.parts["json"])
            texts = told.get("captions") or [told.get("caption")] if isinstance(told, dict) else []
            good = tuple(text for text in texts if isinstance(text, str) and text.strip())
            if good:
                "".join(good).encode()  # JSON can say half a character, which no text may hold
                return good
        text = raw.parts.get("txt", b"").decode("utf-8").strip()
    except (ValueError, RecursionError, TypeError) as error:
        raise DataError(f"its caption cannot be read: {error}") from error
    if not text:
        raise DataError("it has no caption (.txt, or .json with caption or captions)")
    return (text,)


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
