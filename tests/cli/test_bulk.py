"""`unclip generate --from` and `unclip embed`: each row exactly once, whatever happens to the run."""

import contextlib
import io
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unclip.cli import main
from unclip.data.tables import read_table
from unclip.errors import DataError, InputError, TrainingError
from unclip.pipelines import workers
from unclip.pipelines.bulk import PictureWork, Results, picture_rows
from unclip.pipelines.session import Compute, read_texts
from unclip.pipelines.workers import Failed, Row, batches_of, work_off

FEW = ["--prior-steps", "2", "--decoder-steps", "2", "--super-res-steps", "2"]
NUM_KILLS = {"here": 10, "processes": 3, "ray": 1}
"""Killed runs of each test; starting workers takes seconds."""
ASKED = os.environ.get("UNCLIP_TEST_KILLS")


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.png")}


def rows_of(*prompts: str, **more) -> list[Row]:
    return picture_rows([{"prompt": prompt} for prompt in prompts], {}, of_model=["m"], **more)


@pytest.fixture
def run(unclip, model, tmp_path):
    """Run the command on a table."""

    def start(table: Path, *more: object, out: Path = tmp_path / "out"):
        return unclip("generate", "--from", table, "--out", out, "--model", model, *FEW, *more)

    return start


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,seed,tag\na red apple,7,x\na cat,,y\na cat,,z\n,3,none\n", encoding="utf-8")
    return path


def test_every_row_is_in_the_index_once_and_a_second_run_makes_nothing(run, table, tmp_path):
    done = run(table)
    assert done.code == 3
    assert "4 pictures: 4 new, 0 existing, 1 failed" in done.err
    found = entries(tmp_path / "out")
    assert [entry["tag"] for entry in found] == ["x", "y", "z", "none"]
    assert found[0]["seed"] == 7
    assert found[1]["id"] != found[2]["id"]
    assert "no prompt" in found[3]["error"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert len(before) == 3
    again = run(table)
    assert again.code == 3
    assert "0 new, 4 existing, 1 failed" in again.err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert entries(tmp_path / "out") == found


def test_the_parquet_index_equals_the_lines(run, table, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    run(table)
    rows = parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()
    kept = [{name: value for name, value in row.items() if value is not None} for row in rows]
    assert kept == entries(tmp_path / "out")


def test_a_bulk_picture_is_that_of_generate_and_can_be_made_again(run, unclip, table, model, tmp_path):
    run(table, "--negative", "a dog")
    path = tmp_path / "out" / entries(tmp_path / "out")[0]["path"]
    again = unclip("rerun", path, "--model", model, "--out", tmp_path / "again")
    assert again.code == 0, again.err
    assert "differ" not in again.err
    assert Path(again.lines[0]).read_bytes() == path.read_bytes()


def test_a_resumed_run_makes_the_same_bytes(run, tmp_path):
    table = tmp_path / "many.txt"
    table.write_text("\n".join(f"a cat {n}" for n in range(10)))
    run(table, "--batch-size", 4, out=tmp_path / "whole")
    run(table, "--batch-size", 4)
    whole, out = pictures(tmp_path / "whole"), tmp_path / "out"
    lines = (out / "index.jsonl").read_bytes().splitlines(keepends=True)
    (out / "index.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])  # torn
    for path in list(out.rglob("*.png"))[::3]:
        path.write_bytes(b"half a picture") if json.dumps(path.stem).encode() not in b"".join(lines[:5]) else None
    assert run(table, "--batch-size", 4).code == 0
    assert pictures(out) == whole
    assert entries(out) == entries(tmp_path / "whole")


def test_failed_rows_are_made_only_on_request(run, table, tmp_path, monkeypatch):
    real = workers._attempt
    monkeypatch.setattr(workers, "_attempt", lambda make, batch: [Failed("no power")] * len(batch))
    assert run(table).code == 1
    monkeypatch.setattr(workers, "_attempt", real)
    assert "0 new, 4 existing, 4 failed" in run(table).err
    assert run(table, "--retry-failed").code == 3
    assert [("path" in entry, "error" in entry) for entry in entries(tmp_path / "out")] == [(True, False)] * 3 + [
        (False, True)
    ]


def test_one_bad_row_does_not_fail_its_batch():
    rows = rows_of("good", "bad", "fine")

    def make(batch):
        if any(row.given["prompt"] == "bad" for row in batch):
            raise InputError("bad")
        return [row.given["prompt"].encode() for row in batch]

    assert workers._attempt(make, rows) == [b"good", Failed("bad"), b"fine"]


def test_two_runs_on_one_folder(run, table, tmp_path):
    with Results(tmp_path / "out", ".png").opened():
        refused = run(table)
    assert refused.code == 1
    assert "another process is writing" in refused.err


def test_a_folder_with_other_files_is_refused(run, table, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert "choose an empty folder" in run(table).err


def test_other_settings_are_other_pictures(run, table, tmp_path):
    run(table)
    done = run(table, "--decoder-guidance", "3")
    assert "3 new, 1 existing" in done.err
    assert len(pictures(tmp_path / "out")) == 6


def test_settings_of_a_row(run, unclip, tmp_path):
    table = tmp_path / "rows.jsonl"
    table.write_text('{"caption": "a cat", "decoder_steps": 3, "seed": 1}\n{"text": "a cat", "seed": 1.0}\n"a dog"\n')
    assert run(table).code == 0
    first, second, _ = entries(tmp_path / "out")
    made = [read_texts(tmp_path / "out" / entry["path"])["settings"] for entry in (first, second)]
    assert [settings["decoder_num_inference_steps"] for settings in made] == [3, 2]


@pytest.mark.parametrize(
    "cells",
    [{"seed": "-1"}, {"seed": 2**64}, {"seed": 1.5}, {"decoder_steps": "0"}, {"decoder_guidance": "nan"}, {"width": 0}],
)
def test_bad_cells_are_failed_rows(cells):
    (row,) = picture_rows([{"prompt": "a cat", **cells}], {}, of_model=[])
    assert next(iter(cells)) in row.error


def test_identities_depend_on_content_alone():
    rows = rows_of("a", "b", "a")
    assert len({row.id for row in rows}) == 3
    assert [row.id for row in rows_of("b", "a", "a")] == [rows[1].id, rows[0].id, rows[2].id]
    assert [row.about["seed"] for row in rows_of("a", seed=1)] != [rows[0].about["seed"]]
    assert len({row.id for row in rows_of("a", num_images=3)}) == 3
    other = picture_rows([{"prompt": "a"}], {}, of_model=["other"])
    assert other[0].about["seed"] == rows[0].about["seed"]
    assert other[0].id != rows[0].id


def test_own_columns_are_renamed():
    (row,) = picture_rows([{"prompt": "a", "id": 5, "path": "p", "note": "n"}], {}, of_model=[])
    assert row.about == {"prompt": "a", "input_id": 5, "input_path": "p", "note": "n", "seed": row.given["seed"]}


def test_batches_do_not_depend_on_what_is_missing():
    rows = rows_of(*"abcdefg")
    assert batches_of(rows, lambda row: row is rows[3], 3) == [rows[3:6]]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", "{", "line 1: it is not JSON"),
        ("a.jsonl", "3", "must be an object"),
        ("a.csv", "prompt\na,b\n", "line 2: there are more cells"),
        ("a.csv", 'prompt\n"a\n', "cannot be read"),
        ("a.csv", "", "no rows"),
        ("a.txt", "\ud800", "not UTF-8"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.doc", "x", "must end in"),
        ("none.csv", None, "No such file"),
    ],
)
def test_broken_tables(tmp_path, name, content, error):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogatepass")
    with pytest.raises((InputError, DataError), match=error):
        read_table(tmp_path / name)


def test_a_parquet_table(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"prompt": ["a", None], "seed": [1.0, float("nan")]}), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet") == [{"prompt": "a", "seed": 1.0}, {}]


def test_shards_hold_each_row_once_after_a_kill_between_shard_and_index(run, tmp_path):
    import tarfile

    table = tmp_path / "many.txt"
    table.write_text("\n".join(f"a cat {n}" for n in range(7)))
    shards = ["--format", "webdataset", "--per-shard", 3]
    assert run(table, *shards).code == 0
    out = tmp_path / "out"
    lines = (out / "index.jsonl").read_bytes().splitlines(keepends=True)
    (out / "index.jsonl").write_bytes(b"".join(lines[:3]))  # the other shards are not recorded yet
    assert run(table, *shards).code == 0
    names = []
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert sorted(names) == sorted(f"{entry['id']}.{kind}" for entry in entries(out) for kind in ("png", "txt", "json"))
    with tarfile.open(out / "00000.tar") as tar:
        Image.open(io.BytesIO(tar.extractfile(f"{entries(out)[0]['id']}.png").read())).load()


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for place, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 40), colour).save(folder / f"{place}.png")
    return folder


@pytest.fixture
def expected(model, photos):
    """The embeddings of the photos, from the pipeline."""
    from unclip import UnCLIPImageVariationPipeline
    from unclip.clip.encoders import ImageEncoder

    pipe = UnCLIPImageVariationPipeline.from_pretrained(model, own_clip=True)
    encoder = ImageEncoder(pipe.image_encoder, pipe.feature_extractor)
    with torch.no_grad():
        return encoder.encode([Image.open(path) for path in sorted(photos.iterdir())]).numpy()


def read_embeddings(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".npz":
        return np.load(path)["image_embeds"]
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(path)["image_embeds"]
    parquet = pytest.importorskip("pyarrow.parquet")
    if path.suffix:
        return np.array(parquet.read_table(path).column("embedding").to_pylist())
    found = parquet.read_table(path / "metadata" / "metadata_0.parquet").column("image_path").to_pylist()
    assert [Path(each).name for each in found] == ["0.png", "1.png", "2.png"]
    return np.load(path / "img_emb" / "img_emb_0.npy")


@pytest.mark.parametrize("name", ["e.npy", "e.npz", "e.safetensors", "e.parquet", "e"])
def test_embeddings_of_pictures(unclip, model, photos, expected, tmp_path, name):
    if name in ("e.parquet", "e"):
        pytest.importorskip("pyarrow")
    done = unclip("embed", photos, "--model", model, "--out", tmp_path / name, "--batch-size", 3)
    assert done.code == 0, done.err
    np.testing.assert_array_equal(read_embeddings(tmp_path / name), expected)
    assert not (tmp_path / f"{name}.unfinished").exists()
    assert "already exists" in unclip("embed", photos, "--model", model, "--out", tmp_path / name).err


def test_half_embeddings_of_a_table_with_a_broken_picture(unclip, model, photos, expected, tmp_path):
    (photos / "1.png").write_text("no picture")
    table = tmp_path / "photos.csv"
    table.write_text("image,tag\nphotos/0.png,a\nphotos/1.png,b\nphotos/none.png,c\nphotos/2.png,d\n")
    arguments = ("embed", "--from", table, "--model", model, "--out", tmp_path / "e.npy")
    done = unclip(*arguments, "--half")
    assert done.code == 3
    array = np.load(tmp_path / "e.npy")
    assert array.dtype == np.float16
    np.testing.assert_allclose(array, expected[[0, 2]], rtol=1e-2, atol=1e-3)
    index = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert [(entry["tag"], entry.get("row"), "error" in entry) for entry in index] == [
        ("a", 0, False), ("b", None, True), ("c", None, True), ("d", 1, False),
    ]  # fmt: skip
    Image.new("RGB", (40, 40), "green").save(photos / "1.png")
    (photos / "none.png").write_bytes((photos / "1.png").read_bytes())
    assert unclip(*arguments).code == 0
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), expected[[0, 1, 1, 2]], rtol=1e-5, atol=1e-6)


def test_embeddings_of_captions_resume(unclip, model, tmp_path, monkeypatch):
    from unclip.pipelines import embeddings

    captions, out = tmp_path / "captions.txt", tmp_path / "e.safetensors"
    captions.write_text("".join(f"a cat {n}\n" for n in range(9)))
    arguments = ("embed", "--captions", captions, "--model", model, "--batch-size", 2)
    assert unclip(*arguments, "--out", tmp_path / "whole.npy").code == 0
    whole = np.load(tmp_path / "whole.npy")
    asked, real = [], embeddings.EmbeddingWork.load

    def load(work, worker):
        make = real(work, worker)

        def stopped(batch):
            asked.extend(row.given for row in batch)
            if len(asked) == 6:
                raise KeyboardInterrupt
            return make(batch)

        return stopped

    monkeypatch.setattr(embeddings.EmbeddingWork, "load", load)
    assert unclip(*arguments, "--out", out).code == 130
    assert not out.exists()
    assert unclip(*arguments, "--out", out).code == 0
    assert asked[6:] == [f"a cat {n}" for n in range(4, 9)]
    from safetensors.numpy import load_file

    np.testing.assert_array_equal(load_file(out)["text_embeds"], whole)


def test_an_index_that_is_not_one(tmp_path):
    (tmp_path / "index.jsonl").write_text('{"no": "id"}\n')
    with pytest.raises(DataError, match=r"line 1"), Results(tmp_path, ".png").opened():
        pass


def test_conflicting_options(unclip, table):
    assert unclip("generate", "a cat", "--from", table).code == 2
    assert unclip("generate", "--from", table, "--grid").code == 2


def started(log: Path, *arguments: object) -> int:
    """The command in a fork of this process, which has loaded the libraries already. Returns: its process id."""
    if process := os.fork():
        return process
    code = 99
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = sys.stdout = open(2, "w", closefd=False)  # noqa: SIM115  (not those of pytest)
        signal.signal(signal.SIGTERM, main._stop)
        main.app([str(argument) for argument in arguments], prog_name="unclip")
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(process: int) -> int:
    """Its exit code, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def num_lines(index: Path) -> int:
    return index.read_bytes().count(b"\n") if index.exists() else 0


def check_each_once(out: Path, num_rows: int) -> None:
    found = entries(out)
    assert len(found) == num_rows
    assert max(Counter(entry["id"] for entry in found).values()) == 1
    assert {entry["path"] for entry in found} == {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    for entry in found:
        Image.open(out / entry["path"]).load()


WAYS = {"here": [], "processes": ["--processes", "2"], "ray": ["--ray", "local"]}
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.mark.slow
@forks
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_random_moments(way, model, tmp_path):
    """kill -9 of the main process; the moments lie before, between and within the batches."""
    if way == "ray":
        pytest.importorskip("ray")
    table, out, log = tmp_path / "prompts.txt", tmp_path / "out", tmp_path / "log"
    table.write_text("\n".join(f"a cat {n % 150}" for n in range(200)))  # 50 captions twice
    run = ["generate", "--from", table, "--out", out, "--model", model, *FEW, "--batch-size", 2, *WAYS[way]]
    chance, index, killed_at = random.Random(), out / "index.jsonl", [0]
    for left in range(int(ASKED or NUM_KILLS[way]), 0, -1):
        until = killed_at[-1] + chance.randint(0, (190 - killed_at[-1]) // left)
        process = started(log, *run)
        deadline = time.monotonic() + 300
        while num_lines(index) < until and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(process, signal.SIGKILL)
        assert ended(process) == -signal.SIGKILL, log.read_text()
        killed_at.append(num_lines(index))
    print(f"{way}: killed when the index had {killed_at[1:]} lines")
    process = started(log, *run)
    assert ended(process) == 0, log.read_text()
    check_each_once(out, 200)
    assert f"{killed_at[-1]} existing" in log.read_text()


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(model, tmp_path):
    import multiprocessing

    settings = {name: 2 for name in ("prior_num_inference_steps", "decoder_num_inference_steps")}
    table = [{"prompt": f"a cat {n}"} for n in range(40)]
    rows = picture_rows(table, settings, of_model=[])
    made = []
    batches = batches_of(rows, lambda row: True, 2)
    for done in work_off(batches, PictureWork(str(model), Compute()), processes=2):
        made += done
        if len(made) in (2, 20):
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    assert sorted(row.id for row, _ in made) == sorted(row.id for row in rows)
    assert not [content for _, content in made if isinstance(content, Failed)]
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_lost_actor_and_a_cluster_without_room(model):
    ray = pytest.importorskip("ray")
    few = {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}
    rows = picture_rows([{"prompt": f"a cat {n}"} for n in range(30)], few, of_model=[])
    work, made = PictureWork(str(model), Compute()), []
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        for done in work_off(batches_of(rows, lambda row: True, 2), work, ray="auto"):
            made += done
            if len(made) in (4, 16):
                os.kill(actors()[0], signal.SIGKILL)
        assert sorted(row.id for row, _ in made) == sorted(row.id for row in rows)
        assert not [content for _, content in made if isinstance(content, Failed)]
        holder = ray.remote(num_cpus=1)(Holder).remote()
        ray.get(holder.__ray_ready__.remote())
        with pytest.raises(TrainingError, match=r"no worker has started within 3 s\..*'num_cpus': 1\.0"):
            list(work_off([rows], work, ray="auto", stall_s=3))
    finally:
        ray.shutdown()


class Holder:
    """An actor that holds its CPU."""


def actors() -> list[int]:
    """The processes of our actors."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::_Worker"):
                found.append(int(path.parent.name))
    return found


class Fake:
    """Workers that behave as told: each answers a number of batches, and is lost then."""

    lost = EOFError
    count = 2

    def __init__(self, answers: int, started: bool = True):
        self.answers, self.started, self.sent = answers, started, {}

    def start(self, number):
        self.sent[number] = None
        return number

    def wait(self, workers, timeout_s):
        return workers[:1] if self.started else []

    def receive(self, worker):
        batch = self.sent[worker]
        if batch is None:
            return None
        if not self.answers or batch[0].given["prompt"] == "deadly":
            raise EOFError
        self.answers -= 1
        return [row.given["prompt"].encode() for row in batch], []

    def send(self, worker, batch):
        self.sent[worker] = batch

    def describe(self):
        return "Nothing is free"

    def stop(self):
        self.sent = None


@pytest.mark.parametrize(
    ("pool", "error"),
    [(Fake(0), "workers were killed one after the other"), (Fake(9, started=False), "Nothing is free")],
)
def test_workers_that_never_work(monkeypatch, pool, error):
    monkeypatch.setattr(workers, "_Processes", lambda work, count: pool)
    with pytest.raises(TrainingError, match=error):
        list(work_off([[row] for row in rows_of(*"abcdefgh")], None, processes=2))
    assert pool.sent is None


def test_a_batch_that_kills_its_workers_fails_alone(monkeypatch):
    monkeypatch.setattr(workers, "_Processes", lambda work, count: Fake(9))
    batches = [[row] for row in rows_of("a", "deadly", "b", "c")]
    found = {row.given["prompt"]: made for done in work_off(batches, None, processes=2) for row, made in done}
    assert found.pop("deadly") == Failed("its worker was killed 3 times")
    assert found == {"a": b"a", "b": b"b", "c": b"c"}


@pytest.mark.parametrize(("package", "more"), [("ray", ["--ray", "local"]), ("pyarrow.parquet", [])])
def test_a_missing_package_is_named(run, tmp_path, monkeypatch, package, more):
    monkeypatch.setitem(sys.modules, package, None)
    table = tmp_path / ("t.txt" if more else "t.parquet")
    table.write_text("a cat")
    done = run(table, *more)
    assert done.code == 1
    assert "pip install 'unclip[" in done.err


@pytest.mark.slow
@forks
@pytest.mark.parametrize("way", ["here", "processes"])
def test_sigterm_stops_cleanly(way, model, tmp_path):
    table, out, log = tmp_path / "prompts.txt", tmp_path / "out", tmp_path / "log"
    table.write_text("\n".join(f"a cat {n}" for n in range(2000)))
    process = started(log, "generate", "--from", table, "--out", out, "--model", model, *FEW, *WAYS[way])
    while not num_lines(out / "index.jsonl"):
        time.sleep(0.02)
    os.kill(process, signal.SIGTERM)
    assert ended(process) == 143
    assert log.read_text().splitlines()[-1] == "stopped; finished results are kept"
    assert not list(out.rglob(".unclip-tmp-*"))
    assert {entry["path"] for entry in entries(out)} <= {str(path.relative_to(out)) for path in out.rglob("*.png")}
