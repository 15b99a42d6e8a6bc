"""A folder of captioned pictures: what is read and how, what is skipped, what is refused."""

import json
import os
import struct
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.data.folder import Keys, load_sizes, read_metadata, read_records, square_pixels
from unclip.data.samples import decode, inspect
from unclip.data.shards import RawSample
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
        ("{", "line 2: it is not JSON"),
        ("[1]", "line 2: it is not a JSON object but a list"),
        ("[" * 100_000, "line 2: it is not JSON"),
        ({"captions": ["x"]}, "needs the name of a picture under file_name or image"),
        ({"file_name": 3, "text": "x"}, "needs the name of a picture"),
        ({"file_name": "", "text": "x"}, "needs the name of a picture"),
        ('{"file_name": "\\ud83d.png", "text": "x"}', "it contains text that is not valid Unicode"),
        ({"file_name": "a.png"}, "needs a caption under captions or text"),
        ({"file_name": "a.png", "text": ""}, "needs a caption"),
        ({"file_name": "a.png", "text": None}, "needs a caption"),
        ({"file_name": "a.png", "captions": []}, "needs a caption"),
        ({"file_name": "a.png", "captions": [" ", None]}, "text that is not blank"),
        ({"file_name": "a.png", "captions": [3]}, "needs a caption"),
        (entry(weight=-1), "weight is -1"),
        (entry(weight=10**400), "weight is a number of 401 digits; it must be 0 or a number from 1e-12 to 1e"),
        (entry(weight=1e300), "weight is 1e"),
        (entry(weight=1e-300), "weight is 1e-300"),
        ('{"file_name": "a.png", "text": "x", "weight": 1e400}', "weight is inf"),
        (entry(weight="1"), "weight is '1'"),
        (entry(weight=True), "weight is True"),
        ('{"file_name": "a.png", "text": "x", "weight": NaN}', "weight is nan"),
        (entry(concept=3), "concept is 3; it must be a text"),
        (entry(held_out="no"), "held_out is 'no'"),
        (
            '{"file_name": "a.png", "text": "a smile \\ud83d"}',
            "line 2: it contains text that is not valid Unicode: .*surrogates",
        ),
        (
            '{"file_name": "a.png", "text": "x", "label": "\\ude00"}',
            "line 2: it contains text that is not valid Unicode",
        ),
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


def test_an_empty_folder_and_one_of_pictures_are_told_what_to_do(tmp_path):
    tile(tmp_path, "my cat.png")
    with pytest.raises(DataError) as caught:
        read_records(tmp_path)
    assert '{"file_name": "my cat.png", "text": "a black cat"}' in str(caught.value)
    assert f"unclip data caption {tmp_path}" in str(caught.value)
    with pytest.raises(DataError, match="is a file; name a folder"):
        read_records(tmp_path / "my cat.png")
    with pytest.raises(DataError, match="does not exist"):
        read_records(tmp_path / "none")


@pytest.mark.parametrize(
    ("line", "captions"),
    [
        ({"file_name": "a.png", "captions": "a cat"}, ("a cat",)),
        ({"file_name": "a.png", "captions": ["a cat", "", None]}, ("a cat",)),
        ({"file_name": "a.png", "captions": None, "text": "a cat"}, ("a cat",)),
        ({"file_name": "a.png", "text": ["one", "two"]}, ("one", "two")),
        ({"image": "a.png", "caption": "a cat"}, ("a cat",)),
        ({"image_path": "a.png", "prompt": "a cat"}, ("a cat",)),
        ({"file_name": "a.png", "image": "b.png", "text": "first", "caption": "second"}, ("first",)),
        ({"file_name": "a.png", "captions": ["first"], "text": "second"}, ("first",)),
        ({"file_name": "a.png", "text": "x", "weight": None, "held_out": None, "label": None}, ("x",)),
    ],
)
def test_names_of_keys(folder, line, captions):
    (record,) = read_records(folder(line))
    assert (record.file_name, record.captions, record.weight, record.held_out) == ("a.png", captions, 1.0, False)


def test_keys_that_are_chosen(folder):
    root = folder({"file_name": "x.png", "photo": "a.png", "text": "no", "title": ["yes", "or"]}, entry())
    records, broken = read_metadata(root / "metadata.jsonl", root, Keys("photo", "title"))
    assert [(record.file_name, record.captions) for record in records] == [("a.png", ("yes", "or"))]
    assert list(broken) == ["metadata.jsonl, line 2"]
    assert "under photo" in broken["metadata.jsonl, line 2"]


def test_a_line_that_cannot_be_used_is_a_broken_sample(folder):
    faults = [entry("x.png", captions=[""]), {"file_name": "y.png", "text": None}, "{", entry("z.png", weight=10**400)]
    root = folder(*faults, *(entry(f"{i}.png") for i in range(16)))
    for i in range(16):
        tile(root, f"{i}.png")
    (root / "0.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"5 pictures in .* are skipped: metadata\.jsonl, line 1: it needs a caption"):
        pictures = load_sizes(root, [8], max_skipped_share=0.25)[0]
    assert len(pictures) == 15
    assert str(root / "metadata.jsonl, line 4") in pictures.skipped
    with pytest.raises(DataError, match=r"5 of 20 pictures .* more than the 20% allowed"):
        load_sizes(root, [8], max_skipped_share=0.2)
    with pytest.raises(DataError, match=r"4 of 20 pictures"):
        read_records(root)


def test_few_lines_that_cannot_be_used(folder):
    root = folder({"file_name": "x.png", "text": ""}, *(entry(f"{i}.png") for i in range(100)))
    with pytest.warns(UserWarning, match="line 1"):
        assert len(read_records(root)) == 100


# -- CSV -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        'file_name,text\na.png,"a cat, sleeping"\n\nb.png,a dog\n',
        "\ufeffFile_Name; Text\r\na.png;a cat, sleeping\r\nb.png;a dog\r\n",
        "id\timage\tcaption\n0\ta.png\ta cat, sleeping\n1\tb.png\ta dog\n",
        'prompt, path, weight, held_out\n"a cat, sleeping", a.png, , \na dog,b.png,1.0,FALSE\n',
    ],
)
def test_metadata_csv(tmp_path, text):
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    first, second = read_records(tmp_path)
    assert (first.file_name, first.captions) == ("a.png", ("a cat, sleeping",))
    assert (second.file_name, second.captions) == ("b.png", ("a dog",))
    assert (second.weight, second.held_out) == (1.0, False)


def test_what_a_csv_says_more(tmp_path):
    text = "file_name,text,weight,held_out,label\na.png,x,2.5,true,l\n"
    text += "b.png,x,heavy,,\nc.png,x,nan,,\nd.png,x,1,maybe,\n"
    (tmp_path / "metadata.csv").write_text(text + 'e.png,a, cat,1,\nf.png,a red, juicy, apple,1,\ng.png,"a\ncat",,,\n')
    records, broken = read_metadata(tmp_path / "metadata.csv", tmp_path)
    assert [(r.file_name, r.weight, r.held_out, r.label) for r in records] == [
        ("a.png", 2.5, True, "l"),
        ("g.png", 1.0, False, ""),
    ]
    assert records[1].captions == ("a\ncat",)
    assert [name.removeprefix("metadata.csv, line ") for name in broken] == ["3", "4", "5", "6", "7"]
    assert "weight is 'heavy'" in broken["metadata.csv, line 3"]
    assert "6 columns, but the first line has 5" in broken["metadata.csv, line 7"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,title\n1,x\n", r"the first line .*'id,title'; it must name a column for the picture .*--image-key"),
        ("", "the first line of"),
        ('file_name,text\na.png,"a cat\nb.png,a dog\n', "cannot be read as CSV"),
        ("file_name,text\na.png," + "x" * 200_000, "cannot be read as CSV"),
        ("file_name,text\n", "is empty"),
    ],
)
def test_a_csv_that_cannot_be_used(tmp_path, text, words):
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        read_records(tmp_path)


def test_columns_that_are_chosen(tmp_path):
    (tmp_path / "metadata.csv").write_text("Photo,Title\na.png,a tile\n")
    tile(tmp_path)
    assert load_sizes(tmp_path, [8], keys=Keys("photo", "TITLE"))[0].records[0].captions == ("a tile",)
    (tmp_path / "metadata.jsonl").write_text(json.dumps(entry(captions=["of the other"])))
    assert read_records(tmp_path)[0].captions == ("of the other",)  # metadata.jsonl comes first


# -- names of pictures ---------------------------------------------------------------------------------------------


def test_names_written_on_windows(folder):
    root = folder(entry("img\\a.png"))
    (root / "img").mkdir()
    tile(root, "img/a.png")
    assert load_sizes(root, [8])[0].records[0].file_name == "img/a.png"


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_names_whose_accents_are_written_otherwise(folder, forms):
    written, stored = (unicodedata.normalize(form, "été/café.png") for form in forms)
    root = folder(entry(written))
    (root / stored).parent.mkdir()
    tile(root, stored)
    assert load_sizes(root, [8])[0].records[0].file_name == stored


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "../a.png", "x/../../a.png", "C:/a.png", "a\0.png", "x" * 999, "é" * 999),
        *("..\\a.png", "C:\\a.png", "\\a.png", "\\\\host\\a.png", "x\\..\\..\\é.png"),
    ],
)
def test_names_that_leave_the_folder(folder, name):
    with pytest.raises(DataError, match="outside the data set"):
        load_sizes(folder(entry(name)), [8])


def test_a_link_that_leaves_the_folder(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    tile(other)
    root = folder(entry())
    (root / "a.png").symlink_to(other / "a.png")
    with pytest.raises(DataError, match="is a link that leaves its folder"):
        load_sizes(root, [8])


# -- pixels --------------------------------------------------------------------------------------------------------


def test_pixels_and_images(folder):
    root = folder(entry())
    tile(root, colour=(255, 0, 102))
    pictures = load_sizes(root, [8])[0]
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
    pixels = load_sizes(root, [8])[0].pixels[0]
    assert pixels[:, 0, 7].tolist() == [255] * 3
    assert pixels[0, 0, 0] < 20


def test_padded_to_a_square_with_white(folder):
    root = folder(entry("wide.png"), entry("tall.png"))
    tile(root, "wide.png", "black", (16, 8))
    tile(root, "tall.png", "black", (8, 16))
    wide, tall = load_sizes(root, [16])[0].pixels[:, 0]
    assert torch.equal(wide, tall.T)
    assert wide[:4].eq(255).all()
    assert wide[4:12].eq(0).all()
    assert wide[12:].eq(255).all()


def test_shrunk_by_a_whole_number_is_the_mean(folder):
    root = folder(entry())
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(values).save(root / "a.png")
    found = load_sizes(root, [4])[0].pixels[0].float()
    wanted = torch.from_numpy(values).float().view(4, 4, 4, 4, 3).mean(dim=(1, 3)).permute(2, 0, 1)
    assert (found - wanted).abs().max() <= 1  # Pillow rounds after each of two passes
    assert load_sizes(root, [5])[0].pixels.shape == (1, 3, 5, 5)


def test_sixteen_bits_are_scaled(folder):
    root = folder(entry())
    Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.uint16)).save(root / "a.png")
    assert load_sizes(root, [8])[0].pixels.eq(128).all()


def test_upright(folder):
    root = folder(entry("a.jpg"))
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 16, 8))
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(root / "a.jpg", exif=exif)
    pixels = load_sizes(root, [16])[0].pixels[0, 0]
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
        pictures = load_sizes(root, [8], max_skipped_share=0.1)[0]
    assert sorted(pictures.skipped) == [str(root / "0.png"), str(root / "1.png")]
    assert len(pictures) == 18
    assert [record.file_name for record in pictures.records] == [f"{i}.png" for i in range(2, 20)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_in_place_of_a_picture_or_a_shard(folder, tmp_path_factory):
    path = folder(entry(), entry("pipe.jpg"))
    tile(path)
    os.mkfifo(path / "pipe.jpg")
    with pytest.warns(UserWarning, match="not a regular file"):
        (found,) = load_sizes(path, [8], max_skipped_share=0.5)
    assert [record.file_name for record in found.records] == ["a.png"]
    assert "not a regular file" in inspect(path).broken["pipe.jpg: 000000001"]
    os.mkfifo((shards := tmp_path_factory.mktemp("shards")) / "a.tar")
    assert "not a regular file" in inspect(shards).broken[str(shards / "a.tar")]


def test_too_many_broken_pictures(folder):
    root = with_broken(folder, 3, 20)
    with pytest.raises(DataError, match=r"3 of 20 pictures in .* cannot be read, more than the 10% allowed: 0\.png"):
        load_sizes(root, [8], max_skipped_share=0.1)
    with pytest.raises(DataError, match="none of 1 pictures"):
        load_sizes(folder(entry("none.png")), [8])
    with pytest.raises(DataError, match=r"none of 1 pictures in .* can be read: none\.png"):
        load_sizes(folder(entry("none.png")), [8], max_skipped_share=1.0)


def test_a_huge_picture_is_not_decoded(folder, monkeypatch):
    root = folder(entry())
    tile(root, size=(100, 100))
    monkeypatch.setattr("unclip.images.MAX_PIXELS", 9_999)
    with pytest.raises(DataError, match=r"10,000 pixels \(100×100\); the limit is 9,999"):
        load_sizes(root, [8])


@pytest.mark.parametrize("size", [(3000, 40), (40, 3000), (333, 100), (100, 333), (5, 3), (64, 10), (10, 64)])
@pytest.mark.parametrize("size_px", [7, 64])
def test_as_if_padded_first(size, size_px, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image, side = Image.fromarray(pixels), max(size)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    filter_ = Image.Resampling.BOX if side % size_px == 0 else Image.Resampling.LANCZOS
    wanted = np.asarray(canvas.resize((size_px, size_px), filter_), dtype=int).transpose(2, 0, 1)
    assert np.array_equal(square_pixels(image, size_px).numpy(), wanted)
    monkeypatch.setattr("unclip.data.folder.MAX_PIXELS", 1)
    difference = np.abs(square_pixels(image, size_px).numpy() - wanted).max()
    assert difference == 0 if size[0] > size[1] else difference <= 1  # rows are resized before columns


@pytest.mark.parametrize("size", [(30_000, 300), (300, 30_000), (80_000, 800), (800, 80_000)])
def test_a_thin_picture_needs_no_large_square(size, monkeypatch):
    areas = []

    def new(mode, size, *args, made=Image.new):
        areas.append(size[0] * size[1])
        return made(mode, size, *args)

    image = Image.new("RGB", size, "black")
    monkeypatch.setattr(Image, "new", new)
    pixels = square_pixels(image, 64)
    assert max(areas) <= 64 * 80_000
    middle = pixels[:, 31] if size[0] > size[1] else pixels[:, :, 31]
    assert middle.float().mean() < 220
    assert (pixels == 255).float().mean() > 0.9


def test_a_picture_that_does_not_fit_into_memory_is_a_broken_one(folder, monkeypatch):
    root = folder(entry("a.png"), entry("b.png"))
    tile(root, "a.png")
    tile(root, "b.png", size=(9, 9))

    def scarce(image, size_px):
        if image.width == 9:
            raise MemoryError
        return square_pixels(image, size_px)

    monkeypatch.setattr("unclip.data.folder.square_pixels", scarce)
    with pytest.warns(UserWarning, match=r"b\.png is 9×9 pixels: there is not enough memory"):
        pictures = load_sizes(root, [8], max_skipped_share=0.5)[0]
    assert [record.file_name for record in pictures.records] == ["a.png"]
    sample = RawSample("key", "0.tar", {"png": (root / "b.png").read_bytes(), "txt": b"a tile"})
    with pytest.raises(DataError, match="key is 9×9 pixels: there is not enough memory"):
        decode(sample, [8])


def test_damaged_exif_breaks_nothing(folder):
    """XResolution is -1/0, which cannot be written again."""
    root = folder(entry("a.jpg"), entry("b.jpg"))
    tile(root, "b.jpg", size=(16, 16))
    stored = Image.new("RGB", (16, 8), "black")
    block = b"Exif\0\0MM\0*\0\0\0\x08\0\2"
    block += struct.pack(">HHI4s", 0x0112, 3, 1, b"\0\6\0\0") + struct.pack(">HHII", 0x011A, 10, 1, 38)
    stored.save(root / "a.jpg", exif=block + bytes(4) + struct.pack(">ii", -1, 0))
    pictures = load_sizes(root, [16], max_skipped_share=0)[0]
    assert pictures.skipped == {}
    assert pictures.pixels[0, 0, 8, 2] == 255  # upright it is narrow
    assert pictures.pixels[0, 0, 2, 8] < 20


@pytest.mark.parametrize(("suffix", "form"), [("avif", "AVIF"), ("jp2", "JPEG2000"), ("gif", "GIF"), ("tiff", "TIFF")])
def test_formats_in_folders_and_shards(folder, suffix, form):
    root = folder(entry(f"a.{suffix}"))
    Image.new("RGB", (8, 8), (200, 10, 10)).save(root / f"a.{suffix}", form)
    found = load_sizes(root, [8])[0].pixels[0]
    assert found[0].float().mean() > 190
    sample = RawSample("a", "0.tar", {suffix: (root / f"a.{suffix}").read_bytes(), "txt": b"a tile"})
    assert torch.equal(decode(sample, [8]).pixels[8], found)


# -- subsets -------------------------------------------------------------------------------------------------------


def test_split(folder):
    root = folder(entry("a.png"), entry("b.png", held_out=True))
    tile(root, "a.png", "red")
    tile(root, "b.png", "blue")
    training, held_out = load_sizes(root, [8])[0].split()
    assert [r.file_name for r in training.records] == ["a.png"]
    assert [r.file_name for r in held_out.records] == ["b.png"]
    assert held_out.pixels[0, :, 0, 0].tolist() == [0, 0, 255]
    (pictures,) = load_sizes(folder(entry("a.png", weight=0), entry("b.png", held_out=True)), [8])
    with pytest.raises(DataError, match="none of 2 pictures"):
        pictures.split()
    assert len(pictures.split(need_training=False)[0]) == 1


def test_several_sizes_are_read_at_once(folder):
    root = with_broken(folder, 1, 20)
    with pytest.warns(UserWarning, match="1 pictures"):
        small, large = load_sizes(root, [4, 8], max_skipped_share=0.1)
    assert (small.pixels.shape, large.pixels.shape) == ((19, 3, 4, 4), (19, 3, 8, 8))
    assert small.records == large.records
