"""OpenAI's Python client, with only its base URL changed."""

import base64
import io
import threading
import time
import warnings

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from unclip.pipelines.session import Session
from unclip.server.models import KINDS, PRIOR_SETTINGS
from unclip.stages.arithmetic import blend

pytestmark = pytest.mark.filterwarnings("ignore:the prompt has:UserWarning")


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def opened(item) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


@pytest.fixture(scope="module")
def client(live):
    return live.client()


@pytest.fixture(scope="module")
def red() -> bytes:
    return png(Image.new("RGB", (16, 16), "red"))


@pytest.fixture(scope="module")
def holed() -> bytes:
    """A red picture whose left half is transparent."""
    image = Image.new("RGBA", (16, 16), "red")
    image.paste((0, 0, 0, 0), (0, 0, 8, 16))
    return png(image)


def test_generations_as_base64(client, model_folder):
    answer = client.images.generate(
        model="dall-e-2", prompt="a cat", n=2, size="256x256", response_format="b64_json", extra_body={"seed": 7}
    )
    assert abs(answer.created - time.time()) < 60
    assert [item.seed for item in answer.data] == [7, 8]
    assert (answer.size, answer.output_format) == ("16x16", "png")
    pipe = Session(str(model_folder), progress=False).pipeline(KINDS["generate"])
    settings = {name: value for name, value in pipe.recommended.items()}
    wanted = pipe(["a cat", "a cat"], seed=[7, 8], **settings).images
    for item, image in zip(answer.data, wanted, strict=True):
        assert np.array_equal(np.asarray(opened(item)), np.asarray(image))
        assert opened(item).text["prompt"] == "a cat"


def test_generations_as_url(client, live):
    (item,) = client.images.generate(prompt="a cat").data
    assert item.url.startswith(live.url)
    with live.http() as http:
        answer = http.get(item.url)
        assert answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).size == (16, 16)
        assert http.get(item.url.replace("signature=", "signature=0")).status_code == 403
        assert http.get(item.url.replace("expires=", "expires=9")).status_code == 403


@pytest.mark.parametrize(("size", "made"), [("1024x1024", (16, 16)), ("32x16", (24, 12)), ("auto", (16, 16))])
def test_a_size_is_mapped_to_what_the_model_makes(client, size, made):
    answer = client.images.generate(prompt="a cat", size=size, response_format="b64_json")
    assert opened(answer.data[0]).size == made
    assert answer.size == f"{made[0]}x{made[1]}"


def test_a_picture_is_enlarged_on_request(client):
    answer = client.images.generate(
        prompt="a cat", size="256x256", response_format="b64_json", extra_body={"enlarge": True}
    )
    assert opened(answer.data[0]).size == (256, 256)
    assert answer.size == "256x256"


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_output_formats(client, kind):
    answer = client.images.generate(prompt="a cat", response_format="b64_json", output_format=kind)
    assert opened(answer.data[0]).format == kind.upper()
    assert answer.output_format == kind


def test_own_fields_change_the_picture(client):
    def made(**fields):
        answer = client.images.generate(prompt="a cat", response_format="b64_json", extra_body={"seed": 1, **fields})
        return opened(answer.data[0]).tobytes()

    plain = made()
    assert made() == made(preset="exact") == plain
    for fields in (
        {"seed": 2}, {"steps": 2}, {"guidance": 1.5}, {"sampler": "ddim"}, {"negative_prompt": "a dog"},
        {"candidates": 3}, {"prior_steps": 3}, {"super_res_steps": 3}, {"prior_guidance": 9},
    ):  # fmt: skip
        assert made(**fields) != plain, fields


def test_variations_decode_the_picture_s_own_embedding(client, model_folder, red):
    with pytest.warns(DeprecationWarning, match="create_variation|deprecated|retired"):
        answer = client.images.create_variation(image=red, n=2, response_format="b64_json", extra_body={"seed": 3})
    pipe = Session(str(model_folder), progress=False).pipeline(KINDS["decode"])
    settings = pipe.recommended
    wanted = pipe([Image.new("RGB", (16, 16), "red")] * 2, seed=[3, 4], **settings).images
    for item, image in zip(answer.data, wanted, strict=True):
        assert np.abs(np.asarray(opened(item), int) - np.asarray(image, int)).max() <= 1


def test_edits_by_a_mask(client, red):
    mask = Image.new("RGBA", (16, 16), "black")
    mask.paste((0, 0, 0, 0), (0, 0, 16, 8))
    answer = client.images.edit(image=red, mask=png(mask), prompt="a cat", response_format="b64_json")
    result = np.asarray(opened(answer.data[0]))
    assert (result[8:] == (255, 0, 0)).all()
    assert (result[:8] != (255, 0, 0)).any()


@pytest.mark.parametrize("form", ["one file", "a list"])
def test_edits_by_the_picture_s_own_transparency(client, holed, form):
    answer = client.images.edit(
        image=holed if form == "one file" else [holed], prompt="a cat", response_format="b64_json"
    )
    result = np.asarray(opened(answer.data[0]))
    assert (result[:, 8:, :3] == (255, 0, 0)).all()
    assert (result[:, :8, :3] != (255, 0, 0)).any()


@torch.no_grad()
def test_several_pictures_are_combined_with_the_prompt(client, model_folder, red):
    blue = png(Image.new("RGB", (16, 16), "blue"))
    options = {"prompt": "a cat", "n": 2, "response_format": "b64_json", "extra_body": {"seed": 3}}
    answer = client.images.edit(image=[red, blue], **options)
    session = Session(str(model_folder), progress=False)
    text, pipe = session.pipeline(KINDS["generate"]), session.pipeline(KINDS["decode"])
    shown = pipe.embed_images([Image.new("RGB", (16, 16), color) for color in ("red", "blue")])
    of_prior = {PRIOR_SETTINGS[name]: value for name, value in text.recommended.items() if name in PRIOR_SETTINGS}
    told = text.embed_captions(["a cat"] * 2, seed=[3, 4], **of_prior)
    mixed = torch.stack([blend(torch.cat([shown, row[None]]), [1, 1, 1]) for row in told])
    wanted = pipe(image_embeddings=mixed, seed=[3, 4], **pipe.recommended).images
    for item, image in zip(answer.data, wanted, strict=True):
        assert np.abs(np.asarray(opened(item), int) - np.asarray(image, int)).max() <= 1
    streamed = list(client.images.edit(image=[red, blue], stream=True, partial_images=1, **options))
    assert [event.type for event in streamed].count("image_edit.completed") == 2


def test_further_pictures_guide_the_edit_of_the_first(client, red, holed):
    options = {"prompt": "a cat", "response_format": "b64_json", "extra_body": {"seed": 3}}
    results = [
        np.asarray(opened(client.images.edit(image=images, **options).data[0]))
        for images in ([holed, red], [holed, png(Image.new("RGB", (16, 16), "blue"))])
    ]
    assert all((result[:, 8:, :3] == (255, 0, 0)).all() for result in results)
    assert (results[0] != results[1]).any()


def test_edits_by_strength_and_by_a_caption_difference(client, red):
    redrawn = client.images.edit(image=red, prompt="a cat", response_format="b64_json", extra_body={"strength": 0.5})
    assert opened(redrawn.data[0]).size == (16, 16)
    changed = client.images.edit(
        image=red, prompt="", n=2, response_format="b64_json",
        extra_body={"from": "a cat", "to": "a red apple", "strength": 0.9, "seed": 1},
    )  # fmt: skip
    assert len({opened(item).tobytes() for item in changed.data}) == 2
    assert opened(changed.data[0]).text["to"] == "a red apple"


def test_streamed_generations(client):
    plain = client.images.generate(prompt="a cat", response_format="b64_json", extra_body={"seed": 5})
    events = list(client.images.generate(prompt="a cat", stream=True, partial_images=2, extra_body={"seed": 5}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert events[0].size == "8x8"
    assert len({event.b64_json for event in events}) == 3
    assert opened(events[2]).tobytes() == opened(plain.data[0]).tobytes()
    assert events[2].usage.total_tokens == 0


def test_streamed_edits(client, holed):
    events = list(client.images.edit(image=holed, prompt="a cat", stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert (np.asarray(opened(events[1]))[:, 8:, :3] == (255, 0, 0)).all()


def test_an_error_after_the_stream_started(client, live, monkeypatch):
    from unclip.errors import NonFiniteError
    from unclip.server import models

    def broken(*given):
        raise NonFiniteError("the pictures came out as NaN")

    monkeypatch.setattr(models.Model, "make", broken)
    with pytest.raises(openai.APIError, match="NaN") as caught:
        list(client.images.generate(prompt="a cat", stream=True))
    assert caught.value.code == "numerical_error"
    with pytest.raises(openai.InternalServerError) as caught:
        client.images.generate(prompt="a cat")
    assert caught.value.code == "numerical_error"
    assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": " \n"}, "prompt", "invalid_value"),
        ({"prompt": "x" * 40_000}, "prompt", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 10_000}, "n", "invalid_value"),
        ({"size": "huge"}, "size", "invalid_value"),
        ({"size": "99999x1"}, "size", "invalid_value"),
        ({"response_format": "png"}, "response_format", "invalid_value"),
        ({"quality": "best"}, "quality", "invalid_value"),
        ({"partial_images": 4}, "partial_images", "invalid_value"),
        ({"extra_body": {"seed": -1}}, "seed", "invalid_value"),
        ({"extra_body": {"seed": 2**64}}, "seed", "invalid_value"),
        ({"extra_body": {"steps": 0}}, "steps", "invalid_value"),
        ({"extra_body": {"steps": 1001}}, "steps", "invalid_value"),
        ({"extra_body": {"steps": 1.5}}, "steps", "invalid_value"),
        ({"extra_body": {"guidance": 1e9}}, "guidance", "invalid_value"),
        ({"extra_body": {"guidance": "nan"}}, "guidance", "invalid_value"),
        ({"extra_body": {"guidance": "inf"}}, "guidance", "invalid_value"),
        ({"extra_body": {"candidates": 0}}, "candidates", "invalid_value"),
        ({"extra_body": {"sampler": "euler"}}, "sampler", "invalid_value"),
        ({"extra_body": {"preset": "fast"}}, "preset", "invalid_value"),
        ({"extra_body": {"noise_level": 0}}, "noise_level", "invalid_value"),
    ],
)
def test_wrong_values_name_their_field(client, fields, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "a cat", **fields})
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")
    assert param in caught.value.message


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a cat", model="sdxl")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_what_is_wrong_with_pictures(client, red):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=b"<svg xmlns='http://www.w3.org/2000/svg'/>", prompt="a cat")
    assert (caught.value.param, caught.value.code) == ("image", "invalid_image")
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=red, mask=png(Image.new("RGBA", (8, 8))), prompt="a cat")
    assert caught.value.param == "mask"
    with pytest.raises(openai.BadRequestError, match="nothing marks") as caught:
        client.images.edit(image=red, prompt="a cat")
    assert caught.value.param == "mask"
    with pytest.raises(openai.BadRequestError, match="edits one picture") as caught:
        client.images.edit(image=[red, red], prompt="", extra_body={"from": "a cat", "to": "a dog"})
    assert caught.value.param == "image"
    with pytest.raises(openai.BadRequestError, match="at most 16") as caught:
        client.images.edit(image=[red] * 17, prompt="a cat")
    assert (caught.value.param, caught.value.code) == ("image", "too_many_images")


def test_a_full_queue_is_retried(serve):
    made = []
    with serve(max_queue=1) as live:
        live.engine._seconds = 0.5
        patient = live.client(max_retries=3)
        thread = threading.Thread(target=lambda: made.append(patient.images.generate(prompt="a cat")))
        with live.busy():
            with pytest.raises(openai.RateLimitError) as caught:
                live.client().images.generate(prompt="a cat")
            assert caught.value.code == "queue_full"
            assert caught.value.response.headers["retry-after"] == "1"
            thread.start()
            time.sleep(0.3)
        thread.join(timeout=20)  # the worker is free when the retry comes
    assert len(made[0].data) == 1


def test_concurrent_requests_get_their_own_pictures(live, client):
    seeds = list(range(20, 26))
    alone = {}
    for seed in seeds:
        answer = client.images.generate(prompt="a cat", response_format="b64_json", extra_body={"seed": seed})
        alone[seed] = np.asarray(opened(answer.data[0]), int)
    found = {}

    def ask(seed: int) -> None:
        answer = client.images.generate(prompt="a cat", response_format="b64_json", extra_body={"seed": seed})
        found[seed] = np.asarray(opened(answer.data[0]), int)

    sizes = []
    before, live.engine.on_batch = live.engine.on_batch, lambda size, seconds: sizes.append(size)
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in seeds]
    with live.busy():
        for thread in threads:
            thread.start()
        live.wait_for_queue(len(seeds))
    for thread in threads:
        thread.join(timeout=20)
    live.engine.on_batch = before
    assert 6 in sizes
    for seed in seeds:
        assert np.abs(found[seed] - alone[seed]).max() <= 1


def test_models_and_embeddings(client, model_folder, red):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    url = "data:image/png;base64," + base64.b64encode(red).decode()
    answer = client.embeddings.create(model="tiny", input=["a cat", url])  # the client asks for base64
    floats = client.embeddings.create(model="tiny", input=["a cat", url], encoding_format="float")
    session = Session(str(model_folder), progress=False)
    pipe = session.pipeline(KINDS["decode"])
    text = pipe.caption_encoder.encode(["a cat"]).embeds[0].tolist()
    image = pipe.embed_images(Image.new("RGB", (16, 16), "red"))[0].tolist()
    for each in (answer, floats):
        assert each.data[0].embedding == pytest.approx(text, abs=1e-5)
        assert each.data[1].embedding == pytest.approx(image, abs=1e-5)
    prior = client.embeddings.create(model="tiny", input="a cat", extra_body={"space": "prior", "seed": 4})
    with warnings.catch_warnings():
        wanted = session.pipeline(KINDS["generate"]).embed_captions(
            "a cat", seed=4, num_inference_steps=2, guidance_scale=4.0
        )
    assert prior.data[0].embedding == pytest.approx(wanted[0].tolist(), abs=1e-4)
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="tiny", input=["https://example.org/cat.png", ""])
    assert caught.value.param == "input"


def test_a_long_caption_is_answered_with_a_warning(client):
    answer = client.images.generate(prompt="a cat " * 30, response_format="b64_json")
    assert "ignored" in answer.warnings[0]
