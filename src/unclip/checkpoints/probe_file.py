"""The principal components that may lie beside a model's components, carried from one folder to another as they are.

Knows the file and whose embeddings it is of; knows not what it holds. Called by pipelines and where folders are
converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from unclip.checkpoints.files import file_size, safe_join
from unclip.checkpoints.fingerprint import may_be_of
from unclip.checkpoints.layout import PROBE_FILE
from unclip.checkpoints.tensor_file import LIMIT_BYTES
from unclip.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ProbeFile:
    """A folder's `probe.safetensors`.

    Attributes:
        content: of the file.
        image_encoder: the fingerprint of the image encoder whose embeddings the components are of; empty where the file
            does not say it, or is damaged, which whoever reads the components is told.
    """

    content: bytes
    image_encoder: str

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """That of a folder; None where there is none. Raises: CheckpointError for a file that is absurdly large."""
        path = safe_join(folder, PROBE_FILE)
        if not path.exists():
            return None
        if file_size(path) > LIMIT_BYTES:
            raise CheckpointError(f"{path} has more than {LIMIT_BYTES:,} bytes; no principal components do: remove it")
        return cls(path.read_bytes(), _image_encoder(path))

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        (folder / PROBE_FILE).write_bytes(self.content)

    def may_be_of(self, state: Mapping[str, Tensor]) -> bool:
        """Whether it is of the image encoder with these weights, or does not say of which."""
        return may_be_of(self.image_encoder, [state])


def _image_encoder(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("image_encoder", "")
    except (SafetensorError, OSError):
        return ""
