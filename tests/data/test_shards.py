"""Shards: what names them, what they hold, what damage does, and an order that can be entered anywhere."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import random
import tarfile
import threading
import time
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from unclip.data import shards as module
from unclip.data.shard_writer import write_shards
from unclip.data.shards import Damage, ShardStream, expand, is_shards, read_shard
from unclip.errors import DataError


def numbers(samples) -> list[int]:
    return [int(sample.key) for sample in samples]


# -- names ---------------------------------------------------------------------------------------------------------


def test_names(shards):
    folder = shards(7, per_shard=2)
    four = [str(folder / f"0000{n}.tar") for n in range(4)]
    assert expand(folder) == expand(f"{folder}/*.tar") == expand(f"{folder}/{{00000..00003}}.tar") == four
    assert expand(folder / "00002.tar") == four[2:3]
    assert expand("http://host/{7..9}/{08..10}.tar")[:4] == [
        "http://host/7/08.tar", "http://host/7/09.tar", "http://host/7/10.tar", "http://host/8/08.tar"
    ]  # fmt: skip
    assert len(expand("http://host/{7..9}/{08..10}.tar")) == 9


def test_files_that_a_range_names_and_that_are_not_there(shards):
    folder = shards(7, per_shard=2)
    names = expand(f"{folder}/{{00002..00005}}.tar")
    assert names == [str(folder / f"0000{n}.tar") for n in range(2, 6)]
    stream = ShardStream(names, seed=0)
    assert sorted(numbers(stream.one_epoch())) == [4, 5, 6]
    assert sorted(stream.damage.broken) == names[2:]
    assert "FileNotFoundError" in stream.damage.broken[names[3]]
    assert expand(f"{folder}/{{0..1}}000*.tar") == [*(f"{folder}/0000{n}.tar" for n in range(4)), f"{folder}/1000*.tar"]


def test_globs_in_folders(shards, tmp_path):
    folders = [shards(2, per_shard=1, name=name) for name in ("part-0", "part-[1]")]
    names = [str(folder / f"0000{n}.tar") for folder in folders for n in (0, 1)]
    assert (
        expand(f"{tmp_path}/*/*.tar") == expand(f"{tmp_path}/part-*/*.tar") == expand(f"{tmp_path}/**/*.tar") == names
    )
    assert expand(f"{tmp_path}/part-?/00001.tar") == names[1:2]
    assert expand(f"{tmp_path}/part-[1]/*.tar") == expand(f"{tmp_path}/part-[1]/0000[01].tar") == names[2:]
    assert expand(f"{tmp_path}/part-[1]/00001.tar") == names[3:]
    assert expand(f"{tmp_path}/*/{{00000..00001}}.tar") == [names[0], names[2], names[1], names[3]]


def test_globs_from_here(shards, tmp_path, monkeypatch):
    shards(2, per_shard=1)
    monkeypatch.chdir(tmp_path)
    assert expand("*/*.tar") == expand("shards/*.tar") == ["shards/00000.tar", "shards/00001.tar"]


def test_no_shards(tmp_path):
    for source in (
        tmp_path,
        tmp_path / "none.tar",
        f"{tmp_path}/*.tar",
        f"{tmp_path}/*/*.tar",
        f"{tmp_path}/{{0..3}}.tar",
    ):
        with pytest.raises(DataError, match="names no shards"):
            expand(source)


def test_what_is_shards_and_what_a_folder(shards, tmp_path):
    folder = shards(2, per_shard=1)
    for source in (folder, folder / "00000.tar", "https://host/0.tar", f"{folder}/*.tar", "x/{0..3}.tar"):
        assert is_shards(source), source
    (tmp_path / "metadata.jsonl").touch()
    assert not is_shards(tmp_path)
    (folder / "metadata.jsonl").touch()
    assert not is_shards(folder)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


# -- one shard -----------------------------------------------------------------------------------------------------


def test_samples_of_a_shard(shards):
    folder = shards(3, per_shard=3)
    first, second, third = read_shard(str(folder / "00000.tar"))
    assert (first.key, second.key, third.key) == ("000000000", "000000001", "000000002")
    assert sorted(first.parts) == ["json", "png", "txt"]
    assert second.parts["txt"] == b"picture 1"
    assert second.name.endswith("00000.tar: 000000001")


def test_keys_extensions_and_folders(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name in ("in/a.jpg", "in/a.img_emb.NPY", "b.txt", "in/b.txt", ".hidden", "nodot"):
            add(tar, name, name.encode())
        folder = tarfile.TarInfo("some.folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    found = {sample.key: sorted(sample.parts) for sample in read_shard(str(tmp_path / "a.tar.gz"))}
    assert found == {"in/a": ["img_emb.npy", "jpg"], "b": ["txt"], "in/b": ["txt"]}


@pytest.mark.parametrize("damage", ["cut in a file", "cut in a header", "cut between", "header", "no tar", "empty"])
def test_a_damaged_shard_gives_what_comes_before_and_is_named(shards, damage):
    path = shards(4, per_shard=4) / "00000.tar"
    content = path.read_bytes()
    third = content.index(b"000000002.png")  # where its header begins
    path.write_bytes(
        {
            "cut in a file": content[: third + 520],
            "cut in a header": content[: third + 100],
            "cut between": content[:third],
            "header": content[: third + 148] + b"garbage!" + content[third + 156 :],
            "no tar": b"<html>not found</html>" * 100,
            "empty": b"",
        }[damage]
    )
    found = Damage()
    whole = {"cut in a file": [0, 1], "no tar": [], "empty": []}
    # Unless another key followed, a sample may lack parts, and is left out.
    assert numbers(read_shard(str(path), found)) == whole.get(damage, [0])
    assert list(found.broken) == [str(path)]
    assert "samples)" in found.broken[str(path)]


def test_a_whole_shard_is_not_named(shards):
    found = Damage()
    assert len(list(read_shard(str(shards(4, per_shard=4) / "00000.tar"), found))) == 4
    assert not found.broken


# -- names in a shard ----------------------------------------------------------------------------------------------


def tar_of(path, *names) -> str:
    """A shard of these files; each holds its number."""
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            add(tar, name, str(number).encode())
    return str(path)


def told(shard) -> list[tuple[str, dict[str, str]]]:
    return [(s.key, {name: part.decode() for name, part in s.parts.items()}) for s in read_shard(shard)]


def test_one_name_twice(tmp_path):
    names = ("a.jpg", "a.txt", "a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg", "a.JPG", "a.txt", "a (2).txt")
    assert told(tar_of(tmp_path / "a.tar", *names)) == [
        ("a", {"jpg": "0", "txt": "1"}),
        ("a (2)", {"jpg": "2", "txt": "3"}),
        ("b", {"jpg": "4", "txt": "5"}),
        ("a (3)", {"jpg": "6"}),
        ("a (4)", {"jpg": "7", "txt": "8"}),
        ("a (2) (2)", {"txt": "9"}),
    ]


def test_names_with_several_dots_are_counted(tmp_path):
    names = [f"img.{n:03}.{kind}" for n in range(50) for kind in ("jpg", "txt")]
    found = told(tar_of(tmp_path / "a.tar", *names))
    assert [key for key, _ in found] == [f"img.{n:03}" for n in range(50)]
    assert found[7][1] == {"007.jpg": "14", "007.txt": "15"}
    names = [f"img.{n:03}.{kind}" for kind in ("img_emb.npy", "jpg") for n in range(5)]
    assert [key for key, _ in told(tar_of(tmp_path / "b.tar", *names))] == [f"img.{n:03}" for n in range(5)]


def test_further_parts_of_a_sample_with_several_dots(tmp_path):
    names = [f"a.{kind}" for kind in ("canny.png", "depth.png", "img_emb.npy", "jpg", "left.jpg", "txt")]
    ((key, parts),) = told(tar_of(tmp_path / "a.tar", *names))
    assert (key, len(parts)) == ("a", 6)


# -- compressed shards ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shards(shards, pack):
    folder = shards(20, per_shard=5)
    order = take(ShardStream(expand(folder), seed=1, block=7), 0, 50)
    suffix = {gzip.compress: ".tar.gz", bz2.compress: ".tar.bz2", lzma.compress: ".tar.xz"}[pack]
    for path in list(folder.iterdir()):
        content = path.read_bytes()
        half = len(content) // 2
        path.with_suffix(suffix).write_bytes(pack(content[:half]) + pack(content[half:]))  # of two members
        path.unlink()
    (folder / f"._00000{suffix}").write_bytes(b"what a Mac leaves")
    assert is_shards(folder)
    assert is_shards(folder / f"00000{suffix}")
    names = expand(folder)
    assert [name.rpartition("/")[2] for name in names] == [f"0000{n}{suffix}" for n in range(4)]
    for position in (0, 8, 23):
        stream = ShardStream(names, seed=1, block=7)
        assert take(stream, position, 20) == order[position : position + 20]
        assert not stream.damage.broken


@pytest.mark.parametrize("damage", ["cut", "cut in its header", "changed", "no gzip"])
def test_damaged_gzip(shards, damage):
    path = shards(4, per_shard=4) / "00000.tar"
    content = gzip.compress(path.read_bytes())
    half = len(content) // 2
    path.write_bytes(
        {
            "cut": content[:half],
            "cut in its header": content[:3],
            "changed": content[:half] + bytes(8) + content[half + 8 :],
            "no gzip": b"\x1f\x8b" + b"x" * 99,
        }[damage]
    )
    found = Damage()
    assert len(list(read_shard(str(path), found))) < 4
    assert list(found.broken) == [str(path)]


def test_a_compressed_shard_from_a_server(server):
    url, queue = server
    queue.extend(["gzip cut", "gzip"])
    found = Damage()
    assert numbers(read_shard(url, found)) == [0, 1, 2, 3, 4]
    assert not found.broken


# -- headers -------------------------------------------------------------------------------------------------------


def header(name="a.txt", kind=tarfile.REGTYPE, size=0) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def blocks(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(**records: str) -> bytes:
    content = b""
    for name, value in records.items():
        record = f" {name.replace('_', '.')}={value}\n".encode()
        content += str(len(record) + 2).encode() + record  # of 10 to 99 bytes
    return header("x", tarfile.XHDTYPE, len(content)) + blocks(content)


A_FILE = header(size=3) + blocks(b"cat")
LONG_NAME = header("x", tarfile.GNUTYPE_LONGNAME, 6) + blocks(b"a.txt")


@pytest.mark.parametrize(
    "content",
    [
        *(pax(GNU_sparse_size=value) + A_FILE for value in ("x", "-1", "9" * 40)),
        *(pax(GNU_sparse_map=value) + A_FILE for value in ("x", "0,x", "1,2,3")),
        pax(GNU_sparse_major="1", GNU_sparse_minor="0") + A_FILE,
        *(pax(size=value) + A_FILE for value in ("-512", "-1", "9" * 30)),
        LONG_NAME * 1000 + A_FILE,
        pax(comment="x") * 5000 + A_FILE,
        pax(comment="x"),
        LONG_NAME,
        header(kind=tarfile.GNUTYPE_SPARSE, size=3) + blocks(b"cat"),
        *(header(kind=kind, size=2**60) + blocks(b"cat") for kind in (b"0", b"x", b"g", b"L", b"K", b"Z", b"S")),
        *(header(kind=kind, size=-(2**60)) + blocks(b"cat") for kind in (b"0", b"x", b"L", b"Z")),
    ],
)
def test_headers_that_damage_a_shard(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(header("first.txt", size=3) + blocks(b"dog") + content + bytes(1024))
    found = Damage()
    begun = time.monotonic()
    samples = list(read_shard(str(path), found))
    assert time.monotonic() - begun < 5
    assert [sample.key for sample in samples] in ([], ["first"], ["first", "a"])
    assert list(found.broken) == [str(path)]
    assert "Error: " in found.broken[str(path)]


def test_headers_that_are_well(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(pax(comment="x", size="3") + LONG_NAME + A_FILE + header("b.txt", size=3) + blocks(b"dog"))
    with open(path, "ab") as tar:
        tar.write(bytes(1024))
    assert told(str(path)) == [("a", {"txt": "cat"}), ("b", {"txt": "dog"})]


def test_damage_to_any_header(tmp_path):
    """Fuzzed with a seed: each shard gives samples, or is named."""
    random_ = random.Random(0)
    sizes = [b"77777777777\0", b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"\x80" + bytes(6) + b"\x10" + bytes(4), b"x" * 12]
    plain = bytearray(pax(size="3") + A_FILE + LONG_NAME + A_FILE + header("b.jpg", size=600) + bytes(1024 + 1024))
    starts = [place for place in range(0, len(plain), 512) if plain[place + 257 : place + 262] == b"ustar"]
    path, outcomes = tmp_path / "a.tar", set()
    for _ in range(600):
        content = bytearray(plain)
        for start in random_.choices(starts, k=2):
            what = random_.randrange(4)
            if what == 0:
                content[start + 156] = random_.choice(b"0123457xgLKSXNZ\0")
            elif what == 1:
                content[start + 124 : start + 136] = random_.choice(sizes)
            else:
                content[start + random_.randrange(700)] = random_.randrange(256)
            block = content[start : start + 512]
            block[148:156] = b" " * 8
            content[start + 148 : start + 156] = b"%06o\0 " % sum(block)
        path.write_bytes(content)
        found = Damage()
        samples = list(read_shard(str(path), found))
        assert set(found.broken) <= {str(path)}
        outcomes.add((len(samples), bool(found.broken)))
    assert {(0, True), (3, False)} <= outcomes


def test_a_part_too_large(shards, monkeypatch):
    monkeypatch.setattr(module, "MAX_PART_BYTES", 50)
    found = Damage()
    assert not list(read_shard(str(shards(1, per_shard=1) / "00000.tar"), found))
    assert "at most 50 are read" in str(found.broken)


# -- URLs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(shards):
    """Serves a shard of five samples; `replies` says how each request goes."""
    content = (shards(5, per_shard=5) / "00000.tar").read_bytes()
    replies: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            how = replies.pop(0)
            status = int(how) if how.isdigit() else 200
            self.send_response(status)
            body = (gzip.compress(content) if "gzip" in how else content) if status == 200 else b""
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if "cut" in how else body)

        def log_message(self, *about):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/a.tar", replies
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("replies", [["whole"], ["500", "whole"], ["cut", "whole"], ["cut", "503", "429", "whole"]])
def test_a_url_is_tried_again_and_no_sample_comes_twice(server, replies):
    url, queue = server
    queue.extend(replies)
    found = Damage()
    assert numbers(read_shard(url, found)) == [0, 1, 2, 3, 4]
    assert not queue
    assert not found.broken


@pytest.mark.parametrize(("replies", "words"), [(["404"], "404"), (["500"] * 4, "500"), (["cut"] * 4, "ReadError")])
def test_a_url_that_fails(server, replies, words):
    url, queue = server
    queue.extend(replies)
    found = Damage()
    samples = list(read_shard(url, found))
    assert len(samples) < 5
    assert not queue
    assert words in found.broken[url]


def test_a_shard_that_is_read_whole_later_is_no_longer_damaged(server):
    url, queue = server
    found = Damage()
    for replies, number in ((["500"] * 4, 1), (["whole"], 0), (["cut"] * 4, 1), (["cut", "whole"], 0)):
        queue.extend(replies)
        list(read_shard(url, found))
        assert (found.num_broken_shards, found.num_broken_samples) == (number, 0)
        assert list(found.broken) == [url]  # it stays listed


@pytest.mark.parametrize(("num_read", "least", "most"), [(0, 2, 4), (1, 25, 40)])
def test_a_network_is_waited_for_unless_nothing_was_ever_read(server, monkeypatch, num_read, least, most):
    monkeypatch.undo()
    waited = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    url, queue = server
    queue.extend(["500"] * 4)
    list(read_shard(url, Damage(num_read=num_read)))
    assert len(waited) == 3
    assert least < sum(waited) < most


def test_nobody_listens():
    found = Damage()
    assert not list(read_shard("http://127.0.0.1:9/a.tar", found))
    assert "refused" in str(found.broken)


# -- the order -----------------------------------------------------------------------------------------------------


def take(stream, position, count):
    samples = stream.read_from(position)
    found = numbers(itertools.islice(samples, count))
    samples.close()
    return found


def test_every_epoch_has_every_sample_once_in_another_order(shards):
    stream = ShardStream(expand(shards(20, per_shard=6)), seed=1, block=7)
    order = take(stream, 0, 60)
    epochs = [order[:20], order[20:40], order[40:]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order != take(ShardStream(stream.shards, seed=2, block=7), 0, 60)


@pytest.fixture
def weighed(shards):
    """Twenty samples; the first of weight 9, the second of weight 0, others of 1 or of an invalid weight."""
    weights = {0: 9, 1: 0, 2: 1.0, 3: "heavy", 4: True, 5: -1, 6: float("nan"), 7: float("inf"), 8: None}

    def change(number, parts):
        about = {"weight": weights[number]} if number in weights else {}
        return parts | {"json": json.dumps(about).encode()}

    return shards(20, per_shard=6, change=change)


def test_samples_are_drawn_by_their_weight(weighed):
    stream = ShardStream(expand(weighed), seed=1, block=64)
    order = take(stream, 0, 1900)
    counts = [order.count(number) for number in range(20)]
    assert counts[1] == 0
    assert counts[0] == pytest.approx(1900 * 9 / 27, rel=0.1)
    assert all(40 < count < 105 for count in counts[2:])
    assert sorted(numbers(stream.one_epoch())) == [0, *range(2, 20)]


@pytest.mark.parametrize(("power", "share"), [(0.0, 1 / 19), (0.5, 3 / 21), (2.0, 81 / 99)])
def test_weights_count_to_a_power(weighed, power, share):
    order = take(ShardStream(expand(weighed), seed=1, block=64, weight_power=power), 0, 1900)
    assert 1 not in order  # of weight 0, whatever the power
    assert order.count(0) == pytest.approx(1900 * share, rel=0.12)


def test_an_order_by_weight_can_be_entered_anywhere(weighed):
    names = expand(weighed)
    order = take(ShardStream(names, seed=1, block=7), 0, 70)
    for position in range(0, 50, 7):
        assert take(ShardStream(names, seed=1, block=7), position, 20) == order[position : position + 20], position


def test_all_of_weight_0(shards):
    folder = shards(3, per_shard=2, change=lambda number, parts: parts | {"json": b'{"weight": 0}'})
    with pytest.raises(DataError, match="all weights are 0"):
        next(ShardStream(expand(folder), seed=0).read_from(0))


def test_it_can_be_entered_anywhere(shards):
    names = expand(shards(20, per_shard=6))
    order = take(ShardStream(names, seed=1, block=7), 0, 70)
    for position in range(0, 50, 3):
        fresh = ShardStream(names, seed=1, block=7)
        assert take(fresh, position, 20) == order[position : position + 20], position
    again = ShardStream(names, seed=1, block=7)
    assert take(again, 30, 5) == order[30:35]
    assert take(again, 2, 5) == order[2:7]  # and with what was counted then


def counting(monkeypatch) -> list[str]:
    """The keys of all samples that are read, as they are."""
    keys, plain = [], module.read_shard

    def counted(shard, damage):
        for sample in plain(shard, damage):
            keys.append(sample.key)
            yield sample

    monkeypatch.setattr(module, "read_shard", counted)
    return keys


def test_an_order_is_entered_without_reading_a_sample_twice(shards, monkeypatch):
    names = expand(shards(20, per_shard=5))
    order = take(ShardStream(names, seed=1, block=5), 0, 20)
    keys = counting(monkeypatch)
    for position in (0, 7, 9):
        keys.clear()
        assert take(ShardStream(names, seed=1, block=5), position, 5) == order[position : position + 5]
        assert len(keys) == len(set(keys))
    stream = ShardStream(names, seed=1, block=5)
    stream.counts = {shard: 5 for shard in stream._order(0)[:2]}
    keys.clear()
    assert take(stream, 12, 3) == order[12:15]
    assert not set(order[:10]) & {int(key) for key in keys}


def wait_until(is_so) -> None:
    end = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_one_block_is_read_ahead_and_no_further_one(shards, monkeypatch):
    names = expand(shards(60, per_shard=10))
    order = take(ShardStream(names, seed=1, block=5), 0, 60)
    alive, plain = [], module.read_shard

    def watched(shard, damage):
        for sample in plain(shard, damage):
            alive.append(weakref.ref(sample))
            yield sample

    monkeypatch.setattr(module, "read_shard", watched)
    samples = ShardStream(names, seed=1, block=5).read_from(0)
    found = []
    for block in range(1, 8):
        found += numbers(itertools.islice(samples, 1))
        wait_until(lambda block=block: len(alive) == 5 * (block + 1))
        time.sleep(0.02)
        assert len(alive) == 5 * (block + 1)
        assert sum(sample() is not None for sample in alive) <= 2 * 5
        found += numbers(itertools.islice(samples, 4))
    assert found == order[:35]
    samples.close()


def test_processes_share_the_shards(shards):
    names = expand(shards(24, per_shard=4))
    parts = [take(ShardStream(names, seed=1, block=5, rank=rank, world=3), 0, 8) for rank in range(3)]
    assert sorted(itertools.chain(*parts)) == list(range(24))
    with pytest.raises(DataError, match="6 shards for 7 processes"):
        ShardStream(names, seed=1, world=7)


def test_a_block_mixes_shards(shards):
    stream = ShardStream(expand(shards(40, per_shard=10)), seed=0, block=40)
    first = take(stream, 0, 10)
    assert len({number // 10 for number in first}) > 1


def test_damage_is_named_once_and_the_rest_goes_on(shards):
    folder = shards(20, per_shard=5)
    (folder / "00002.tar").write_bytes((folder / "00002.tar").read_bytes()[:8000])
    stream = ShardStream(expand(folder), seed=0, block=4)
    left = len(list(read_shard(str(folder / "00002.tar"))))
    assert 0 < left < 5
    length = 15 + left
    order = take(stream, 0, 2 * length)
    assert sorted(order[:length]) == sorted(order[length:])
    assert take(ShardStream(stream.shards, seed=0, block=4), length + 3, 9) == order[length + 3 : length + 12]
    assert list(stream.damage.broken) == [str(folder / "00002.tar")]


def test_nothing_at_all(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    with pytest.raises(DataError, match="1 shards have no samples: they are empty"):
        next(ShardStream([str(tmp_path / "a.tar")], seed=0).read_from(0))
    (tmp_path / "a.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"1 shards have no samples: .*ReadError"):
        next(ShardStream([str(tmp_path / "a.tar")], seed=0).read_from(0))


def test_written_shards_are_plain_tars(shards):
    folder = shards(5, per_shard=2)
    assert [path.name for path in sorted(folder.iterdir())] == ["00000.tar", "00001.tar", "00002.tar"]
    with tarfile.open(folder / "00002.tar") as tar:
        assert tar.getnames() == ["000000004.png", "000000004.txt", "000000004.json"]
        assert io.BytesIO(tar.extractfile("000000004.png").read()).getvalue()[:4] == b"\x89PNG"


def test_names_of_any_length_and_script(tmp_path):
    keys = ["k" * 100, "folder/" * 40 + "k" * 200, "яблоко" * 50]
    (written,) = write_shards(((key, {"txt": b"a", "img_emb.npy": b"b"}) for key in keys), tmp_path, per_shard=10)
    found = Damage()
    assert [(sample.key, sorted(sample.parts)) for sample in read_shard(str(written), found)] == [
        (key, ["img_emb.npy", "txt"]) for key in keys
    ]
    assert not found.broken
