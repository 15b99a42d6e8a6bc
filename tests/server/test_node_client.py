"""OpenAI's Node client, with only its base URL changed."""

import base64
import io
import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


def png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def opened(item: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))))


@pytest.fixture(scope="module")
def found(live, serve, npm: Path) -> dict[str, Any]:
    """What the client got."""
    mask = Image.new("RGBA", (16, 16), "black")
    mask.paste((0, 0, 0, 0), (0, 0, 16, 8))
    holed = Image.new("RGBA", (16, 16), "red")
    holed.paste((0, 0, 0, 0), (0, 0, 8, 16))
    files = {
        "red": png(Image.new("RGB", (16, 16), "red")),
        "mask": png(mask),
        "holed": png(holed),
        "small": png(Image.new("RGBA", (8, 8))),
    }
    with serve(max_queue=1) as full:
        full.engine._seconds = 0.5  # so that Retry-After is 1
        freed = threading.Event()

        @full.app.post("/free")
        def free() -> None:
            freed.set()

        def hold() -> None:
            with full.busy():
                started.set()
                freed.wait(60)

        started, thread = threading.Event(), threading.Thread(target=hold)
        thread.start()
        started.wait(20)
        arguments = ["node", str(Path(__file__).with_name("client.mjs")), str(npm), live.url, full.url]
        done = subprocess.run(arguments, input=json.dumps(files), capture_output=True, text=True, timeout=120)
        freed.set()
        thread.join()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_generations(found):
    assert [item["seed"] for item in found["generation"]["data"]] == [5, 6]
    plain = opened(found["generation"]["data"][0])
    by_url = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["bytes"]))))
    assert plain.shape == (16, 16, 3)
    assert np.abs(plain.astype(int) - by_url).max() <= 1


@pytest.mark.parametrize("form", ["masked", "list"])
def test_edits_with_a_mask(found, form):
    result = opened(found[form]["data"][0])
    assert (result[8:] == (255, 0, 0)).all()
    assert (result[:8] != (255, 0, 0)).any()


def test_edits_without_a_mask_variations_and_embeddings(found):
    result = opened(found["own_alpha"]["data"][0])
    assert (result[:, 8:, :3] == (255, 0, 0)).all()
    assert len(found["variation"]["data"]) == 2
    assert opened(found["two"]["data"][0]).shape == (16, 16, 3)
    assert len(found["embedding"]["data"][0]["embedding"]) == 16
    assert [model["id"] for model in found["models"]] == ["tiny"]


def test_streams(found):
    kinds = [event["type"].removeprefix("image_generation.") for event in found["stream"]]
    assert kinds == ["partial_image", "partial_image", "completed"]
    assert [event["partial_image_index"] for event in found["stream"][:2]] == [0, 1]
    assert found["stream"][2]["usage"]["total_tokens"] == 0
    last = opened(found["stream"][2]).astype(int)
    assert np.abs(last - opened(found["generation"]["data"][0])).max() <= 1
    assert [event["type"] for event in found["edit_stream"]] == ["image_edit.partial_image", "image_edit.completed"]


def test_typed_errors(found):
    bad = {"name": "BadRequestError", "status": 400, "type": "invalid_request_error"}
    assert found["size"] == {**bad, "param": "size", "code": "invalid_value"}
    assert found["steps"] == {**bad, "param": "steps", "code": "invalid_value"}
    assert found["mask"] == {**bad, "param": "mask", "code": "invalid_mask"}
    assert found["many"] == {**bad, "param": "image", "code": "too_many_images"}
    assert (found["model"]["name"], found["model"]["code"]) == ("NotFoundError", "model_not_found")


def test_a_full_queue_is_retried(found):
    assert (found["full"]["name"], found["full"]["code"]) == ("RateLimitError", "queue_full")
    assert len(found["retried"]["data"]) == 1
