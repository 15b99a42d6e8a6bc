"""`unclip serve --ray`: the same server, computed by replicas on a small Ray of this machine."""

import base64
import functools
import importlib.util
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai
import pytest
from PIL import Image

from .conftest import Live, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[serve]"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STALL_S = 20
LONG = 400
"""Denoising steps that take a few seconds."""


def descendants(parent: int) -> dict[int, str]:
    """The processes that a process started, and theirs, with their command lines."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found: dict[int, str] = {}
    left = [parent]
    while left:
        for pid in children.get(left.pop(), []):
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            left.append(pid)
    return found


@dataclass
class Cluster:
    url: str
    process: subprocess.Popen
    log: list[dict]

    def replicas(self) -> list[int]:
        return [pid for pid, name in descendants(self.process.pid).items() if "ServeReplica" in name]

    @functools.cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=60)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=60)

    def job(self, **fields: object) -> str:
        return httpx2.post(f"{self.url}/v1/jobs", json={"prompt": "a cat", **fields}, timeout=60).json()["id"]


@contextmanager
def cluster_of(folder: Path, model: Path, replicas: str, **variables: object) -> Iterator[Cluster]:
    names = {f"UNCLIP_SERVER_{name.upper()}": str(value) for name, value in variables.items()}
    command = ["serve", "--ray", "local", "--replicas", replicas, "--model", f"tiny={model}", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "unclip", *command, "--folder", str(folder)],
        env={**os.environ, **names},
        stderr=subprocess.PIPE,
        text=True,
    )
    log: list[dict] = []

    def read() -> None:
        for line in process.stderr:  # type: ignore[union-attr]
            if line.startswith("{"):
                log.append(json.loads(line))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    started: dict[int, str] = {}
    try:
        wait_until(lambda: process.poll() is not None or any("url" in line for line in log), 300)
        found = Cluster(next(line["url"] for line in log if "url" in line), process, log)
        yield found
        found.client.close()
        started = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), 20)
    finally:
        for pid in {**started, **descendants(process.pid)}:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        reader.join(timeout=10)
        process.stderr.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def cluster(model_folder, tmp_path_factory) -> Iterator[Cluster]:
    """Two replicas, of which none is lost between tests."""
    folder = tmp_path_factory.mktemp("cluster")
    limits = {"max_queue": 6, "max_batch": 2, "ray_stall_s": STALL_S, "replica_cpus": 0.5, "drain_s": 20}
    with cluster_of(folder, model_folder, "2", **limits) as found:
        wait_until(lambda: len(found.replicas()) == 2, 120)
        wait_until(lambda: found.get("/readyz").is_success, 120)
        yield found


def pixels(item) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json))).tobytes()


def red() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(stream, "PNG")
    return stream.getvalue()


def test_pictures_are_those_of_a_local_server(cluster: Cluster, live: Live):
    requests: list[Callable[[openai.OpenAI], object]] = [
        lambda client: client.images.generate(
            prompt="a cat", n=2, response_format="b64_json", extra_body={"seed": 7, "sampler": "ddim"}
        ),
        lambda client: client.images.create_variation(image=red(), response_format="b64_json", extra_body={"seed": 7}),
        lambda client: client.images.edit(
            image=red(), prompt="a dog", response_format="b64_json", extra_body={"seed": 7, "from": "a cat", "to": "a"}
        ),
    ]
    for ask in requests:
        there, here = ask(cluster.client), ask(live.client())
        assert [pixels(item) for item in there.data] == [pixels(item) for item in here.data]
        assert there.warnings == here.warnings if hasattr(here, "warnings") else True
    there, here = (each.embeddings.create(model="clip", input=["a cat"]) for each in (cluster.client, live.client()))
    assert there.data[0].embedding == here.data[0].embedding


def test_streams_have_previews_and_the_picture(cluster: Cluster, live: Live):
    def events(client: openai.OpenAI) -> list[tuple[str, bytes]]:
        options = {"stream": True, "partial_images": 2, "extra_body": {"seed": 3}}
        return [(event.type, pixels(event)) for event in client.images.generate(prompt="a cat", **options)]

    there = events(cluster.client)
    assert [kind.rpartition(".")[2] for kind, _ in there] == ["partial_image", "partial_image", "completed"]
    assert there == events(live.client())


def test_errors_of_replicas_have_the_shape_of_the_api(cluster: Cluster):
    with pytest.raises(openai.InternalServerError) as caught:
        cluster.client.post(
            "/images/decode", body={"embeddings": [[3e38] * 16]}, cast_to=object, options={"max_retries": 0}
        )
    assert caught.value.code == "numerical_error"
    assert "Traceback" not in caught.value.message


def test_a_full_queue_answers_429_and_health_stays_fast(cluster: Cluster):
    names = [cluster.job(steps=LONG, n=2) for _ in range(3)]
    with pytest.raises(openai.RateLimitError) as caught:
        cluster.client.images.generate(prompt="a cat", n=6)
    assert caught.value.code == "queue_full"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    times = []
    with httpx2.Client(base_url=cluster.url, timeout=60) as client:
        for path in ["/healthz", "/readyz"] * 10:
            begun = time.monotonic()
            assert client.get(path).is_success
            times.append(time.monotonic() - begun)
    assert statistics.median(times) < 0.1
    for name in names:
        httpx2.delete(f"{cluster.url}/v1/jobs/{name}", timeout=60)
    states = [cluster.get(f"/v1/jobs/{name}").json()["status"] for name in names]
    assert states == ["cancelled"] * 3


def test_a_killed_replica_loses_and_doubles_no_job(cluster: Cluster, live: Live):
    before = {job["id"] for job in cluster.get("/v1/jobs").json()["data"]}
    names = [cluster.job(seed=seed, steps=LONG) for seed in range(4)]
    wait_until(lambda: any(cluster.get(f"/v1/jobs/{name}").json()["status"] == "running" for name in names), 30)
    killed = cluster.replicas()[0]
    os.kill(killed, signal.SIGKILL)
    wait_until(
        lambda: all(cluster.get(f"/v1/jobs/{name}").json()["status"] in ("completed", "failed") for name in names), 300
    )
    found = [cluster.get(f"/v1/jobs/{name}").json() for name in names]
    problems = [line for line in cluster.log if line["level"] != "info"]
    assert [(job["status"], job["error"]) for job in found] == [("completed", None)] * 4, problems
    assert [len(job["result"]["data"]) for job in found] == [1] * 4
    assert {job["id"] for job in cluster.get("/v1/jobs").json()["data"]} - before == set(names)
    picture = Image.open(io.BytesIO(httpx2.get(found[0]["result"]["data"][0]["url"], timeout=60).content))
    body = {"prompt": "a cat", "seed": 0, "steps": LONG, "response_format": "b64_json"}
    wanted = live.post("/v1/images/generations", json=body).json()["data"][0]["b64_json"]
    other = Image.open(io.BytesIO(base64.b64decode(wanted)))
    assert max(abs(a - b) for a, b in zip(picture.tobytes(), other.tobytes(), strict=True)) <= 1  # another batch size
    wait_until(lambda: killed not in cluster.replicas() and len(cluster.replicas()) == 2, 120)  # it is replaced


def test_a_stall_is_an_error_within_the_time(cluster: Cluster):
    stopped = cluster.replicas()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    begun = time.monotonic()
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            cluster.client.images.generate(prompt="a cat")
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert (caught.value.status_code, caught.value.code) == (503, "replica_unavailable")
    assert time.monotonic() - begun < 2 * STALL_S
    assert cluster.client.images.generate(prompt="a cat").data


def test_sigterm_finishes_the_running_request_and_stops_ray(cluster: Cluster):
    started = descendants(cluster.process.pid)
    with ThreadPoolExecutor() as pool:
        body = {"prompt": "a cat", "steps": LONG}
        answer = pool.submit(httpx2.post, f"{cluster.url}/v1/images/generations", json=body, timeout=60)
        wait_until(lambda: "unclip_queue_pictures 1.0" in cluster.get("/metrics").text)
        cluster.process.send_signal(signal.SIGTERM)
        assert answer.result().status_code == 200
    assert cluster.process.wait(timeout=60) == 0
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), 20)


def test_a_replica_that_cannot_be_placed_is_reported(model_folder, tmp_path):
    with cluster_of(tmp_path, model_folder, "1", ray_stall_s=2, replica_gpus=1) as found:
        wait_until(lambda: "0 of 1 replicas run" in found.get("/readyz").text, 30)
        assert found.get("/healthz").is_success
        with pytest.raises(openai.InternalServerError) as caught:
            found.client.images.generate(prompt="a cat")
        assert (caught.value.status_code, caught.value.code) == (503, "replica_unavailable")
        assert "replicas run" in caught.value.message
