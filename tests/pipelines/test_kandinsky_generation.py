"""Kandinsky's folders under the calls of unCLIP's pipelines: the same pictures, and the paper's manipulations."""

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import (
    InputError,
    KandinskyCombinedPipeline,
    KandinskyPriorPipeline,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    Manipulator,
    UnCLIPImageVariationPipeline,
    UnCLIPInpaintPipeline,
    UnCLIPPipeline,
    edit,
    interpolate,
)
from unclip.errors import CheckpointError

from ..kandinsky_parts import decoder_parts, prior_parts

FEW = {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 3, "decoder_guidance_scale": 3.0}
SIDE = 16  # of the tiny U-Net's 8 cells


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def combined():
    """Version → the combined pipeline."""
    kinds = {
        "2.1": (KandinskyCombinedPipeline, KandinskyPriorPipeline),
        "2.2": (KandinskyV22CombinedPipeline, KandinskyV22PriorPipeline),
    }
    made = {}
    for version, (cls, prior) in kinds.items():
        decoder = cls.DECODER(**decoder_parts(version))
        made[version] = quiet(cls.from_pipes(prior(**prior_parts()), decoder))
    return made


@pytest.fixture(scope="module")
def folders(combined, tmp_path_factory):
    base = tmp_path_factory.mktemp("kandinsky")
    for version, pipe in combined.items():
        pipe.save_pretrained(base / version)
    return {version: base / version for version in combined}


@pytest.fixture(scope="module")
def texts(folders):
    return {version: quiet(UnCLIPPipeline.from_pretrained(folder)) for version, folder in folders.items()}


@pytest.fixture(scope="module")
def tool(folders):
    made = Manipulator.from_pretrained(folders["2.2"])
    quiet(made.variation)
    quiet(made.text)
    return made


def picture(seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_picture_of_the_combined_pipeline(texts, combined, version, guidance):
    settings = {**FEW, "decoder_guidance_scale": guidance}
    ours = texts[version](["a cat", "an apple"], seed=3, output_type="pt", **settings).images
    call = {"num_inference_steps": 3, "guidance_scale": guidance, "prior_num_inference_steps": 2, "output_type": "pt"}
    theirs = combined[version](["a cat", "an apple"], seed=3, height=SIDE, width=SIDE, **call).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_defaults_are_kandinsky_s(texts):
    assert texts["2.2"].recommended["decoder_guidance_scale"] == 4.0
    assert texts["2.2"].recommended["decoder_num_inference_steps"] == 100


def test_variations_and_embeddings_from_elsewhere(folders, texts, combined):
    variation = quiet(UnCLIPImageVariationPipeline.from_pipe(texts["2.2"]))
    assert variation.decoder is texts["2.2"].decoder
    again = quiet(UnCLIPImageVariationPipeline.from_pretrained(folders["2.2"]))
    few = {"decoder_num_inference_steps": 3, "decoder_guidance_scale": 3.0, "output_type": "pt", "seed": 1}
    made = variation(picture(), **few).images
    torch.testing.assert_close(again(picture(), **few).images, made)
    embedding = variation.embed_images(picture())
    torch.testing.assert_close(texts["2.2"].decode(embedding, check_scale=False, **few).images, made)
    decoder = quiet(KandinskyV22Pipeline(**decoder_parts("2.2")))
    zero = combined["2.2"].prior_pipe.get_zero_embed(1)
    sizes = {"height": SIDE, "width": SIDE, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    theirs = decoder(embedding, zero, **sizes, seed=1).images
    torch.testing.assert_close(made, theirs, rtol=0, atol=1e-4)
    assert not torch.allclose(variation(picture(1), **few).images, made, atol=1e-3)


def test_a_noise_level(texts):
    few = {**FEW, "output_type": "pt", "seed": 1}
    plain, noised = (texts["2.2"]("a cat", noise_level=level, **few).images for level in (0, 500))
    assert not torch.allclose(plain, noised, atol=1e-3)


def test_a_negative_prompt_matters(texts):
    for version, text in texts.items():
        made = [text("a cat", negative_prompt=negative, seed=1, **FEW).images[0] for negative in ("red", "an apple")]
        assert np.abs(np.asarray(made[0], int) - np.asarray(made[1], int)).max() > 1, version


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_saved_again(texts, folders, tmp_path, version):
    texts[version].save_pretrained(tmp_path / "again")
    names = sorted(path.name for path in folders[version].iterdir())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names
    again = quiet(UnCLIPPipeline.from_pretrained(tmp_path / "again"))
    pictures = [pipe("a cat", seed=1, output_type="pt", **FEW).images for pipe in (again, texts[version])]
    torch.testing.assert_close(*pictures)


def test_sizes(texts):
    made = texts["2.2"]("a cat", seed=1, height=20, width=12, **FEW).images[0]
    assert made.size == (12, 20)
    with pytest.raises(InputError, match="height is 18; for this model it must be a multiple of 4, such as 16"):
        texts["2.2"]("a cat", height=18, **FEW)


def test_what_a_kandinsky_folder_cannot_do(folders, texts):
    with pytest.raises(CheckpointError, match="KandinskyV22CombinedPipeline without"):
        UnCLIPInpaintPipeline.from_pretrained(folders["2.2"])
    encoder = texts["2.1"].text_encoder
    tokens = texts["2.1"].tokenizer(["a cat"], padding="max_length", max_length=11, return_tensors="pt")
    output = encoder(tokens["input_ids"])
    with pytest.raises(InputError, match="encodes captions itself"):
        texts["2.1"](text_model_output=output, text_attention_mask=tokens["attention_mask"], **FEW)


# ---- the paper's manipulations ----


def test_an_inverted_picture_is_reconstructed(tool):
    pictures = [picture(0), picture(1)]
    steps = {"decoder_num_inference_steps": 40}
    latent = tool.invert(pictures, num_rounds=4, **steps)
    assert latent.decoder_latents.shape == (2, 4, 8, 8)
    again = tool.decode(latent, output_type="pt", **steps).images
    x0 = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 127.5 - 1 for one in pictures])
    with torch.no_grad():
        own = tool.variation.movq(x0.float()).sample.clamp(-1, 1) / 2 + 0.5
    fresh = tool.decode(tool.fresh(latent.image_embedding), output_type="pt", **steps).images
    assert (again - own).abs().mean() < 0.2 * (fresh - own).abs().mean()


def test_edits_and_interpolations(tool):
    assert tool.text.decoder is tool.variation.decoder
    steps = {"decoder_num_inference_steps": 3}
    latent = tool.invert(picture(), **steps)
    direction = tool.caption_difference("a cat", "an apple", num_samples=1)
    moved = tool.decode(edit(latent, direction, [0.0, 0.4]), output_type="pt", **steps).images
    assert not torch.allclose(moved[0], moved[1], atol=1e-3)
    torch.testing.assert_close(moved[:1], tool.decode(latent, output_type="pt", **steps).images, rtol=0, atol=1e-4)
    path = interpolate(tool.invert([picture(0), picture(1)], **steps), 1)
    assert tool.decode(path, output_type="np", **steps).images.shape == (3, SIDE, SIDE, 3)


def test_latents_belong_to_their_decoder(tool, tmp_path):
    latent = tool.invert(picture(), decoder_num_inference_steps=2)
    tool.save(latent, tmp_path / "cat.safetensors")
    loaded, _ = tool.load(tmp_path / "cat.safetensors")
    assert torch.equal(loaded.decoder_latents, latent.decoder_latents)
