"""Every sample of a data set once, whichever kind it is; and a sheet to look at.

Knows folders and shards; knows no training. Called by the commands that inspect, pack and embed data.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from unclip.checkpoints.files import atomic_folder, safe_join
from unclip.data.folder import read_records
from unclip.data.shards import Damage, RawSample, expand, is_shards, read_shard, write_shards
from unclip.data.source import decode
from unclip.errors import DataError, UnsafeFileError
from unclip.images import grid, labelled, to_pil

CELL_PX = 128


def raw_samples(data: str | Path, damage: Damage) -> Iterator[RawSample]:
    """The samples of a folder or of shards, in their order, not decoded. Held-out pictures of a folder are left out.

    What cannot be read goes into `damage`.

    Raises: DataError when the data set is not there.
    """
    if is_shards(data):
        for shard in expand(data):
            for sample in read_shard(shard, damage):
                damage.num_read += 1
                yield sample
        return
    folder = Path(data)
    for number, record in enumerate(read_records(folder)):
        if record.held_out:
            continue
        damage.num_read += 1
        about: dict[str, Any] = {name: getattr(record, name) for name in ("captions", "concept", "label", "style")}
        if record.weight != 1:
            about["weight"] = record.weight
        try:
            content = safe_join(folder, record.file_name).read_bytes()
        except (OSError, UnsafeFileError) as error:
            damage.broken[record.file_name] = str(error)
            continue
        extension = Path(record.file_name).suffix.lstrip(".").lower()
        parts = {extension: content, "json": json.dumps(about, ensure_ascii=False).encode()}
        yield RawSample(f"{number:09}", record.file_name, parts)


def pack(data: str | Path, out: Path, *, per_shard: int = 10_000, progress: Callable[..., Any] | None = None) -> Damage:
    """Write a data set as tar shards; the folder appears whole or not at all. Pictures are copied, not decoded.

    Returns: how many samples there were, and what could not be read.

    Raises:
        DataError: the data set is not there, or nothing in it can be read.
        OutputExistsError: `out` is there already.
    """
    damage = Damage()
    samples = raw_samples(data, damage)
    told = progress(samples, desc="packing", unit="sample") if progress else samples
    with atomic_folder(out) as draft:
        written = write_shards(((sample.key, sample.parts) for sample in told), draft, per_shard=per_shard)
        if not written:
            raise DataError(f"nothing in {data} can be read: {damage.broken}")
    return damage


@dataclass
class Inspection:
    """What a data set holds.

    Attributes:
        num_samples: in all; num_captions: theirs together.
        num_embeddings: samples with a CLIP embedding in them.
        broken: what cannot be read, with the reason.
        sheet: pictures with their captions.
    """

    num_samples: int = 0
    num_captions: int = 0
    num_embeddings: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    sheet: Image.Image | None = None


def inspect(data: str | Path, *, num_shown: int = 48, progress: Callable[..., Any] | None = None) -> Inspection:
    """Decode every sample of a data set, count, and draw a contact sheet of some, spread over the whole.

    Raises: DataError when the data set is not there.
    """
    damage, found = Damage(), Inspection()
    samples = raw_samples(data, damage)
    shown: list[tuple[Image.Image, str]] = []
    every = 1
    for raw in progress(samples, desc="reading", unit="sample") if progress else samples:
        try:
            sample = decode(raw, [CELL_PX])
        except DataError as error:
            damage.broken[raw.name] = str(error)
            continue
        if CELL_PX in sample.pixels and found.num_samples % every == 0:
            shown.append((to_pil(sample.pixels[CELL_PX][None].float() / 127.5 - 1)[0], sample.captions[0]))
            if len(shown) >= 2 * num_shown:  # thin out: so the sheet is spread evenly over a set of unknown length
                shown, every = shown[::2], 2 * every
        found.num_samples += 1
        found.num_captions += len(sample.captions)
        found.num_embeddings += sample.embedding is not None
    found.broken = damage.broken
    if shown:
        count = min(num_shown, len(shown))
        spread = [shown[place * len(shown) // count] for place in range(count)]
        found.sheet = grid([labelled(image, text) for image, text in spread], gap=6)
    return found
