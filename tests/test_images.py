"""Pictures as people have them: every mode, every trap in a file, and the way back."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import ImageError, images
from unclip.images import alpha, check_size, grid, open_image, rgb, to_numpy, to_pil, to_tensor, to_unit

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


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG"])
def test_formats_whatever_the_name_says(write, form):
    options = {"lossless": True} if form == "WEBP" else {}
    opened = open_image(write(pattern(), "picture.png", format=form, **options))
    assert opened.mode == "RGB"
    assert opened.size == (6, 4)
    if form not in ("GIF", "JPEG"):
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
    check_size(Image.new("L", (10, 10)))
    with pytest.raises(ImageError, match=r"110 pixels \(11×10\); at most 100 are read: make it smaller"):
        check_size(Image.new("L", (11, 10)))


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
    with pytest.raises(ImageError, match="there is nothing in it"):
        rgb(Image.new("RGB", size))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
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
    with pytest.raises(ImageError, match="not numbers"):
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
