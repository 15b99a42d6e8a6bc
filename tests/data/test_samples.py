"""A whole data set looked at, and packed: nothing lost, what is broken named."""

import json

import pytest
import torch
from PIL import Image

from unclip.data.batches import ShardSource
from unclip.data.samples import decode, inspect, pack, raw_samples
from unclip.data.shard_writer import write_shard
from unclip.data.shards import Damage, about, expand, read_shard, weight_of
from unclip.data.source import FolderSource
from unclip.errors import DataError, OutputExistsError

from .conftest import png


@pytest.fixture
def folder(tmp_path):
    """Five pictures, one of them held out, one broken, one missing."""
    root = tmp_path / "set"
    root.mkdir()
    lines = []
    for n in range(5):
        (root / f"{n}.png").write_bytes(png(n) if n != 1 else b"no picture")
        lines.append({"file_name": f"{n}.png", "captions": [f"picture {n}", "other"], "held_out": n == 3})
    (root / "4.png").unlink()
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def test_packed_is_what_was_there(folder, tmp_path):
    damage = pack(folder, tmp_path / "shards", per_shard=1, max_skipped_share=0.5)
    assert damage.num_read == 4
    assert [name.partition(":")[0] for name in damage.broken] == ["1.png", "4.png"]
    assert json.loads((tmp_path / "shards.skipped.json").read_text()) == damage.broken
    samples = [s for shard in expand(tmp_path / "shards") for s in read_shard(shard)]
    assert [sample.parts["png"] for sample in samples] == [(folder / f"{n}.png").read_bytes() for n in (0, 2)]
    assert decode(samples[1], [8]).captions == ("picture 2", "other")
    with pytest.raises(OutputExistsError):
        pack(folder, tmp_path / "shards")


def test_too_much_that_is_broken(folder, tmp_path):
    with pytest.raises(DataError, match=r"2 of 4 samples cannot be read.* 49% .*1\.png.*shards\.skipped\.json"):
        pack(folder, tmp_path / "shards", max_skipped_share=0.49)
    assert not (tmp_path / "shards").exists()
    assert len(json.loads((tmp_path / "shards.skipped.json").read_text())) == 2
    for n in (1, 4):
        (folder / f"{n}.png").write_bytes(png(n))
    assert not pack(folder, tmp_path / "shards").broken
    assert not (tmp_path / "shards.skipped.json").exists()


def test_every_line_that_cannot_be_read_counts(folder, tmp_path):
    with (folder / "metadata.jsonl").open("a") as lines:
        lines.write('\n{"file_name": "4.png", "text": "again"}' * 3)
    with pytest.raises(DataError, match="5 of 7 samples"):
        pack(folder, tmp_path / "shards")


def test_too_many_shards_that_are_broken(shards, tmp_path):
    folder = shards(12, per_shard=3)
    (folder / "00001.tar").unlink()
    everything = f"{folder}/{{00000..00003}}.tar"
    with pytest.raises(DataError, match=r"1 of 4 shards cannot be read.*00001\.tar: FileNotFoundError"):
        pack(everything, tmp_path / "out", max_skipped_share=0.2)
    damage = pack(everything, tmp_path / "out", max_skipped_share=0.25)
    assert (damage.num_read, damage.num_broken_samples, len(damage.shards), damage.num_shards) == (9, 0, 1, 4)


def test_a_name_that_is_no_unicode(shards, tmp_path):
    folder = shards(3, per_shard=3)
    write_shard([("\udcff", {"txt": b"no picture"})], folder / "00001.tar")
    pack(folder, tmp_path / "out", max_skipped_share=0.25)
    (name,) = json.loads((tmp_path / "out.skipped.json").read_text())
    assert name.endswith("00001.tar: \\udcff")


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF"])
def test_pictures_of_other_kinds_are_packed_as_png(tmp_path, kind):
    root = tmp_path / "set"
    root.mkdir()
    picture = Image.new("RGBA", (8, 8), (200, 30, 40, 255))
    picture.putpixel((0, 0), (0, 0, 0, 0))
    (picture.convert("RGB") if kind == "BMP" else picture).save(root / f"a.{kind}", kind)
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": f"a.{kind}", "text": "red"}))
    found = inspect(root)
    assert (found.num_samples, found.broken) == (1, {})
    assert not pack(root, tmp_path / "shards").broken
    source = ShardSource(tmp_path / "shards", [8])
    torch.testing.assert_close(source.examples(1).images[8], FolderSource([root], [8]).examples(1).images[8])
    source.close()


def test_what_a_record_says_is_packed(tmp_path):
    lines = [{"text": "a", "weight": 0.25, "concept": "c", "label": "l", "style": "s"}, {"text": "b"}]
    root = tmp_path / "set"
    root.mkdir()
    for n, line in enumerate(lines):
        (root / f"{n}.png").write_bytes(png(n))
        line["file_name"] = f"{n}.png"
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pack(root, tmp_path / "shards")
    first, second = read_shard(str(tmp_path / "shards" / "00000.tar"))
    assert about(first) == {"captions": ["a"], "concept": "c", "label": "l", "style": "s", "weight": 0.25}
    assert (weight_of(first), weight_of(second)) == (0.25, 1.0)


def test_packed_shards_train(shards, tmp_path):
    pack(shards(20, per_shard=7), tmp_path / "again", per_shard=4)
    assert len(expand(tmp_path / "again")) == 5
    source = ShardSource(tmp_path / "again", [8])
    assert sorted(source.examples(100).captions) == sorted(f"picture {n}" for n in range(20))
    source.close()


def test_nothing_to_pack(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "none.png", "text": "t"}')
    with pytest.raises(DataError, match=r"can be read.*none\.png"):
        pack(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_inspected(folder):
    found = inspect(folder)
    assert (found.num_samples, found.num_captions, found.num_embeddings) == (3, 6, 0)
    assert sorted(name.rsplit(": ")[0] for name in found.broken) == ["1.png", "4.png"]
    assert found.sheet.width == 2 * 128 + 6


def test_a_held_out_picture_that_is_broken_is_found(folder):
    """Training reads it too."""
    (folder / "3.png").write_bytes(b"no picture")
    assert sorted(name.rsplit(": ")[0] for name in inspect(folder).broken) == ["1.png", "3.png", "4.png"]


def test_a_sheet_is_spread_over_the_whole(shards):
    found = inspect(shards(200, per_shard=50), num_shown=4)
    assert (found.num_samples, found.num_captions) == (200, 200)
    sheet = found.sheet
    assert sheet.size == (2 * 128 + 6, 2 * (128 + 18) + 6)
    reds = [sheet.getpixel((x, y))[0] for y in (64, 64 + 152) for x in (64, 64 + 134)]
    assert reds == sorted(reds)
    assert reds[0] < 40
    assert reds[-1] > 120


def test_an_order_of_raw_samples(shards):
    damage = Damage()
    keys = [sample.key for sample in raw_samples(shards(6, per_shard=4), damage)]
    assert keys == [f"{n:09}" for n in range(6)]
    assert damage.num_read == 6


def test_by_the_command_line(folder, tmp_path):
    from typer.testing import CliRunner

    from unclip.cli.main import app

    sheet = tmp_path / "sheet.png"
    done = CliRunner().invoke(app, ["data", "inspect", str(folder), "--sheet", str(sheet)])
    assert done.exit_code == 0, done.output
    assert "samples                      3" in done.stdout
    assert "broken                       2" in done.stdout
    assert "1.png" in done.stderr
    with Image.open(sheet) as image:
        assert image.format == "PNG"
    again = CliRunner().invoke(app, ["data", "inspect", str(folder), "--sheet", str(sheet)])
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    done = CliRunner().invoke(app, ["data", "pack", str(folder), "--out", str(tmp_path / "shards")])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "2 of 4 samples cannot be read, more than the 1% allowed" in done.stderr
    allowed = ["data", "pack", str(folder), "--out", str(tmp_path / "shards"), "--max-skipped", "0.5"]
    done = CliRunner().invoke(app, allowed)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'shards'}\n"
    assert "4 samples read, 2 samples or shards broken" in done.stderr
    assert f"listed in {tmp_path / 'shards.skipped.json'}" in done.stderr
