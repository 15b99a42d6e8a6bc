"""Limits, keys, disconnection, repeated requests, health, metrics and logs."""

import base64
import io
import json
import logging
import threading
import time
import zlib

import httpx2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unclip.errors import ConfigError, OutputError
from unclip.pipelines.session import Session
from unclip.server import jobs
from unclip.server.app import JsonLines, model_folders
from unclip.server.contract import EmbeddingRequest
from unclip.server.models import KINDS
from unclip.server.results import Results
from unclip.server.settings import make_settings

from .conftest import wait_until

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # as the server does

GENERATE = "/v1/images/generations"
B64 = {"prompt": "a cat", "response_format": "b64_json"}


def opened(item) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


@pytest.fixture(scope="module")
def http(live):
    with live.http() as client:
        yield client


def error_of(answer: httpx2.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


# ---- errors in OpenAI's shape ----


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"n": 1}', "missing_required_parameter"),
        (b'{"prompt": ["a"]}', "invalid_value"),
        (b'{"prompt": "a", "n": NaN}', "invalid_value"),
        (b'{"prompt": "a", "guidance": NaN}', "invalid_value"),
        (b'{"prompt": "a", "guidance": -Infinity}', "invalid_value"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "invalid_json"),
        (b'{"prompt": "\\ud800"}', "invalid_value"),
        (b'{"prompt": "a", "negative_prompt": "\\ud800"}', "invalid_value"),
    ],
)
def test_a_wrong_body_is_a_bad_request(http, body, code):
    answer = http.post(GENERATE, content=body, headers={"content-type": "application/json"})
    assert error_of(answer, 400)["code"] == code


@pytest.mark.parametrize("prompt", ["\0", "<|endoftext|>", "👩‍👩‍👧‍👦 e\u0301", "شجرة", "\x1b[31m"])
def test_any_text_is_a_prompt(http, prompt):
    answer = http.post(GENERATE, json={**B64, "prompt": prompt}).json()
    assert opened(answer["data"][0]).size == (16, 16)


def test_null_and_unknown_fields_are_tolerated(http):
    fields = {
        **B64,
        "n": None,
        "seed": None,
        "quality": "hd",
        "style": "vivid",
        "safety_identifier": "x",
        "nonsense": {},
    }
    assert http.post(GENERATE, json={**fields, "response_format": ["b64_json"]}).status_code == 200


def test_routes_that_do_not_exist(http):
    assert error_of(http.get("/v1/nothing"), 404)["code"] == "not_found"
    assert error_of(http.get(GENERATE), 405)["code"] == "method_not_allowed"
    assert error_of(http.get("/v1/jobs?limit=x"), 400)["param"] == "limit"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a picture",
        b"GIF89a",
        b"%PDF-1.4",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
        b"BM" + bytes(range(50)),
    ],
)
def test_broken_pictures(http, content):
    answer = http.post("/v1/images/variations", files={"image": ("a.png", content)})
    assert error_of(answer, 400)["param"] == "image"


def test_a_picture_that_declares_a_huge_size(http):
    stream = io.BytesIO()
    Image.new("1", (1, 1)).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = (40_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    answer = http.post("/v1/images/variations", files={"image": bytes(content)})
    assert "pixels" in error_of(answer, 400)["message"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode(http, mode):
    stream = io.BytesIO()
    Image.new(mode, (20, 10)).save(stream, "TIFF")
    answer = http.post("/v1/images/variations", files={"image": ("upload", stream.getvalue())}, data={"n": "1"})
    assert answer.status_code == 200, answer.text


def test_pictures_as_data_urls_and_never_as_urls(http):
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(stream, "PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    assert http.post("/v1/images/variations", json={"image": url}).status_code == 200
    assert http.post(
        "/v1/images/edits", json={"images": [{"image_url": url}], "prompt": "a", "strength": 0.5}
    ).is_success
    answer = http.post("/v1/images/variations", json={"image": "http://127.0.0.1/cat.png"})
    assert error_of(answer, 400)["code"] == "unsupported_url"
    for broken in ("data:image/png,abc", "data:image/png;base64,!!", 5):
        assert error_of(http.post("/v1/images/variations", json={"image": broken}), 400)["param"] == "image"


def test_decoding_of_embeddings(http, model_folder):
    found = http.post("/v1/embeddings", json={"input": "a cat", "space": "prior", "seed": 2}).json()
    embedding = found["data"][0]["embedding"]
    body = {"embeddings": [embedding, [0.5] * 16], "n": 2, "seed": 5, "response_format": "b64_json"}
    answer = http.post("/v1/images/decode", json=body).json()
    pipe = Session(str(model_folder), progress=False).pipeline(KINDS["decode"])
    wanted = pipe(
        image_embeddings=torch.tensor([embedding] * 2 + [[0.5] * 16] * 2), seed=[5, 6, 7, 8], **pipe.recommended
    ).images
    for item, image in zip(answer["data"], wanted, strict=True):
        assert np.array_equal(np.asarray(opened(item)), np.asarray(image))
    for wrong in ([[1.0], [1.0, 2.0]], [[1e39] * 16], [[float("nan")] * 16], [], [[0.5] * 3], "x"):
        content = json.dumps({"embeddings": wrong})
        headers = {"content-type": "application/json"}
        error_of(http.post("/v1/images/decode", content=content, headers=headers), 400)


def test_a_model_without_an_image_encoder(serve, tmp_path, tiny_components, build_pipeline):
    folder = tmp_path / "text-only"
    build_pipeline("text", tiny_components()).save_pretrained(folder)
    with serve(models=[str(folder)]) as live, live.http() as http:
        assert http.get("/v1/models").json()["data"][0] | {"can": ["generate", "inpaint"]} == {
            "id": "text-only", "object": "model", "created": 0, "owned_by": "unclip", "can": ["generate", "inpaint"]
        }  # fmt: skip
        answer = http.post("/v1/images/decode", json={"embeddings": [[0.5] * 16]})
        assert error_of(answer, 400)["code"] == "unsupported_model"


def test_an_unknown_caption_is_answered_with_a_warning(serve, tmp_path, tiny_components, build_pipeline):
    from unclip.clip.concepts import Concepts

    folder = tmp_path / "tiny"
    build_pipeline("inpaint", tiny_components()).save_pretrained(folder)
    Concepts("tiny", (("apple",), ("cat",)), torch.eye(2, 16), threshold=0.999).write(folder)
    few = {"steps": 2, "prior_steps": 2, "super_res_steps": 2}
    with serve(models=[str(folder)]) as live, live.http() as http:
        answer = http.post(GENERATE, json={**B64, "prompt": "a fox", **few}).json()
    (warning,) = answer["warnings"]
    assert "'a fox' is not close to anything tiny knows" in warning


# ---- limits ----


def test_a_large_request_is_refused(serve):
    with serve(max_upload_mb=0.01) as live, live.http() as http:
        body = {"prompt": "a cat", "user": "x" * 20_000}
        assert error_of(http.post(GENERATE, json=body), 413)["code"] == "request_too_large"

        def chunks():
            for _ in range(20):
                yield b" " * 1000

        answer = http.post(GENERATE, content=chunks(), headers={"content-type": "application/json"})
        assert error_of(answer, 413)["code"] == "request_too_large"


def test_the_deadline(serve):
    with serve(deadline_s=0.2) as live, live.http() as http, live.busy():
        answer = http.post(GENERATE, json=B64)
        assert error_of(answer, 504)["code"] == "deadline_exceeded"
        assert not live.engine._queue
        answer = http.post(GENERATE, json={**B64, "stream": True})
        assert "deadline_exceeded" in answer.text
        wait_until(lambda: not live.engine._queue)


def test_out_of_memory_is_unavailable(live, http, monkeypatch):
    from unclip.server import models

    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models.Model, "make", full)
    answer = http.post(GENERATE, json=B64)
    assert error_of(answer, 503)["code"] == "out_of_memory"
    assert answer.headers["retry-after"]


def test_an_unexpected_failure_tells_nothing(live, http, monkeypatch):
    from unclip.server import models

    def broken(*given):
        raise KeyError("/secret/path")

    with monkeypatch.context() as patch:
        patch.setattr(models.Model, "make", broken)
        error = error_of(http.post(GENERATE, json=B64), 500)
        assert (error["code"], "secret" in error["message"]) == ("internal_error", False)
    monkeypatch.setattr(live.app.state.service.requests, "generation", broken)
    answer = http.post(GENERATE, json=B64, headers={"X-Request-Id": "failing"})
    error = error_of(answer, 500)
    assert (error["code"], "secret" in error["message"]) == ("internal_error", False)
    assert answer.headers["x-request-id"] == "failing"


def test_the_rate_of_a_key(serve):
    with serve(rate_per_minute=2) as live, live.http() as http:
        assert [http.post(GENERATE, json=B64).status_code for _ in range(3)] == [200, 200, 429]
        answer = http.post(GENERATE, json=B64)
        assert error_of(answer, 429)["code"] == "rate_limit_exceeded"
        assert 0 < int(answer.headers["retry-after"]) <= 61
        assert http.get("/v1/models").is_success


def test_the_quota_of_a_key(serve):
    with serve(api_keys=["first-key", "second-key"], quota=3) as live, live.http() as http:
        first, second = ({"Authorization": f"Bearer {name}-key"} for name in ("first", "second"))
        again = {**first, "Idempotency-Key": "one"}
        for _ in range(2):  # a repeated request is not counted again
            assert http.post(GENERATE, json={**B64, "n": 2}, headers=again).status_code == 200
        answer = http.post(GENERATE, json={**B64, "n": 2}, headers=first)
        error = error_of(answer, 429)
        assert (error["type"], error["code"], "has 1 left" in error["message"]) == (*["insufficient_quota"] * 2, True)
        assert (0 < int(answer.headers["retry-after"]) <= 86_400, answer.headers["x-should-retry"]) == (True, "false")
        film = {"type": "interpolation", "input": ["a", "b"], "frames": 2}
        assert error_of(http.post("/v1/jobs", json=film, headers=first), 429)["code"] == "insufficient_quota"
        assert error_of(http.post(GENERATE, json={**B64, "n": 2, "stream": True}, headers=first), 429)
        assert http.post("/v1/embeddings", json={"input": "a"}, headers=first).is_success
        assert http.post("/v1/jobs", json={"prompt": "a cat"}, headers=first).status_code == 202
        assert http.post(GENERATE, json={**B64, "n": 3}, headers=second).is_success


# ---- clients that leave, or ask again ----


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request_alone(live, stream):
    kept = []
    with live.busy():
        with pytest.raises(httpx2.ReadTimeout):
            live.post(GENERATE, json={**B64, "stream": stream}, timeout=0.5)
        thread = threading.Thread(target=lambda: kept.append(live.post(GENERATE, json=B64)))
        thread.start()
        live.wait_for_queue(1)
        assert live.engine.num_pending == 2  # the blocker, and the one that stayed
    thread.join(timeout=20)
    assert kept[0].status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_running_work_stops_when_its_client_leaves(live, stream):
    with pytest.raises(httpx2.ReadTimeout):
        live.post(GENERATE, json={**B64, "stream": stream, "steps": 1000, "n": 4}, timeout=0.5)
    wait_until(lambda: live.engine.num_pending == 0, 1.5)


def test_a_repeated_request_gets_the_first_answer(live, http):
    headers = {"Idempotency-Key": "one"}
    first = http.post(GENERATE, json=B64, headers=headers).json()
    assert http.post(GENERATE, json=B64, headers=headers).json() == first
    assert http.post(GENERATE, json=B64, headers={"Idempotency-Key": "two"}).json() != first
    answer = http.post(GENERATE, json={**B64, "n": 2}, headers=headers)
    assert error_of(answer, 400)["code"] == "idempotency_mismatch"


def test_a_repeated_request_waits_for_the_first_one(live):
    headers = {"Idempotency-Key": "waiting"}
    with live.busy():
        with pytest.raises(httpx2.ReadTimeout):
            live.post(GENERATE, json=B64, headers=headers, timeout=0.3)
        found = []
        thread = threading.Thread(target=lambda: found.append(live.post(GENERATE, json=B64, headers=headers)))
        thread.start()
        time.sleep(0.2)
        assert len(live.engine._queue) == 1
    thread.join(timeout=20)
    assert found[0].status_code == 200


def test_a_failed_request_is_repeated(serve, monkeypatch):
    with serve(deadline_s=0.3) as live, live.http() as http:
        headers = {"Idempotency-Key": "again"}
        with live.busy():
            error_of(http.post(GENERATE, json=B64, headers=headers), 504)
        live.app.state.service.settings.deadline_s = 20
        assert http.post(GENERATE, json=B64, headers=headers).status_code == 200


# ---- keys ----


def test_keys(serve, tmp_path):
    file = tmp_path / "keys"
    file.write_text("# of the team\nsecond-key\n")
    with serve(api_keys=["first-key"], api_keys_file=file) as live, live.http() as http:
        for headers in ({}, {"Authorization": "Bearer wrong-key"}, {"Authorization": "Basic first-key"}):
            answer = http.post(GENERATE, json=B64, headers=headers)
            assert error_of(answer, 401)["code"] == "invalid_api_key"
            assert http.get("/metrics", headers=headers).status_code == 401
        for key in ("first-key", "second-key"):
            (item,) = live.client(api_key=key).images.generate(prompt="a cat").data
            assert http.get(item.url).status_code == 200  # signed: no key is needed
        assert http.get("/healthz").is_success
        first = {"Authorization": "Bearer first-key"}
        job = http.post("/v1/jobs", json={"prompt": "a cat"}, headers=first).json()
        second = {"Authorization": "Bearer second-key"}
        assert http.get("/v1/jobs", headers=second).json()["data"] == []
        assert error_of(http.delete(f"/v1/jobs/{job['id']}", headers=second), 404)["code"] == "not_found"


def test_a_public_address_needs_keys(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="keys are missing"):
        make_settings(host="0.0.0.0")
    assert make_settings(host="0.0.0.0", allow_open=True).keys == []
    assert make_settings(host="::1").keys == []
    monkeypatch.setenv("UNCLIP_SERVER_API_KEYS", "key-number-1, key-number-2")
    assert make_settings(host="0.0.0.0").keys == ["key-number-1", "key-number-2"]
    with pytest.raises(ConfigError, match="8 or more"):
        make_settings(api_keys=["short"])
    with pytest.raises(ConfigError, match="cannot be read"):
        make_settings(api_keys_file=tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="has no key"):
        make_settings(api_keys_file=tmp_path / "empty")
    with pytest.raises(ConfigError, match="port is 70000"):
        make_settings(port=70_000)


def test_pages_of_other_sites_may_not_call_unless_told(live, http, serve):
    headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in http.options(GENERATE, headers=headers).headers
    with serve(cors_origins=["https://example.org"]) as other, other.http() as client:
        answer = client.options(GENERATE, headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        assert client.post(GENERATE, json=B64, headers={"Origin": "https://example.org"}).is_success


def test_without_keys_pages_of_other_sites_cannot_use_a_local_server(live, http, serve):
    def code(client, **headers):
        answer = client.post(GENERATE, content=json.dumps(B64), headers={"content-type": "text/plain", **headers})
        return answer.json().get("error", {}).get("code")

    assert code(http, origin="https://example.org") == "wrong_origin"
    assert code(http, origin="null") == "wrong_origin"
    assert code(http, host="rebound.example.org") == "wrong_host"
    assert code(http, host="") == "wrong_host"
    assert code(http, origin=live.url) is None
    assert code(http, host="localhost:1234") is None
    given = {"allow_open": True, "host": "0.0.0.0", "public_url": "https://pictures.example.org/"}
    with serve(**given) as other, other.http() as client:
        assert code(client, origin="https://pictures.example.org") is None
        assert code(client, host="pictures.example.org") is None


def test_results_are_kept_under_a_quota_and_a_time(tmp_path):
    results = Results(tmp_path, keep_s=1000, quota_bytes=25, url_s=100)
    names = []
    for _ in range(3):
        names.append(results.put(b"0123456789", "png"))
        time.sleep(0.02)
    assert [results.path(name) is not None for name in names] == [False, True, True]
    assert results.path("../secret") is None
    again = Results(tmp_path, keep_s=1000, quota_bytes=25, url_s=100)
    query = dict(part.split("=") for part in results.url(names[1]).partition("?")[2].split("&"))
    assert again.is_signed(names[1], **query)
    assert not again.is_signed(names[2], **query)
    assert not Results(tmp_path, keep_s=1000, quota_bytes=25, url_s=-1).is_signed(
        names[1], **dict(part.split("=") for part in Results(tmp_path, keep_s=1000, quota_bytes=25, url_s=-1)
        .url(names[1]).partition("?")[2].split("&"))
    )  # fmt: skip
    assert Results(tmp_path, keep_s=0, quota_bytes=25, url_s=1).path(names[2]) is None
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Results(tmp_path / "file", keep_s=1, quota_bytes=1, url_s=1)


# ---- health, metrics, logs ----


def test_health_metrics_and_the_id_of_a_request(live, http):
    assert http.get("/healthz").json()["status"] == "ok"
    assert http.get("/readyz").json() == {"status": "ready"}
    http.post(GENERATE, json=B64)
    text = http.get("/metrics").text
    assert 'unclip_requests_total{method="POST",route="/v1/images/generations",status="200"}' in text
    assert "unclip_queue_pictures 0.0" in text
    assert float(text.partition("\nunclip_pictures_total ")[2].split()[0]) >= 1
    assert http.get("/healthz", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert http.get("/healthz", headers={"X-Request-Id": "a b"}).headers["x-request-id"] != "a b"
    assert "unclip" in http.get("/").text


def test_health_answers_while_the_worker_is_busy(live, http):
    with live.busy():
        start = time.monotonic()
        assert http.get("/healthz").is_success
        assert time.monotonic() - start < 1


def test_not_ready_until_the_model_is_loaded(serve, tmp_path, model_folder):
    import shutil

    folder = shutil.copytree(model_folder, tmp_path / "broken")
    (folder / "decoder" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with serve(models=[str(folder)]) as live, live.http() as http:
        answer = http.get("/readyz")
        assert answer.status_code == 503
        assert "safetensors" in answer.json()["reason"]


def test_logs_are_structured_and_hold_no_prompt(live, http, caplog):
    with caplog.at_level(logging.INFO, logger="unclip.server"):
        http.post(GENERATE, json={**B64, "prompt": "a secret cat"}, headers={"X-Request-Id": "logged"})
        wait_until(lambda: any(getattr(record, "facts", {}).get("request_id") == "logged" for record in caplog.records))
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    (line,) = [line for line in lines if line.get("request_id") == "logged"]
    assert (line["method"], line["path"], line["status"]) == ("POST", GENERATE, 200)
    assert "secret" not in json.dumps(lines)


def test_models_by_name(serve, model_folder):
    with serve(models=[f"one={model_folder}", f"two={model_folder}"]) as live, live.http() as http:
        assert [each["id"] for each in http.get("/v1/models").json()["data"]] == ["one", "two"]
        answers = [http.post(GENERATE, json={**B64, "seed": 1, "model": name}).json() for name in ("one", "two")]
        assert [answer["model"] for answer in answers] == ["one", "two"]
        assert opened(answers[0]["data"][0]).tobytes() == opened(answers[1]["data"][0]).tobytes()
    with pytest.raises(ConfigError, match="two models"):
        model_folders([str(model_folder), str(model_folder)])


def test_the_description_of_the_routes(http):
    paths = http.get("/openapi.json").json()["paths"]
    for path in ("images/generations", "images/edits", "images/variations", "images/decode", "embeddings"):
        assert paths[f"/v1/{path}"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    kinds = paths["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert [kind["properties"]["type"]["const"] for kind in kinds] == list(jobs.KINDS)
    form = paths["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert {"image", "mask", "from", "to", "seed", "steps", "guidance", "sampler"} <= form.keys()
    for route in (route for each in paths.values() for route in each.values()):
        assert {"400", "401", "404", "413", "429", "500", "503", "504"} <= route["responses"].keys()
        assert "422" not in route["responses"]


# ---- any fields ----

ODD = [None, True, 0, -1, 1, 2, 1.5, 1e30, float("nan"), 10**30, "", "x", "1", "auto", "a\0", [], [1], ["x"], {}, {"a": 1}]  # fmt: skip  # noqa: E501
FIELDS = ["image", "mask", "from", "to", "type"]
FIELDS += sorted({name for kind in (*jobs.KINDS.values(), EmbeddingRequest) for name in kind.model_fields})
ROUTES = ["images/generations", "images/edits", "images/variations", "images/decode", "embeddings", "jobs"]


@given(
    path=st.sampled_from(ROUTES),
    fields=st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(ODD), max_size=4),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_field_makes_the_server_fail(http, path, fields):
    known = {"prompt": "a cat", "input": "a cat", "embeddings": [[0.5] * 16]}
    content = json.dumps({**known, **fields})
    answer = http.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 202, 400, 404), (answer.text, fields)
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]
