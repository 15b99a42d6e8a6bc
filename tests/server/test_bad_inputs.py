"""Unusual and wrong pictures, texts and numbers over HTTP."""

import base64
import io
import json
import struct
import zlib

import httpx2
import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # as the server does
VARIATIONS = "/v1/images/variations"
RED = Image.new("RGB", (24, 16), "red")


def saved(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **more)
    return stream.getvalue()


def frames(kind: str) -> bytes:
    """Forty frames, the first one red."""
    rest = [Image.new("RGB", RED.size, (0, 0, 6 * place)) for place in range(40)]
    return saved(RED, kind, save_all=True, append_images=rest)


def with_size(width: int, height: int) -> bytes:
    """A PNG whose header declares another size."""
    content = bytearray(saved(RED))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def with_wrong_checksum() -> bytes:
    content = bytearray(saved(Image.effect_noise((64, 64), 50)))
    content[len(content) // 2] ^= 255
    return bytes(content)


def pixels(content: str) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(content))).tobytes()


@pytest.fixture(scope="module")
def http(live):
    with live.http() as client:
        yield client


def refusal(answer: httpx2.Response) -> dict:
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    return answer.json()["error"]


def vary(http: httpx2.Client, content: bytes, **fields: str) -> httpx2.Response:
    given = {"seed": "1", "response_format": "b64_json", **fields}
    return http.post(VARIATIONS, files={"image": ("upload.png", content, "application/octet-stream")}, data=given)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_of_many_frames_counts(http, kind):
    content = frames(kind)
    assert Image.open(io.BytesIO(content)).n_frames == 41
    one, other = (
        vary(http, each).json()["data"][0]["b64_json"] for each in (content, saved(Image.open(io.BytesIO(content))))
    )
    assert pixels(one) == pixels(other)


def test_extreme_shapes(http):
    assert vary(http, saved(Image.new("RGB", (1, 1), "red"))).status_code == 200
    for size in ((1, 10_000), (10_000, 1)):
        error = refusal(vary(http, saved(Image.new("RGB", size, "red"))))
        assert (error["param"], error["code"], "10000" in error["message"]) == ("image", "invalid_image", True)


@pytest.mark.parametrize(
    "content",
    [
        saved(RED)[:-30],
        saved(RED, "JPEG")[:300],
        with_wrong_checksum(),
        with_size(0, 16),
        with_size(0, 0),
        with_size(100_000, 100_000),
        with_size(2**31 - 1, 2**31 - 1),
        b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        b"\0" * 1000,
    ],
    ids=["cut PNG", "cut JPEG", "checksum", "0x16", "0x0", "100000", "2^31", "SVG", "PDF", "zeros"],
)
def test_broken_pictures_are_refused(http, content):
    for route, fields in (("variations", {}), ("edits", {"prompt": "a cat", "strength": "0.5"})):
        answer = http.post(f"/v1/images/{route}", files={"image": content}, data=fields)
        error = refusal(answer)
        assert (error["param"], error["code"]) == ("image", "invalid_image")


def test_orientation_is_applied(http):
    """The picture is the same, whichever way it is stored."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    wanted = vary(http, saved(upright)).json()["data"][0]["b64_json"]
    ways = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for number, way in ways.items():
        exif = Image.Exif()
        exif[274] = number
        stored = upright if way is None else upright.transpose(way)
        found = vary(http, saved(stored, exif=exif)).json()["data"][0]["b64_json"]
        assert pixels(found) == pixels(wanted), number


def test_sixteen_bits_are_scaled(http):
    """A 16-bit grey is the 8-bit grey of the same share, not white."""
    eight = Image.new("L", (16, 16), 100)
    sixteen = Image.fromarray(np.full((16, 16), 100 * 257, dtype=np.uint16))
    first, second = (pixels(vary(http, saved(each)).json()["data"][0]["b64_json"]) for each in (eight, sixteen))
    assert first == second


def test_transparent_palettes(http):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(0, (0, 0, 8, 16))
    content = saved(image, transparency=0)
    assert vary(http, content).status_code == 200
    fields = {"prompt": "a cat", "response_format": "b64_json"}
    answer = http.post("/v1/images/edits", files={"image": content}, data=fields)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("prompt", [None, "", " \n\t", 5, ["a", "b"], {"a": 1}, "x" * 2**20])
def test_prompts_that_are_refused(http, prompt):
    error = refusal(http.post("/v1/images/generations", json={"prompt": prompt}))
    assert error["param"] == "prompt"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("steps", ["0", "-1", "1001", "1.5", "nan", "x", "1e400"]),
        ("guidance", ["nan", "inf", "-inf", "1e9", "-1", "x"]),
        ("n", ["0", "-1", "10000", "1.5"]),
        ("seed", ["-1", str(2**64), "1.5", "nan"]),
        ("super_res_steps", ["0", "1001"]),
        ("output_compression", ["-1", "101"]),
        ("partial_images", ["-1", "4"]),
        ("preset", ["fast"]),
        ("noise_level", ["0", "1"]),
    ],
)
def test_numbers_that_are_refused(http, field, values):
    for value in values:
        error = refusal(vary(http, saved(RED), **{field: value}))
        assert error["param"] == field, value
        if field != "noise_level":
            body = json.dumps({"prompt": "a cat"})[:-1] + f', "{field}": "{value}"}}'
            answer = http.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
            assert refusal(answer)["param"] == field


@pytest.mark.parametrize("fields", [{"guidance": "0.5"}, {"steps": "1"}, {"seed": str(2**64 - 1)}, {"n": "10"}])
def test_numbers_at_the_limits_are_accepted(http, fields):
    assert vary(http, saved(RED), **fields).status_code == 200


def test_embeddings_that_overflow_are_an_error_and_not_a_black_picture(http):
    answer = http.post("/v1/images/decode", json={"embeddings": [[3e38] * 16]})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (500, "server_error", "numerical_error")
    assert answer.headers["x-should-retry"] == "false"
