"""Every sample of a data set once, whichever kind it is; and a sheet to look at.

Knows folders and shards; knows no training. Called by the commands that inspect, pack and embed data.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from unclip.checkpoints.files import atomic_folder, output_path, safe_join, write_json
from unclip.data.decoding import decode
from unclip.data.folder import read_records
from unclip.data.shards import Damage, RawSample, expand, is_shards, read_shard, write_shards
from unclip.errors import DataError, ImageError, UnsafeFileError
from unclip.images import grid, labelled, open_image, to_pil

CELL_PX = 128
PACKED_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Of the pictures that are packed into shards as they are."""
CHECK_PX = 8
"""Side to which a picture is made when only its being whole matters."""


def raw_samples(data: str | Path, damage: Damage, *, include_held_out: bool = False) -> Iterator[RawSample]:
    """The samples of a folder or of shards, in their order, not decoded.

    Held-out pictures of a folder are left out unless they are asked for; of shards there are none.

    A folder's picture of a kind that other readers of shards do not know (GIF, TIFF, AVIF …) becomes a PNG. What cannot
    be read goes into `damage`.

    Raises: DataError when the data set is not there.
    """
    if is_shards(data):
        for shard in expand(data):
            damage.num_shards += 1
            for sample in read_shard(shard, damage):
                damage.num_read += 1
                yield sample
        return
    folder = Path(data)
    for number, record in enumerate(read_records(folder)):
        if record.held_out and not include_held_out:
            continue
        damage.num_read += 1
        about: dict[str, Any] = {name: getattr(record, name) for name in ("captions", "concept", "label", "style")}
        if record.weight != 1:
            about["weight"] = record.weight
        try:
            content = safe_join(folder, record.file_name).read_bytes()
            extension = Path(record.file_name).suffix.lstrip(".").lower()
            if extension not in PACKED_EXTENSIONS:
                extension, content = "png", _as_png(content, record.file_name)
        except (OSError, UnsafeFileError, ImageError) as error:
            damage.broken[f"{record.file_name}: {number:09}"] = str(error)
            continue
        parts = {extension: content, "json": json.dumps(about, ensure_ascii=False).encode()}
        yield RawSample(f"{number:09}", record.file_name, parts)


def _as_png(content: bytes, name: str) -> bytes:
    """The first frame as training sees it: RGB, on white where it is transparent."""
    found = io.BytesIO()
    open_image(io.BytesIO(content), name).save(found, "PNG")
    return found.getvalue()


def readable(samples: Iterable[RawSample], damage: Damage) -> Iterator[RawSample]:
    """Those samples that training could read; the others go into `damage`."""
    for raw in samples:
        try:
            decode(raw, [CHECK_PX])
        except DataError as error:
            damage.broken[raw.name] = str(error)
            continue
        yield raw


def pack(
    data: str | Path,
    out: Path,
    *,
    per_shard: int = 10_000,
    max_skipped_share: float = 0.01,
    progress: Callable[..., Any] | None = None,
) -> Damage:
    """Write a data set as tar shards; the folder appears whole or not at all.

    Every picture is decoded, to see whether it is whole; what is written is its file as it was (see `raw_samples`).

    Args:
        data: a folder or shards.
        out: the folder to make.
        per_shard: samples in a shard.
        max_skipped_share: of the samples, and of the shards, that may be broken. They are left out, and listed with the
            reason in `skipped_file(out)`, also when there are more and nothing is written.
        progress: wraps an iterable, as `tqdm` does.

    Returns: how many samples there were, and what could not be read.

    Raises:
        DataError: the data set is not there, nothing in it can be read, or too much cannot.
        OutputExistsError: `out` is there already.
    """
    damage = Damage()
    samples = raw_samples(data, damage)
    told = progress(samples, desc="packing", unit="sample") if progress else samples
    with atomic_folder(out) as draft:
        good = ((sample.key, sample.parts) for sample in readable(told, damage))
        written = write_shards(good, draft, per_shard=per_shard)
        settle(damage, data, out, is_empty=not written, max_skipped_share=max_skipped_share)
    return damage


def skipped_file(out: Path) -> Path:
    """Where it stands what was left out of `out`: beside it, with the suffix .skipped.json."""
    target = output_path(out)
    return target.with_name(f"{target.name}.skipped.json")


def escaped(text: str) -> str:
    """What stands for a byte that is no UTF-8 (in a file's name, say) written as an escape."""
    return text.encode(errors="backslashreplace").decode()


def settle(damage: Damage, data: str | Path, out: Path, *, is_empty: bool, max_skipped_share: float) -> None:
    """Write down what was left out of `out`.

    Raises: DataError when there is nothing else, or more than the share allows.
    """
    listed = skipped_file(out)
    if damage.broken:
        write_json(listed, {escaped(name): escaped(why) for name, why in damage.broken.items()})
    else:
        listed.unlink(missing_ok=True)
    if is_empty:
        raise DataError(f"nothing in {data} can be read: {damage.some() or 'it is empty'}")
    try:
        damage.check(max_skipped_share)
    except DataError as error:
        raise DataError(f"{error} (all of them are in {listed}); leave them out, or allow more") from error


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
    """Decode every sample of a data set, held-out ones too, count, and draw a sheet of some, spread over the whole.

    Raises: DataError when the data set is not there.
    """
    damage, found = Damage(), Inspection()
    samples = raw_samples(data, damage, include_held_out=True)
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
