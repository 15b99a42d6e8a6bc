"""Pictures as people have them: every mode, every trap in a file, and the way back."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import ImageError, InputError, images
from unclip.images import alpha, as_pictures, check_size, grid, open_image, rgb, to_numpy, to_pil, to_tensor, to_unit

WHITE, RED, BLACK = (255, 255, 255), (255, 0, 0), (0, 0, 0)


def png(width, height, body=b"", *, bits=8, kind=2):
    """A PNG whose header says what we like; the body is whatever it is."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def pattern(size=(6, 4)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def write(tmp_path):
    """Write bytes, or a picture in a format, and return the path."""

    def put(content, name="picture.png", **options):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content.save(path, **options)
        return path

    return put


# ---- opening files ----


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG", "AVIF", "JPEG2000"])
def test_formats_whatever_the_name_says(write, form):
    options = {"lossless": True} if form == "WEBP" else {}
    opened = open_image(write(pattern(), "picture.png", format=form, **options))
    assert opened.mode == "RGB"
    assert opened.size == (6, 4)
    if form not in ("GIF", "JPEG", "AVIF"):
        assert np.array_equal(np.asarray(opened), np.asarray(pattern()))
    assert open_image(str(write(pattern()))).size == (6, 4)


@pytest.mark.parametrize(
    ("width", "height"), [(20_000, 20_000), (9000, 8000), (100_000, 50_000), (2**31 - 1, 2**31 - 1)]
)
def test_a_huge_picture_is_refused_by_its_header(write, monkeypatch, width, height):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="pixels"):
        open_image(write(png(width, height)))


def test_the_limit_itself(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    check_size((10, 10))
    with pytest.raises(ImageError, match=r"110 pixels \(11×10\); the limit is 100: make it smaller"):
        check_size((11, 10))


@pytest.mark.parametrize("form", [form for form in images.FORMATS if form != "GIF"])
def test_limits_are_the_same_for_every_format(write, monkeypatch, form):
    path = write(pattern((30, 20)), format=form)
    long = write(Image.new("RGB", (404, 4)), "long.png", format=form)
    monkeypatch.setattr(images, "MAX_PIXELS", 599)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"600 pixels \(30×20\); the limit is 599"):
        open_image(path)
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    with pytest.raises(ImageError, match="one side may be at most 100 times the other"):
        open_image(long)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "I;16"])
def test_modes_of_jpeg_2000(write, mode):
    picture = Image.new("I;16", (8, 8), 32768) if mode == "I;16" else Image.new("RGBA", (8, 8), (9, 9, 9, 0))
    path = write(picture if mode == "I;16" else picture.convert(mode), "picture.jp2")
    wanted = {"L": (9, 9, 9), "I;16": (128, 128, 128)}.get(mode, WHITE)
    assert open_image(path).getpixel((4, 4)) == wanted


def test_transparency_of_avif(write):
    picture = Image.new("RGBA", (16, 16), (200, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 8, 16))
    path = write(picture, "picture.avif", quality=100)
    assert np.asarray(open_image(path, keep_alpha=True))[0, [0, 15], 3].tolist() == [0, 255]
    assert open_image(path).getpixel((0, 0)) == WHITE


def test_without_support_for_a_format(write, monkeypatch):
    from PIL import AvifImagePlugin

    path = write(pattern(), format="AVIF")
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    with pytest.raises(ImageError, match=r"not a picture of a known kind \(JPEG, PNG,"):
        open_image(path)


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (100, 1)])
def test_small_pictures(write, size):
    assert open_image(write(Image.new("RGB", size, RED))).getpixel((0, 0)) == RED


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 101)])
def test_long_pictures(write, size):
    with pytest.raises(ImageError, match="one side may be at most 100 times the other: crop it"):
        open_image(write(Image.new("L", size)))


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_empty_pictures(write, size):
    with pytest.raises(ImageError):
        open_image(write(png(*size)))
    with pytest.raises(ImageError, match="it is empty"):
        rgb(Image.new("RGB", size))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_files(write, form, part):
    buffer = io.BytesIO()
    pattern((64, 64)).save(buffer, form)
    data = buffer.getvalue()
    with pytest.raises(ImageError, match=r"picture\.png"):
        open_image(write(data[: int(len(data) * part)]))


def test_a_wrong_checksum(write):
    buffer = io.BytesIO()
    pattern().save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[data.index(b"IDAT") + 6] ^= 0xFF
    with pytest.raises(ImageError, match="cannot be read as a picture"):
        open_image(write(bytes(data)))


NOT_PICTURES = {
    "empty": b"",
    "text": b"hello",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "PDF": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "zip": b"PK\x03\x04" + b"\0" * 30,
    "header alone": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("name", NOT_PICTURES)
def test_what_is_no_picture(write, name):
    with pytest.raises(ImageError, match=r"picture\.png is not a picture|cannot be read"):
        open_image(write(NOT_PICTURES[name]))


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "none.png", tmp_path, "a\0b.png"):
        with pytest.raises(ImageError, match="cannot be read as a picture"):
            open_image(path)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first(write, form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    path = write(frames[0], "moving.bin", format=form, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as opened:
        assert opened.n_frames == 3
    assert open_image(path).getpixel((4, 4)) == RED


def test_decompression_bomb_warnings_are_our_error_alone(write):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError):
            open_image(write(png(12_000, 10_000)))


def test_nothing_is_left_open(write, recwarn):
    import gc

    open_image(write(pattern()))
    with pytest.raises(ImageError):
        open_image(write(png(20_000, 20_000), "huge.png"))
    gc.collect()
    assert not [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)]


# ---- modes ----


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
def test_transparency_stands_on_white(mode):
    clear = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "PA":
        picture = Image.frombytes("PA", (2, 1), bytes([0, 0, 0, 255]))
        picture.putpalette(BLACK)
    else:
        picture = clear.convert("LA").convert("La") if mode == "La" else clear.convert(mode)
    picture = rgb(picture)
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == WHITE
    assert picture.getpixel((1, 0)) == BLACK


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
def test_transparency_alone(mode):
    image = Image.new("RGBA", (3, 1), (9, 9, 9, 255))
    image.putpixel((1, 0), (9, 9, 9, 0))
    image.putpixel((2, 0), (9, 9, 9, 100))
    if mode == "PA":
        image = Image.frombytes("PA", (3, 1), bytes([0, 255, 0, 0, 0, 100]))
        image.putpalette(BLACK)
    else:
        image = image.convert("LA").convert("La") if mode == "La" else image.convert(mode)
    found = alpha(image)
    assert found is not None
    assert found.mode == "L"
    assert np.asarray(found).tolist() == [[255, 0, 100]]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "I", "F", "I;16"])
def test_no_transparency(mode):
    assert alpha(Image.new(mode, (3, 2))) is None


def test_transparency_of_a_colour_and_of_a_turned_picture(write):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.putpixel((1, 0), 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write(image, transparency=1, exif=exif)
    opened = open_image(path, keep_alpha=True)
    assert opened.mode == "RGBA"
    assert opened.size == (1, 2)
    assert np.asarray(opened)[:, 0, 3].tolist() == [255, 0]
    assert open_image(path).mode == "RGB"
    assert open_image(write(pattern()), keep_alpha=True).mode == "RGB"


def test_a_file_keeps_its_transparency_and_what_it_hides(write):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8)
    pixels[0, :, 3] = 0
    opened = open_image(write(Image.fromarray(pixels)), keep_alpha=True)
    assert np.array_equal(np.asarray(opened), pixels)


def test_a_sheet_has_white_behind_transparency():
    assert grid([Image.new("RGBA", (1, 1), (255, 0, 0, 0)), Image.new("RGB", (1, 1), RED)]).getpixel((0, 0)) == WHITE


def test_transparency_of_pictures_out_of_limits():
    with pytest.raises(ImageError, match="one side may be"):
        alpha(Image.new("RGBA", (1, 101)))


def test_half_transparent():
    assert rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize(("mode", "value"), [("L", 7), ("1", 0), ("RGB", (7, 8, 9)), ("P", 0), ("P", b"\x00\xff")])
def test_a_transparent_colour(write, mode, value):
    colour = value if isinstance(value, int | tuple) else 0
    path = write(Image.new(mode, (3, 3), colour), transparency=value)
    with Image.open(path) as opened:
        assert "transparency" in opened.info
    assert open_image(path).getpixel((1, 1)) == WHITE


def test_a_palette(write):
    path = write(Image.new("RGB", (3, 3), RED).convert("P", palette=Image.Palette.ADAPTIVE))
    assert open_image(path).getpixel((1, 1)) == RED


def test_one_bit(write):
    assert open_image(write(Image.new("1", (3, 3), 1))).getpixel((1, 1)) == WHITE


def test_cmyk(write):
    path = write(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "picture.jpg")
    red, green, blue = open_image(path).getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_and_not_clipped(mode):
    layout = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    picture = Image.frombytes(mode, (4, 1), np.array([0, 256, 32768, 65535], dtype=layout).tobytes())
    assert np.asarray(rgb(picture))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_sixteen_bits_in_a_file(write):
    path = write(Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)))
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 128, 255]


def test_sixteen_bits_of_three_colours(write):
    body = b"\0" + struct.pack(">6H", 0, 32768, 65535, 65535, 0, 257)
    assert np.asarray(open_image(write(png(2, 1, body, bits=16)))).tolist() == [[[0, 128, 255], [255, 0, 1]]]


def test_sixteen_bits_with_a_transparent_grey():
    picture = Image.fromarray(np.array([[0, 40_000]], dtype=np.uint16))
    picture.info["transparency"] = 0
    assert [rgb(picture).getpixel((x, 0))[0] for x in (0, 1)] == [255, 156]


@pytest.mark.parametrize(("top", "expected"), [(1.0, [0, 128, 255]), (255.0, [0, 128, 255])])
def test_floating_point_pixels(top, expected):
    picture = Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32) * np.float32(top))
    assert np.asarray(rgb(picture))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers(value):
    with pytest.raises(ImageError, match="NaN or infinite"):
        rgb(Image.fromarray(np.full((2, 2), value, dtype=np.float32)))


def test_thirty_two_bit_integers_of_eight_bits():
    picture = Image.fromarray(np.array([[-5, 100, 255]], dtype=np.int32))
    assert np.asarray(rgb(picture))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(write, orientation):
    """A red pixel at the top left of the upright picture, wherever the file has it."""
    upright = Image.new("RGB", (4, 2), "white")
    upright.putpixel((0, 0), RED)
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[274] = orientation
    opened = open_image(write(stored, exif=exif))
    assert opened.size == (4, 2)
    assert opened.getpixel((0, 0)) == RED


def upside_down_top():
    """A picture whose stored left column is red: the top row, once it is turned as orientation 6 says."""
    stored = Image.new("RGB", (16, 8), "white")
    stored.paste(RED, (0, 0, 8, 8))
    return stored


def exif_with(*entries):
    """A block of orientation 6 and raw entries (tag, type, count, four bytes) of a directory."""
    rows = [struct.pack(">HHI4s", 0x0112, 3, 1, b"\0\6\0\0"), *(struct.pack(">HHI4s", *entry) for entry in entries)]
    body = struct.pack(">H", len(rows)) + b"".join(rows) + bytes(4)
    return b"Exif\0\0MM\0*\0\0\0\x08" + body + struct.pack(">ii", -1, 0)


DAMAGED = {
    "a rational of -1/0": exif_with((0x011A, 10, 1, struct.pack(">I", 8 + 2 + 24 + 4))),
    "bytes for a text": exif_with((0x010F, 3, 2, b"\0\1\0\2")),
    "a number for a comment": exif_with((0x9286, 5, 1, struct.pack(">I", 8 + 2 + 24 + 4))),
    "an offset beyond the end": exif_with((0x010F, 2, 2**31, b"\xff\xff\xff\xff")),
    "a directory beyond the end": exif_with((0x8769, 4, 1, b"\xff\xff\xff\0")),
    "a directory that is a text": exif_with((0x8769, 2, 4, b"abc\0")),
    "an unknown type": exif_with((0x010F, 77, 1, b"abcd")),
    "half a directory": exif_with((0x010F, 2, 4, b"abc\0"))[: 6 + 8 + 2 + 12 + 3],
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_orientation_beside_damaged_exif(write, form, damage):
    path = write(upside_down_top(), format=form, exif=DAMAGED[damage])
    opened = open_image(path)
    assert opened.size == (8, 16)
    assert opened.getpixel((4, 2))[1] < 60
    assert opened.getpixel((4, 13))[1] > 200
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own
        lazy = Image.open(path)
    with lazy:
        assert np.array_equal(np.asarray(rgb(lazy)), np.asarray(opened))


@pytest.mark.parametrize("block", [b"", b"Exif\0\0", b"Exif\0\0MM\0*", b"Exif\0\0nonsense", b"\xff" * 40])
def test_exif_that_cannot_be_read_at_all(write, block):
    assert open_image(write(pattern(), exif=block)).size == (6, 4)


@pytest.mark.parametrize("value", [b"\0\0\0\0", b"\0\x09\0\0", b"\xff\xff\0\0"])
def test_orientations_that_do_not_exist(write, value):
    path = write(pattern(), exif=exif_with().replace(b"\0\6\0\0", value))
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(pattern()))


def test_a_picture_is_turned_once(write):
    opened = open_image(write(upside_down_top(), exif=exif_with()))
    assert rgb(opened).size == opened.size == (8, 16)
    assert np.array_equal(np.asarray(rgb(rgb(opened))), np.asarray(opened))


def test_a_tiff_with_damaged_tags(write):
    path = write(upside_down_top(), "picture.tif", tiffinfo={0x0112: 6, 0x8769: 99_999_999, 0x011A: 72.0})
    assert open_image(path).size == (8, 16)


def test_metadata_that_keeps_a_picture_from_being_opened(write):
    """A checksum of EXIF or of a text, a multi-picture index, and EXIF in AVIF."""
    png_file = bytearray(write(upside_down_top(), exif=exif_with()).read_bytes())
    png_file[png_file.index(b"eXIf") + 3 + len(exif_with()[6:])] ^= 1
    assert open_image(write(bytes(png_file))).size == (8, 16)

    frames = {"save_all": True, "append_images": [pattern()], "format": "MPO", "exif": exif_with()}
    mpo = write(upside_down_top(), "two.jpg", **frames).read_bytes()
    assert open_image(write(mpo.replace(b"MPF\0", b"MPF\0\1\2\3\4", 1), "two.jpg")).size == (8, 16)

    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "maker"
    avif = write(upside_down_top(), format="AVIF", exif=tags).read_bytes()
    assert open_image(write(avif.replace(b"MM\0*", b"nope"))).size == (8, 16)


def test_any_failure_of_pillow_is_an_image_error(write, monkeypatch):
    path = write(pattern())
    for error in (MemoryError(), RecursionError(), struct.error("x"), KeyError("x"), Image.DecompressionBombError("x")):

        def fail(self, error=error):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(Image.Image, "load", fail)
            with pytest.raises(ImageError, match=r"picture\.png cannot be read as a picture: \S"):
                open_image(path)
            with pytest.raises(ImageError, match="cannot be decoded"):
                rgb(Image.new("L", (2, 2)))


# ---- transparency by a colour ----


def packed(values, bits):
    """Rows of a PNG: each value in so many bits, and the filter's number before each row."""
    rows = []
    for row in values:
        digits = "".join(f"{value:0{bits}b}" for value in row)
        digits += "0" * (-len(digits) % 8)
        rows.append(b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big"))
    return b"".join(rows)


def keyed(values, bits, kind, key):
    """A PNG of one row a list of values, with a colour or a palette's index that is transparent."""
    num_channels = 3 if kind == 2 else 1
    whole = png(len(values[0]) // num_channels, len(values), packed(values, bits), bits=bits, kind=kind)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    place = whole.index(b"IDAT") - 4
    palette = chunk(b"PLTE", bytes(n % 256 for n in range(3 * 2**bits))) if kind == 3 else b""
    return whole[:place] + palette + chunk(b"tRNS", key) + whole[place:]


@pytest.mark.parametrize("how", ["file", "lazy", "loaded", "copied"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_transparent_grey_at_every_depth(write, bits, which, how):
    top = 2**bits - 1
    values = [0, 1, top // 2, top, 1, top] if bits > 1 else [0, 1, 1, 0, 1, 0]
    key = top if which < 0 else which
    path = write(keyed([values, values[::-1]], bits, 0, struct.pack(">H", key)))
    found = shown(path, how)
    assert np.asarray(found)[0, :, 3].tolist() == [0 if value == key else 255 for value in values]
    assert np.asarray(found)[1, :, 3].tolist() == [0 if value == key else 255 for value in values[::-1]]
    levels = [255 * value / top for value in values]
    assert np.abs(np.asarray(found)[0, :, 0] - levels).max() <= 1
    on_white = np.asarray(open_image(path))[0, :, 0]
    assert np.abs(on_white - [255 if value == key else 255 * value / top for value in values]).max() <= 1


def shown(path, how):
    """The picture in RGBA: read by us, or opened by Pillow and decoded late, early or copied."""
    if how == "file":
        return open_image(path, keep_alpha=True)
    with Image.open(path) as opened:
        if how != "lazy":
            opened.load()
        return images.rgba(opened.copy() if how == "copied" else opened)


@pytest.mark.parametrize("how", ["file", "lazy", "loaded"])
@pytest.mark.parametrize("key", [(0, 0, 0), (40_000, 257, 3), (65_535, 65_535, 65_535), (0x1234, 0x5678, 0x9ABC)])
def test_a_transparent_colour_of_sixteen_bits(write, key, how):
    others = [(1, 2, 300), (50_000, 60_000, 100)]
    row = [*key, *others[0], *key, *others[1]]
    found = np.asarray(shown(write(keyed([row], 16, 2, struct.pack(">3H", *key))), how))
    assert found[0, :, 3].tolist() == [0, 255, 0, 255]
    assert found[0, 0, :3].tolist() == [value >> 8 for value in key]
    assert found[0, 3, :3].tolist() == [195, 234, 0]


def test_a_colour_of_sixteen_bits_is_compared_in_all_of_them(write):
    key, near = (0x1234, 0x5678, 0x9ABC), (0x1234, 0x5678, 0x9ABD)
    path = write(keyed([[*key, *near]], 16, 2, struct.pack(">3H", *key)))
    assert np.asarray(open_image(path, keep_alpha=True))[0, :, 3].tolist() == [0, 255]
    assert open_image(path).mode == "RGB"
    with path.open("rb") as file:
        assert open_image(file, keep_alpha=True).mode == "RGBA"


def test_a_transparent_colour_of_eight_bits(write):
    path = write(keyed([[1, 2, 3, 4, 5, 6]], 8, 2, struct.pack(">3H", 4, 5, 0x0106)))
    assert np.asarray(open_image(path, keep_alpha=True))[0, :, 3].tolist() == [255, 0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("key", [b"\xff\0", b"\xff\x07"])
def test_transparent_entries_of_a_palette(write, bits, key):
    found = open_image(write(keyed([[0, 1, 0, 1]], bits, 3, key)), keep_alpha=True)
    assert np.asarray(found)[0, :, 3].tolist() == [255, key[1], 255, key[1]]
    assert np.asarray(found)[0, 1, :3].tolist() == [3, 4, 5]


def test_a_grey_of_eight_bits_that_could_be_of_four(write):
    path = write(keyed([[0, 17, 34, 255]], 8, 0, struct.pack(">H", 1)))
    assert np.asarray(open_image(path, keep_alpha=True))[0, :, 3].tolist() == [255] * 4


def test_transparency_by_a_colour_in_a_turned_file(write):
    data = keyed([[0, 40_000]], 16, 0, struct.pack(">H", 0))
    place = data.index(b"IDAT") - 4
    block = exif_with()[6:]
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    found = open_image(write(data[:place] + chunk + data[place:]), keep_alpha=True)
    assert np.asarray(found)[:, 0, 3].tolist() == [0, 255]


@pytest.mark.parametrize("profile", ["sRGB", b"no profile at all"])
def test_a_colour_profile_is_not_applied(write, profile):
    from PIL import ImageCms

    if profile == "sRGB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    opened = open_image(write(pattern(), icc_profile=profile))
    assert np.array_equal(np.asarray(opened), np.asarray(pattern()))


def test_the_given_picture_stays_as_it_is():
    picture = Image.new("RGBA", (2, 2), (1, 2, 3, 0))
    rgb(picture)
    assert picture.mode == "RGBA"
    assert picture.getpixel((0, 0)) == (1, 2, 3, 0)


# ---- arrays ----


COLOURS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def arrays_of(given, **options):
    return [np.asarray(picture) for picture in as_pictures(given, **options)]


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64, ">f4"])
def test_arrays_are_pictures(dtype):
    given = COLOURS if dtype is np.uint8 else (COLOURS / 255).astype(dtype)
    (found,) = arrays_of(given)
    assert np.array_equal(found, COLOURS)
    assert all(np.array_equal(one, COLOURS) for one in arrays_of([given, given[::1], Image.fromarray(COLOURS)]))
    assert [one.shape for one in arrays_of(np.stack([given, given]))] == [(4, 6, 3)] * 2
    assert [one.shape for one in arrays_of([np.stack([given, given]), given])] == [(4, 6, 3)] * 3


@pytest.mark.parametrize(("channels", "mode"), [(None, "L"), (1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_channels_of_arrays(channels, mode):
    (found,) = as_pictures(np.zeros((4, 6) if channels is None else (4, 6, channels), np.uint8))
    assert (found.mode, found.size) == (mode, (6, 4))
    assert (found.getpixel((0, 0)) if mode == "L" else sum(found.getpixel((0, 0)))) == 0


def test_batches_of_masks():
    masks = np.random.default_rng(0).random((3, 16, 16)) > 0.5
    found = arrays_of(masks, are_masks=True)
    assert [np.array_equal(one, 255 * mask) for one, mask in zip(found, masks, strict=True)] == [True] * 3
    assert arrays_of(masks[0], are_masks=True)[0].shape == (16, 16)
    assert len(arrays_of(masks[..., None], are_masks=True)) == 3


def test_arrays_out_of_order_in_memory():
    turned = COLOURS.transpose(1, 0, 2)[::-1]
    assert np.array_equal(arrays_of(turned)[0], turned)


def test_half_is_white_in_masks_as_in_the_reference():
    (found,) = arrays_of(np.array([[0.0, 0.499, 0.5, 1.0]]), are_masks=True)
    assert (found >= 128).tolist() == [[False, False, True, True]]


def test_what_a_pipeline_gives_as_arrays_is_taken():
    pictures = torch.rand(2, 3, 4, 5) * 2 - 1
    assert all(
        np.array_equal(np.asarray(one), np.asarray(other))
        for one, other in zip(as_pictures(to_numpy(pictures)), to_pil(pictures), strict=True)
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.full((4, 4, 3), 1.5), r"float64 with values from 1\.5 to 1\.5; floating point must be from 0 to 1"),
        (COLOURS.astype(np.float32), r"values from 1 to 248; .*given as uint8"),
        (COLOURS / 127.5 - 1, "values from -0.9922 to 0.9451"),
        (np.full((4, 4), np.nan), "NaN or infinity"),
        (np.full((4, 4), np.inf, np.float32), "NaN or infinity"),
        (COLOURS.astype(np.int64), r"array of int64; it must be uint8 \(0 to 255\), floating point \(0 to 1\) or bool"),
        (COLOURS.astype(np.uint16), "array of uint16"),
        (COLOURS.astype(complex), "array of complex128"),
        (COLOURS.astype(object), "array of object"),
        (np.array("cat.png"), "of the shape"),
        (COLOURS.transpose(2, 0, 1), r"shape \(3, 4, 6\); it must be \[height, width\]"),
        (np.zeros((2, 16, 16), np.uint8), r"shape \(2, 16, 16\)"),
        (np.zeros(5, np.uint8), r"shape \(5,\)"),
        (np.zeros((1, 1, 4, 4, 3), np.uint8), "of the shape"),
        (np.zeros((0, 4, 4, 3), np.uint8), "it is empty"),
        (np.zeros((0, 4), np.uint8), "it is empty"),
        (np.zeros((1, 101), np.uint8), "one side may be at most 100 times"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), "the limit is 64,000,000"),
        ([COLOURS, "cat.png"], "not a list with a str"),
        ([[COLOURS]], "not a list with a list"),
        ("cat.png", "not a str"),
        (b"cat", "not a bytes"),
        (None, "not a NoneType"),
        ([], "empty list"),
        (torch.zeros(3, 4, 4), "not a Tensor"),
    ],
)
def test_arrays_that_are_refused(given, words):
    with pytest.raises(InputError, match=f"^image .*{words}"):
        as_pictures(given)


# ---- tensors ----


def test_there_and_back():
    picture = pattern()
    tensor = to_tensor(picture)
    assert tensor.shape == (3, 4, 6)
    assert tensor.dtype == torch.float32
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    (back,) = to_pil(tensor[None])
    assert np.array_equal(np.asarray(back), np.asarray(picture))


def test_ends_of_the_range():
    assert to_tensor(Image.new("RGB", (1, 1), WHITE)).flatten().tolist() == [1, 1, 1]
    assert to_tensor(Image.new("RGB", (1, 1), BLACK)).flatten().tolist() == [-1, -1, -1]
    beyond = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_unit(beyond)[0, 0, 0].tolist() == [0, 0, 0.5, 1, 1]
    assert np.asarray(to_pil(beyond)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_channels_last_in_numpy():
    tensor = torch.rand(2, 3, 4, 5, dtype=torch.float64) * 2 - 1
    array = to_numpy(tensor.bfloat16())
    assert array.shape == (2, 4, 5, 3)
    assert array.dtype == np.float32
    assert np.abs(array - to_unit(tensor).permute(0, 2, 3, 1).numpy()).max() < 0.01


# ---- sheets ----


@pytest.mark.parametrize(
    ("count", "columns", "size"),
    [(1, None, (5, 3)), (4, None, (14, 10)), (5, None, (23, 10)), (3, 1, (5, 17)), (2, 9, (14, 3))],
)
def test_a_sheet(count, columns, size):
    sheet = grid([Image.new("RGB", (5, 3), RED)] * count, columns=columns)
    assert sheet.size == size
    red, white = ((np.asarray(sheet) == colour).all(axis=2) for colour in (RED, WHITE))
    assert red.sum() == count * 15
    assert (red | white).all()


def test_to_a_square():
    halves = Image.new("RGB", (8, 4), "white")
    halves.paste("black", (4, 0, 8, 4))
    square = images.to_square(halves, 2)
    assert square.tolist() == [[[1, -1], [1, -1]]] * 3
    assert images.to_square(halves.convert("LA"), 3).shape == (3, 3, 3)
    assert images.to_square(halves, 3)[:, :, 1].abs().max() < 0.5  # the edge, antialiased
