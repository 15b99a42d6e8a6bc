"""CLIP image embeddings of a folder's pictures, computed once and remembered for the next run.

Prior, decoder, and a run that goes on need the same numbers; with CLIP's own passes they cost minutes for some ten
thousand pictures. They lie in the user's cache, under a name made of the pictures and of the CLIP; deleting them only
costs time. Knows no task. Called by the conditions of prior and decoder.
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
"""Pictures that are embedded at once."""
MIN_PICTURES = 256
"""Of fewer it is not worth a file."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/unclip/embeddings`, or that under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unclip" / "embeddings"


def known_embeddings(
    pictures: CaptionedPictures,
    embed: Callable[[Tensor], Tensor],
    width: int,
    fingerprint: str,
    *,
    progress: Callable[..., Any] | None = None,
) -> Tensor:
    """float32 [num_pictures, width], read if they are known, else computed and remembered.

    Args:
        pictures: at the encoder's own size.
        embed: [batch, 3, size, size] in [-1, 1] → [batch, width].
        width: of an embedding.
        fingerprint: of the encoder's weights and of its preprocessing.
        progress: wraps an iterable, as `tqdm` does.
    """
    path = cache_folder() / f"{_name_of(pictures, fingerprint)}.safetensors"
    if (known := _read(path, (len(pictures), width))) is not None:
        return known
    rows = torch.arange(len(pictures)).split(PART)
    told = progress(rows, desc="embedding the pictures", unit="batch") if progress else rows
    embeddings = torch.cat([embed(pictures.images(part)).float() for part in told])
    if len(pictures) >= MIN_PICTURES:
        _remember(path, embeddings)
    return embeddings


def _name_of(pictures: CaptionedPictures, fingerprint: str) -> str:
    digest = hashlib.sha256(f"{fingerprint} {PART} {tuple(pictures.pixels.shape)} ".encode())
    digest.update(pictures.pixels.contiguous().numpy().data)
    return digest.hexdigest()


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """What lies there; None if nothing does, or nothing whole."""
    try:
        known = load_file(path).get("embeddings")
    except (OSError, SafetensorError):
        return None
    whole = known is not None and known.shape == shape and known.dtype == torch.float32 and known.isfinite().all()
    return known if whole else None


def _remember(path: Path, embeddings: Tensor) -> None:
    """Keep them if there is room; a cache that cannot be written costs the next run its time, not this one its life."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as draft:
            save_file({"embeddings": embeddings.contiguous()}, draft)
    except (OSError, SafetensorError, UnclipError):
        return
