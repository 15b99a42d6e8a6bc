"""The interpolation pipelines: arguments, ends of the path, and errors."""

import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import (
    InputError,
    UnCLIPImageInterpolationPipeline,
    UnCLIPImageVariationPipeline,
    UnCLIPPipeline,
    UnCLIPTextInterpolationPipeline,
)
from unclip.stages.arithmetic import slerp_path

FEW_OF_VARIATIONS = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}


@pytest.fixture
def of_texts(tiny_pipeline):
    return UnCLIPTextInterpolationPipeline.from_pipe(tiny_pipeline)


@pytest.fixture
def of_images(tiny_variation):
    return UnCLIPImageInterpolationPipeline.from_pipe(tiny_variation)


@pytest.fixture
def two():
    return [Image.new("RGB", (16, 16), "red"), Image.effect_noise((16, 16), 90)]


def test_the_community_s_arguments():
    """Names and order; a call may be written with them by position."""

    def positional(cls):
        parameters = inspect.signature(cls.__call__).parameters.values()
        return [(one.name, one.default) for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD][1:]

    empty = inspect.Parameter.empty
    assert positional(UnCLIPTextInterpolationPipeline) == [
        ("start_prompt", empty),
        ("end_prompt", empty),
        ("steps", 5),
        ("prior_num_inference_steps", 25),
        ("decoder_num_inference_steps", 25),
        ("super_res_num_inference_steps", 7),
        ("generator", None),
        ("prior_guidance_scale", 4.0),
        ("decoder_guidance_scale", 8.0),
        ("enable_sequential_cpu_offload", False),
        ("gpu_id", 0),
        ("output_type", "pil"),
        ("return_dict", True),
    ]
    assert positional(UnCLIPImageInterpolationPipeline) == [
        ("image", None),
        ("steps", 5),
        ("decoder_num_inference_steps", 25),
        ("super_res_num_inference_steps", 7),
        ("generator", None),
        ("image_embeddings", None),
        ("decoder_latents", None),
        ("super_res_latents", None),
        ("decoder_guidance_scale", 8.0),
        ("output_type", "pil"),
        ("return_dict", True),
    ]


def test_captions_begin_and_end_with_their_own_pictures(of_texts, make, few):
    made = of_texts("a cat", "a red apple", seed=3, output_type="pt", **few).images
    assert len(made) == 5
    ends = make(["a cat", "a red apple"], seed=[3, 3])
    torch.testing.assert_close(made[[0, -1]], ends, rtol=0, atol=1e-5)
    assert all(not torch.equal(one, other) for one, other in pairwise(made))
    one = of_texts("a cat", "a", 1, seed=3, output_type="pt", **few).images
    torch.testing.assert_close(one, made[:1], rtol=0, atol=1e-5)


def test_equal_captions_give_equal_pictures(of_texts, few):
    made = of_texts("a cat", "a cat", 3, seed=3, output_type="pt", **few).images
    torch.testing.assert_close(made, made[:1].expand(3, -1, -1, -1), rtol=0, atol=1e-5)


def test_pictures_begin_and_end_with_their_own_variations(of_images, vary, two):
    made = of_images(image=two, steps=np.int64(4), seed=3, output_type="pt", **FEW_OF_VARIATIONS).images
    assert len(made) == 4
    torch.testing.assert_close(made[[0, -1]], vary(two, seed=[3, 3]), rtol=0, atol=1e-5)
    assert all(not torch.equal(one, other) for one, other in pairwise(made))


def test_embeddings_and_more_than_two_of_them(of_images, vary):
    points = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    made = of_images(image_embeddings=points, steps=5, seed=range(5), output_type="pt", **FEW_OF_VARIATIONS).images
    path = slerp_path(points, [0, 0.5, 1, 1.5, 2])
    assert torch.equal(made, vary(image_embeddings=path, seed=range(5)))


def test_a_generator_is_used_in_the_order_of_the_reference(of_images, of_texts, vary, two, few):
    def generator():
        return torch.Generator().manual_seed(7)

    made = of_images(two, 3, generator=generator(), output_type="pt", **FEW_OF_VARIATIONS).images
    embeddings = of_images.embed_images(two)
    assert torch.equal(made, vary(image_embeddings=slerp_path(embeddings, [0, 0.5, 1]), generator=generator()))
    assert of_texts("a", "a cat", 2, generator=generator(), output_type="pt", **few).images.isfinite().all()


def test_forms_of_output(of_images, of_texts, two, few):
    assert len(of_images(two, 2, **FEW_OF_VARIATIONS).images) == 2
    (images,) = of_texts("a", "a cat", 2, return_dict=False, **few)
    assert [image.size for image in images] == [(16, 16)] * 2


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.0, True, "5", None])
def test_invalid_numbers_of_pictures(of_texts, of_images, two, steps):
    for call in (lambda: of_texts("a", "a cat", steps), lambda: of_images(two, steps)):
        with pytest.raises(InputError, match=r"steps is .*; it must be a whole number from 1 to 1000"):
            call()


def test_wrong_inputs(of_texts, of_images, two):
    for prompts in ((None, "a"), ("a", ["a"]), (3, "a")):
        with pytest.raises(InputError, match="prompt must be a string"):
            of_texts(*prompts)
    for wrong in (two[:1], [], None):
        with pytest.raises(InputError):
            of_images(wrong)
    with pytest.raises(InputError, match="two or more"):
        of_images(image_embeddings=torch.ones(1, 16))
    with pytest.raises(InputError, match="not both"):
        of_images(two, image_embeddings=torch.ones(2, 16))


def test_sequential_offload(own_pipeline, of_texts, few, monkeypatch):
    own, told = UnCLIPTextInterpolationPipeline.from_pipe(own_pipeline), []
    monkeypatch.setattr(
        UnCLIPTextInterpolationPipeline, "enable_sequential_cpu_offload", lambda self, gpu_id: told.append(gpu_id)
    )
    own("a", "a cat", 2, seed=1, enable_sequential_cpu_offload=True, gpu_id=3, **few)
    own("a", "a cat", 2, seed=1, **few)
    assert told == [3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(own_pipeline, few, dtype):
    own = UnCLIPTextInterpolationPipeline.from_pipe(own_pipeline.to(dtype))
    made = own("a cat", "a red apple", 3, seed=3, output_type="pt", **few).images
    tolerance = 0.1 if dtype is torch.bfloat16 else 1e-5
    alone = own_pipeline("a cat", seed=3, output_type="pt", **few).images
    torch.testing.assert_close(made[:1], alone, rtol=0, atol=tolerance)


def test_loading(tiny_pipeline, tiny_variation, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "text")
    tiny_variation.save_pretrained(tmp_path / "variation")
    texts = UnCLIPTextInterpolationPipeline.from_pretrained(tmp_path / "text")  # needs no image encoder
    assert isinstance(texts, UnCLIPPipeline)
    images = UnCLIPImageInterpolationPipeline.from_pretrained(tmp_path / "variation")
    assert isinstance(images, UnCLIPImageVariationPipeline)
