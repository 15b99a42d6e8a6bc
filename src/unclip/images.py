"""From pictures as people have them to pixels as networks want them, and back.

Knows Pillow's modes and the traps in them; knows no network. Called by encoders, pipelines and the command line.
"""

import math
import threading
import warnings
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from unclip.errors import ImageError

MAX_PIXELS = 64_000_000
MAX_ASPECT = 100
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

_filters = threading.Lock()


def open_image(file: str | Path | IO[bytes], name: str | None = None, *, keep_alpha: bool = False) -> Image.Image:
    """Open a picture file as RGB; nothing is decoded before its declared size is checked.

    Of several frames the first is taken.

    Args:
        file: a path, or an open file.
        name: how messages call it; the path when left out.
        keep_alpha: a picture with transparency comes as RGBA, upright too, its colours as they are in the file instead
            of on white.

    Raises: ImageError for a missing, broken or truncated file, no picture at all, or one of too many pixels.
    """
    name = name or str(file)
    try:
        with _opened(file) as image:
            check_size(image, name)
            image.seek(0)
            image.load()
            seen_through = rgba(image) if keep_alpha else None
            return rgb(image) if seen_through is None else seen_through
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture of a known kind ({', '.join(FORMATS)})") from error
    except ImageError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name} cannot be read as a picture: {error}") from error


def _opened(file: str | Path | IO[bytes]) -> Image.Image:
    # Pillow warns of large pictures, which are refused here anyway; filters of warnings belong to all threads at once.
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=FORMATS)


def check_size(image: Image.Image, name: str = "the image") -> None:
    """Raises: ImageError when a side is 0, the pixels are too many or the shape is too long."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is {width}×{height} pixels: there is nothing in it")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} has {width * height:,} pixels ({width}×{height}); at most {MAX_PIXELS:,} are read: make it smaller"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name} is {width}×{height} pixels; one side may be at most {MAX_ASPECT} times the other: crop it"
        )


def rgb(image: Image.Image) -> Image.Image:
    """The picture upright and in RGB: EXIF orientation applied, transparency on white, 16 bits scaled, not clipped.

    A colour profile (ICC) is not applied: the numbers are taken for sRGB.

    Raises: ImageError when it cannot be decoded, or its size is out of limits.
    """
    check_size(image)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = _eight_bits(image)
        if image.mode == "La":
            image = image.convert("LA")
        if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            canvas = Image.new("RGBA", image.size, "white")
            canvas.alpha_composite(image)
            image = canvas
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise ImageError(f"the image cannot be decoded: {error}") from error


def alpha(image: Image.Image) -> Image.Image | None:
    """The picture's transparency, upright, in mode L: 0 is fully transparent. None for a picture that has none.

    Raises: ImageError when it cannot be decoded, or its size is out of limits.
    """
    seen_through = rgba(image)
    return None if seen_through is None else seen_through.getchannel("A")


def rgba(image: Image.Image) -> Image.Image | None:
    """The picture upright and in RGBA, what its transparency hides too. None for a picture that has no transparency.

    Raises: ImageError when it cannot be decoded, or its size is out of limits.
    """
    check_size(image)
    try:
        if not image.has_transparency_data or image.mode[0] in "IF":
            return None
        image = ImageOps.exif_transpose(image)
        return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise ImageError(f"the image cannot be decoded: {error}") from error


def to_pil(images: Tensor) -> list[Image.Image]:
    """float [batch, 3, height, width] in [-1, 1] → 8-bit pictures."""
    return [Image.fromarray(array) for array in (to_numpy(images) * 255).round().astype(np.uint8)]


def to_numpy(images: Tensor) -> np.ndarray:
    """float [batch, 3, height, width] in [-1, 1] → float32 [batch, height, width, 3] in [0, 1]."""
    return to_unit(images).permute(0, 2, 3, 1).cpu().numpy()


def to_unit(images: Tensor) -> Tensor:
    """float in [-1, 1] → float32 in [0, 1], clamped."""
    return (images.float() * 0.5 + 0.5).clamp(0, 1)


def to_tensor(image: Image.Image) -> Tensor:
    """A picture → float32 [3, height, width] in [-1, 1]."""
    return torch.from_numpy(np.asarray(rgb(image), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def to_square(image: Image.Image, size_px: int) -> Tensor:
    """A picture → float32 [3, size_px, size_px] in [-1, 1], antialiased; squashed to a square as encoders do."""
    image = rgb(image)
    even = image.width % size_px == 0 and image.height % size_px == 0
    return to_tensor(image.resize((size_px, size_px), Image.Resampling.BOX if even else Image.Resampling.LANCZOS))


def grid(images: list[Image.Image], *, columns: int | None = None, gap: int = 4) -> Image.Image:
    """One sheet of pictures of one size, white between and behind them; about square unless `columns` is given."""
    columns = min(len(images), columns or math.ceil(math.sqrt(len(images))))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for place, image in enumerate(images):
        sheet.paste(rgb(image), ((place % columns) * (width + gap), (place // columns) * (height + gap)))
    return sheet


LABEL_PX = 18


def labelled(image: Image.Image, text: str) -> Image.Image:
    """The picture with its caption below, in one line, cut where it is too long."""
    card = Image.new("RGB", (image.width, image.height + LABEL_PX), "white")
    card.paste(image)
    font = ImageFont.load_default(12)
    pen = ImageDraw.Draw(card)
    text = " ".join(text.split())
    shown = text
    while shown and pen.textlength(shown + ("" if shown == text else "…"), font=font) > image.width:
        shown = shown[:-1]
    shown += "" if shown == text else "…"
    pen.text((image.width / 2, image.height + 2), shown, fill="#444444", font=font, anchor="ma")
    return card


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ImageError("the image has pixels that are not numbers")
    if image.mode == "F":
        top = 1.0 if values.max(initial=0) <= 1.0 else 255.0
    else:
        top = 65535.0 if values.max(initial=0) > 255 or image.mode.startswith("I;16") else 255.0
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values = np.where(values == transparent, top, values)
    return Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
