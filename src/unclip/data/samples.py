"""Decode samples of shards and folders: captions, pictures and image embeddings. Pack and inspect data sets."""

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.checkpoints.files import atomic_folder, file_size, output_path, safe_join, write_json
from unclip.data.folder import USUAL_KEYS, Keys, metadata_file, read_metadata, read_pixels, some_of, texts_of, weight_in
from unclip.data.shard_writer import write_shards
from unclip.data.shards import EMBEDDING, Damage, RawSample, about, expand, is_shards, read_shard
from unclip.errors import CheckpointError, DataError, ImageError
from unclip.images import PICTURE_SUFFIXES, grid, labelled, open_image

IMAGE_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)
CLIP = "clip"
"""The key of a sample's .json for the fingerprint of the CLIP model of its embedding."""


@dataclass(frozen=True)
class Sample:
    """A decoded sample: pixels by size, uint8 [3, size, size]; the embedding, float32 [width].

    `clip` is the fingerprint of the CLIP model of the embedding; None if the sample does not state it.
    """

    name: str
    captions: tuple[str, ...]
    pixels: dict[int, Tensor]
    embedding: Tensor | None
    clip: str | None = None


def decode(raw: RawSample, sizes: Sequence[int]) -> Sample:
    """Decode a sample. Its picture is padded to a square with white and resized to each size.

    Raises: DataError for a sample without a caption, with neither a picture nor an embedding, or with a broken one; and
        for an invalid weight.
    """
    captions = read_captions(raw)
    weight_in(about(raw))
    embedding = _embedding(raw.parts[EMBEDDING]) if EMBEDDING in raw.parts else None
    image = _image(raw)
    if image is None and embedding is None:
        raise _no_picture(raw)
    pixels = {}
    if image is not None and sizes:
        with _reading():
            pixels = read_pixels(io.BytesIO(image), raw.key, sizes)
    clip = about(raw).get(CLIP) if embedding is not None else None
    return Sample(raw.name, captions, pixels, embedding, clip if isinstance(clip, str) else None)


def read_picture(raw: RawSample) -> Image.Image:
    """The sample's picture, RGB.

    Raises: DataError when it has none, or it cannot be read.
    """
    image = _image(raw)
    if image is None:
        raise _no_picture(raw)
    with _reading():
        return open_image(io.BytesIO(image), raw.key)


def _image(raw: RawSample) -> bytes | None:
    return next((raw.parts[extension] for extension in IMAGE_EXTENSIONS if extension in raw.parts), None)


def _no_picture(raw: RawSample) -> DataError:
    return DataError(f"it has no picture (.{', .'.join(IMAGE_EXTENSIONS)}) and no .{EMBEDDING}{_found(raw)}")


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise DataError(str(error)) from error


def read_captions(raw: RawSample) -> tuple[str, ...]:
    """The captions in .json under "captions" or "caption", else in .txt, else in .json under "text" or "prompt".

    The plain caption comes first.

    Raises: DataError when there is none, or one that is not Unicode text.
    """
    try:
        text = raw.parts.get("txt", b"").decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"its caption cannot be read: {error}") from error
    captions = texts_of(about(raw) | {".txt": text}, ("captions", "caption", ".txt", "text", "prompt"))
    if not captions:
        raise DataError(f"it has no caption (.txt, or .json with captions, caption, text or prompt){_found(raw)}")
    return captions


def recaptioned(raw: RawSample, key: str | None) -> RawSample:
    """The sample with the captions under `key` of its .json; unchanged if `key` is None.

    Raises: DataError when it has no caption under this key.
    """
    if key is None:
        return raw
    entry = about(raw)
    if not (captions := texts_of(entry, (key,))):
        raise DataError(f"it has no caption under {key!r} in its .json{_found(raw)}")
    return replace(raw, parts={**raw.parts, "json": json.dumps(entry | {"captions": captions}).encode()})


def _found(raw: RawSample) -> str:
    """A description of a sample's files for an error message, with the rule about names with several dots."""
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
        raise DataError(f".{EMBEDDING} is not a list of finite numbers but {array.dtype} {array.shape}")
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise DataError(f".{EMBEDDING} must have finite numbers within the range of float32")
    return torch.from_numpy(numbers)


CELL_PX = 128
PACKED_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Suffixes of pictures that are packed into shards without conversion."""
CHECK_PX = 8
"""The size at which pictures are decoded to check that they are complete."""


def raw_samples(
    data: str | Path, damage: Damage, *, keys: Keys = USUAL_KEYS, include_held_out: bool = False
) -> Iterator[RawSample]:
    """The samples of a folder or of shards in their order, not decoded.

    Pictures of a folder in formats that other readers of shards do not support (GIF, TIFF, AVIF …) become PNG.

    Args:
        data: a folder or shards.
        damage: records what cannot be read.
        keys: the keys of pictures and captions in the metadata of a folder, and of captions in the .json of a shard's
            samples, to which "captions" is then added.
        include_held_out: also return the held-out pictures of a folder.

    Raises: DataError when the data set does not exist.
    """
    if is_shards(data):
        for shard in expand(data):
            damage.num_shards += 1
            for sample in read_shard(shard, damage):
                damage.num_read += 1
                try:
                    yield recaptioned(sample, keys.caption)
                except DataError as error:
                    damage.broken[sample.name] = str(error)
        return
    folder = Path(data)
    records, broken = read_metadata(metadata_file(folder), folder, keys)
    damage.num_read += len(broken)
    damage.broken.update(broken)
    for number, record in enumerate(records):
        if record.held_out and not include_held_out:
            continue
        damage.num_read += 1
        entry: dict[str, Any] = {name: getattr(record, name) for name in ("captions", "concept", "label", "style")}
        entry |= {"weight": record.weight} if record.weight != 1 else {}
        try:
            file_size(picture := safe_join(folder, record.file_name))  # refuses a pipe, which could block
            content = picture.read_bytes()
            extension = Path(record.file_name).suffix.lstrip(".").lower()
            if extension not in PACKED_EXTENSIONS:
                converted = io.BytesIO()
                open_image(io.BytesIO(content), record.file_name).save(converted, "PNG")
                extension, content = "png", converted.getvalue()
        except (OSError, CheckpointError, ImageError) as error:
            damage.broken[f"{record.file_name}: {number:09}"] = str(error)
            continue
        parts = {extension: content, "json": json.dumps(entry, ensure_ascii=False).encode()}
        yield RawSample(f"{number:09}", record.file_name, parts)


def pack(
    data: str | Path,
    out: Path,
    *,
    per_shard: int = 10_000,
    max_skipped_share: float = 0.01,
    keys: Keys = USUAL_KEYS,
    progress: Callable[..., Any] | None = None,
) -> Damage:
    """Write a data set as tar shards; the folder is written atomically.

    Every picture is decoded to check it, but its file is written unchanged (see `raw_samples`).

    Args:
        data: a folder or shards.
        out: the folder to create.
        per_shard: samples per shard.
        max_skipped_share: the share of samples, and of shards, that may be broken. They are left out, and listed with
            the reasons in `skipped_file(out)`. If there are more, they are listed, and nothing else is written.
        keys: as for `raw_samples`.
        progress: wraps an iterable, as `tqdm` does.

    Returns: the number of samples, and what could not be read.

    Raises:
        DataError: the data set does not exist, or nothing or too little in it can be read.
        OutputExistsError: `out` exists.
    """
    damage = Damage()
    samples = raw_samples(data, damage, keys=keys)
    shown = progress(samples, desc="packing", unit="sample") if progress else samples
    with atomic_folder(out) as draft:
        readable = ((raw.key, raw.parts) for raw, _ in _decoded(shown, CHECK_PX, damage))
        written = write_shards(readable, draft, per_shard=per_shard)
        settle(damage, data, out, is_empty=not written, max_skipped_share=max_skipped_share)
    return damage


def _decoded(samples: Iterable[RawSample], size: int, damage: Damage) -> Iterator[tuple[RawSample, Sample]]:
    for raw in samples:
        try:
            sample = decode(raw, [size])
        except DataError as error:
            damage.broken[raw.name] = str(error)
        else:
            yield raw, sample


def skipped_file(out: Path) -> Path:
    """The file that lists what was left out of `out`: beside it, with the suffix .skipped.json."""
    target = output_path(out)
    return target.with_name(f"{target.name}.skipped.json")


def escaped(text: str) -> str:
    """The text with escapes for bytes that are not UTF-8, which file names may have."""
    return text.encode(errors="backslashreplace").decode()


def settle(damage: Damage, data: str | Path, out: Path, *, is_empty: bool, max_skipped_share: float) -> None:
    """List what was left out of `out`.

    Raises: DataError when everything was left out, or more than the share allows.
    """
    listed = skipped_file(out)
    if damage.broken:
        write_json(listed, {escaped(name): escaped(why) for name, why in damage.broken.items()})
    else:
        listed.unlink(missing_ok=True)
    if is_empty:
        raise DataError(f"nothing in {data} can be read: {some_of(damage.broken) or 'it is empty'}")
    try:
        damage.check(max_skipped_share, max_skipped_share)
    except DataError as error:
        raise DataError(f"{error} (all of them are in {listed}); leave them out, or allow a larger share") from error


@dataclass
class Inspection:
    """The result of `inspect`.

    Attributes:
        num_samples, num_captions: how many can be read.
        num_embeddings: number of samples with a CLIP embedding.
        broken: what cannot be read, with the reasons.
        sheet: pictures with their captions.
    """

    num_samples: int = 0
    num_captions: int = 0
    num_embeddings: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    sheet: Image.Image | None = None


def inspect(
    data: str | Path, *, num_shown: int = 48, keys: Keys = USUAL_KEYS, progress: Callable[..., Any] | None = None
) -> Inspection:
    """Decode and count all samples of a data set, including held-out ones, and draw a sheet of some.

    Raises: DataError when the data set does not exist.
    """
    damage, found = Damage(), Inspection()
    samples = raw_samples(data, damage, keys=keys, include_held_out=True)
    shown: list[tuple[Image.Image, str]] = []
    every = 1
    for _, sample in _decoded(
        progress(samples, desc="reading", unit="sample") if progress else samples, CELL_PX, damage
    ):
        if CELL_PX in sample.pixels and found.num_samples % every == 0:
            picture = Image.fromarray(sample.pixels[CELL_PX].permute(1, 2, 0).numpy())
            shown.append((picture, sample.captions[0]))
            if len(shown) >= 2 * num_shown:  # keep every second one: the length of the data set is unknown
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
