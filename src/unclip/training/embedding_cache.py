"""A cache on disk for the CLIP image embeddings of a folder of pictures.

Prior, decoder and resumed runs use the same embeddings, which take minutes to compute for ten thousand pictures. The
file name is a hash of the pictures and of the CLIP. Deleting the cache is safe.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unclip.checkpoints.files import atomic_file
from unclip.data.folder import CaptionedPictures
from unclip.errors import UnclipError

PART = 128
"""Batch size of the image encoder."""
MIN_PICTURES = 256
"""Embeddings of fewer pictures are not cached."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/unclip/embeddings`; the default of the variable is `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unclip" / "embeddings"


def known_embeddings(
    pictures: CaptionedPictures,
    embed: Callable[[Tensor], Tensor],
    width: int,
    fingerprint: str,
    *,
    progress: Callable[..., Any] | None = None,
) -> Tensor:
    """Embeddings float32 [num_pictures, width] from the cache, or else computed and cached.

    Args:
        pictures: at the size of the encoder.
        embed: [batch, 3, size, size] in [-1, 1] → [batch, width].
        width: of an embedding.
        fingerprint: identifies the encoder's weights and preprocessing.
        progress: wraps an iterable, as `tqdm` does.
    """
    path = cache_folder() / f"{_name_of(pictures, fingerprint)}.safetensors"
    if (known := _read(path, (len(pictures), width))) is not None:
        return known
    rows = torch.arange(len(pictures)).split(PART)
    parts = progress(rows, desc="embedding the pictures", unit="batch") if progress else rows
    embeddings = torch.cat([embed(pictures.images(part)).float() for part in parts])
    if len(pictures) >= MIN_PICTURES:
        _remember(path, embeddings)
    return embeddings


def _name_of(pictures: CaptionedPictures, fingerprint: str) -> str:
    digest = hashlib.sha256(f"{fingerprint} {PART} {tuple(pictures.pixels.shape)} ".encode())
    digest.update(pictures.pixels.contiguous().numpy().data)
    return digest.hexdigest()


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """The cached embeddings; None if they are missing or damaged."""
    try:
        known = load_file(path).get("embeddings")
    except (OSError, SafetensorError):
        return None
    whole = known is not None and known.shape == shape and known.dtype == torch.float32 and known.isfinite().all()
    return known if whole else None


def _remember(path: Path, embeddings: Tensor) -> None:
    """Write the cache file. A failure is ignored: the next run computes the embeddings again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as draft:
            save_file({"embeddings": embeddings.contiguous()}, draft)
    except (OSError, SafetensorError, UnclipError):
        return
