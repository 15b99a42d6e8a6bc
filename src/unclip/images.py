"""Reading and checking pictures, and their conversion to and from tensors and arrays.

Files are decoded by Pillow, within limits that are checked first.
"""

import contextlib
import io
import math
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from unclip.errors import ImageError

if TYPE_CHECKING:
    from torch import Tensor

Pictures = Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray]
"""One or several pictures; see `as_pictures`."""
MAX_PIXELS = 64_000_000
MAX_ASPECT = 100
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
}
"""The supported formats by Pillow's names, with their file suffixes."""
PICTURE_SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MAX_REPAIRED_BYTES = 256 * 2**20
"""Size limit of the files from which damaged metadata is removed."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes a picture upright, by its EXIF orientation."""
_ORIENTED = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Keys of Pillow's metadata that may contain an orientation."""
_CHUNK_ROWS = 256
WARNING_FILTERS = threading.Lock()
"""Held while warning filters are changed, since all threads share them."""


def open_image(file: str | Path | IO[bytes], name: str | None = None, *, keep_alpha: bool = False) -> Image.Image:
    """Open a picture file as RGB; its declared size is checked before anything is decoded.

    The first of several frames is used. Damaged metadata is ignored.

    Args:
        file: a path, or an open file.
        name: the picture's name in messages; the path by default.
        keep_alpha: return a picture with transparency as upright RGBA, with the colours of the file, instead of on
            white.

    Raises: ImageError for a missing, broken or truncated file, a file that is not a picture, or too many pixels.
    """
    name = name or str(file)
    if isinstance(file, str | Path) and os.path.exists(file) and not os.path.isfile(file):
        raise ImageError(f"{name} cannot be read as a picture: it is not a regular file")
    with _decoding(name, "cannot be read as a picture"):
        try:
            return _read(file, name, keep_alpha)
        except (ImageError, MemoryError):
            raise
        except Exception:
            if (repaired := _without_metadata(file)) is None:
                raise
            return _read(io.BytesIO(repaired), name, keep_alpha)


def _read(file: str | Path | IO[bytes], name: str, keep_alpha: bool) -> Image.Image:
    with _quiet():
        opened = Image.open(file, formats=tuple(FORMATS))
    with opened as image:
        check_size(image.size, name)
        image.seek(0)
        upright = _upright(image)
        return (_rgba(upright) if keep_alpha else None) or _rgb(upright)


@contextlib.contextmanager
def _decoding(name: str = "the image", what: str = "cannot be decoded") -> Iterator[None]:
    """Turn errors into ImageError. Pillow raises errors of many kinds for damaged files."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture of a known kind ({', '.join(FORMATS)})") from error
    except Exception as error:
        raise ImageError(f"{name} {what}: {str(error) or type(error).__name__}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ignore Pillow's warnings."""
    with WARNING_FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_size(size: tuple[int, int], name: str = "the image") -> None:
    """Raises: ImageError when a side is 0, there are too many pixels, or the aspect ratio is too large."""
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}×{height} pixels: it is empty")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {width * height:,} pixels ({width}×{height}); the limit is {MAX_PIXELS:,}: make it smaller"
        )
    if max(size) > MAX_ASPECT * min(size):
        raise ImageError(
            f"{name} is {width}×{height} pixels; one side may be at most {MAX_ASPECT} times the other: crop it"
        )


def as_pictures(given: Pictures, name: str = "image", *, are_masks: bool = False) -> list[Image.Image]:
    """Convert pictures or masks of any supported kind to a list of PIL images.

    Args:
        given: a PIL image, a numpy array, or a list of them. An array is [height, width], [height, width, channels]
            or a batch [batch, height, width, channels], with 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels;
            uint8 from 0 to 255, floating point from 0 to 1 (rounded to 8 bits), or bool.
        name: the argument's name in messages.
        are_masks: an array [batch, height, width] is a batch of masks, unless its last axis has 1 to 4 entries.

    Raises: ImageError for another kind of object, or an array of another type, shape or range.
    """
    parts = given if isinstance(given, Sequence) and not isinstance(given, str | bytes) else [given]
    if not parts:
        raise ImageError(f"{name} is an empty list; give a PIL image, a numpy array, or a list of them")
    pictures: list[Image.Image] = []
    for part in parts:
        if isinstance(part, Image.Image):
            pictures.append(part)
        elif isinstance(part, np.ndarray):
            pictures += [Image.fromarray(levels) for levels in _levels(part, name, are_masks=are_masks)]
        else:
            raise ImageError(
                f"{name} must be a PIL image, a numpy array, or a list of them, not "
                f"{'a list with ' if parts is given else ''}a {type(part).__name__}"
            )
    return pictures


def _levels(array: np.ndarray, name: str, *, are_masks: bool) -> list[np.ndarray]:
    """Convert an array of one or several pictures to arrays for PIL: uint8 [height, width] or [..., 2 to 4]."""
    is_flat = array.ndim == 2 or (are_masks and array.ndim == 3 and array.shape[-1] not in (1, 2, 3, 4))
    batch = array[..., None] if is_flat else array
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim != 4 or batch.shape[-1] not in (1, 2, 3, 4):
        raise ImageError(
            f"{name} is an array of the shape {array.shape}; it must be [height, width], [height, width, channels] or "
            "[batch, height, width, channels], with 1 to 4 channels in the last axis"
        )
    if not len(batch):
        raise ImageError(f"{name} is an array of the shape {array.shape}: it is empty")
    check_size((batch.shape[2], batch.shape[1]), name)
    if array.dtype != np.uint8:
        batch = _rounded(batch, name)
    return [np.ascontiguousarray(one[..., 0] if one.shape[-1] == 1 else one) for one in batch]


def _rounded(array: np.ndarray, name: str) -> np.ndarray:
    """An array of bool, or of floating point in [0, 1], as uint8."""
    if array.dtype == np.bool_:
        return array * np.uint8(255)
    if array.dtype.kind != "f":
        raise ImageError(
            f"{name} is an array of {array.dtype}; it must be uint8 (0 to 255), floating point (0 to 1) or bool"
        )
    if not np.isfinite(array).all():
        raise ImageError(f"{name} is an array with NaN or infinity")
    levels = np.rint(array * np.float32(255))  # float16 and float32 are computed in float32
    if levels.min() < 0 or levels.max() > 255:
        raise ImageError(
            f"{name} is an array of {array.dtype} with values from {array.min():.4g} to {array.max():.4g}; floating "
            "point must be from 0 to 1 (values from 0 to 255 are given as uint8)"
        )
    return levels.astype(np.uint8)


def rgb(image: Image.Image) -> Image.Image:
    """The picture upright and in RGB: EXIF orientation applied, transparency on white, 16 bits scaled.

    Colour profiles (ICC) are not applied; values are interpreted as sRGB.

    Raises: ImageError when it cannot be decoded, or its size is outside the limits.
    """
    check_size(image.size)
    with _decoding():
        return _rgb(_upright(image))


def alpha(image: Image.Image) -> Image.Image | None:
    """The picture's transparency, upright, in mode L: 0 is fully transparent. None for a picture without transparency.

    Raises: ImageError when it cannot be decoded, or its size is outside the limits.
    """
    seen_through = rgba(image)
    return None if seen_through is None else seen_through.getchannel("A")


def rgba(image: Image.Image) -> Image.Image | None:
    """The picture upright and in RGBA, including hidden colours. None for a picture without transparency.

    Raises: ImageError when it cannot be decoded, or its size is outside the limits.
    """
    check_size(image.size)
    with _decoding():
        return _rgba(_upright(image))


def _rgb(image: Image.Image) -> Image.Image:
    """An upright picture in RGB."""
    seen_through = _rgba(image)
    if seen_through is not None:
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(seen_through)
    elif _is_deep(image):
        image = _eight_bits(image)
    return image.convert("RGB")


def _rgba(image: Image.Image) -> Image.Image | None:
    """An upright picture in RGBA; None when it has no transparency."""
    if not image.has_transparency_data:
        return None
    if not _is_deep(image):
        return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    opaque = np.asarray(image) != image.info["transparency"]
    grey = _eight_bits(image)
    return Image.merge("RGBA", (grey, grey, grey, Image.fromarray(opaque * np.uint8(255))))


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise ImageError("the image has pixels that are NaN or infinite")
        top = 1.0 if values.max(initial=0) <= 1.0 else 255.0
    else:
        top = 65535.0 if values.max(initial=0) > 255 or image.mode.startswith("I;16") else 255.0
    levels = np.empty(values.shape, np.uint8)
    for row in range(0, len(values), _CHUNK_ROWS):  # in parts, since float64 takes eight times the memory
        part = values[row : row + _CHUNK_ROWS].astype(np.float64)
        levels[row : row + _CHUNK_ROWS] = (part / top * 255).clip(0, 255).round()
    return Image.fromarray(levels)


# ---- orientation, colour keys and damaged metadata ----


def _upright(image: Image.Image) -> Image.Image:
    """The picture decoded and rotated by its EXIF orientation, with a colour key that matches its pixels."""
    image = _keyed(image)
    try:
        with _quiet():
            turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF fails in many ways
        return image
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in _ORIENTED:  # so that it is not rotated again
        turned.info.pop(key, None)
    return turned


def _keyed(image: Image.Image) -> Image.Image:
    """The picture decoded, with its transparent colour (tRNS of PNG) converted to 8 bits.

    Pillow converts pixels of 2, 4 or 16 bits to 8 bits, but not the transparent colour.
    """
    key = image.info.get("transparency")
    depth = str(image.tile[0].args) if isinstance(image, PngImagePlugin.PngImageFile) and image.tile else None
    if depth == "RGB;16B" and isinstance(key, tuple):
        low = np.asarray(_low_bytes(image)) == [k & 255 for k in key]
        image = image.copy()
        del image.info["transparency"]
        opaque = ~(low & (np.asarray(image) == [k >> 8 for k in key])).all(axis=-1)
        image.putalpha(Image.fromarray(opaque * np.uint8(255)))
        return image
    _load(image)
    if image.mode == "L" and isinstance(key, int):
        scaled = _grey_level(image, key, depth)
    elif image.mode == "RGB" and isinstance(key, tuple):
        # Without the file the depth is unknown; a number above 255 has 16 bits.
        scaled = tuple(k & 255 if depth or max(key) < 256 else k >> 8 for k in key)
    else:
        return image
    if scaled == key:
        return image
    image = image.copy()
    image.info["transparency"] = scaled
    return image


def _load(image: Image.Image) -> None:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        finish = image.load_end

        def load_end() -> None:
            """Ignore errors in tags, which Pillow reads after the pixels."""
            with contextlib.suppress(Exception), _quiet():
                finish()

        image.load_end = load_end
    try:
        image.load()
    finally:
        vars(image).pop("load_end", None)


def _low_bytes(image: Image.Image) -> Image.Image:
    """The lower 8 of the 16 bits of each colour, for a PNG that is not yet decoded."""
    file: IO[bytes] = image.fp  # type: ignore[attr-defined]
    place = file.tell()
    with _quiet():
        twin = Image.open(file, formats=("PNG",))
    # Little-endian, so Pillow takes the lower byte for the upper one.
    twin.tile = [tile._replace(args="RGB;16L") for tile in twin.tile]  # type: ignore[attr-defined]
    twin.load()
    file.seek(place)
    return twin


def _grey_level(image: Image.Image, key: int, depth: str | None) -> int:
    """A transparent grey value of a PNG as a level of the decoded picture."""
    bits = {"L;2": 2, "L;4": 4}.get(depth or "", 8)
    if depth is None:  # the picture is decoded: take the smallest depth that fits its levels and the key
        levels = [level for level, count in enumerate(image.histogram()) if count]
        fits = (b for b, step in ((2, 85), (4, 17)) if key < 2**b and not any(level % step for level in levels))
        bits = next(fits, 8)
    return key % 2**bits * 255 // (2**bits - 1)


def _without_metadata(file: str | Path | IO[bytes]) -> bytes | None:
    """The file's content without metadata that may be damaged; None where there is none.

    The orientation is kept, unless it is damaged.
    """
    if isinstance(file, str | Path):
        with open(file, "rb") as stream:
            return _without_metadata(stream)
    file.seek(0)
    head = file.read(16)
    cut = next((cut for magic, cut in _CUTS.items() if re.match(magic, head, re.DOTALL)), None)
    content = b"" if cut is None else head + file.read(MAX_REPAIRED_BYTES)
    if cut is None or len(content) > MAX_REPAIRED_BYTES:
        return None
    repaired = cut(content)
    return None if repaired == content else repaired


def _cut_png(content: bytes) -> bytes:
    """Keep critical chunks, transparency, and EXIF with a corrected checksum."""
    kept, place = [content[:8]], 8
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        chunk = content[place : place + 12 + length]
        if kind == b"eXIf" and len(chunk) == 12 + length:
            chunk = chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4]))
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf"):
            kept.append(chunk)
        place += 12 + length
    return b"".join(kept)


def _cut_jpeg(content: bytes) -> bytes:
    """Remove comments and all application segments except JFIF, EXIF and Adobe."""
    kept, place = [content[:2]], 2
    while place + 4 <= len(content):
        prefix, marker, length = struct.unpack_from(">BBH", content, place)
        if prefix != 0xFF or not 0xC0 <= marker <= 0xFE or marker == 0xDA:
            break
        if not (0xE2 <= marker <= 0xEF or marker == 0xFE) or marker == 0xEE:
            kept.append(content[place : place + 2 + length])
        place += 2 + length
    return b"".join(kept) + content[place:]


def _cut_avif(content: bytes) -> bytes:
    """Mark EXIF as an unknown item; AVIF stores its orientation elsewhere."""
    return re.sub(rb"(infe.{8})Exif", rb"\1skip", content, flags=re.DOTALL)


_CUTS = {rb"\x89PNG\r\n\x1a\n": _cut_png, rb"\xff\xd8\xff": _cut_jpeg, rb".{4}ftyp": _cut_avif}


# ---- pictures and tensors ----


def to_pil(images: "Tensor") -> list[Image.Image]:
    """float [batch, 3, height, width] in [-1, 1] → 8-bit pictures."""
    return [Image.fromarray(array) for array in (to_numpy(images) * 255).round().astype(np.uint8)]


def to_numpy(images: "Tensor") -> np.ndarray:
    """float [batch, 3, height, width] in [-1, 1] → float32 [batch, height, width, 3] in [0, 1]."""
    return to_unit(images).permute(0, 2, 3, 1).cpu().numpy()


def to_unit(images: "Tensor") -> "Tensor":
    """float in [-1, 1] → float32 in [0, 1], clamped."""
    return (images.float() * 0.5 + 0.5).clamp(0, 1)


def to_tensor(image: Image.Image) -> "Tensor":
    """A picture → float32 [3, height, width] in [-1, 1]."""
    import torch

    return torch.from_numpy(np.asarray(rgb(image), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def to_square(image: Image.Image, size_px: int) -> "Tensor":
    """A picture → float32 [3, size_px, size_px] in [-1, 1], antialiased; squashed to a square as encoders do."""
    image = rgb(image)
    even = image.width % size_px == 0 and image.height % size_px == 0
    return to_tensor(image.resize((size_px, size_px), Image.Resampling.BOX if even else Image.Resampling.LANCZOS))


def grid(images: list[Image.Image], *, columns: int | None = None, gap: int = 4) -> Image.Image:
    """A sheet of pictures of one size on white; about square unless `columns` is given."""
    columns = min(len(images), columns or math.ceil(math.sqrt(len(images))))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for place, image in enumerate(images):
        sheet.paste(rgb(image), ((place % columns) * (width + gap), (place // columns) * (height + gap)))
    return sheet


LABEL_PX = 18


def labelled(image: Image.Image, text: str) -> Image.Image:
    """The picture with its caption below it in one line, truncated to the width."""
    card = Image.new("RGB", (image.width, image.height + LABEL_PX), "white")
    card.paste(image)
    font = ImageFont.load_default(12)
    pen = ImageDraw.Draw(card)
    text = " ".join(text.split())
    shown = text
    while text and pen.textlength(shown, font=font) > image.width:
        text = text[:-1]
        shown = f"{text}…"
    pen.text((image.width / 2, image.height + 2), shown, fill="#444444", font=font, anchor="ma")
    return card
