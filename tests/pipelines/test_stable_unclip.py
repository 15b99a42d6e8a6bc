"""Stable unCLIP's pipelines: what a call refuses, its noise, and embeddings of any prior of the same CLIP."""

import sys

import pytest
import torch
from PIL import Image

from unclip import (
    ConfigError,
    EmbeddingStatistics,
    InputError,
    MissingDependencyError,
    PriorTransformer,
    StableUnCLIPImageNormalizer,
    StableUnCLIPImg2ImgPipeline,
    StableUnCLIPPipeline,
    UnCLIPPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
)
from unclip.clip.statistics import noised
from unclip.stages.stable_diffusion import noised_with_level

from ..conftest import randomize
from ..stable_parts import DIM, VAE, reference, stable_parts

import diffusers  # isort: skip

FEW = {"num_inference_steps": 2, "output_type": "pt"}
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def parts():
    return stable_parts()


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    base = tmp_path_factory.mktemp("stable")
    for kind in ("text", "variation"):
        reference(kind, parts).save_pretrained(base / kind)
    return base


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def text(folder):
    return quiet(StableUnCLIPPipeline.from_pretrained(folder / "text", own_clip=True))


@pytest.fixture
def variation(folder):
    return quiet(StableUnCLIPImg2ImgPipeline.from_pretrained(folder / "variation", own_clip=True))


@pytest.fixture
def embeds():
    return torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))


# ---- the noise ----


def test_the_noise_is_the_one_definition(parts, embeds):
    """Whitened, noised, un-whitened as for every decoder, and followed by cosines and sines of the level."""
    noise, process = torch.randn(2, DIM), UnCLIPScheduler().process
    mean, std = (parts["image_normalizer"].state_dict()[name] for name in ("mean", "std"))
    statistics = EmbeddingStatistics(mean[0], std[0], 1.0, 1.0)
    found = noised_with_level(embeds, 300, noise, mean, std, process)
    torch.testing.assert_close(found[:, :DIM], statistics.noised(embeds, 300, noise), rtol=0, atol=0)
    frequencies = 10_000 ** (-torch.arange(DIM / 2) / (DIM / 2))
    torch.testing.assert_close(found[0, DIM:], torch.cat([(300 * frequencies).cos(), (300 * frequencies).sin()]))
    zero = noised(embeds, 0, noise, mean, std)
    assert 0 < float((zero - embeds).abs().max()) < 0.1  # level 0 is not the clean embedding


def test_every_picture_has_its_own_noise(variation, embeds):
    both = variation(image_embeds=embeds, noise_level=500, seed=[4, 9], **FEW).images
    alone = variation(image_embeds=embeds[1:], noise_level=500, seed=9, **FEW).images
    torch.testing.assert_close(both[1:], alone, **CLOSE)
    other = variation(image_embeds=embeds[1:], noise_level=900, seed=9, **FEW).images
    assert (other - alone).abs().max() > 1e-3


# ---- any prior of the same CLIP ----


def test_karlos_prior_makes_the_embeddings(text, own_pipeline):
    """The same prior and scheduler give UnCLIPPipeline's embeddings, with every sampler."""
    shared = {"prior": "prior", "prior_scheduler": "prior_scheduler", "text_encoder": "prior_text_encoder"}
    for own, name in shared.items():
        setattr(text, name, getattr(own_pipeline, own))
    expected = own_pipeline.embed_captions("a cat", num_inference_steps=3, seed=5)
    made = text("a cat", prior_num_inference_steps=3, seed=5, return_intermediates=True, **FEW)
    torch.testing.assert_close(made.image_embeddings, expected, **CLOSE)
    direct = text("a cat", image_embeds=expected, seed=5, return_intermediates=True, **FEW)
    torch.testing.assert_close(direct.image_embeddings, expected, **CLOSE)


def test_a_prior_of_eclipse(text, own_pipeline, tiny_configs):
    """It needs no scheduler, and gives UnCLIPPipeline's embeddings."""
    prior = randomize(PriorTransformer(**tiny_configs["prior"], additional_embeddings=3), 8)
    own_pipeline.prior = prior
    expected = own_pipeline.embed_captions("a cat", seed=5)
    parts = {**text.components, "prior": prior, "prior_text_encoder": own_pipeline.text_encoder}
    del parts["prior_scheduler"]
    made = quiet(StableUnCLIPPipeline(**parts))("a cat", seed=5, return_intermediates=True, **FEW)
    torch.testing.assert_close(made.image_embeddings, expected, **CLOSE)
    with pytest.raises(InputError, match="prior_scheduler"):
        StableUnCLIPPipeline(**{**parts, "prior": text.prior})


def test_embeddings_of_another_pipelines_prior(variation, own_pipeline):
    embeddings = own_pipeline.embed_captions(["a cat", "a red apple"], num_inference_steps=2, seed=1)
    assert variation(image_embeds=embeddings, prompt="a cat", seed=1, **FEW).images.shape == (2, 3, 16, 16)


def test_the_decoder_is_shared(text, parts, folder):
    pipe = StableUnCLIPImg2ImgPipeline.from_pipe(
        text, **{name: parts[name] for name in ("image_encoder", "feature_extractor")}
    )
    assert (pipe.unet, pipe.vae) == (text.unet, text.vae)
    assert StableUnCLIPPipeline.from_pipe(text).prior is text.prior


# ---- devices and types ----


def test_offloading(text, variation):
    given = {"image": Image.new("RGB", (16, 16), "red"), "noise_level": 40, "seed": 2, **FEW}
    plain = variation(**given).images, text("a cat", seed=1, prior_num_inference_steps=2, **FEW).images
    for enable in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        for pipe in (variation, text):
            getattr(pipe, enable)(device="cpu")
        assert variation.statistics is not None
        torch.testing.assert_close(variation(**given).images, plain[0], **CLOSE)
        made = text("a cat", seed=1, prior_num_inference_steps=2, **FEW).images
        torch.testing.assert_close(made, plain[1], **CLOSE)
        for pipe in (variation, text):
            pipe.remove_all_hooks()


def test_types(folder, embeds, tmp_path):
    types = {"default": torch.bfloat16, "vae": "float32"}
    pipe = quiet(StableUnCLIPImg2ImgPipeline.from_pretrained(folder / "variation", torch_dtype=types))
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    exact = quiet(StableUnCLIPImg2ImgPipeline.from_pretrained(folder / "variation"))
    settings = {"image_embeds": embeds, "seed": 2, "guidance_scale": 1, **FEW}
    assert (pipe(**settings).images - exact(**settings).images).abs().mean() < 0.05
    pipe.save_pretrained(tmp_path / "half", variant="bf16")
    again = StableUnCLIPImg2ImgPipeline.from_pretrained(tmp_path / "half", variant="bf16", torch_dtype="stored")
    assert (again.unet.dtype, again.vae.dtype) == (torch.bfloat16, torch.float32)


# ---- calls ----


def test_one_picture_and_several_captions(variation):
    picture = Image.new("RGB", (16, 16), "red")
    made = variation(picture, ["a cat", "a red apple"], seed=[1, 1], **FEW).images
    alone = variation(picture, "a red apple", seed=1, **FEW).images
    torch.testing.assert_close(made[1:], alone, **CLOSE)


def test_callbacks(variation, embeds):
    seen = []
    variation(image_embeds=embeds, callback=lambda step, t, latents: seen.append((step, t, latents.shape)),
              callback_steps=2, num_inference_steps=3, output_type="pt")  # fmt: skip
    assert [step for step, _, _ in seen] == [0, 2]
    assert seen[0][2] == (2, 4, 8, 8)
    own = []
    variation(image_embeds=embeds, callback_on_step_end=lambda *state: own.append(state[3]["stage"]), **FEW)
    assert own == ["decoder"] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"height": 17}, "height is 17; it must be a multiple of 2"),
        ({"noise_level": 1000}, "noise_level"),
        ({"noise_level": -1}, "noise_level"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"output_type": "jpg"}, "output_type"),
        ({"latents": torch.zeros(2, 4, 8, 9)}, "decoder_latents have shape"),
        ({"clip_skip": 3}, "clip_skip"),
        ({"cross_attention_kwargs": {"scale": 1}}, "cross_attention_kwargs"),
        ({"prompt_embeds": torch.zeros(2, 11, 7)}, r"must be \[2, tokens, 24\]"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(2, 11, 24)}, "not both"),
        ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(2, 11, 24)}, "not both"),
        ({"prompt": ["a", "b", "c"]}, "3 captions for 2 pictures"),
        ({"image_embeds": torch.zeros(2, 7)}, r"must be \[batch, 16\]"),
        ({"image_embeds": torch.full((1, 16), float("nan"))}, "NaN"),
        ({"image": Image.new("RGB", (8, 8))}, "only one of them"),
        ({"callback": print, "callback_on_step_end": print}, "not both"),
        ({"callback_steps": 0}, "callback_steps"),
        ({"seed": 1, "generator": torch.Generator()}, "not both"),
        ({"eta": 2}, "eta"),
    ],
)
def test_what_a_call_refuses(variation, embeds, given, message, monkeypatch):
    monkeypatch.setattr(variation.unet, "forward", None)  # nothing is computed
    with pytest.raises(InputError, match=message):
        variation(**{"image_embeds": embeds, **FEW, **given})


def test_what_text_to_image_refuses(text, embeds):
    for given, message in (
        ({}, "give a prompt"),
        ({"prompt": ["a", "b", "c"], "image_embeds": embeds}, "2 image embeddings for 3 prompts"),
        ({"prompt": "a", "prior_latents": torch.zeros(1, 7)}, "prior_latents have shape"),
    ):
        with pytest.raises(InputError, match=message):
            text(**given, **FEW)


# ---- components that do not fit ----


def test_another_clips_image_encoder(variation, parts, tiny_components):
    config = parts["image_encoder"].config
    wide = type(parts["image_encoder"])(type(config)(**{**config.to_dict(), "projection_dim": 24}))
    with pytest.raises(ConfigError, match=r"embedding_dim is 16, but image_encoder\.projection_dim is 24"):
        StableUnCLIPImg2ImgPipeline.from_pipe(variation, image_encoder=wide)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("image_normalizer", lambda: StableUnCLIPImageNormalizer(embedding_dim=24), "is 32, but twice .* is 48"),
        ("unet", lambda: UNet2DConditionModel, "it must be diffusers' UNet2DConditionModel"),
        ("vae", lambda: diffusers.AutoencoderKL(**{**VAE, "latent_channels": 8}), r"but vae\.latent_channels is 8"),
        ("vae", lambda: diffusers.AutoencoderKL(**VAE, shift_factor=0.1), "shift_factor is 0.1"),
        ("scheduler", lambda: UnCLIPScheduler(variance_type="learned_range"), r"unet\.out_channels is 4"),
        ("scheduler", lambda: diffusers.EulerDiscreteScheduler(), "no sampler like that of diffusers' Euler"),
    ],
)
def test_parts_that_do_not_fit(variation, name, make, message):
    with pytest.raises(ConfigError, match=message):
        StableUnCLIPImg2ImgPipeline.from_pipe(variation, **{name: make()})


def test_another_clips_prior(text, tiny_configs):
    wide = PriorTransformer({**tiny_configs["prior"], "embedding_dim": 24})
    with pytest.raises(ConfigError, match=r"prior\.embedding_dim is 24, but prior_text_encoder\.projection_dim is 16"):
        StableUnCLIPPipeline.from_pipe(text, prior=wide)


def test_without_diffusers(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'unclip\[family\]'"):
        StableUnCLIPImg2ImgPipeline.from_pretrained(folder / "variation")


def test_a_karlo_folder_is_not_a_stable_unclip_folder(own_pipeline, tmp_path):
    own_pipeline.save_pretrained(tmp_path / "karlo")
    with pytest.raises(Exception, match="prior_tokenizer"):
        StableUnCLIPPipeline.from_pretrained(tmp_path / "karlo")
    assert UnCLIPPipeline.from_pretrained(tmp_path / "karlo").prior is not None
