"""Jobs: progress, cancellation, history, and what a restart leaves."""

import base64
import io
import json
import threading

import httpx2
import pytest
from PIL import Image

from .conftest import wait_until

stream = io.BytesIO()
Image.new("RGB", (16, 16), "red").save(stream, "PNG")
IMAGE = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # as the server does


@pytest.fixture(scope="module")
def http(live):
    with live.http() as client:
        yield client


def post(http: httpx2.Client, **fields) -> dict:
    answer = http.post("/v1/jobs", json={"prompt": "a cat", **fields})
    assert answer.status_code == 202, answer.text
    return answer.json()


def finished(http: httpx2.Client, name: str) -> dict:
    wait_until(lambda: http.get(f"/v1/jobs/{name}").json()["status"] not in ("queued", "running"))
    return http.get(f"/v1/jobs/{name}").json()


def events(http: httpx2.Client, name: str) -> list[tuple[str, dict]]:
    text = http.get(f"/v1/jobs/{name}/events").text
    found = [block.splitlines() for block in text.split("\n\n") if block.startswith("event:")]
    return [(head.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for head, data in found]


def test_a_job_is_answered_at_once_and_finished_later(live, http):
    with live.busy():
        first, second = post(http, seed=3), post(http, seed=4)
        assert [job["status"] for job in (first, second)] == ["queued", "queued"]
        assert [http.get(f"/v1/jobs/{job['id']}").json()["position"] for job in (first, second)] == [1, 2]
    done = finished(http, first["id"])
    assert done["status"] == "completed"
    assert done["request"] == {"prompt": "a cat", "seed": 3}
    (item,) = done["result"]["data"]
    assert item["seed"] == 3
    assert Image.open(io.BytesIO(http.get(item["url"]).content)).size == (16, 16)
    assert [job["id"] for job in http.get("/v1/jobs?limit=2").json()["data"]] == [second["id"], first["id"]]


def test_the_events_of_a_job(live, http):
    found = []

    def listen() -> None:
        with live.http() as client:
            found.extend(events(client, job["id"]))

    with live.busy():
        job = post(http, partial_images=2)
        thread = threading.Thread(target=listen)
        thread.start()
        wait_until(lambda: live.app.state.jobs.get("everybody", job["id"]).listeners)
    thread.join(timeout=20)
    names = [name for name, _ in found]
    assert names[0] == names[-1] == "job"
    assert [data["status"] for name, data in found if name == "job"] == ["queued", "running", "completed"]
    steps = [(data["stage"], data["step"], data["num_steps"]) for name, data in found if name == "progress"]
    assert steps == [
        ("prior", 1, 2), ("prior", 2, 2), ("decoder", 1, 3), ("decoder", 2, 3), ("decoder", 3, 3),
        ("super_res", 1, 2), ("super_res", 2, 2),
    ]  # fmt: skip
    assert names.count("preview") == 2
    # A client that comes later gets the end at once.
    assert [name for name, _ in events(http, job["id"])] == ["job"]


def test_cancelling_a_queued_and_a_running_job(live, http):
    with live.busy():
        job = post(http)
        assert http.delete(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"
        assert not live.engine._queue
    job = post(http, steps=1000)
    wait_until(lambda: http.get(f"/v1/jobs/{job['id']}").json()["status"] == "running")
    assert http.delete(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"
    wait_until(lambda: live.engine.num_pending == 0, 5)


def test_a_job_cancelled_within_a_batch_is_answered_at_once_and_changes_nothing(live, http):
    """The other job's picture is the one of a batch that nobody disturbed."""

    def pair(cancel: bool) -> bytes:
        with live.busy():
            kept, gone = post(http, seed=1, steps=300), post(http, seed=2, steps=300)
        if cancel:
            wait_until(lambda: http.get(f"/v1/jobs/{gone['id']}").json()["progress"].get("stage") == "decoder")
            assert http.delete(f"/v1/jobs/{gone['id']}").json()["status"] == "cancelled"
            assert http.get(f"/v1/jobs/{kept['id']}").json()["status"] == "running"
        done = finished(http, kept["id"])
        return Image.open(io.BytesIO(http.get(done["result"]["data"][0]["url"]).content)).tobytes()

    sizes: list[int] = []
    before, live.engine.on_batch = live.engine.on_batch, lambda size, seconds: sizes.append(size)
    assert pair(cancel=True) == pair(cancel=False)
    live.engine.on_batch = before
    assert [size for size in sizes if size > 1] == [2, 2]


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "interpolation", "input": ["a cat", "a dog"], "steps": 1000},
        {"type": "decode", "embeddings": [[0.5] * 16], "steps": 1000, "n": 3},
        {"type": "edit", "image": IMAGE, "prompt": "a cat", "strength": 0.9, "steps": 1000},
        {"type": "edit", "image": IMAGE, "from": "a cat", "to": "a dog", "steps": 1000},
    ],
)
def test_cancelled_work_of_every_type_stops(live, http, fields):
    job = post(http, **fields)
    wait_until(lambda: http.get(f"/v1/jobs/{job['id']}").json()["progress"].get("stage") not in (None, "prior"))
    assert http.delete(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"
    wait_until(lambda: live.engine.num_pending == 0, 1.5)


def test_a_finished_job_is_removed_with_its_pictures(http):
    job = finished(http, post(http)["id"])
    url = job["result"]["data"][0]["url"]
    http.delete(f"/v1/jobs/{job['id']}")
    assert http.get(f"/v1/jobs/{job['id']}").status_code == 404
    assert http.get(url).status_code == 404


def test_jobs_of_every_type(http):
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(stream, "PNG")
    files = {"image": stream.getvalue()}
    posted = [
        http.post("/v1/jobs", files=files, data={"type": "variation", "n": "2"}),
        http.post("/v1/jobs", files=files, data={"type": "edit", "prompt": "a cat", "strength": "0.5"}),
        http.post("/v1/jobs", json={"type": "decode", "embeddings": [[0.5] * 16]}),
    ]
    done = [finished(http, answer.json()["id"]) for answer in posted]
    assert [job["status"] for job in done] == ["completed"] * 3
    assert [len(job["result"]["data"]) for job in done] == [2, 1, 1]
    assert http.post("/v1/jobs", json={"type": "film", "prompt": "a"}).json()["error"]["param"] == "type"
    assert http.post("/v1/jobs", json={"prompt": ""}).json()["error"]["param"] == "prompt"


def test_a_failed_job_says_why(http, live, monkeypatch):
    from unclip.errors import NonFiniteError
    from unclip.server import models

    def broken(*given):
        raise NonFiniteError("the pictures came out as NaN")

    monkeypatch.setattr(models.Model, "make", broken)
    job = finished(http, post(http)["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "numerical_error")


def test_a_repeated_post_is_one_job(http):
    headers = {"Idempotency-Key": "job"}
    ids = {http.post("/v1/jobs", json={"prompt": "a cat"}, headers=headers).json()["id"] for _ in range(2)}
    assert len(ids) == 1


def test_jobs_are_listed_after_a_restart(serve, tmp_path):
    with serve(folder=tmp_path, drain_s=0) as live, live.http() as http:
        done = finished(http, post(http)["id"])
        running = post(http, steps=1000)
        waiting = post(http)
        wait_until(lambda: http.get(f"/v1/jobs/{running['id']}").json()["status"] == "running")
    (tmp_path / "jobs" / "damaged.json").write_text("{")
    with serve(folder=tmp_path) as live, live.http() as http:
        listed = {job["id"]: job for job in http.get("/v1/jobs").json()["data"]}
        assert listed[done["id"]]["status"] == "completed"
        assert http.get(listed[done["id"]]["result"]["data"][0]["url"]).is_success
        for job in (running, waiting):
            assert listed[job["id"]]["error"]["code"] == "interrupted"
