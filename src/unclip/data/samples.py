"""Decode one sample of a shard: its captions, its picture and its image embedding."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.checkpoints.files import atomic_folder, output_path, safe_join, write_json
from unclip.data.folder import USUAL_KEYS, Keys, metadata_file, read_metadata, read_pixels, some_of, texts_of, weight_in
from unclip.data.shard_writer import write_shards
from unclip.data.shards import EMBEDDING, Damage, RawSample, about, expand, is_shards, read_shard
from unclip.errors import DataError, ImageError, UnsafeFileError
from unclip.images import PICTURE_SUFFIXES, grid, labelled, open_image, to_pil

IMAGE_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in PICTURE_SUFFIXES)
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

    Raises: DataError for a sample without caption, with neither picture nor embedding, or with a broken one; and for a
        weight that cannot be used.
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
    """Its picture, RGB.

    Raises: DataError when it has none, or one that cannot be read.
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

    The plain one comes first.

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
    """The sample with what stands under `key` in its .json as its captions; unchanged where `key` is None.

    Raises: DataError where there is no caption under it.
    """
    if key is None:
        return raw
    entry = about(raw)
    if not (captions := texts_of(entry, (key,))):
        raise DataError(f"it has no caption under {key!r} in its .json{_found(raw)}")
    return replace(raw, parts={**raw.parts, "json": json.dumps(entry | {"captions": captions}).encode()})


def _found(raw: RawSample) -> str:
    """What a sample has, for a message that says what it lacks; with the rule where a name has several dots."""
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
        raise DataError(f".{EMBEDDING} is not a list of finite numbers: float32 does not hold all of them")
    return torch.from_numpy(numbers)


CELL_PX = 128
PACKED_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Suffixes of pictures that are packed into shards without conversion."""
CHECK_PX = 8
"""Side to which a picture is made when only its being whole matters."""


def raw_samples(
    data: str | Path, damage: Damage, *, keys: Keys = USUAL_KEYS, include_held_out: bool = False
) -> Iterator[RawSample]:
    """The samples of a folder or of shards, in their order, not decoded.

    Held-out pictures of a folder are left out unless they are asked for; of shards there are none.

    A folder's picture of a kind that other readers of shards do not know (GIF, TIFF, AVIF …) becomes a PNG. What cannot
    be read goes into `damage`. `keys` name pictures and captions in the metadata of a folder, and captions in the .json
    of a shard's samples, to which "captions" is added then.

    Raises: DataError when the data set is not there.
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
            content = safe_join(folder, record.file_name).read_bytes()
            extension = Path(record.file_name).suffix.lstrip(".").lower()
            if extension not in PACKED_EXTENSIONS:
                picture = io.BytesIO()
                open_image(io.BytesIO(content), record.file_name).save(picture, "PNG")
                extension, content = "png", picture.getvalue()
        except (OSError, UnsafeFileError, ImageError) as error:
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

    Every picture is decoded, to see whether it is whole; what is written is its file as it was (see `raw_samples`).

    Args:
        data: a folder or shards.
        out: the folder to make.
        per_shard: samples in a shard.
        max_skipped_share: of the samples, and of the shards, that may be broken. They are left out, and listed with the
            reason in `skipped_file(out)`, also when there are more and nothing is written.
        keys: as for `raw_samples`.
        progress: wraps an iterable, as `tqdm` does.

    Returns: how many samples there were, and what could not be read.

    Raises:
        DataError: the data set is not there, nothing in it can be read, or too much cannot.
        OutputExistsError: `out` is there already.
    """
    damage = Damage()
    samples = raw_samples(data, damage, keys=keys)

    def readable() -> Iterator[tuple[str, Mapping[str, bytes]]]:
        for raw in progress(samples, desc="packing", unit="sample") if progress else samples:
            try:
                decode(raw, [CHECK_PX])
                yield raw.key, raw.parts
            except DataError as error:
                damage.broken[raw.name] = str(error)

    with atomic_folder(out) as draft:
        written = write_shards(readable(), draft, per_shard=per_shard)
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
        raise DataError(f"nothing in {data} can be read: {some_of(damage.broken) or 'it is empty'}")
    try:
        damage.check(max_skipped_share, max_skipped_share)
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


def inspect(
    data: str | Path, *, num_shown: int = 48, keys: Keys = USUAL_KEYS, progress: Callable[..., Any] | None = None
) -> Inspection:
    """Decode every sample of a data set, held-out ones too, count, and draw a sheet of some, spread over the whole.

    Raises: DataError when the data set is not there.
    """
    damage, found = Damage(), Inspection()
    samples = raw_samples(data, damage, keys=keys, include_held_out=True)
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
