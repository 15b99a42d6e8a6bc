"""The paper's manipulations, `pipe.decode` and the commands with a decoder in latent space: Stable unCLIP."""

import json
import shutil

import pytest
import torch
from PIL import Image

from unclip import CheckpointError, EmbeddingScaleWarning, InputError, Manipulator, edit, interpolate
from unclip.images import to_square
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
from unclip.pipelines.samplers import sampler_name
from unclip.pipelines.session import Compute, Session
from unclip.pipelines.stable_unclip_generation import StableTextToImage, StableVariation
from unclip.pipelines.text_to_image import UnCLIPPipeline

from ..stable_parts import DIM, reference, stable_parts

CLOSE = {"rtol": 0, "atol": 1e-4}
FEW = {"decoder_num_inference_steps": 3, "output_type": "pt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the components of both pipelines, as the small model has them."""
    base, parts = tmp_path_factory.mktemp("stable"), stable_parts()
    for parameter in parts["unet"].conv_out.parameters():  # a random network's path is chaotic
        parameter.data *= 0.1
    for kind in ("text", "variation"):
        reference(kind, parts).save_pretrained(base / kind)
    index = json.loads((base / "text" / "model_index.json").read_text())
    more = json.loads((base / "variation" / "model_index.json").read_text())
    for name in ("image_encoder", "feature_extractor"):
        shutil.copytree(base / "variation" / name, base / "text" / name)
        index[name] = more[name]
    (base / "text" / "model_index.json").write_text(json.dumps(index))
    return base / "text"


@pytest.fixture(scope="module")
def session(folder):
    return Session(str(folder), Compute(device="cpu"), progress=False)


@pytest.fixture(scope="module")
def tool(session):
    return session.manipulator(captions=True)


@pytest.fixture(scope="module")
def picture():
    return Image.effect_mandelbrot((16, 16), (-3, -2.5, 2, 2.5), 30).convert("RGB")


@pytest.fixture
def embeds():
    return torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))


def test_the_session_has_the_classes_for_the_folder(session):
    text, variation = session.pipeline(UnCLIPPipeline), session.pipeline(UnCLIPImageVariationPipeline)
    assert (type(text), type(variation)) == (StableTextToImage, StableVariation)
    assert text.unet is variation.unet
    assert sampler_name(variation) == "ddim"
    settings = session.settings(UnCLIPPipeline, {"decoder_guidance_scale": None, "decoder_num_inference_steps": 7})
    assert settings == {"decoder_guidance_scale": 10.0, "decoder_num_inference_steps": 7}


def test_unclips_own_classes_load_the_folder(folder, tmp_path):
    text = UnCLIPPipeline.from_pretrained(folder, own_clip=True)
    assert type(text) is StableTextToImage
    assert text.recommended == {"decoder_num_inference_steps": 20, "decoder_guidance_scale": 10.0}
    assert text.sizes(24) == {"decoder": (24, 16)}
    variation = UnCLIPImageVariationPipeline.from_pipe(text)
    assert type(variation) is StableVariation
    assert variation.unet is text.unet
    assert type(Manipulator.from_pretrained(folder).text) is StableTextToImage
    text.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == "StableUnCLIPPipeline"


def test_calls_with_unclips_names_make_the_same_pictures(session, embeds):
    """Above level 0, where both add the same noise."""
    pipe = session.pipeline(UnCLIPImageVariationPipeline)
    own = pipe(image_embeddings=embeds, noise_level=20, seed=3, prompt="a cat", **FEW).images
    theirs = super(StableVariation, pipe).__call__(
        image_embeds=embeds, prompt=["a cat"] * 2, noise_level=20, num_inference_steps=3, seed=3, output_type="pt"
    )
    torch.testing.assert_close(own, theirs.images, rtol=0, atol=0)
    text = session.pipeline(UnCLIPPipeline)
    own = text("a cat", noise_level=20, seed=3, prior_num_inference_steps=2, **FEW).images
    theirs = super(StableTextToImage, text).__call__(
        "a cat", noise_level=20, num_inference_steps=3, prior_num_inference_steps=2, seed=3, output_type="pt"
    )
    torch.testing.assert_close(own, theirs.images, rtol=0, atol=0)


def test_inversion_in_latents_and_back(tool, picture):
    """What is decoded is what the autoencoder makes of the picture's latents."""
    latent = tool.invert(picture, decoder_num_inference_steps=10, num_rounds=6)
    assert latent.decoder_latents.shape == (1, 4, 8, 8)
    found = tool.decode(latent, decoder_num_inference_steps=10, output_type="pt").images
    small = tool.decode_small(latent, decoder_num_inference_steps=10)
    vae = tool.variation.autoencoder
    with torch.no_grad():
        best = vae.decode_latents(vae.encode_pictures(to_square(picture, 16)[None])).clamp(-1, 1) / 2 + 0.5
    other = tool.decode(tool.fresh(latent.image_embedding, seed=1), decoder_num_inference_steps=10, output_type="pt")
    torch.testing.assert_close(found, small, **CLOSE)
    error = float((found - best).abs().mean())
    assert error < 0.003
    assert float((other.images - best).abs().mean()) > 0.1


def test_manipulations(tool, picture, tmp_path):
    latents = tool.invert([picture, picture.rotate(90)], decoder_num_inference_steps=3)
    made = tool.decode(interpolate(latents, 1), **FEW).images
    assert made.shape == (3, 3, 16, 16)
    assert (made[0] - made[1]).abs().max() > 1e-3
    direction = tool.caption_difference("a cat", "a red apple", num_samples=1)
    assert direction.norm() == pytest.approx(1, abs=1e-4)
    texts = tool.caption_difference("a cat", "a red apple", through_prior=False)
    assert texts.shape == (DIM,)
    assert tool.decode(edit(latents.select(slice(1)), direction, [0, 0.3]), **FEW).images.shape == (2, 3, 16, 16)
    components = tool.fit_components([[picture.rotate(angle) for angle in range(0, 360, 20)]])
    assert components.dim == DIM
    path = tool.save(latents, tmp_path / "latent.safetensors")
    torch.testing.assert_close(tool.load(path)[0].decoder_latents, latents.decoder_latents)
    best = tool.embed_captions("a cat", num_prior_candidates=3, prior_num_inference_steps=2)
    assert best.shape == (1, DIM)


def test_a_manipulator_of_the_reference_s_pipelines(folder, picture):
    from unclip import StableUnCLIPImg2ImgPipeline

    pipe = StableUnCLIPImg2ImgPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    tool = Manipulator(pipe)
    assert tool.variation.unet is pipe.unet
    assert tool.embed_images(picture).shape == (1, DIM)
    with pytest.raises(CheckpointError, match="no text encoder in the space of its image embeddings"):
        tool.caption_difference("a cat", "a red apple", through_prior=False)
    with pytest.raises(CheckpointError, match="no prior"):
        tool.caption_difference("a cat", "a red apple")


def test_decode_warns_of_the_scale(session, embeds):
    pipe = session.pipeline(UnCLIPImageVariationPipeline)
    own = pipe.statistics.mean + pipe.statistics.std * embeds
    assert pipe.decode(own, seed=1, **FEW).images.shape == (2, 3, 16, 16)
    with pytest.warns(EmbeddingScaleWarning):
        pipe.decode(own * 10, seed=1, **FEW)
    rescaled = pipe.decode(embeds, rescale="unwhiten", seed=1, **FEW).images
    torch.testing.assert_close(rescaled, pipe.decode(own, seed=1, **FEW).images, **CLOSE)


def test_what_there_is_not(session, embeds):
    pipe = session.pipeline(UnCLIPImageVariationPipeline)
    with pytest.raises(InputError, match="2 values for 0 super-resolution stages"):
        pipe(image_embeddings=embeds, super_res_num_inference_steps=[7, 7], **FEW)
    with pytest.raises(InputError, match="no super-resolution"):
        pipe.enable_super_res_tiling()
