"""What batches are drawn from: folders and shards alike, broken samples replaced and named, a stream repeatable."""

import collections
import functools
import io
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.data import shards as shards_module
from unclip.data.batches import ShardSource, choose_captions
from unclip.data.folder import Keys
from unclip.data.samples import decode
from unclip.data.shard_writer import write_shard
from unclip.data.shards import RawSample, read_shard
from unclip.data.source import FolderSource, open_source
from unclip.errors import DataError
from unclip.training.recipe import read_recipe
from unclip.training.task import source_of

from .conftest import png


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def source():
    """Opens shards, and closes them at the end."""
    opened = []

    def make(folder, **how):
        opened.append(ShardSource(folder, [8, 4], **{"block": 6, **how}))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def shown(rows) -> list[int]:
    """The numbers that the pictures tell."""
    colours = ((rows.images[8][:, :2, 4, 4] + 1) * 127.5).round().long()
    return (colours[:, 0] + 256 * colours[:, 1]).tolist()


# -- a folder ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    lines = []
    for n in range(6):
        (tmp_path / f"{n}.png").write_bytes(png(n))
        lines.append({"file_name": f"{n}.png", "captions": [f"picture {n}", "other"], "weight": [4, 1, 1, 0, 1, 1][n]})
    lines[5]["held_out"] = True
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_a_folder_is_drawn_by_weight(folder):
    source = FolderSource([folder], [8, 4])
    rows = source.draw(0, 4000, generator())
    assert {size: tuple(images.shape) for size, images in rows.images.items()} == {
        8: (4000, 3, 8, 8),
        4: (4000, 3, 4, 4),
    }
    assert shown(rows) == rows.index.tolist()
    shares = torch.bincount(rows.index, minlength=5) / 4000
    torch.testing.assert_close(shares, torch.tensor([4.0, 1, 1, 0, 1]) / 7, atol=0.03, rtol=0)
    even = FolderSource([folder], [8], weight_power=0.5).draw(0, 4000, generator()).index
    assert (even == 0).float().mean().item() == pytest.approx(2 / 5, abs=0.03)
    assert all(text in ("other", f"picture {n}") for text, n in zip(rows.captions, shown(rows), strict=True))


def test_a_folders_examples(folder):
    source = FolderSource([folder], [8])
    assert sorted(shown(source.examples(100))) == [0, 1, 2, 4]  # a weight of 0 is never drawn
    assert shown(source.examples(2)) == shown(source.examples(2))
    assert source.examples(2).captions == [f"picture {n}" for n in shown(source.examples(2))]
    assert shown(source.examples(9, held_out=True)) == [5]
    assert sorted(set(source.all_captions())) == ["other", *(f"picture {n}" for n in range(5))]
    assert len(FolderSource([folder], [8], include_held_out=True).records) == 6


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_a_weight_of_0_is_never_drawn_whatever_the_power(folder, power):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for place, row in enumerate(rows):
        row["weight"] = [0, 1, 4][place % 3]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    weights = FolderSource([folder], [8], weight_power=power).weights.tolist()
    assert weights[:3] == pytest.approx([0.0, 1.0, 4.0**power])


@pytest.mark.filterwarnings("ignore:skipped")
def test_one_sample_of_a_large_weight_does_not_hide_the_readable_ones(shards, source):
    """Its block draws it again and again; the next one can be read."""

    def change(n, parts):
        if n < 6:
            parts = parts | {"png": b"no"}
        return parts | {"json": json.dumps({"weight": 10_000.0 if n == 0 else 1.0}).encode()}

    stream = source(shards(12, per_shard=6, change=change), max_skipped_share=1.0)
    for step in range(12):
        assert shown(stream.draw(step, 1, generator()))[0] >= 6


def test_several_folders_are_one(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "a.png").write_bytes(png(200))
    (other / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "the other", "weight": 3}')
    source = open_source([folder, other], [8, 4], seed=0)
    rows = source.draw(0, 4000, generator())
    assert (rows.images[8].shape, rows.images[4].shape) == ((4000, 3, 8, 8), (4000, 3, 4, 4))
    assert shown(rows).count(200) / 4000 == pytest.approx(3 / 10, abs=0.03)
    assert shown(source.examples(9, held_out=True)) == [5]


def test_broken_pictures_of_one_name_in_two_folders(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for place in (folder, other):
        (place / "bad.png").write_bytes(b"no")
    (other / "a.png").write_bytes(png(200))
    lines = ['{"file_name": "a.png", "text": "one"}', '{"file_name": "bad.png", "text": "one"}']
    (other / "metadata.jsonl").write_text("\n".join(lines))
    with open(folder / "metadata.jsonl", "a") as added:
        added.write("\n" + lines[1])
    with pytest.warns(UserWarning, match="1 pictures in"):
        source = open_source([folder, other], [8], seed=0, max_skipped_share=0.5)
    assert sorted(source.skipped) == sorted(str(place / "bad.png") for place in (folder, other))


def test_shards_come_from_one_place(shards, folder):
    with pytest.raises(DataError, match="shards must be in one place"):
        open_source([shards(2, per_shard=1), folder], [8], seed=0)


def test_captions_are_chosen_at_the_stated_rate():
    choices = [("plain", "one", "two", "three")] * 4000
    texts = choose_captions(choices, generator(0))
    assert texts == choose_captions(choices, generator(0)) != choose_captions(choices, generator(1))
    assert texts.count("plain") / 4000 == pytest.approx(0.5 + 0.5 / 4, abs=0.03)
    assert texts.count("two") / 4000 == pytest.approx(0.5 / 4, abs=0.03)


def test_which_source(folder, shards):
    assert isinstance(open_source(folder, [8], seed=0), FolderSource)
    streamed = open_source(shards(3, per_shard=1), [8], seed=0)
    assert isinstance(streamed, ShardSource)
    streamed.close()
    assert (streamed.is_local, FolderSource.is_local) == (True, False)
    with pytest.raises(DataError, match=r"no metadata\.jsonl"):
        open_source(folder / "none", [8], seed=0)


# -- shards --------------------------------------------------------------------------------------------------------


def test_shards_give_pictures_and_captions(shards, source):
    stream = source(shards(20, per_shard=4))
    seen = []
    for step in range(5):
        rows = stream.draw(step, 4, generator(step))
        assert (rows.images[8].shape, rows.images[4].shape) == ((4, 3, 8, 8), (4, 3, 4, 4))
        assert rows.captions == [f"picture {n}" for n in shown(rows)]
        assert len(set(rows.index.tolist())) == 4
        assert rows.embeddings is None
        seen += shown(rows)
    assert sorted(seen) == list(range(20))


def test_a_recipe_says_how_shards_are_read(shards, tmp_path, monkeypatch):
    pools = []
    monkeypatch.setattr("unclip.data.batches.ThreadPoolExecutor", lambda *args, **how: pools.append(args))
    text = f'stage = "super_res"\ndata = "{shards(20, per_shard=4)}"\nreader_workers = 5\n[super_res]\n'
    (tmp_path / "recipe.toml").write_text(text)
    opened = source_of(read_recipe(tmp_path / "recipe.toml"), (8,), weight_power=0.25)
    assert pools == [(5,)]
    assert opened.stream.weight_power == 0.25


def test_a_step_is_the_same_whatever_was_drawn_before(shards, source):
    folder = shards(20, per_shard=4)
    straight = source(folder, seed=3)
    steps = [shown(straight.draw(step, 3, generator())) for step in range(15)]
    jumping = source(folder, seed=3)
    for step in (9, 10, 2, 14, 0, 1):
        assert shown(jumping.draw(step, 3, generator())) == steps[step], step
    assert shown(source(folder, seed=4).draw(0, 3, generator())) != steps[0]


def test_shards_whose_counts_are_known_are_passed_over(shards, source, monkeypatch):
    folder = shards(40, per_shard=4)
    straight = source(folder, seed=3)
    steps = [shown(straight.draw(step, 4, generator())) for step in range(20)]
    opened = []
    monkeypatch.setattr(
        "unclip.data.shards.read_shard", lambda shard, damage: opened.append(shard) or read_shard(shard, damage)
    )
    for counts in ({}, straight.counts):
        opened.clear()
        later = source(folder, seed=3)
        later.counts.update(counts)
        assert shown(later.draw(18, 4, generator())) == steps[18]
        later.close()
    assert len(opened) <= 5  # ten in an epoch, and this is near the second one's end: its last three, and the next two


def test_processes_draw_different_rows(shards, source):
    folder = shards(20, per_shard=4)
    parts = [shown(source(folder, rank=rank, world=2).draw(0, 8, generator())) for rank in range(2)]
    assert not set(parts[0]) & set(parts[1])


def test_examples_are_the_same_for_every_process(shards, source):
    folder = shards(20, per_shard=4)
    first, other = (source(folder, rank=rank, world=2).examples(6) for rank in range(2))
    assert shown(first) == shown(other)
    assert torch.equal(first.index, other.index)
    assert sorted(shown(source(folder).examples(500))) == list(range(20))


def test_broken_samples_are_replaced_and_named(shards, source):
    def spoil(number, parts):
        if number == 3:
            return parts | {"png": b"no picture"}
        return {"png": parts["png"]} if number == 7 else parts

    stream = source(shards(20, per_shard=4, change=spoil), max_skipped_share=0.1)
    seen = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(5):
            rows = stream.draw(step, 4, generator())
            assert rows.captions == [f"picture {n}" for n in shown(rows)]
            seen += shown(rows)
    assert len(seen) == 20
    assert set(seen) == set(range(20)) - {3, 7}
    assert sorted(name[-9:] for name in stream.skipped) == ["000000003", "000000007"]
    assert len(told) == 2


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_batch_of_broken_samples_alone_is_replaced_by_what_comes_next(shards, source):
    folder = shards(30, per_shard=5, change=lambda n, parts: parts | {"png": b"no"} if n == 7 else parts)
    whole = source(shards(30, per_shard=5, name="whole"), seed=2)
    plain = [shown(whole.draw(step, 1, generator())) for step in range(40)]
    stream = source(folder, seed=2)
    drawn = [shown(stream.draw(step, 1, generator())) for step in range(40)]
    places = [place for place, numbers in enumerate(plain) if numbers == [7]]
    assert places
    for place, numbers in enumerate(drawn):
        assert numbers == plain[place + 1 if place in places else place]
    alone = source(folder, seed=2)  # started there, as a resumed run does
    assert shown(alone.draw(places[0], 1, generator())) == drawn[places[0]]
    assert shown(alone.draw(places[0] + 1, 1, generator())) == drawn[places[0] + 1]
    assert [name[-9:] for name in stream.skipped] == ["000000007"]


@pytest.mark.filterwarnings("ignore:skipped")
def test_no_sample_that_can_be_read(shards, source):
    stream = source(shards(9, per_shard=3, change=lambda n, parts: parts | {"png": b"no"}), max_skipped_share=1.0)
    with pytest.raises(DataError, match=r"none of 9 samples can be read: .*00\d\.tar: 00000"):
        stream.draw(0, 1, generator())


@pytest.mark.filterwarnings("ignore:skipped")
def test_the_share_that_may_be_broken(shards, source, folder):
    data = shards(40, per_shard=4, change=lambda n, parts: parts | {"txt": b" "} if n % 10 == 0 else parts)
    with pytest.raises(DataError, match=r"samples cannot be read, more than the 0\.5% allowed"):
        draw_all(source(data, max_skipped_share=0.005), 10, 4)
    draw_all(source(data, max_skipped_share=0.02), 10, 4)
    (folder / "1.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"1 of 6 pictures .* more than the 12\.5% allowed"):
        open_source(folder, [8], seed=0, max_skipped_share=0.125)
    with pytest.warns(UserWarning, match=r"1 pictures .* are skipped"):
        assert len(open_source(folder, [8], seed=0, max_skipped_share=0.2).skipped) == 1


def draw_all(stream, steps, count):
    for step in range(steps):
        stream.draw(step, count, generator())


def test_too_many_broken_samples(shards, source):
    stream = source(shards(40, per_shard=4, change=lambda n, parts: parts | {"txt": b" "} if n % 4 == 0 else parts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=r"samples cannot be read, more than the 1% allowed: .*it has no caption"):
            draw_all(stream, 10, 4)


def test_damaged_shards_up_to_half(shards, source):
    folder = shards(20, per_shard=5)
    (folder / "00001.tar").write_bytes(b"x" * 2000)
    stream = source(folder)
    with pytest.warns(UserWarning, match=r"skipped .*00001\.tar"):
        seen = [n for step in range(6) for n in shown(stream.draw(step, 5, generator()))]
    assert not set(seen) & set(range(5, 10))
    for n in (0, 2):
        (folder / f"0000{n}.tar").write_bytes(b"x" * 2000)
    stream = source(folder)
    with pytest.raises(DataError, match="3 of 4 shards cannot be read, more than the 50% allowed"):
        draw_all(stream, 6, 5)
    tolerant = source(folder, max_skipped_share=0.8)
    with pytest.warns(UserWarning, match="skipped"):
        draw_all(tolerant, 6, 5)


def test_embeddings_in_the_shards(shards, source):
    def embed(number, parts):
        content = io.BytesIO()
        np.save(content, np.full(5, number, dtype=np.float16))
        return {"txt": parts["txt"], "img_emb.npy": content.getvalue()}

    rows = source(shards(8, per_shard=4, change=embed)).draw(0, 4, generator())
    assert rows.images == {}
    assert rows.embeddings.dtype == torch.float32
    assert rows.embeddings[:, 2].long().tolist() == [int(text.split()[1]) for text in rows.captions]


def test_a_name_that_is_no_unicode(shards, source):
    folder = shards(1, per_shard=1)
    write_shard([("\udcff", {"png": png(3), "txt": b"text"})], folder / "00000.tar")
    assert shown(source(folder).draw(0, 1, generator())) == [3]


def test_failures_that_pass_do_not_add_up(shards, source, monkeypatch):
    """Each of four shards cannot be opened once, in another epoch."""
    folder = shards(16, per_shard=4)
    opened = collections.Counter()
    plain = shards_module._opened

    def failing(shard):
        opened[shard] += 1
        if opened[shard] == int(shard[-5]) + 1:
            raise OSError("the network is down")
        return plain(shard)

    monkeypatch.setattr(shards_module, "_opened", failing)
    stream = source(folder, block=4)
    with pytest.warns(UserWarning, match=r"skipped .*the network is down"):
        draw_all(stream, 30, 4)
    assert [name[-9:] for name in sorted(stream.skipped)] == [f"0000{n}.tar" for n in range(4)]
    assert stream.stream.damage.num_broken_shards == 0


def test_a_batch_of_another_size_at_the_same_place(shards, source):
    stream = source(shards(40, per_shard=8))
    stream.draw(0, 8, generator())
    assert len(stream.draw(2, 4, generator()).captions) == 4


def test_where_a_picture_is_needed(shards, source):
    def embed(number, parts, *, every):
        if number % every:
            return parts
        return {"txt": parts["txt"], "img_emb.npy": array([1.0, 2.0])}

    def drawn(every):
        change = functools.partial(embed, every=every)
        return source(shards(8, per_shard=4, change=change, name=f"every {every}")).draw(0, 8, generator())

    alone, mixed = drawn(1), drawn(2)
    with pytest.raises(DataError, match=r"have no picture, but pictures are needed here: .*--keep-pictures"):
        alone.pictures(8)
    with pytest.raises(DataError, match=r"have no picture, others have no embedding, but .*--keep-pictures"):
        mixed.pictures(8)
    whole = source(shards(4, per_shard=4)).draw(0, 4, generator())
    assert whole.pictures(4) is whole.images[4]


# -- one sample ----------------------------------------------------------------------------------------------------


def raw(**parts) -> RawSample:
    return RawSample("k", "s.tar", {name.replace("_", "."): value for name, value in parts.items()})


def array(values, **how) -> bytes:
    content = io.BytesIO()
    np.save(content, np.asarray(values, **how))
    return content.getvalue()


def with_header(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8)


DAMAGED_EMBEDDINGS = [
    b"PK\x03\x04" + bytes(60),  # a zip, says its beginning
    b"\x80\x04]q\x00.",  # a pickle
    with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2L,"),
    with_header(b"{'descr': ('<f4',), 'fortran_order': False, 'shape': (2,)}"),
    with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}"),
    with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999999,)}"),
    with_header(b"(" * 500),
    array([1.0, 2.0])[:-5],
]


@pytest.mark.parametrize(
    ("parts", "captions"),
    [
        ({"txt": b" a caption\n"}, ("a caption",)),
        ({"txt": b"text", "json": b'{"caption": "of json"}'}, ("of json",)),
        ({"json": b'{"captions": ["one", "two", " ", 3]}'}, ("one", "two")),
        ({"json": b'{"captions": "a cat"}'}, ("a cat",)),
        ({"json": b'\xef\xbb\xbf{"caption": ["one", "two"]}'}, ("one", "two")),
        ({"json": b'{"captions": 3, "caption": "a cat"}'}, ("a cat",)),
        ({"txt": b"\xef\xbb\xbfa caption\r\n"}, ("a caption",)),
        ({"json": b'{"prompt": "a cat"}'}, ("a cat",)),
        ({"json": b'{"text": "a cat", "prompt": "a dog"}'}, ("a cat",)),
        ({"json": b'{"text": "of json", "caption": "a cat"}'}, ("a cat",)),
        ({"txt": b"a cat", "json": b'{"text": "of json"}'}, ("a cat",)),
        ({"txt": b"text", "json": b'{"caption": null}'}, ("text",)),
        ({"txt": b"text", "json": b"[1]"}, ("text",)),
        ({"json": b'{"caption": "a smile \\ud83d\\ude00"}'}, ("a smile \N{GRINNING FACE}",)),
    ],
)
def test_captions_of_a_sample(parts, captions):
    assert decode(raw(png=png(1), **parts), [8]).captions == captions


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"png": png(1)}, "no caption"),
        ({"png": png(1), "txt": b"\xff\xfe"}, "cannot be read"),
        ({"png": png(1), "json": b"{"}, "cannot be read"),
        ({"txt": b"text"}, r"no picture .*; it has \.txt$"),
        ({"png": png(1), "txt": b"\xef\xbb\xbf \n"}, r"no caption .*; it has \.png, \.txt$"),
        ({"000.jpg": png(1), "000.txt": b"text"}, r"it has \.000\.jpg, \.000\.txt: .* ends at the first dot"),
        *(
            ({"png": png(1), "txt": b"text", "json": b'{"weight": %s}' % weight}, "weight is")
            for weight in (b"1e400", b"1" * 400, b"-1", b"NaN", b'"2"', b"true", b"1e300")
        ),
        ({"png": b"", "txt": b"text"}, "not a picture"),
        ({"png": png(1)[:48], "txt": b"text"}, "cannot be read"),
        ({"img_emb.npy": b"x", "txt": b"text"}, "img_emb.npy cannot be read"),
        ({"img_emb.npy": array([[1.0]]), "txt": b"text"}, "not a list of finite numbers"),
        ({"img_emb.npy": array([float("nan")]), "txt": b"text"}, "finite numbers within"),
        ({"img_emb.npy": array([{}], dtype=object), "txt": b"text"}, "img_emb.npy cannot be read"),
        ({"img_emb.npy": array([1e300]), "txt": b"text"}, "finite numbers within the range of float32"),
        *(({"img_emb.npy": content, "txt": b"text"}, "img_emb.npy cannot be read") for content in DAMAGED_EMBEDDINGS),
        ({"png": png(1), "json": b'{"caption": "half a smile \\ud83d"}'}, "not valid Unicode.*surrogates"),
        ({"png": png(1), "json": b'{"captions": ["a smile", "\\ude00"]}'}, "not valid Unicode.*surrogates"),
    ],
)
def test_a_sample_that_cannot_be_used(parts, words):
    with pytest.raises(DataError, match=words):
        decode(RawSample("k", "s.tar", parts), [8])


def test_a_key_for_captions_that_is_chosen(shards):
    def change(number, parts):
        told = {"caption": "no", "title": f"title {number}"} if number else {"caption": "no"}
        return parts | {"json": json.dumps(told).encode()}

    stream = open_source(shards(8, per_shard=4, change=change), [8], seed=0, keys=Keys(caption="title"))
    with pytest.warns(UserWarning, match="no caption under 'title'"):
        rows = stream.draw(0, 8, generator())
    assert all(text == f"title {n}" for text, n in zip(rows.captions, shown(rows), strict=True))
    assert sorted(stream.all_captions()) == [f"title {n}" for n in range(1, 8)]
    stream.close()


def test_a_recipe_chooses_keys(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "metadata.csv").write_text("photo,title\na.png,a tile\n")
    keys = 'image_key = "photo"\ncaption_key = "title"\n'
    (tmp_path / "recipe.toml").write_text(f'stage = "super_res"\ndata = "{tmp_path}"\n{keys}[super_res]\n')
    assert list(source_of(read_recipe(tmp_path / "recipe.toml"), (8,)).all_captions()) == ["a tile"]


@pytest.mark.parametrize("weight", ["1e400", "1" * 400])
def test_a_weight_that_cannot_be_used_is_a_broken_sample_in_both(folder, tmp_path_factory, weight):
    lines = (folder / "metadata.jsonl").read_text().replace('"weight": 4', f'"weight": {weight}')
    (folder / "metadata.jsonl").write_text(lines)
    with pytest.warns(UserWarning, match="weight is"):
        drawn = FolderSource([folder], [8], max_skipped_share=0.2).draw(0, 50, generator())
    assert 0 not in shown(drawn)
    packed = ((f"{n}", {"png": png(n), "json": line.encode()}) for n, line in enumerate(lines.split("\n")))
    path = tmp_path_factory.mktemp("shards") / "0.tar"
    write_shard(packed, path)
    stream = ShardSource(path, [8], max_skipped_share=0.2)
    with pytest.warns(UserWarning, match="weight is"):
        seen = {n for step in range(9) for n in shown(stream.draw(step, 5, generator()))}
    stream.close()
    assert 0 not in seen


def test_a_huge_picture_in_a_shard_is_not_decoded(monkeypatch):
    monkeypatch.setattr("unclip.images.MAX_PIXELS", 50)
    with pytest.raises(DataError, match="the limit is 50"):
        decode(raw(png=png(1), txt=b"text"), [8])


def test_kinds_of_pictures():
    content = io.BytesIO()
    Image.new("RGB", (16, 8), "black").save(content, "WEBP", lossless=True)
    pixels = decode(raw(webp=content.getvalue(), txt=b"text"), [16]).pixels[16]
    assert pixels[:, :4].eq(255).all()
    assert pixels[:, 4:12].eq(0).all()
