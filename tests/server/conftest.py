"""A tiny random model behind a live server, and clients of it."""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx2
import openai
import uvicorn
from fastapi import FastAPI

from unclip.pipelines.session import Compute
from unclip.server.app import KEEP_ALIVE_S, make_app
from unclip.server.engine import Engine
from unclip.server.models import Work
from unclip.server.settings import ServerSettings

NPM_PACKAGES = ("openai@6.49.0", "axe-core@4.14.1")
FEW = {
    "prior_num_inference_steps": 2,
    "decoder_num_inference_steps": 3,
    "super_res_num_inference_steps": 2,
}


@pytest.fixture(autouse=True)
def own_log_handlers():
    """`unclip serve` in a test logs to that test's stderr, which is closed after it."""
    loggers = [logging.getLogger(name) for name in ("unclip.server", "uvicorn", "ray")]
    before = [list(logger.handlers) for logger in loggers]
    yield
    for logger, handlers in zip(loggers, before, strict=True):
        logger.handlers[:] = handlers


@pytest.fixture(scope="session", autouse=True)
def no_variables_of_a_person() -> Iterator[None]:
    """The variables of whoever runs the tests do not count; float32, whatever type this machine computes fast."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("UNCLIP_SERVER_", "OPENAI_"))]:
            patch.delenv(name)
        patch.setenv("UNCLIP_CONFIG", os.devnull)
        patch.setenv("UNCLIP_SERVER_DTYPE", "float32")
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_components, build_pipeline) -> Path:
    """A folder with every component; it recommends few steps."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_pipeline("inpaint", tiny_components()).save_pretrained(folder)
    (folder / "generation_defaults.json").write_text(json.dumps(FEW))
    return folder


@dataclass
class Live:
    """A running server.

    Attributes:
        url: its address.
        app: the application.
        clients: OpenAI's clients, which are closed with the server.
    """

    url: str
    app: FastAPI
    clients: list[openai.OpenAI] = field(default_factory=list)

    @property
    def engine(self) -> Engine:
        return self.app.state.engine

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's client; without retries unless asked."""
        given = {"api_key": "any", "max_retries": 0, "timeout": 30, **options}
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", **given))
        return self.clients[-1]

    def http(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=30, **options)

    def post(self, path: str, **given: Any) -> httpx2.Response:
        """One request by a client of its own."""
        with self.http() as client:
            return client.post(path, **given)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Within it the worker is occupied, so that all requests wait."""
        done, started = threading.Event(), threading.Event()

        def block(model: Any, on_step: Any) -> None:
            started.set()
            done.wait(20)

        self.engine.submit(Work(next(iter(self.engine.models)), "block", function=block))
        started.wait(20)
        try:
            yield
        finally:
            done.set()

    def wait_for_queue(self, count: int) -> None:
        """Wait until so many requests are queued."""
        wait_until(lambda: len(self.engine._queue) == count)


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


@contextmanager
def running(settings: ServerSettings) -> Iterator[Live]:
    app = make_app(settings)
    options = {"log_config": None, "timeout_graceful_shutdown": 5, "timeout_keep_alive": KEEP_ALIVE_S}
    server = uvicorn.Server(uvicorn.Config(app, port=0, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        live = Live(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app)
        wait_until(lambda: live.engine.is_ready or live.engine.load_error)
        yield live
        for client in live.clients:
            client.close()
    finally:
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture(scope="session")
def serve(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Start a server with some settings: `with serve(max_queue=2) as live:`."""

    def start(**given: Any) -> Any:
        folder = given.pop("folder", None) or tmp_path_factory.mktemp("server")
        return running(ServerSettings(**{"models": [f"tiny={model_folder}"], "folder": folder, "drain_s": 5, **given}))

    return start


@pytest.fixture(scope="session")
def live(serve) -> Iterator[Live]:
    """A server that all tests share."""
    with serve() as server:
        yield server


@pytest.fixture(scope="session")
def npm(pytestconfig: pytest.Config) -> Path:
    """The folder of npm's packages, installed once under build/. Skips where they cannot be installed."""
    folder = pytestconfig.rootpath / "build" / "npm"
    if not folder.is_dir():
        if not shutil.which("npm") or not shutil.which("node"):
            pytest.skip("Node is not installed")
        folder.parent.mkdir(exist_ok=True)
        draft = tempfile.mkdtemp(prefix="npm-", dir=folder.parent)
        done = subprocess.run(
            ["npm", "install", "--no-audit", "--no-fund", "--prefix", draft, *NPM_PACKAGES],
            capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        try:
            if done.returncode:
                pytest.skip(f"npm cannot install packages: {done.stderr[-200:]}")
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder / "node_modules"


@pytest.fixture
def engine(model_folder: Path) -> Iterator[Engine]:
    """An engine that is not started yet, with batches of up to 4."""
    made = Engine({"tiny": str(model_folder)}, [Compute()], max_batch=4)
    yield made
    made.close()
