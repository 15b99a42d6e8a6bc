"""Captions and pictures on their way into CLIP's space."""

import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import ImageError, InputError
from unclip.clip.encoders import MAX_PROMPT_CHARACTERS, ImageEncoder, TextEncoder, check_prompt

LONG = "a red apple a red apple a red apple"


@pytest.fixture
def encoder(tiny_pipeline):
    return TextEncoder(tiny_pipeline.text_encoder, tiny_pipeline.tokenizer)


@pytest.fixture
def encode(encoder):
    def run(*prompts):
        with torch.no_grad():
            return encoder.encode(list(prompts))

    return run


@pytest.fixture
def pictures(tiny_variation):
    return ImageEncoder(tiny_variation.image_encoder, tiny_variation.feature_extractor)


# ---- captions ----


def test_shapes_and_mask(encode):
    value = encode("a cat", "")
    assert value.embeds.shape == (2, 16)
    assert value.hidden_states.shape == (2, 11, 16)
    assert value.mask.dtype == torch.bool
    assert value.mask[1].tolist() == [True, True] + [False] * 9  # start and end
    assert value.mask[0].sum() == 4


def test_it_is_what_clip_computes(encode, encoder):
    tokens = encoder.tokenizer(["a cat"], padding="max_length", max_length=11, return_tensors="pt")
    with torch.no_grad():
        output = encoder.text_encoder(tokens["input_ids"])
    value = encode("a cat")
    assert torch.equal(value.embeds, output.text_embeds)
    assert torch.equal(value.hidden_states, output.last_hidden_state)
    assert torch.equal(value.mask, tokens["attention_mask"].bool())


def test_equal_captions_are_encoded_once(encode, encoder, monkeypatch):
    rows = []
    original = encoder.text_encoder.forward
    monkeypatch.setattr(encoder.text_encoder, "forward", lambda ids: rows.append(len(ids)) or original(ids))
    value = encode("a cat", "a", "a cat", "a cat")
    assert rows == [2]
    assert torch.equal(value.embeds[0], value.embeds[2])
    assert not torch.equal(value.embeds[0], value.embeds[1])
    assert torch.equal(value.embeds[1:2], encode("a cat", "a").embeds[1:])


def test_a_caption_does_not_depend_on_its_batch(encode):
    torch.testing.assert_close(encode("a cat", "a red apple").embeds[:1], encode("a cat").embeds, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt", ["", " ", "\n\t", "a cat", "a cat a cat a cat a cat a"])
def test_what_fits_gives_no_warning(encode, prompt):
    encode(prompt)  # warnings are errors here


def test_a_full_context_that_fits_exactly(encode):
    assert encode("a cat a cat a cat a cat a").mask.all()


@pytest.mark.parametrize("cut", ["red", "red apple cat"])
def test_what_does_not_fit_is_named(encode, cut):
    fitting = "a cat a cat a cat a cat a"
    with pytest.warns(UserWarning, match=f"ignored: '{cut}'"):
        value = encode(f"{fitting} {cut}")
    torch.testing.assert_close(value.embeds, encode(fitting).embeds)


def test_a_long_rest_is_shortened_in_the_warning(encode):
    with pytest.warns(UserWarning, match="ignored: '.{200}…'$"):
        encode("a cat " * 500)


def test_each_caption_that_is_cut_is_named(encode):
    with pytest.warns(UserWarning, match="ignored") as seen:
        encode(LONG, "a cat", LONG + " cat", LONG)
    assert len(seen) == 2


EXPANDING = {
    "one character, many bytes": "\U0001d160" * 2,
    "joined emoji": "👩‍❤️‍👩",
    "combining": "e" + "\u0301\u0327" * 30,
}


@pytest.mark.parametrize("name", EXPANDING)
def test_few_characters_of_many_tokens_are_noticed(encode, name):
    with pytest.warns(UserWarning, match="ignored"):
        encode(EXPANDING[name])


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize("prompt", ["<|endoftext|>", "a <|endoftext|> cat", "<|startoftext|>", "<|ENDOFTEXT|> a"])
def test_a_special_token_that_a_person_wrote_is_text(encode, encoder, monkeypatch, prompt):
    """The encoder reads one start and one end, the end after all that there is room for."""
    seen = []
    original = encoder.text_encoder.forward
    monkeypatch.setattr(encoder.text_encoder, "forward", lambda ids: seen.append(ids[0].tolist()) or original(ids))
    mask = encode(prompt).mask[0]
    (ids,) = seen
    read = ids[: int(mask.sum())]
    start, end = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    assert read[0] == start
    assert read[-1] == end
    assert len(read) > 3
    assert not {start, end} & set(read[1:-1])


@pytest.mark.parametrize("prompt", ["\x00", "\x1b[31m", "תפוח", "\u202eabc", "ȩ́̂", "\ufffe", "🧑🏽‍🚀"])
def test_odd_texts_work(encode, prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert encode(prompt).embeds.isfinite().all()


@pytest.mark.parametrize(
    "prompt",
    [None, 3, b"a cat", ["a cat"], float("nan"), "a \udc80", "a" * (MAX_PROMPT_CHARACTERS + 1)],
    ids=lambda prompt: repr(prompt)[:20],
)
def test_what_is_no_caption(encode, prompt):
    with pytest.raises(InputError):
        check_prompt(prompt)
    with pytest.raises(InputError):
        encode("a cat", prompt)


def test_the_longest_caption(encode):
    with pytest.warns(UserWarning, match="ignored"):
        encode("a" * MAX_PROMPT_CHARACTERS)


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_only_one_thread_at_a_time_is_in_a_tokenizer(tiny_pipeline):
    """transformers' tokenizers keep padding and truncation as state, so two threads would change each other's."""
    inside, most = [], []

    class Slow:
        model_max_length = 11

        def __call__(self, *args, **options):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            try:
                return tiny_pipeline.tokenizer(*args, **options)
            finally:
                inside.pop()

        def decode(self, ids):
            return tiny_pipeline.tokenizer.decode(ids)

    encoder = TextEncoder(tiny_pipeline.text_encoder, Slow())
    threads = [threading.Thread(target=encoder.encode, args=([prompt],)) for prompt in ("a", LONG, "a cat")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 4
    assert max(most) == 1


# ---- pictures ----


def picture(seed=0, size=(20, 30), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@torch.no_grad()
def test_a_picture_a_list_and_a_tensor(pictures):
    one = pictures.encode(picture())
    assert one.shape == (1, 16)
    both = pictures.encode([picture(), picture(1)])
    torch.testing.assert_close(both[:1], one, rtol=0, atol=1e-5)
    pixels = pictures.feature_extractor(images=[picture()], return_tensors="pt")["pixel_values"]
    assert torch.equal(pictures.encode(pixels), one)
    assert torch.equal(pictures.encode(pixels[0]), one)
    assert torch.equal(pictures.encode((picture(),)), one)


def test_preprocessing_that_does_not_make_squares(pictures, monkeypatch):
    monkeypatch.setattr(pictures.feature_extractor, "size", {"shortest_edge": 16})
    pictures.check()
    with torch.no_grad():
        assert pictures.encode(picture(size=(20, 20))).shape == (1, 16)
    with pytest.raises(InputError, match=r"must be \[batch, 3, 16, 16\]; this one is \(1, 3, 24, 16\)"):
        pictures.encode(picture(size=(20, 30)))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I", "F", "YCbCr", "HSV", "LAB"])
@torch.no_grad()
def test_pictures_of_every_mode(pictures, mode):
    source = picture().convert("L") if mode in ("LA", "I", "F") else picture()
    assert pictures.encode(source.convert(mode)).isfinite().all()


@torch.no_grad()
def test_a_picture_that_is_not_decoded_yet(pictures, tmp_path):
    picture().save(tmp_path / "whole.png")
    with Image.open(tmp_path / "whole.png") as lazy:
        assert torch.equal(pictures.encode(lazy), pictures.encode(picture()))
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "half.png") as lazy, pytest.raises(ImageError, match="cannot be decoded"):
        pictures.encode(lazy)


def test_arrays(pictures):
    wanted = pictures.encode([picture()])
    levels = np.asarray(picture())
    for given in (levels, [levels], levels[None], (levels / 255).astype(np.float32), levels / 255):
        assert torch.equal(pictures.encode(given), wanted)
    assert pictures.encode([levels, picture()]).shape == (2, 16)
    with pytest.raises(ImageError, match="floating point must be from 0 to 1"):
        pictures.encode(levels.astype(np.float32))


@pytest.mark.parametrize(
    "images", [None, 3, "a.png", [], [None], [picture(), "a.png"], np.zeros((4, 4, 5)), [[picture()]]]
)
def test_what_is_no_picture(pictures, images):
    with pytest.raises(InputError):
        pictures.encode(images)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(3, 16),
        torch.zeros(0, 3, 16, 16),
        torch.zeros(1, 4, 16, 16),
        torch.zeros(1, 3, 16, 8),
        torch.zeros(1, 3, 32, 32),
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        torch.full((1, 3, 16, 16), float("inf")),
        torch.zeros(1, 3, 16, 16, device="meta"),
    ],
    ids=lambda pixels: f"{tuple(pixels.shape)} {pixels.dtype} {pixels.device}",
)
def test_what_is_no_preprocessed_picture(pictures, pixels):
    with pytest.raises(InputError, match="image tensor must"):
        pictures.encode(pixels)
