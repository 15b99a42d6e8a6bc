"""A run whose shards are delayed or broken: it stops when requested, and reports what it found."""

import collections
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unclip.data.batches import ShardSource
from unclip.errors import DataError
from unclip.training.recipe import ClipSettings, Recipe
from unclip.training.trainer import Trainer

PROMPTLY_S = 10.0
"""Far less than a server is waited for."""


@pytest.fixture
def serve():
    """Serves a folder: `serve(folder)` gives the URL, the names that were asked for, and those that hang halfway."""
    parting, servers = threading.Event(), []

    def start(folder: Path):
        asked: list[str] = []
        hanging: set[str] = set()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path[1:]
                asked.append(name)
                content = (folder / name).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if name in hanging:
                    self.wfile.write(content[: len(content) // 2])
                    parting.wait(60)
                else:
                    self.wfile.write(content)

            def log_message(self, *about):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", asked, hanging

    yield start
    parting.set()
    for server in servers:
        server.shutdown()
        server.server_close()


class Mean(nn.Module):
    """Learns the mean of all pixels."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        return {"loss": (batch["x"].mean() - self.mean) ** 2}


class MeanTask:
    """The smallest task on shards."""

    fingerprint = "mean"

    def __init__(self, source):
        self.source, self.module = source, Mean()

    def batch(self, step, batch_size, generator, own=None):
        return {"x": self.source.draw(step, batch_size, generator).images[8]}

    def save(self, folder):
        save_file({"mean": self.module.mean.detach().clone()}, folder / "mean.safetensors")

    def sample_sheet(self, path):
        path.with_suffix(".txt").write_text(" ".join(self.source.examples(8).captions))


def recipe(**changes) -> Recipe:
    settings = {"steps": 10, "batch_size": 2, "precision": "no", "sample_every_steps": 100}
    return Recipe(stage="clip", data=Path("x"), clip=ClipSettings(), **{**settings, **changes})


def interrupt_when(is_so, *, times: int = 1) -> None:
    """Ctrl-C, once it is so and the main thread waits."""

    def watch():
        while not is_so():
            time.sleep(0.01)
        for _ in range(times):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def shards_of(folder: Path, url: str) -> str:
    return f"{url}/{{00000..{len(list(folder.glob('*.tar'))) - 1:05}}}.tar"


def test_ctrl_c_while_a_server_hangs_saves_and_stops(shards, serve, tmp_path):
    folder = shards(16, per_shard=4)
    url, asked, hanging = serve(folder)
    data = shards_of(folder, url)
    straight = Trainer(MeanTask(ShardSource(data, [8], block=4)), recipe(), tmp_path / "straight")
    straight.run()
    third = straight.task.source.stream._order(0)[2].rsplit("/", 1)[1]
    hanging.add(third)
    asked.clear()
    run = tmp_path / "stopped"
    trainer = Trainer(MeanTask(ShardSource(data, [8], block=4)), recipe(), run)
    interrupt_when(lambda: third in asked and trainer.step == 4)
    begun = time.monotonic()
    trainer.run()
    assert time.monotonic() - begun < PROMPTLY_S
    assert trainer.step == json.loads((run / "state" / "state.json").read_text())["step"] == 4
    hanging.clear()
    again = Trainer(MeanTask(ShardSource(data, [8], block=4)), recipe(), run)
    assert again.step == 4
    again.run()
    one, other = (load_file(run.parent / name / "state" / "ema.safetensors") for name in ("straight", "stopped"))
    assert torch.equal(one["mean"], other["mean"])


def test_ctrl_c_while_a_sheet_waits(shards, serve, tmp_path):
    folder = shards(4, per_shard=4)
    url, asked, hanging = serve(folder)
    trainer = Trainer(
        MeanTask(ShardSource(shards_of(folder, url), [8], block=4)), recipe(sample_every_steps=2), tmp_path / "run"
    )
    plain = trainer.task.source.examples

    def late(count):
        hanging.update(path.name for path in folder.iterdir())
        asked.clear()
        return plain(count)

    trainer.task.source.examples = late
    interrupt_when(lambda: hanging and asked)
    begun = time.monotonic()
    trainer.run()
    assert time.monotonic() - begun < PROMPTLY_S
    assert trainer.step == 2
    assert not list((tmp_path / "run" / "samples").iterdir())


def test_a_second_ctrl_c_while_a_server_hangs(shards, serve, tmp_path, monkeypatch):
    folder = shards(4, per_shard=4)
    url, asked, hanging = serve(folder)
    hanging.add("00000.tar")
    monkeypatch.setattr("unclip.data.shards.POLL_S", 60.0)  # so that the first one is not heard
    trainer = Trainer(MeanTask(ShardSource(shards_of(folder, url), [8])), recipe(), tmp_path / "run")
    interrupt_when(lambda: asked, times=2)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert time.monotonic() - begun < PROMPTLY_S


DRAWING = """
import sys
import torch
from unclip.data.batches import ShardSource
source = ShardSource(sys.argv[1], [8], block=4)
generator = torch.Generator()
for step in range(int(sys.argv[2])):
    print(*sorted(source.draw(step, 4, generator).captions), sep=", ", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [1, 2])
def test_a_process_ends_while_a_shard_that_nobody_needs_hangs(shards, serve, drawn):
    """The batch is ahead of the steps, and the block of the batch."""
    folder = shards(12, per_shard=4)
    url, asked, hanging = serve(folder)
    order = ShardSource(shards_of(folder, url), [8], block=4).stream._order(0)
    hanging.add(order[2].rsplit("/", 1)[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(DRAWING), shards_of(folder, url), str(drawn)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=40)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("picture") == 4 * drawn
    assert max(collections.Counter(asked).values()) == 1


def test_what_is_read_at_the_start_is_fetched_once(shards, serve):
    folder = shards(12, per_shard=4)
    url, asked, _ = serve(folder)
    generator = torch.Generator().manual_seed(0)
    for step in (0, 1):  # from the beginning, and where a run resumes that counted nothing
        asked.clear()
        source = ShardSource(shards_of(folder, url), [8], block=4)
        source.draw(step, 4, generator)
        while len(asked) < 3:  # those of the batch and the block ahead are on their way
            time.sleep(0.01)
        source.close()
        assert asked[:3] == [shard.rsplit("/", 1)[1] for shard in source.stream._order(0)]


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_run_that_broken_data_end_says_what_was_broken(shards, tmp_path):
    folder = shards(8, per_shard=4, change=lambda n, parts: parts | {"png": b"no"} if n % 2 else parts)
    source = ShardSource(folder, [8])
    run = tmp_path / "run"
    trainer = Trainer(MeanTask(source), recipe(batch_size=4, steps=200), run)
    with pytest.raises(DataError, match="samples cannot be read"):
        trainer.run()
    source.close()
    listed = json.loads((run / "skipped.json").read_text())
    assert len(listed) > 2
    assert {name[-1] for name in listed} <= set("1357")
    assert not (run / "state").exists()
