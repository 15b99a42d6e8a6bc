"""Stable unCLIP: folders of diffusers load, and give its pictures for the same weights and generator."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import unclip
from unclip import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableUnCLIPImg2ImgPipeline,
    StableUnCLIPPipeline,
    UnCLIPScheduler,
    WeightsError,
)
from unclip.clip.pretrained import read_part
from unclip.stages.stable_diffusion import KLAutoencoder, read_borrowed

from ..stable_parts import DDIM, SCHEDULE, UNET, reference, stable_parts

import diffusers  # isort: skip

OURS = {"text": StableUnCLIPPipeline, "variation": StableUnCLIPImg2ImgPipeline}
V_PREDICTION = {**SCHEDULE, "prediction_type": "v_prediction"}
CLOSE = {"rtol": 0, "atol": 1e-4}
FEW = {"num_inference_steps": 4, "output_type": "np"}
FEW_PRIOR = {"prior_num_inference_steps": 3}


@pytest.fixture(scope="module")
def parts():
    return stable_parts()


@pytest.fixture(scope="module")
def folders(parts, tmp_path_factory):
    """The folders that diffusers' pipelines write."""
    base = tmp_path_factory.mktemp("stable")
    for kind in OURS:
        reference(kind, parts).save_pretrained(base / kind)
    return base


@pytest.fixture(scope="module")
def ours(folders):
    found = {kind: cls.from_pretrained(folders / kind) for kind, cls in OURS.items()}
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def theirs(parts):
    return {kind: reference(kind, parts) for kind in OURS}


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def seeded():
    return torch.Generator().manual_seed(3)


def assert_same(ours, theirs, *args, **settings):
    expected = theirs(*args, **settings, generator=seeded()).images
    found = ours(*args, **settings, generator=seeded()).images
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert found.std() > 0.01


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"noise_level": 300, "num_images_per_prompt": 2},
        {"guidance_scale": 1.0, "prior_guidance_scale": 1.0},
        {"negative_prompt": "a red apple", "height": 24, "width": 40},
        {"eta": 0.7},
    ],
)
def test_text_to_image(ours, theirs, settings):
    assert_same(ours["text"], theirs["text"], "a cat", **FEW, **FEW_PRIOR, **settings)


def test_several_prompts(ours, theirs):
    assert_same(ours["text"], theirs["text"], ["a cat", "a red apple"], **FEW, **FEW_PRIOR, noise_level=5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"noise_level": 300, "prompt": "a cat"},
        {"guidance_scale": 0.5},
        {"prompt": ["a cat"], "negative_prompt": ["a red apple"], "height": 24},
    ],
)
def test_variations(ours, theirs, picture, settings):
    given = [picture] if isinstance(settings.get("prompt"), list) else picture
    assert_same(ours["variation"], theirs["variation"], given, **FEW, **settings)


def test_variations_of_embeddings(ours, theirs):
    embeds = torch.randn(2, 16, generator=seeded())
    assert_same(ours["variation"], theirs["variation"], prompt=["", ""], image_embeds=embeds, noise_level=10, **FEW)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DPMSolverMultistepScheduler(**V_PREDICTION),
        diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False),
        diffusers.DDPMScheduler(**V_PREDICTION, clip_sample=False),
    ],
)
def test_other_schedulers(folders, parts, picture, scheduler):
    pipe = OURS["variation"].from_pretrained(folders / "variation", scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    assert_same(pipe, reference("variation", {**parts, "scheduler": scheduler}), picture, **FEW)


def test_latents_and_clip_skip(ours, theirs):
    given = {
        "prompt": "a cat",
        **FEW_PRIOR,
        "num_inference_steps": 3,
        "latents": torch.randn(1, 4, 8, 8, generator=seeded()),
    }
    expected = theirs["text"](**given, output_type="latent", generator=seeded()).images
    found = ours["text"](**given, output_type="latent", generator=seeded()).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    skipped = ours["text"](**given, output_type="latent", generator=seeded(), clip_skip=1).images
    assert (skipped - found).abs().max() > 1e-3


def test_folders_are_written_as_diffusers_reads_them(ours, theirs, folders, picture, tmp_path):
    for kind, pipe in ours.items():
        pipe.save_pretrained(tmp_path / kind)
        index = json.loads((tmp_path / kind / "model_index.json").read_text())
        written = json.loads((folders / kind / "model_index.json").read_text())
        assert index["_class_name"] == written["_class_name"]
        same = ("unet", "vae", "image_normalizer", "scheduler", "text_encoder")
        assert [index[name][1] for name in same] == [written[name][1] for name in same]
        assert set(index) == set(written)
        assert index["image_normalizer"] == ["stable_diffusion", "StableUnCLIPImageNormalizer"]
        again = type(theirs[kind]).from_pretrained(tmp_path / kind)
        again.set_progress_bar_config(disable=True)
        given = ("a cat",) if kind == "text" else (picture,)
        assert_same(pipe, again, *given, **FEW, **(FEW_PRIOR if kind == "text" else {}))


def test_schedulers_of_folders(folders, tmp_path):
    for theirs, expected in (
        (
            diffusers.PNDMScheduler(**V_PREDICTION, skip_prk_steps=True, steps_offset=1),
            DDIM,
        ),
        (diffusers.DPMSolverMultistepScheduler(**V_PREDICTION), SCHEDULE),
    ):
        name = type(theirs).__name__
        folder = shutil.copytree(folders / "variation", tmp_path / name)
        theirs.save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
        if name == "PNDMScheduler":
            with pytest.warns(UserWarning, match="PNDMScheduler; DDIMScheduler with the same noise levels") as record:
                pipe = OURS["variation"].from_pretrained(folder)
            assert len(record) == 1
            assert type(pipe.scheduler) is DDIMScheduler
        else:
            pipe = OURS["variation"].from_pretrained(folder)
            assert type(pipe.scheduler) is DPMSolverMultistepScheduler
        assert all(pipe.scheduler.config[key] == value for key, value in expected.items())


def test_the_prior_keeps_its_noise_schedule_in_the_documented_recipe(folders, parts, tmp_path):
    """diffusers' guide turns Karlo's UnCLIPScheduler into a DDPMScheduler, which then has another schedule."""
    config = {"_class_name": "UnCLIPScheduler", "prediction_type": "sample", "variance_type": "fixed_small_log"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config | {"clip_sample_range": 5.0}))
    karlo = diffusers.UnCLIPScheduler.from_pretrained(tmp_path)
    recipe = diffusers.DDPMScheduler.from_config(karlo.config)
    assert recipe.betas[-1] == pytest.approx(0.02)  # the defect: the prior was trained on the cosine schedule
    ours = DDPMScheduler.from_config(UnCLIPScheduler.from_pretrained(tmp_path).config)
    pipe = OURS["text"].from_pretrained(folders / "text", prior_scheduler=recipe)
    for scheduler in (ours, pipe.prior_scheduler):
        assert scheduler.process.beta_schedule == "squaredcos_cap_v2"
        assert scheduler.process.posterior(999, 998).beta == pytest.approx(0.999)
        assert scheduler.spaced_timesteps(25)[0] == 999
        assert scheduler.spaced_timesteps(25)[-1] == 0


# ---- the full size ----

FULL = {
    **UNET,
    "sample_size": 96,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "layers_per_block": 2,
}
FULL_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@pytest.mark.parametrize(("dim", "parameters"), [(768, 869_517_764), (1024, 870_173_124)])
def test_the_published_sizes(dim, parameters):
    """The configurations of the small and the large model, on the meta device."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**{**FULL, "projection_class_embeddings_input_dim": 2 * dim})
        vae = diffusers.AutoencoderKL(**FULL_VAE)
        normalizer = unclip.StableUnCLIPImageNormalizer(embedding_dim=dim)
    assert sum(each.numel() for each in unet.parameters()) == parameters
    assert sum(each.numel() for each in vae.parameters()) == 83_653_863
    assert unet.state_dict()["class_embedding.linear_1.weight"].shape == (1280, 2 * dim)
    assert {name: tuple(tensor.shape) for name, tensor in normalizer.state_dict().items()} == {
        "mean": (1, dim),
        "std": (1, dim),
    }
    size = KLAutoencoder(vae)
    assert (size.factor, size.channels, size.scale) == (8, 4, 0.18215)


def test_files_of_older_versions(parts, folders, tmp_path):
    """Older versions of diffusers name the layers of the autoencoder's attention differently."""
    folder = shutil.copytree(folders / "variation" / "vae", tmp_path / "vae")
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = parts["vae"].state_dict()
    for new, old in names.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    assert sum("query" in name for name in state) == 4
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    found = read_borrowed("AutoencoderKL", folder, None, None)
    for name, tensor in parts["vae"].state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_of_older_and_newer_versions_of_transformers(parts, folders, tmp_path, prefix):
    folder = shutil.copytree(folders / "variation" / "text_encoder", tmp_path / "text_encoder")
    state = {prefix + name.removeprefix("text_model."): t for name, t in parts["text_encoder"].state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    found = read_part(tmp_path, "text_encoder", "CLIPTextModel")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(found(ids).last_hidden_state, parts["text_encoder"](ids).last_hidden_state)
    del state[next(iter(state))]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="missing"):
        read_part(tmp_path, "text_encoder", "CLIPTextModel")
