"""Every stage trains on shards: from a folder, over HTTP, with a damaged shard among them, and resumes where it was."""

import dataclasses
import functools
import io
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from unclip.data.batches import ShardSource
from unclip.data.shard_writer import write_shard, write_shards
from unclip.data.shards import about, read_shard
from unclip.errors import ConfigError, DataError, OutputExistsError
from unclip.training import task as task_module
from unclip.training.clip import ClipTask
from unclip.training.conditions import Captioned, FrozenClip
from unclip.training.embedding import embed
from unclip.training.task import make_task
from unclip.training.trainer import Trainer, step_generator

STAGES = pytest.mark.parametrize("stage", ["clip", "prior", "decoder", "super_res"])


def pack(pictures: Path, folder: Path, *, copies: int = 4, per_shard: int = 8, embedding: int = 0) -> Path:
    """The tiny pictures as shards, each several times; with `embedding`, that many numbers in place of the picture."""
    folder.mkdir()
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]

    def parts(line: dict, number: int) -> dict[str, bytes]:
        about = {"json": json.dumps({"captions": line["captions"]}).encode()}
        if not embedding:
            return about | {"png": (pictures / line["file_name"]).read_bytes()}
        content = io.BytesIO()
        np.save(content, np.random.default_rng(number).normal(number % 3, 2, embedding).astype(np.float32))
        return about | {"img_emb.npy": content.getvalue()}

    write_shards(((f"{n:05}", parts(line, n)) for n, line in enumerate(lines * copies)), folder, per_shard=per_shard)
    return folder


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """For a server that may do better."""
    for name in ("WAITS_S", "FIRST_WAITS_S"):
        monkeypatch.setattr(f"unclip.data.shards.{name}", (0.0, 0.0, 0.0))


@pytest.fixture
def sharded(tiny, pictures, tmp_path):
    """A tiny recipe whose data are shards."""
    return functools.partial(tiny, data=pack(pictures, tmp_path / "shards"))


def closing(request, task):
    request.addfinalizer(task.source.close)
    return task


@STAGES
def test_it_learns_from_shards(sharded, stage, request):
    task = closing(request, make_task(sharded(stage)))
    assert task.source.is_local
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=2e-3)
    losses = []
    for step in range(60):
        loss = task.module(task.batch(step, 16, step_generator(0, step)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@STAGES
def test_an_interrupted_run_on_shards_is_as_one_that_was_not(sharded, stage, tmp_path, request):
    recipe = sharded(stage, steps=6, sample_every_steps=100)
    Trainer(closing(request, make_task(recipe)), recipe, tmp_path / "straight").run()
    half = Trainer(closing(request, make_task(recipe)), recipe, tmp_path / "stopped")
    for _ in range(4):
        half.take_step()
    half.save()
    half.run_folder.start(recipe, half.step)
    again = Trainer(closing(request, make_task(recipe)), recipe, tmp_path / "stopped")
    assert again.step == 4
    again.run()
    one, other = (Trainer(make_task(recipe), recipe, tmp_path / name) for name in ("straight", "stopped"))
    for task in (one.task, other.task):
        closing(request, task)
    for (name, mine), theirs in zip(one.ema.items(), other.ema.values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_run_that_goes_on_does_not_count_its_shards_again(sharded, tmp_path, monkeypatch, request):
    recipe = sharded("super_res", steps=6, sample_every_steps=100)
    Trainer(closing(request, make_task(recipe)), recipe, tmp_path).run()  # two epochs
    longer = sharded("super_res", steps=9, sample_every_steps=100)
    trainer = Trainer(closing(request, make_task(longer)), longer, tmp_path)
    assert sorted(trainer.task.source.counts.values()) == [8] * 6
    read = []
    monkeypatch.setattr(
        "unclip.data.shards.read_shard", lambda shard, damage: read.append(shard) or read_shard(shard, damage)
    )
    trainer.take_step()
    assert read[0] == trainer.task.source.stream._order(2)[0]  # the third epoch's first, and none of the two before


def test_a_clip_that_goes_on_keeps_its_tokenizer(sharded, tmp_path, monkeypatch, request):
    recipe = sharded("clip", steps=2, sample_every_steps=100)
    first = closing(request, ClipTask(recipe, run=tmp_path))
    Trainer(first, recipe, tmp_path).run()
    with monkeypatch.context() as without:
        without.setattr(ShardSource, "all_captions", lambda source: pytest.fail("read again"))
        again = closing(request, ClipTask(recipe, run=tmp_path))
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert again.fingerprint == first.fingerprint
    for caption in ("a red circle", "Grün: 12 €"):
        assert again.tokenizer(caption)["input_ids"] == first.tokenizer(caption)["input_ids"]
    assert Trainer(again, recipe, tmp_path).step == 2
    smaller = sharded("clip", section={"vocabulary_size": 520})
    assert len(closing(request, ClipTask(smaller, run=tmp_path)).tokenizer) == 520
    (tmp_path / "model" / "tokenizer" / "tokenizer.json").write_text("{")
    assert closing(request, ClipTask(recipe, run=tmp_path)).fingerprint == first.fingerprint  # learned again


@STAGES
def test_sheets_of_shards(sharded, stage, tmp_path, monkeypatch, request):
    monkeypatch.setattr("unclip.training.diffusion.SHEET_STEPS", 2)
    closing(request, task := make_task(sharded(stage)))
    task.sample_sheet(tmp_path / "0001.png")
    assert next(tmp_path.glob("0001.*")).stat().st_size > 20


def test_the_recipe_says_how_much_may_be_broken(sharded, request):
    assert closing(request, make_task(sharded("super_res"))).source.max_skipped_share == 0.01
    assert closing(request, make_task(sharded("clip", max_skipped_share=0.25))).source.max_skipped_share == 0.25


def test_a_prior_learns_from_embeddings_alone(tiny, pictures, tmp_path, request):
    width = make_task(tiny("prior")).clip.width
    data = pack(pictures, tmp_path / "embedded", embedding=width)
    task = closing(request, make_task(tiny("prior", data=data)))
    everything = task.source.examples(100).embeddings
    assert everything.shape == (48, width)
    torch.testing.assert_close(task.stage.prior.clip_mean[0], everything.mean(dim=0))
    torch.testing.assert_close(task.stage.prior.clip_std[0], everything.std(dim=0, correction=0))
    batch = task.batch(0, 16, step_generator(0, 0))
    assert batch["x0"].shape == (16, width)
    assert batch["x0"].std().item() == pytest.approx(1, abs=0.2)
    other = pack(pictures, tmp_path / "other", embedding=width + 1)
    with pytest.raises(ConfigError, match="they are of another CLIP"):
        make_task(tiny("prior", data=other))


@pytest.mark.parametrize("stage", ["clip", "decoder", "super_res"])
def test_shards_without_pictures(pictures, clip_model, tiny, tmp_path, request, stage):
    embed(pictures, clip_model, tmp_path / "embedded")
    task = closing(request, make_task(tiny(stage, data=tmp_path / "embedded")))
    with pytest.raises(DataError, match=r"have no picture, but pictures are needed here: .* --keep-pictures"):
        task.batch(0, 4, step_generator(0, 0))


def test_shards_where_some_samples_have_a_picture_and_some_an_embedding(pictures, clip_model, tiny, tmp_path, request):
    embed(pictures, clip_model, tmp_path / "mixed")
    packed = pack(pictures, tmp_path / "packed")
    (packed / "00000.tar").rename(tmp_path / "mixed" / "00001.tar")
    with pytest.raises(DataError, match=r"have no picture, others have no embedding, .* --keep-pictures"):
        closing(request, make_task(tiny("prior", data=tmp_path / "mixed")))


def test_processes_draw_rows_and_noise_of_their_own(sharded, monkeypatch, request):
    batches = []
    for rank in range(2):
        place = type("Place", (), {"process_index": rank, "num_processes": 2, "device": torch.device("cpu")})
        monkeypatch.setattr(task_module, "PartialState", lambda cpu, place=place: place)
        task = closing(request, make_task(sharded("decoder")))
        trainer = object.__new__(Trainer)
        trainer.task, trainer.recipe, trainer.step = task, sharded("decoder", batch_size=8), 0
        trainer.accelerator = place
        batch = trainer._batch()
        assert len(batch["x0"]) == 4
        batches.append(batch)
    assert not torch.equal(batches[0]["noise"], batches[1]["noise"])


def test_of_a_stream_few_pictures_are_in_memory_at_once(sharded, monkeypatch, request):
    task = closing(request, make_task(sharded("prior")))
    whole = task.data.embeddings(task.source.examples(100))
    asked = []
    embeddings = task.data.embeddings
    monkeypatch.setattr(task.data, "embeddings", lambda rows: asked.append(len(rows.captions)) or embeddings(rows))
    monkeypatch.setattr("unclip.training.conditions.AT_ONCE", 20)
    found, weights = task.data.weighted()
    assert asked == [20, 20, 8]
    torch.testing.assert_close(found, whole)
    assert weights.tolist() == pytest.approx([1 / 48] * 48)


def test_a_decoder_without_jitter_looks_for_no_spread(sharded, monkeypatch, request):
    def batch(noise: float) -> dict:
        task = closing(request, make_task(sharded("decoder", section={"embedding_noise": noise})))
        return task.batch(0, 8, step_generator(0, 0))

    jittered = batch(0.1)
    monkeypatch.setattr(Captioned, "weighted", lambda data: pytest.fail("looked"))
    plain = batch(0.0)
    assert torch.equal(plain["noise"], jittered["noise"])  # what is drawn stays the same
    assert not torch.equal(plain["image_embedding"], jittered["image_embedding"])


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *about):
        pass


@pytest.fixture
def served(pictures, tmp_path):
    """The URL of six shards; the third is cut off."""
    folder = pack(pictures, tmp_path / "served")
    third = folder / "00002.tar"
    third.write_bytes(third.read_bytes()[:9000])
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{{00000..00005}}.tar"
    server.shutdown()
    server.server_close()


def test_a_decoder_trained_on_shards_by_url_with_a_damaged_one(served, clip_model, tmp_path):
    """By the command itself, from a recipe file."""
    from typer.testing import CliRunner

    from unclip.cli.main import app

    text = (Path(__file__).parents[2] / "recipes" / "tiny" / "decoder.toml").read_text()
    recipe = tmp_path / "decoder.toml"
    lines = [f'data = "{served}"' if line.startswith("data") else line for line in text.splitlines()]
    lines = [f'clip = "{clip_model}"' if line.startswith("clip =") else line for line in lines]
    recipe.write_text("\n".join(lines))
    done = CliRunner().invoke(app, ["train", str(recipe), "--out", str(tmp_path / "run"), "--steps", "12"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip().endswith("model")
    assert "00002.tar: ReadError" in done.stderr
    assert "1 samples or shards could not be read" in done.stderr
    skipped = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert [name.rsplit("/", 1)[1] for name in skipped] == ["00002.tar"]
    assert (tmp_path / "run" / "model" / "decoder" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize("keep_pictures", [False, True])
def test_embeddings_computed_once_are_those_computed_each_time(
    pictures, clip_model, tiny, tmp_path, request, keep_pictures
):
    packed = pack(pictures, tmp_path / "shards", copies=1)
    damage = embed(packed, clip_model, tmp_path / "embedded", keep_pictures=keep_pictures, batch_size=5)
    assert (damage.num_read, damage.broken) == (12, {})
    stage = "decoder" if keep_pictures else "prior"
    task = closing(request, make_task(tiny(stage, data=tmp_path / "embedded")))
    rows = task.source.examples(100)
    assert bool(rows.images) == keep_pictures
    found = dict(zip(rows.captions, rows.embeddings, strict=True))
    live = closing(request, make_task(tiny("decoder", data=packed)))
    rows = live.source.examples(100)
    wanted = dict(zip(rows.captions, live.data.embeddings(rows), strict=True))
    assert found.keys() == wanted.keys()
    for caption in wanted:
        torch.testing.assert_close(found[caption], wanted[caption], atol=2e-3, rtol=2e-3)


def test_what_else_a_sample_says_is_embedded_with_it(pictures, clip_model, tmp_path):
    picture = next(pictures.rglob("*.png")).read_bytes()
    (tmp_path / "in").mkdir()
    told = {"caption": "a", "weight": 0.5, "concept": "c", "note": "half a smile \ud83d"}
    write_shards(iter([("k", {"png": picture, "json": json.dumps(told).encode()})]), tmp_path / "in", per_shard=1)
    embed(tmp_path / "in", clip_model, tmp_path / "out")
    (sample,) = read_shard(str(tmp_path / "out" / "00000.tar"))
    assert about(sample) == told | {"captions": ["a"], "clip": FrozenClip(clip_model).fingerprint}


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_embeddings_of_another_clip_of_the_same_width(pictures, clip_model, tiny, tmp_path, request, stage):
    ClipTask(tiny("clip", seed=9)).save(tmp_path / "other")
    packed = pack(pictures, tmp_path / "in", copies=1)
    embed(packed, tmp_path / "other", tmp_path / "of_other", keep_pictures=True)
    words = r"the data were embedded with another CLIP \(.*: embed them again \(unclip data embed\)"
    # A decoder that asks for no spread meets them at its first step.
    plain = {"embedding_noise": 0.0} if stage == "decoder" else {}
    recipe = tiny(stage, data=tmp_path / "of_other", section=plain)
    with pytest.raises(ConfigError, match=words):
        closing(request, make_task(recipe)).batch(0, 4, step_generator(0, 0))
    own = tiny(stage, data=tmp_path / "of_other", section=plain | {"clip": tmp_path / "other"})
    assert closing(request, make_task(own)).batch(0, 4, step_generator(0, 0))["x0"].isfinite().all()
    embed(tmp_path / "of_other", clip_model, tmp_path / "again", keep_pictures=True)
    again = tiny(stage, data=tmp_path / "again", section=plain)
    assert closing(request, make_task(again)).batch(0, 4, step_generator(0, 0))["x0"].isfinite().all()


def test_embeddings_that_do_not_say_their_clip_are_taken(pictures, tiny, tmp_path, request):
    task = closing(request, make_task(tiny("prior", data=pack(pictures, tmp_path / "in", embedding=32))))
    rows = task.source.examples(8)
    assert rows.clips == frozenset()
    assert task.data.embeddings(rows) is rows.embeddings
    with pytest.raises(ConfigError, match=r"another CLIP \(0123456789ab…\)"):
        task.data.embeddings(dataclasses.replace(rows, clips=frozenset({"0123456789abcdef", task.clip.fingerprint})))


def test_too_much_that_cannot_be_embedded(pictures, clip_model, tmp_path):
    folder = pack(pictures, tmp_path / "in", copies=1)
    broken = ("broken", {"png": b"no picture", "txt": b"a"})
    write_shard([broken], folder / "00009.tar")
    with pytest.raises(DataError, match=r"1 of 13 samples cannot be read, more than the 1% .*broken: "):
        embed(folder, clip_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(json.loads((tmp_path / "out.skipped.json").read_text())) == 1
    damage = embed(folder, clip_model, tmp_path / "out", max_skipped_share=0.1)
    assert (damage.num_read, damage.num_broken_samples) == (13, 1)


class _StopError(Exception):
    pass


def _stop_after(count):
    """A progress that is interrupted at a sample."""

    def progress(samples, **about):
        for number, sample in enumerate(samples):
            if number == count:
                raise _StopError
            yield sample

    return progress


def _contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def counted(monkeypatch):
    """How many pictures CLIP was shown."""
    seen = []
    plain = FrozenClip.embed
    monkeypatch.setattr(FrozenClip, "embed", lambda self, images: seen.append(len(images)) or plain(self, images))
    return seen


def test_an_interrupted_embedding_goes_on(pictures, clip_model, tmp_path, counted):
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    packed = pack(pictures, tmp_path / "in", copies=1)
    write_shard([("broken", {"png": b"no picture", "txt": b"a"})], packed / "00000-first.tar")
    how = {"per_shard": 3, "batch_size": 2, "max_skipped_share": 0.1}
    whole = embed(packed, clip_model, tmp_path / "straight", **how)
    assert sum(counted) == len(lines) == 12
    with pytest.raises(_StopError):
        embed(packed, clip_model, tmp_path / "out", **how, progress=_stop_after(8))
    assert not (tmp_path / "out").exists()
    unfinished = tmp_path / "out.unfinished"
    assert sorted(path.name for path in unfinished.iterdir()) == ["00000.tar", "00001.tar", "unfinished.json"]
    for name in ("00002.tar", ".unclip-tmp-0123456789abcdef.tar"):
        (unfinished / name).write_bytes(b"half")
    counted.clear()
    again = embed(packed, clip_model, tmp_path / "out", **how)
    assert sum(counted) == 12 - 5
    assert not unfinished.exists()
    assert again == whole
    assert _contents(tmp_path / "out") == _contents(tmp_path / "straight")


def test_a_shard_that_was_lost_or_cut_is_computed_again(pictures, clip_model, tmp_path, counted):
    packed = pack(pictures, tmp_path / "in", copies=1)
    embed(packed, clip_model, tmp_path / "straight", per_shard=3)
    with pytest.raises(_StopError):
        embed(packed, clip_model, tmp_path / "out", per_shard=3, progress=_stop_after(11))
    second = tmp_path / "out.unfinished" / "00001.tar"
    second.write_bytes(second.read_bytes()[:-100])
    counted.clear()
    embed(packed, clip_model, tmp_path / "out", per_shard=3)
    assert sum(counted) == 9
    assert _contents(tmp_path / "out") == _contents(tmp_path / "straight")


def test_an_embedding_does_not_go_on_with_something_else(pictures, clip_model, tmp_path):
    packed = pack(pictures, tmp_path / "in", copies=1)
    with pytest.raises(_StopError):
        embed(packed, clip_model, tmp_path / "out", per_shard=3, progress=_stop_after(5))
    with pytest.raises(
        OutputExistsError, match=r"out\.unfinished was started with other settings \(keep_pictures, per_shard\); use"
    ):
        embed(packed, clip_model, tmp_path / "out", per_shard=4, keep_pictures=True)
    other = pack(pictures, tmp_path / "other", copies=1)
    write_shard([("0", {"png": b"", "txt": b"a"})], other / "00000.tar")
    with pytest.raises(DataError, match="samples from number 0 on differ; remove that folder"):
        embed(other, clip_model, tmp_path / "out", per_shard=3)
    (tmp_path / "new.unfinished").mkdir()
    (tmp_path / "new.unfinished" / "mine.tar").touch()
    with pytest.raises(OutputExistsError, match=r"has no unfinished\.json; remove it"):
        embed(packed, clip_model, tmp_path / "new", per_shard=3)
    assert (tmp_path / "new.unfinished" / "mine.tar").exists()


def test_embedding_by_the_command(pictures, clip_model, tmp_path):
    from typer.testing import CliRunner

    from unclip.cli.main import app

    with pytest.raises(_StopError):
        embed(pictures, clip_model, tmp_path / "out", per_shard=3, progress=_stop_after(5))
    command = ["data", "embed", str(pictures), "--clip", str(clip_model), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--per-shard", "3", "--device", "nowhere"])
    assert done.exit_code == 1
    assert "the device is 'nowhere'" in done.stderr
    done = CliRunner().invoke(app, [*command, "--per-shard", "3", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'out'}\n"
    assert "continuing after the 1 shards in" in done.stderr
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_nothing_to_embed(tmp_path, clip_model):
    with pytest.raises(DataError, match=r"has no metadata\.jsonl"):
        embed(tmp_path, clip_model, tmp_path / "out")
    assert not (tmp_path / "out.unfinished").exists()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "none.png", "text": "t"}')
    with pytest.raises(DataError, match=r"nothing in .* can be read: none\.png"):
        embed(tmp_path, clip_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.unfinished").exists()
