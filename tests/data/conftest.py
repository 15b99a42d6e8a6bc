"""Tar shards of small pictures."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from unclip.data.shard_writer import write_shards


def png(number: int, size: int = 8) -> bytes:
    """A picture of one colour, which tells its number."""
    content = io.BytesIO()
    Image.new("RGB", (size, size), (number % 256, number // 256, 7)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """For a server that may do better."""
    for name in ("WAITS_S", "FIRST_WAITS_S"):
        monkeypatch.setattr(f"unclip.data.shards.{name}", (0.0, 0.0, 0.0))


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., Path]:
    """A folder of shards: `shards(20, per_shard=5)`; `change` may alter a sample's parts, by its number."""

    def make(count: int, *, per_shard: int, name: str = "shards", change=lambda number, parts: parts) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        samples = (
            (
                f"{n:09}",
                change(n, {"png": png(n), "txt": f"picture {n}".encode(), "json": json.dumps({"n": n}).encode()}),
            )
            for n in range(count)
        )
        write_shards(samples, folder, per_shard=per_shard)
        return folder

    return make
