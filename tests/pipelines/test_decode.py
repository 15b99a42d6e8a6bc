"""`pipe.decode`, and noise on the image embedding."""

import warnings

import pytest
import torch

from unclip import (
    EmbeddingPrior,
    EmbeddingPriorNetwork,
    EmbeddingScaleWarning,
    EmbeddingStatistics,
    InputError,
    UnCLIPImageVariationPipeline,
)
from unclip.pipelines.interpolation import UnCLIPTextInterpolationPipeline

STEPS = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2, "output_type": "pt"}
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def embeddings():
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def known(own_variation):
    """A pipeline with statistics."""
    rows = torch.randn(500, 16, generator=torch.Generator().manual_seed(1)) * 0.5 + torch.linspace(-2, 2, 16)
    own_variation.statistics = EmbeddingStatistics.of(rows)
    return own_variation


def test_decode_is_the_call_with_embeddings(tiny_pipeline, tiny_variation, embeddings, vary):
    expected = vary(image_embeddings=embeddings, seed=4, num_images_per_prompt=2, prompt="a cat")
    settings = {**STEPS, "seed": 4, "num_images_per_prompt": 2, "prompt": "a cat"}
    for pipe in (tiny_variation, tiny_pipeline, UnCLIPTextInterpolationPipeline.from_pipe(tiny_pipeline)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EmbeddingScaleWarning)
            torch.testing.assert_close(pipe.decode(embeddings, **settings).images, expected, rtol=0, atol=0)
            torch.testing.assert_close(pipe.decode(embeddings.numpy(), **settings).images, expected, rtol=0, atol=0)


def test_decode_refuses_other_embeddings(tiny_variation, embeddings):
    for wrong in (embeddings[:, :7], embeddings[0], embeddings[None], embeddings.long(), embeddings * float("nan")):
        with pytest.raises(InputError):
            tiny_variation.decode(wrong, **STEPS)
    with pytest.raises(TypeError, match="steps"):
        tiny_variation.decode(embeddings, steps=3)


def test_decode_warns_of_the_scale_and_rescales(known, embeddings):
    own = known.statistics.mean + 0.5 * embeddings
    unit = own / own.norm(dim=1, keepdim=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known.decode(own, **STEPS)
        known.decode(unit, **STEPS, check_scale=False)
        scaled = known.decode(unit, **STEPS, rescale="norm", seed=1).images
        direct = known.decode(unit * known.statistics.norm_mean, **STEPS, seed=1).images
    torch.testing.assert_close(scaled, direct, **CLOSE)
    with pytest.warns(EmbeddingScaleWarning, match="probably normalised; use --rescale norm"):
        known.decode(unit, **STEPS)
    known.statistics = None
    with pytest.raises(InputError, match="rescale needs the statistics"):
        known.decode(unit, rescale="norm", **STEPS)


def test_level_0_changes_nothing(known, embeddings):
    settings = {**STEPS, "image_embeddings": embeddings, "seed": 2}
    torch.testing.assert_close(known(**settings, noise_level=0).images, known(**settings).images, rtol=0, atol=0)


def test_the_noise_is_that_of_the_level(known, own_pipeline, embeddings):
    """The noise is drawn first, and the decoder is given the noised embedding alone."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(3, 16, generator=generator)
    noised = known.statistics.noised(embeddings, 400, noise)
    expected = known(image_embeddings=noised, generator=generator, **STEPS).images
    own_pipeline.statistics = known.statistics
    for pipe in (known, own_pipeline):
        made = pipe(
            image_embeddings=embeddings,
            noise_level=400,
            generator=torch.Generator().manual_seed(5),
            return_intermediates=True,
            **STEPS,
        )
        torch.testing.assert_close(made.image_embeddings, noised, **CLOSE)
        if pipe is known:
            torch.testing.assert_close(made.images, expected, **CLOSE)


def test_every_picture_has_its_own_noise_and_more_of_it_at_a_higher_level(known, embeddings):
    settings = {**STEPS, "image_embeddings": embeddings[:1], "num_images_per_prompt": 2, "return_intermediates": True}
    moved = []
    for level in (10, 100, 999):
        made = known(**settings, noise_level=level, seed=[3, 4]).image_embeddings
        assert (made[0] - made[1]).norm() > 0
        alone = known(**{**settings, "num_images_per_prompt": 1}, noise_level=level, seed=4).image_embeddings
        torch.testing.assert_close(made[1:], alone, **CLOSE)
        moved.append((made - embeddings[:1]).norm())
    assert moved == sorted(moved)


@pytest.mark.parametrize("level", [-1, 1000, 1.5, "high", True, float("nan")])
def test_wrong_levels(known, level):
    with pytest.raises(InputError, match="noise_level"):
        known(image_embeddings=torch.zeros(1, 16), noise_level=level, **STEPS)


def test_statistics_are_saved_loaded_and_shared(known, tmp_path):
    known.save_pretrained(tmp_path / "model")
    found = UnCLIPImageVariationPipeline.from_pretrained(tmp_path / "model", own_clip=True)
    torch.testing.assert_close(found.statistics.mean, known.statistics.mean)
    assert UnCLIPImageVariationPipeline.from_pipe(found).statistics is found.statistics


@pytest.mark.parametrize("kind", ["text", "variation"])
def test_without_the_file_those_of_the_prior_are_used(own_pipeline, own_variation, kind, tmp_path):
    mean = torch.linspace(-1, 1, 16)[None]
    own_pipeline.prior.clip_mean.data = mean
    own_pipeline.save_pretrained(tmp_path / "model")
    parts = {} if kind == "text" else {k: own_variation.components[k] for k in ("image_encoder", "feature_extractor")}
    cls = type(own_pipeline if kind == "text" else own_variation)
    found = cls.from_pretrained(tmp_path / "model", **parts)
    torch.testing.assert_close(found.statistics.mean, mean[0])
    assert not (tmp_path / "model" / "embedding_statistics.safetensors").exists()


def test_decode_the_sample_of_a_prior_of_dalle2_pytorch(own_pipeline):
    """Text encodings in, an embedding of norm 1 out, and the model's norm for the decoder."""
    settings = {"embedding_dim": 16, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 6}
    settings |= {"max_text_len": 11, "use_text_encodings": True, "normalized": True}
    prior = EmbeddingPrior(EmbeddingPriorNetwork(**settings).initialize_for_training())
    text = own_pipeline.caption_encoder.encode(["a cat"])
    drawn = prior.sample(text.embeds, encodings=text.hidden_states, mask=text.mask, seed=0, num_inference_steps=2)
    own_pipeline.statistics = EmbeddingStatistics(torch.zeros(16), torch.ones(16), 4.0, 0.5)
    made = own_pipeline.decode(drawn, rescale="norm", check_scale=False, return_intermediates=True, **STEPS)
    torch.testing.assert_close(made.image_embeddings.norm(dim=1), torch.tensor([4.0]))
    with pytest.raises(InputError, match=r"must be \[batch, 16\]"):
        own_pipeline.decode(torch.randn(1, 4, 16))
