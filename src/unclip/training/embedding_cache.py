"""A cache on disk for embeddings that take minutes to compute and that several runs use.

The name of a file is a hash of all that its content depends on. Deleting the cache is safe.
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

Progress = Callable[..., Any]
"""Wraps an iterable, as `tqdm` does."""

PART = 128
"""Batch size of the image encoder."""
MIN_PICTURES = 256
"""Embeddings of fewer pictures are not cached."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/unclip/embeddings`; the default of the variable is `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unclip" / "embeddings"


def cached(path: Path, names: set[str], count: int, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors `names`, each with `count` rows, from a file, or else computed and written to it.

    A file that cannot be written is ignored: the next run computes the tensors again.
    """
    try:
        found = load_file(path)
        if found.keys() == names and all(len(each) == count and each.isfinite().all() for each in found.values()):
            return found
    except (OSError, SafetensorError):
        pass
    found = compute()
    try:
        with atomic_file(path) as draft:
            save_file({name: value.contiguous() for name, value in found.items()}, draft)
    except (OSError, SafetensorError, UnclipError):
        pass
    return found


def cached_embeddings(
    pictures: CaptionedPictures, embed: Callable[[Tensor], Tensor], fingerprint: str, progress: Progress | None = None
) -> Tensor:
    """Image embeddings float32 [num_pictures, width] from the cache, or else computed and cached.

    Args:
        pictures: at the size of the encoder.
        embed: [batch, 3, size, size] in [-1, 1] → [batch, width].
        fingerprint: identifies the encoder's weights and preprocessing.
        progress: wraps an iterable, as `tqdm` does.
    """

    def compute() -> dict[str, Tensor]:
        rows = torch.arange(len(pictures)).split(PART)
        parts = progress(rows, desc="embedding the pictures", unit="batch") if progress else rows
        return {"embeddings": torch.cat([embed(pictures.images(part)).float() for part in parts])}

    if len(pictures) < MIN_PICTURES:
        return compute()["embeddings"]
    digest = hashlib.sha256(f"{fingerprint} {PART} {tuple(pictures.pixels.shape)} ".encode())
    digest.update(pictures.pixels.contiguous().numpy().data)
    path = cache_folder() / f"{digest.hexdigest()}.safetensors"
    return cached(path, {"embeddings"}, len(pictures), compute)["embeddings"]
