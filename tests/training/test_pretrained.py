"""A CLIP that another library trained: read in either layout, lived in by prior and decoder, and trained on."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor
from transformers.utils import logging

import unclip
from unclip.clip.pretrained import read_clip
from unclip.errors import CheckpointError, ConfigError, WeightsError
from unclip.pipelines.component import write_component
from unclip.training import recipe as recipe_module
from unclip.training.assemble import assemble
from unclip.training.clip import ClipTask, train_tokenizer
from unclip.training.conditions import FrozenClip, normalized
from unclip.training.recipe import ClipSettings, located, read_recipe
from unclip.training.task import make_task
from unclip.training.trainer import Trainer, step_generator

from .conftest import RECIPES

CAPTIONS = ["a red circle", "a blue square", "an orange bar", "a green picture"]


def save_whole(folder: Path, *, projection_dim: int = 32) -> CLIPModel:
    """A random `CLIPModel` with its processor, written by transformers."""
    logging.disable_progress_bar()
    tokenizer = train_tokenizer(CAPTIONS, vocabulary_size=540, context_length=12)
    end = len(tokenizer) - 1
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(
        text_config=size | tokens | {"vocab_size": len(tokenizer), "max_position_embeddings": 12},
        vision_config=size | {"image_size": 32, "patch_size": 8},
        projection_dim=projection_dim,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = CLIPModel(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        torch.nn.init.constant_(model.logit_scale, 3.0)
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, CLIPModel]:
    folder = tmp_path_factory.mktemp("whole") / "clip"
    return folder, save_whole(folder)


@pytest.fixture(params=["whole", "components"])
def layout(request, whole, tmp_path) -> Path:
    """The same CLIP in both layouts."""
    folder, _ = whole
    if request.param == "whole":
        return folder
    for name, part in read_clip(folder).components().items():
        write_component(part, tmp_path / "components" / name, variant=None)
    return tmp_path / "components"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_normalize": False, "rescale_factor": 0.5 / 255},
        {"image_mean": 0.5, "image_std": 0.25},
    ],
    ids=str,
)
def test_training_sees_what_the_preprocessor_would_make(settings):
    colours = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    processor = CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False, **settings)
    made = processor(images=[Image.fromarray(colours.numpy())], return_tensors="pt")["pixel_values"]
    pixels = colours.permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(normalized(pixels, processor), made, rtol=1e-5, atol=1e-5 * float(made.abs().max()))


@torch.no_grad()
def test_both_layouts_give_what_transformers_gives(whole, layout):
    folder, model = whole
    clip = FrozenClip(layout)
    processor = CLIPProcessor.from_pretrained(folder)
    tokens = processor(text=CAPTIONS, padding="max_length", max_length=12, return_tensors="pt")
    text = model.get_text_features(**tokens)
    picture = Image.effect_mandelbrot((32, 32), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    image = model.get_image_features(**processor(images=[picture], return_tensors="pt"))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, 32, 32, 3).permute(0, 3, 1, 2)
    text, image = (found if isinstance(found, torch.Tensor) else found.pooler_output for found in (text, image))
    torch.testing.assert_close(clip.text.encode(CAPTIONS).embeds, text)
    torch.testing.assert_close(clip.embed(pixels.float() / 127.5 - 1), image, rtol=1e-4, atol=1e-4)
    assert (clip.width, clip.context, clip.image_size) == (32, 12, 32)


def test_each_layout_says_what_its_folder_says(whole, layout):
    clip = read_clip(layout)
    assert clip.logit_scale == (pytest.approx(3.0) if layout == whole[0] else None)
    assert clip.context_length == 12
    assert clip.fingerprint == read_clip(layout).fingerprint


def test_pixels_of_a_clip_of_ours_stay_as_they_are(clip_model):
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(normalized(pixels, read_clip(clip_model).feature_extractor), pixels)


def test_pixels_without_normalisation():
    extractor = CLIPImageProcessorPil(do_normalize=False)
    found = normalized(torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3), extractor)
    assert found[0, 0, 0].tolist() == [0.0, 0.5, 1.0]


# -- training on ---------------------------------------------------------------------------------------------------


def test_a_pretrained_clip_is_trained_on(tiny, layout, whole, tmp_path):
    section = dataclasses.asdict(ClipSettings())  # all defaults: the model says its sizes
    recipe = tiny("clip", start_from=layout, section=section, steps=40, log_every_steps=40)
    task = ClipTask(recipe)
    assert task.tokenizer.get_vocab() == read_clip(whole[0]).tokenizer.get_vocab()
    batch = task.batch(0, 16, step_generator(0, 0))
    assert batch["pixels"].max() > 1.5  # white, after CLIP's own normalisation
    assert task.module(batch)["loss"] > 0
    if layout == whole[0]:
        assert task.module.logit_scale.item() == pytest.approx(3.0)
    Trainer(task, recipe, tmp_path / "run").run()
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    with torch.no_grad():
        untrained = ClipTask(recipe).module(batch)["loss"].item()
    assert row["loss"] < untrained
    again = read_clip(tmp_path / "run" / "model")
    assert list(again.feature_extractor.image_mean) == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert again.tokenizer.get_vocab() == task.tokenizer.get_vocab()
    assert again.fingerprint != read_clip(layout).fingerprint


def test_sizes_that_the_pretrained_clip_has_not(tiny, whole):
    section = dataclasses.asdict(ClipSettings(image_size=48, text_layers=1))
    with pytest.raises(ConfigError, match=r"differs from the one in .*: image_size is 32 there and 48 here\. Remove"):
        ClipTask(tiny("clip", start_from=whole[0], section=section))


# -- prior, decoder, the whole model -------------------------------------------------------------------------------


def test_a_model_around_a_pretrained_clip(tiny, whole, tmp_path):
    folder, _ = whole
    for stage in ("prior", "decoder", "super_res"):
        section = {} if stage == "super_res" else {"clip": folder}
        recipe = tiny(stage, steps=2, section=section)
        Trainer(make_task(recipe), recipe, tmp_path / stage).run()
    runs = {stage: tmp_path / stage for stage in ("prior", "decoder")}
    assemble(clip=folder, super_res_first=tmp_path / "super_res", out=tmp_path / "model", **runs)
    pipeline = unclip.UnCLIPPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    steps = {f"{stage}_num_inference_steps": 2 for stage in ("prior", "decoder", "super_res")}
    assert pipeline("a red circle", seed=1, **steps).images[0].size == (32, 32)
    variation = unclip.UnCLIPImageVariationPipeline.from_pretrained(tmp_path / "model")
    assert variation.feature_extractor.do_center_crop


def test_tokens_and_embeddings_of_different_widths(tiny, tmp_path):
    save_whole(tmp_path, projection_dim=16)
    for stage in ("prior", "decoder"):
        with pytest.raises(ConfigError, match="has tokens of width 32 and embeddings of width 16"):
            make_task(tiny(stage, section={"clip": tmp_path}))
    assert read_clip(tmp_path).text_encoder.config.projection_dim == 16


def test_what_is_no_clip(tmp_path):
    with pytest.raises(ConfigError, match=r"contains no trained CLIP \(neither text_encoder/ nor .*: train that stage"):
        read_clip(tmp_path)
    save_whole(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole_file = weights.read_bytes()
    weights.write_bytes(whole_file[: len(whole_file) // 2])
    with pytest.raises((CheckpointError, WeightsError), match="CLIPModel"):
        read_clip(tmp_path)


def test_absurd_sizes_are_refused_before_anything_is_built(tmp_path):
    save_whole(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    about["vision_config"]["hidden_size"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(
        ConfigError, match=r"hidden_size in .* is 1000000000; it must be a whole number from 1 to 16,384"
    ):
        read_clip(tmp_path)


# -- names ---------------------------------------------------------------------------------------------------------


def write(folder: Path, **lines: str) -> Path:
    """The tiny prior's recipe with its CLIP, or what it starts from, named otherwise."""
    text = (RECIPES / "prior.toml").read_text()
    if "clip" in lines:
        text = text.replace('"../../runs/tiny/clip/model"', f'"{lines["clip"]}"')
    if "start_from" in lines:
        text = text.replace("seed = 2", f'seed = 2\nstart_from = "{lines["start_from"]}"')
    path = folder / "prior.toml"
    path.write_text(text)
    return path


def test_models_by_their_names(tmp_path, monkeypatch):
    read = read_recipe(write(tmp_path, clip="openai/clip-vit-large-patch14", start_from="unclip-emoji"))
    assert read.prior.clip == "openai/clip-vit-large-patch14"
    assert read.start_from == "unclip-emoji"
    monkeypatch.setattr(recipe_module, "resolve", lambda name: tmp_path / name)
    found = located(read)
    assert found.prior.clip == tmp_path / "openai" / "clip-vit-large-patch14"
    assert found.start_from == tmp_path / "unclip-emoji"
    assert found.prior.text_drop == read.prior.text_drop


@pytest.mark.parametrize("place", ["clip/model", "../clip/model", "./clip/model", "runs/clip/model"])
def test_a_folder_is_no_name(tmp_path, place):
    base = tmp_path / "recipes"
    base.mkdir()
    if place == "clip/model":  # looks like a name, but is there
        (base / place).mkdir(parents=True)
    read = read_recipe(write(base, clip=place))
    assert read.prior.clip == base / place
    assert located(read) == read
