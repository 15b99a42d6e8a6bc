"""Wrong arguments raise InputError before any stage runs; unusual but valid ones work."""

import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import ImageError, InputError

NAN, INF = float("nan"), float("inf")
TEXT = (torch.zeros(1, 16), torch.zeros(1, 11, 16))
MASK = torch.ones(1, 11)


@pytest.fixture
def nothing_runs(tiny_pipeline, monkeypatch):
    """No stage's network may be called."""

    def run(*args, **kwargs):
        raise AssertionError("a stage ran although an argument is wrong")

    for name in ("prior", "decoder", "super_res_first", "super_res_last"):
        monkeypatch.setattr(getattr(tiny_pipeline, name), "forward", run)


def case(message, **arguments):
    # Addresses differ from one process to the next, and test names may not.
    told = {name: re.sub(r" at 0x\w+", "", repr(value)) for name, value in arguments.items()}
    shown = ", ".join(f"{name}={value:.40}" for name, value in told.items())
    return pytest.param(arguments, message, id=shown)


STEPS = [
    case(f"{stage}|step|1000", **{f"{stage}_num_inference_steps": steps})
    for stage in ("prior", "decoder", "super_res")
    for steps in (0, -1, 1001, 1.5, NAN, True, "5", None)
]
SCALES = [
    case(f"{stage}_guidance_scale", **{f"{stage}_guidance_scale": scale})
    for stage in ("prior", "decoder")
    for scale in (NAN, INF, -INF, 1e9, -0.5, "4", None, True)
]
COUNTS = [
    case("num_images_per_prompt|pictures", num_images_per_prompt=n) for n in (0, -1, 10_000, True, 1.5, "2", None)
]
SEEDS = [case("seed", seed=seed) for seed in (-1, 2**64, 1.5, True, "1", [1, 2], [], [-1], [None])]
GENERATORS = [
    case("generators for 1 images", generator=[torch.Generator(), torch.Generator()]),
    case("generators for 1 images", generator=[]),
    case("generator is", generator=3),
    case("generator is", generator=[3]),
    case("not both", generator=torch.Generator(), seed=1),
]
LATENTS = [
    case("prior_latents have shape", prior_latents=torch.zeros(1, 15)),
    case("prior_latents have shape", prior_latents=torch.zeros(2, 16)),
    case("prior_latents have shape", prior_latents=torch.zeros(1, 1, 16)),
    case("decoder_latents have shape", decoder_latents=torch.zeros(1, 3, 16, 16)),
    case("super_res_latents have shape", super_res_latents=torch.zeros(1, 3, 8, 8)),
] + [
    case(name, **{name: value})
    for name, shape in (
        ("prior_latents", (1, 16)),
        ("decoder_latents", (1, 3, 8, 8)),
        ("super_res_latents", (1, 3, 16, 16)),
    )
    for value in (
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape, dtype=torch.complex64),
        torch.full(shape, NAN),
        torch.full(shape, INF),
        torch.zeros(shape, device="meta"),
        np.zeros(shape),
        [0.0],
    )
]
EMBEDDINGS = [
    case("image_embeddings", image_embeddings=value)
    for value in (
        torch.zeros(1, 15),
        torch.zeros(16),
        torch.zeros(0, 16),
        torch.zeros(1, 1, 16),
        torch.full((1, 16), NAN),
        torch.zeros(1, 16, dtype=torch.long),
        torch.zeros(1, 16, device="meta"),
        np.zeros((1, 16)),
        "a",
    )
]
GIVEN_TEXT = [
    case("needs text_attention_mask", prompt=None, text_model_output=TEXT),
    case("needs text_attention_mask", prompt=None, text_model_output=TEXT, text_attention_mask=[[1] * 11]),
    case("needs text_model_output", text_attention_mask=MASK),
    case("not both", text_model_output=TEXT, text_attention_mask=MASK),
    case("CLIPTextModelOutput", prompt=None, text_model_output=TEXT[:1], text_attention_mask=MASK),
    case("CLIPTextModelOutput", prompt=None, text_model_output=TEXT[0], text_attention_mask=MASK),
    case("CLIPTextModelOutput", prompt=None, text_model_output="a cat", text_attention_mask=MASK),
    case("shapes", prompt=None, text_model_output=TEXT[::-1], text_attention_mask=MASK),
    case("shapes", prompt=None, text_model_output=TEXT, text_attention_mask=MASK[0]),
    case("shapes", prompt=None, text_model_output=TEXT, text_attention_mask=MASK[:, :5]),
    case("shapes", prompt=None, text_model_output=(TEXT[0].expand(2, -1), TEXT[1]), text_attention_mask=MASK),
    case("text_embeds has NaN", prompt=None, text_model_output=(TEXT[0] * NAN, TEXT[1]), text_attention_mask=MASK),
    case("last_hidden_state must", prompt=None, text_model_output=(TEXT[0], [1]), text_attention_mask=MASK),
    case("shapes", prompt=None, text_model_output=(torch.tensor(0.0), TEXT[1]), text_attention_mask=MASK),
    case("shapes", prompt=None, text_model_output=tuple(t[:0] for t in TEXT), text_attention_mask=MASK[:0]),
    case("24", prompt=None, text_model_output=(torch.zeros(1, 24), TEXT[1]), text_attention_mask=MASK),
    case("24", prompt=None, text_model_output=(TEXT[0], torch.zeros(1, 11, 24)), text_attention_mask=MASK),
    case("9", prompt=None, text_model_output=(TEXT[0], TEXT[1][:, :9]), text_attention_mask=MASK[:, :9]),
]
PROMPTS = [
    case("give a prompt", prompt=None),
    case("prompt must be", prompt=[]),
    case("prompt must be", prompt=3),
    case("prompt must be", prompt=b"a cat"),
    case("prompt must be", prompt={"a cat"}),
    case("must be a string, not NoneType", prompt=["a cat", None]),
    case("must be a string, not int", prompt=["a cat", 3]),
    case("must be a string, not list", prompt=[["a cat"]]),
    case("1,000,000 characters", prompt="a" * 1_000_000),
    case("not valid Unicode at 2", prompt="a \ud800"),
    case("1001 prompts", prompt=["a"] * 1001),
    case("must be a string, not int", negative_prompt=["a", 3]),
    case("prompt must be", negative_prompt=[]),
    case("2 captions for 1", negative_prompt=["a", "b"]),
    case("1 image_embeddings for 2 prompts", prompt=["a", "b"], image_embeddings=torch.zeros(1, 16)),
]
OTHERS = [case("output_type", output_type=form) for form in ("PIL", "latent", None, 3, [])]


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("arguments", "message"),
    STEPS + SCALES + COUNTS + SEEDS + GENERATORS + LATENTS + EMBEDDINGS + GIVEN_TEXT + PROMPTS + OTHERS,
)
def test_wrong_arguments(make, arguments, message):
    with pytest.raises(InputError, match=message):
        make(**{"prompt": "a cat"} | arguments)


VARIATION_IMAGES = [
    case("give an image", image=None),
    case("not both", image=Image.new("RGB", (8, 8)), image_embeddings=torch.zeros(1, 16)),
    *(
        case("image", image=value)
        for value in (
            [],
            "picture.png",
            3,
            [3],
            [Image.new("RGB", (8, 8)), None],
            np.zeros((8, 8, 5)),
            torch.zeros(16, 16),
            torch.zeros(1, 1, 16, 16),
            torch.zeros(1, 3, 8, 8),
            torch.zeros(0, 3, 16, 16),
            torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
            torch.full((1, 3, 16, 16), NAN),
            torch.zeros((1, 3, 16, 16), device="meta"),
        )
    ),
    case("captions", image=torch.zeros(1, 3, 16, 16), prompt=["a", "b"]),
    case("must be a string", image=torch.zeros(1, 3, 16, 16), prompt=[3]),
]
VARIATION_NUMBERS = [
    one for one in STEPS + SCALES + COUNTS + SEEDS + GENERATORS + LATENTS + OTHERS if "prior" not in str(one.id)
]


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("arguments", "message"), VARIATION_IMAGES + VARIATION_NUMBERS + EMBEDDINGS)
def test_wrong_arguments_of_variations(vary, arguments, message):
    if not arguments.keys() & {"image", "image_embeddings"}:
        arguments = arguments | {"image": torch.zeros(1, 3, 16, 16)}
    with pytest.raises(InputError, match=message):
        vary(**arguments)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (101, 1)])
def test_a_picture_of_an_impossible_shape(vary, size):
    with pytest.raises(ImageError, match="one side may be at most 100 times the other"):
        vary(Image.new("RGB", size))


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (400, 30)])
def test_a_picture_of_an_odd_shape(vary, size):
    assert vary(Image.new("RGB", size, "red"), seed=1).isfinite().all()


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 3, 16, 16)])
def test_one_picture_as_a_tensor(vary, shape):
    assert vary(torch.zeros(shape), seed=1).shape == (1, 3, 16, 16)


PROMPTS_THAT_WORK = {
    "empty": "",
    "spaces": "   \t\n ",
    "emoji with joiners": "👩‍❤️‍👩",
    "right to left": "תפוח",
    "combining": "ȩ́̂",
    "the end token": "<|endoftext|> a cat",
    "both special tokens": "<|startoftext|><|endoftext|>",
    "control characters": "a\x00\x07\x1b[31m",
    "not a character": "\ufffe\U0010ffff",
}


@pytest.mark.parametrize("name", PROMPTS_THAT_WORK)
def test_prompts_that_work(make, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what a context of 11 tokens has no room for
        assert make(PROMPTS_THAT_WORK[name], seed=1).isfinite().all()


def test_a_list_of_prompts_of_all_lengths(make):
    prompts = ["", "a cat", "a", "a cat"]
    batch = make(prompts, seed=1)
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(batch[i : i + 1], make(prompt, seed=1 + i), rtol=0, atol=1e-5)


def test_a_tuple_of_prompts(make):
    assert torch.equal(make(("a cat", "a"), seed=1), make(["a cat", "a"], seed=1))


def test_a_warning_shows_the_text_that_was_cut(make):
    with pytest.warns(UserWarning, match="the text encoder reads 9; ignored: 'red'"):
        make("a cat a cat a cat a cat a red", seed=1)


@pytest.mark.parametrize("scale", [0, 1, 1.0001, 1000])
def test_scales_at_the_limits(make, scale):
    assert make("a cat", seed=1, prior_guidance_scale=scale, decoder_guidance_scale=scale).isfinite().all()


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_seeds_at_the_limits(make, seed):
    assert make("a cat", seed=seed, num_images_per_prompt=2).isfinite().all()


def test_latents_for_a_prior_that_does_not_run(tiny_pipeline, few):
    with pytest.raises(InputError, match="prior_latents"):
        tiny_pipeline("a cat", image_embeddings=torch.zeros(1, 16), prior_latents=torch.zeros(1, 16), **few)


def test_a_negative_prompt_is_checked_without_guidance_too(tiny_pipeline, few):
    with pytest.raises(InputError):
        tiny_pipeline("a cat", negative_prompt=5, prior_guidance_scale=1, decoder_guidance_scale=1, **few)
