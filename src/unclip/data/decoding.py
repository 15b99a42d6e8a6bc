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

from unclip.data.folder import square_pixels
from unclip.data.shards import RawSample
from unclip.errors import DataError, ImageError
from unclip.images import open_image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
EMBEDDING = "img_emb.npy"


@dataclass(frozen=True)
class Sample:
    """As `decode` gives it: pixels are uint8 [3, size, size] by size, the embedding float32 [width]."""

    name: str
    captions: tuple[str, ...]
    pixels: dict[int, Tensor]
    embedding: Tensor | None


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
        picture = _opened(image, raw)
        pixels = {size: square_pixels(picture, size) for size in sizes}
    return Sample(raw.name, captions, pixels, embedding)


def read_picture(raw: RawSample) -> Image.Image:
    """Its picture, RGB.

    Raises: DataError when it has none, or one that cannot be read.
    """
    image = _image(raw)
    if image is None:
        raise DataError(f"it has no picture (.{', .'.join(IMAGE_EXTENSIONS)})")
    return _opened(image, raw)


def _image(raw: RawSample) -> bytes | None:
    return next((raw.parts[extension] for extension in IMAGE_EXTENSIONS if extension in raw.parts), None)


def _opened(image: bytes, raw: RawSample) -> Image.Image:
    try:
        return open_image(io.BytesIO(image), raw.key)
    except ImageError as error:
        raise DataError(str(error)) from error


def read_captions(raw: RawSample) -> tuple[str, ...]:
    """Of .txt, or of .json with "captions" or "caption"; the plain one first.

    Raises: DataError when there is none.
    """
    try:
        if "json" in raw.parts:
            about = json.loads(raw.parts["json"])
            texts = about.get("captions") or [about.get("caption")] if isinstance(about, dict) else []
            good = tuple(text for text in texts if isinstance(text, str) and text.strip())
            if good:
                return good
        text = raw.parts.get("txt", b"").decode("utf-8").strip()
    except (ValueError, RecursionError, TypeError) as error:
        raise DataError(f"its caption cannot be read: {error}") from error
    if not text:
        raise DataError("it has no caption (.txt, or .json with caption or captions)")
    return (text,)


def _embedding(content: bytes) -> Tensor:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f".{EMBEDDING} cannot be read: {error}") from error
    if array.ndim != 1 or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise DataError(f".{EMBEDDING} is no list of finite numbers but {array.dtype} {array.shape}")
    return torch.from_numpy(array.astype(np.float32))
