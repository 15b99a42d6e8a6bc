"""A folder of captioned pictures: what is read and how, what is skipped, what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.data.folder import load_pictures, load_sizes, read_records
from unclip.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """Writes `metadata.jsonl`; `folder({...}, {...})`."""

    def write(*lines):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
        (tmp_path / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")
        return tmp_path

    return write


def entry(name="a.png", **more):
    return {"file_name": name, "captions": ["a tile"], **more}


def tile(folder, name="a.png", colour="red", size=(8, 8), mode="RGB"):
    Image.new(mode, size, colour).save(folder / name)


# -- records -------------------------------------------------------------------------------------------------------


def test_records(folder):
    root = folder(
        entry(concept="c", label="l", style="s", weight=2, held_out=True, unknown=[1]),
        "",
        {"file_name": "b.png", "text": "one\u2028caption"},
    )
    first, second = read_records(root)
    assert (first.concept, first.label, first.style, first.weight, first.held_out) == ("c", "l", "s", 2, True)
    assert second.captions == ("one\u2028caption",)
    assert (second.weight, second.held_out) == (1.0, False)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is no JSON object but a list"),
        ({"captions": ["x"]}, "needs a file_name"),
        ({"file_name": "a.png"}, "needs a file_name, and captions"),
        ({"file_name": "a.png", "captions": "abc"}, "captions"),
        ({"file_name": "a.png", "captions": ["ok", " "]}, "not blank"),
        ({"file_name": "a.png", "captions": [3]}, "captions"),
        (entry(weight=-1), "weight is -1"),
        (entry(weight="1"), "weight is '1'"),
        (entry(weight=True), "weight is True"),
        ('{"file_name": "a.png", "text": "x", "weight": NaN}', "weight is nan"),
        (entry(concept=3), "concept is 3; it must be a text"),
        (entry(held_out="no"), "held_out is 'no'"),
        (
            '{"file_name": "a.png", "text": "a smile \\ud83d"}',
            "line 2 has a text that is no Unicode text: .*surrogates",
        ),
        ('{"file_name": "a.png", "text": "x", "label": "\\ude00"}', "line 2 has a text that is no Unicode text"),
    ],
)
def test_bad_lines(folder, line, words):
    with pytest.raises(DataError, match=words):
        read_records(folder(entry(), line))


def test_no_data_set(tmp_path, folder):
    with pytest.raises(DataError, match="unclip data emoji"):
        read_records(tmp_path)
    with pytest.raises(DataError, match="is empty"):
        read_records(folder(""))
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a.png", "x/../../a.png", "a\\b.png", "C:/a.png", "a\0.png", "x" * 999]
)
def test_names_that_leave_the_folder(folder, name):
    with pytest.raises(DataError, match="outside the data set"):
        load_pictures(folder(entry(name)), 8)


def test_a_link_that_leaves_the_folder(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    tile(other)
    root = folder(entry())
    (root / "a.png").symlink_to(other / "a.png")
    with pytest.raises(DataError, match="is a link that leaves its folder"):
        load_pictures(root, 8)


# -- pixels --------------------------------------------------------------------------------------------------------


def test_pixels_and_images(folder):
    root = folder(entry())
    tile(root, colour=(255, 0, 102))
    pictures = load_pictures(root, 8)
    assert pictures.pixels.dtype == torch.uint8
    assert pictures.pixels.shape == (1, 3, 8, 8)
    assert pictures.pixels[0, :, 3, 3].tolist() == [255, 0, 102]
    images = pictures.images()
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[0, :, 0, 0], torch.tensor([1.0, -1.0, -0.2]))
    assert pictures.images([0, 0]).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_transparent_becomes_white(folder, kind):
    root = folder(entry())
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((10, 10, 10, 255), (0, 0, 4, 8))
    image.convert(kind).save(root / "a.png")
    pixels = load_pictures(root, 8).pixels[0]
    assert pixels[:, 0, 7].tolist() == [255] * 3
    assert pixels[0, 0, 0] < 20


def test_padded_to_a_square_with_white(folder):
    root = folder(entry("wide.png"), entry("tall.png"))
    tile(root, "wide.png", "black", (16, 8))
    tile(root, "tall.png", "black", (8, 16))
    wide, tall = load_pictures(root, 16).pixels[:, 0]
    assert torch.equal(wide, tall.T)
    assert wide[:4].eq(255).all()
    assert wide[4:12].eq(0).all()
    assert wide[12:].eq(255).all()


def test_shrunk_by_a_whole_number_is_the_mean(folder):
    root = folder(entry())
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(values).save(root / "a.png")
    found = load_pictures(root, 4).pixels[0].float()
    wanted = torch.from_numpy(values).float().view(4, 4, 4, 4, 3).mean(dim=(1, 3)).permute(2, 0, 1)
    assert (found - wanted).abs().max() <= 1  # Pillow rounds after each of two passes
    assert load_pictures(root, 5).pixels.shape == (1, 3, 5, 5)


def test_sixteen_bits_are_scaled(folder):
    root = folder(entry())
    Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.uint16)).save(root / "a.png")
    assert load_pictures(root, 8).pixels.eq(128).all()


def test_upright(folder):
    root = folder(entry("a.jpg"))
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 16, 8))
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(root / "a.jpg", exif=exif)
    pixels = load_pictures(root, 16).pixels[0, 0]
    assert pixels[:6].float().mean() > 200
    assert pixels[-6:].float().mean() < 50


# -- broken pictures -----------------------------------------------------------------------------------------------


def with_broken(folder, how_many, of):
    root = folder(*[entry(f"{i}.png") for i in range(of)])
    for i in range(of):
        tile(root, f"{i}.png")
    for i in range(how_many):
        (root / f"{i}.png").write_bytes(b"no picture" if i % 2 else (root / "9.png").read_bytes()[:50])
    return root


def test_broken_pictures_are_skipped_and_named(folder):
    root = with_broken(folder, 2, 20)
    with pytest.warns(UserWarning, match=r"2 pictures in .* are skipped: 0\.png: .*; 1\.png: "):
        pictures = load_pictures(root, 8, max_skipped_share=0.1)
    assert sorted(pictures.skipped) == [str(root / "0.png"), str(root / "1.png")]
    assert len(pictures) == 18
    assert [record.file_name for record in pictures.records] == [f"{i}.png" for i in range(2, 20)]


def test_too_many_broken_pictures(folder):
    root = with_broken(folder, 3, 20)
    with pytest.raises(
        DataError, match=r"3 of 20 pictures in .* cannot be read, more than the 10% allowed; the first: 0\.png"
    ):
        load_pictures(root, 8, max_skipped_share=0.1)
    with pytest.raises(DataError, match="1 of 1 pictures"):
        load_pictures(folder(entry("none.png")), 8)
    with pytest.raises(DataError, match=r"1 of 1 pictures in .*, so there is none; the first: none\.png"):
        load_pictures(folder(entry("none.png")), 8, max_skipped_share=1.0)


def test_a_huge_picture_is_not_decoded(folder, monkeypatch):
    root = folder(entry())
    tile(root, size=(100, 100))
    monkeypatch.setattr("unclip.images.MAX_PIXELS", 9_999)
    with pytest.raises(DataError, match=r"10,000 pixels \(100×100\); at most 9,999"):
        load_pictures(root, 8)


# -- subsets -------------------------------------------------------------------------------------------------------


def test_split(folder):
    root = folder(entry("a.png"), entry("b.png", held_out=True))
    tile(root, "a.png", "red")
    tile(root, "b.png", "blue")
    training, held_out = load_pictures(root, 8).split()
    assert [r.file_name for r in training.records] == ["a.png"]
    assert [r.file_name for r in held_out.records] == ["b.png"]
    assert held_out.pixels[0, :, 0, 0].tolist() == [0, 0, 255]
    pictures = load_pictures(folder(entry("a.png", weight=0), entry("b.png", held_out=True)), 8)
    with pytest.raises(DataError, match="none of 2 pictures"):
        pictures.split()
    assert len(pictures.split(need_training=False)[0]) == 1


def test_several_sizes_are_read_at_once(folder):
    root = with_broken(folder, 1, 20)
    with pytest.warns(UserWarning, match="1 pictures"):
        small, large = load_sizes(root, [4, 8], max_skipped_share=0.1)
    assert (small.pixels.shape, large.pixels.shape) == ((19, 3, 4, 4), (19, 3, 8, 8))
    assert small.records == large.records
