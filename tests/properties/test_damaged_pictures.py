"""Damaged picture files: whatever is wrong with one, it gives a picture or an ImageError."""

import contextlib
import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from unclip.errors import ImageError
from unclip.images import FORMATS, open_image, rgb, rgba

NUM_FILES = 6000
NUM_FAST = 400
ORIENTATION = ExifTags.Base.Orientation


def exif(orientation: int = 6) -> bytes:
    """An EXIF block with tags of several types, in three directories."""
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    tags[ExifTags.Base.Make] = "maker"
    tags[ExifTags.Base.XResolution] = tags[ExifTags.Base.YResolution] = 72.0
    tags[ExifTags.Base.UserComment] = b"comment"
    inner, place = tags.get_ifd(ExifTags.IFD.Exif), tags.get_ifd(ExifTags.IFD.GPSInfo)
    inner[ExifTags.Base.DateTimeOriginal], inner[ExifTags.Base.ExposureTime] = "2020:01:01 00:00:00", 0.5
    place[ExifTags.GPS.GPSLatitudeRef], place[ExifTags.GPS.GPSLatitude] = "N", (1.0, 2.0, 3.0)
    return tags.tobytes()


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


def saved(form: str, mode: str = "RGB", **options) -> bytes:
    content = io.BytesIO()
    picture(mode).save(content, form, **options)
    return content.getvalue()


def damaged_exif(block: bytes, rng: random.Random) -> bytes:
    """The block with some bytes changed, missing or inserted, after "Exif" and the byte order."""
    data = bytearray(block)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        place = rng.randrange(8, len(data))
        kind = rng.random()
        if kind < 0.8:
            data[place] = rng.choice([0, 1, 5, 10, 127, 128, 255, rng.randrange(256)])
        elif kind < 0.9:
            del data[place : place + rng.randrange(1, 8)]
        else:
            data[place:place] = rng.randbytes(4)
    return bytes(data if rng.random() < 0.9 else data[: rng.randrange(8, len(data))])


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The file with damage anywhere; most often in its first part, where the headers are."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16, 64])):
        if not data:
            break
        place = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 300))
        kind = rng.random()
        if kind < 0.5:
            data[place] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif kind < 0.7:
            data[place : place + 4] = struct.pack(">I", rng.choice([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]))
        elif kind < 0.8:
            del data[place : place + rng.randrange(1, 64)]
        elif kind < 0.9:
            data[place:place] = rng.randbytes(rng.randrange(1, 16))
        else:
            other = rng.randrange(len(data))
            data[place : place + 16] = data[other : other + 16]
    return bytes(data if rng.random() < 0.9 else data[: rng.randrange(len(data) + 1)])


def with_checksums(content: bytes) -> bytes:
    """A PNG whose chunks' checksums are right, so that what is in them is looked at."""
    data, place = bytearray(content), 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        if place + 12 + length > len(data):
            break
        data[place + 8 + length : place + 12 + length] = struct.pack(
            ">I", zlib.crc32(data[place + 4 : place + 8 + length])
        )
        place += 12 + length
    return bytes(data)


@pytest.fixture(scope="module")
def whole() -> list[bytes]:
    """Whole files of every format that is read."""

    def several() -> dict[str, object]:
        return {"save_all": True, "append_images": [picture("L").convert("RGB")]}

    tags = {"exif": exif()}
    files = [saved("JPEG", **tags), saved("JPEG", "L", **tags), saved("JPEG", "CMYK"), saved("JPEG", progressive=True)]
    files += [saved("MPO", **several(), **tags)]
    files += [saved("PNG", mode, **tags) for mode in ("RGB", "RGBA", "P", "1", "I;16", "LA")]
    files += [saved("PNG", "L", transparency=7), saved("PNG", transparency=(1, 2, 3)), saved("PNG", "P", bits=4)]
    files += [saved("PNG", **several()), saved("PNG", "P", transparency=bytes(range(256)))]
    files += [saved("WEBP", "RGBA", **tags), saved("WEBP", lossless=True, **tags), saved("WEBP", **several())]
    files += [saved("GIF", "P", transparency=3), saved("GIF", **several())]
    files += [saved("BMP", mode) for mode in ("RGB", "P", "1")]
    files += [saved("TIFF", mode, **tags) for mode in ("RGB", "I;16", "F", "RGBA")]
    files += [
        saved("TIFF", compression=kind, tiffinfo={ORIENTATION: 6, ExifTags.Base.XResolution: 72.0})
        for kind in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")
    ]
    files += [saved("TIFF", **several())]
    files += [saved("AVIF", mode, speed=10, **tags) for mode in ("RGB", "RGBA")]
    files += [saved("AVIF", speed=10, **several())]
    files += [saved("JPEG2000", mode) for mode in ("RGB", "RGBA", "L", "LA", "I;16")]
    files += [saved("JPEG2000", no_jp2=True)]
    for content in files:
        assert open_image(io.BytesIO(content)).mode == "RGB"
    return files


def check(content: bytes) -> bool:
    """Whether it is a picture; fails for any error but ours."""
    try:
        found = open_image(io.BytesIO(content), keep_alpha=True)
    except ImageError:
        return False
    assert found.mode in ("RGB", "RGBA")
    assert found.getextrema()
    return True


@pytest.mark.parametrize("count", [NUM_FAST, pytest.param(NUM_FILES, marks=pytest.mark.slow)])
def test_damaged_files(whole, count):
    """Anywhere in the file, in every format."""
    rng = random.Random(count)
    read = 0
    for number in range(count):
        content = damaged(whole[number % len(whole)], rng)
        if content.startswith(b"\x89PNG") and rng.random() < 0.7:
            content = with_checksums(content)
        read += check(content)
    assert 0.1 < read / count < 0.9


@pytest.mark.parametrize("count", [NUM_FAST // 4, pytest.param(NUM_FILES // 4, marks=pytest.mark.slow)])
def test_damaged_files_opened_by_pillow(whole, count, recwarn):
    """Pictures that people opened themselves are decoded when they are used."""
    rng = random.Random(count)
    for number in range(count):
        content = damaged(whole[number % len(whole)], rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = Image.open(io.BytesIO(content), formats=tuple(FORMATS))
            except Exception:
                continue
        for convert in (rgb, rgba):
            with contextlib.suppress(ImageError):
                convert(found)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("count", [NUM_FAST // 5, pytest.param(NUM_FILES // 5, marks=pytest.mark.slow)])
def test_damaged_exif_never_costs_a_picture(form, count):
    rng = random.Random(count)
    block = exif()
    options = {"speed": 10} if form == "AVIF" else {}
    content = saved(form, exif=block, **options)
    for _ in range(count):
        if form in ("JPEG", "WEBP"):
            data = saved(form, exif=damaged_exif(block, rng))
        elif form == "PNG":
            data = saved(form, exif=damaged_exif(block, rng))
            if rng.random() < 0.5:  # a checksum that is wrong too
                start = data.index(b"eXIf")
                place = start + 4 + rng.randrange(int.from_bytes(data[start - 4 : start], "big"))
                data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        elif form == "AVIF":
            data = bytearray(content)
            start = content.index(b"MM\0*")
            for _ in range(rng.choice([1, 2, 8])):
                data[start + rng.randrange(len(block) - 40)] = rng.randrange(256)
            data = bytes(data)
        else:
            place = content.index(struct.pack("<HHI", ExifTags.Base.XResolution, 5, 1))
            rest = content.index(b"maker\0")
            where = rng.choice([rng.randrange(place + 2, place + 12), rng.randrange(rest, len(content))])
            data = content[:where] + rng.randbytes(1) + content[where + 1 :]
        found = open_image(io.BytesIO(data))
        assert sorted(found.size) == [16, 24]
