"""Pipelines with unclip's own CLIP: the same pictures, and transformers' classes where they are needed."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from unclip import CheckpointError, UnCLIPImageVariationPipeline, UnCLIPInpaintPipeline, UnCLIPPipeline

OWN = {
    "text_encoder": "CLIPTextEncoder",
    "tokenizer": "CaptionTokenizer",
    "image_encoder": "CLIPImageEncoder",
    "feature_extractor": "PicturePreprocessor",
}
THEIRS = {
    "text_encoder": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "image_encoder": "CLIPVisionModelWithProjection",
    "feature_extractor": "CLIPImageProcessorPil",
}
KINDS = {"text": UnCLIPPipeline, "variation": UnCLIPImageVariationPipeline, "inpaint": UnCLIPInpaintPipeline}


@pytest.fixture(scope="module")
def saved(tiny_pipeline, tiny_variation, tiny_inpaint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for name, pipeline in (("text", tiny_pipeline), ("variation", tiny_variation), ("inpaint", tiny_inpaint)):
        pipeline.save_pretrained(folder / name)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A folder with all components, to be changed."""
    return shutil.copytree(saved / "inpaint", tmp_path / "copied")


def load(kind, folder, **arguments):
    pipeline = KINDS[kind].from_pretrained(folder, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def classes(pipeline):
    return {name: type(part).__name__ for name, part in pipeline.components.items() if name in OWN}


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | settings))


def draw(kind, pipeline, few):
    photo = Image.radial_gradient("L").convert("RGB").resize((40, 30))
    steps = {name: count for name, count in few.items() if kind != "variation" or not name.startswith("prior")}
    arguments = {
        "text": {"prompt": ["a red apple", ""], "negative_prompt": "a cat"},
        "variation": {"image": [photo, photo.rotate(90, expand=True)], "prompt": "a cat"},
        "inpaint": {"prompt": "a cat", "image": photo, "strength": 0.5, "embedding_from": "image"},
    }[kind]
    return pipeline(**arguments, **steps, seed=1, output_type="pt").images


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_same_pictures(saved, few, kind):
    own, theirs = load(kind, saved / kind, own_clip=True), load(kind, saved / kind)
    names = classes(theirs)
    assert names == {name: THEIRS[name] for name in names}
    assert classes(own) == {name: OWN[name] for name in names}
    torch.testing.assert_close(draw(kind, own, few), draw(kind, theirs, few), rtol=0, atol=1e-5)


def test_without_asking_they_are_transformers(saved):
    assert classes(load("inpaint", saved / "inpaint")) == THEIRS
    assert classes(load("inpaint", saved / "inpaint", own_clip=False)) == THEIRS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_types(saved, dtype):
    own = load("inpaint", saved / "inpaint", own_clip=True, torch_dtype=dtype)
    assert classes(own) == OWN
    assert own.text_encoder.dtype == own.image_encoder.dtype == dtype


@pytest.mark.parametrize(
    ("component", "file", "settings"),
    [
        ("text_encoder", "config.json", {"hidden_act": "relu"}),
        ("image_encoder", "config.json", {"hidden_act": "relu"}),
        ("tokenizer", "tokenizer_config.json", {"extra_special_tokens": [], "padding_side": "left"}),
        ("feature_extractor", "preprocessor_config.json", {"do_normalize": False}),
    ],
)
def test_what_is_not_implemented_is_transformers(copied, few, component, file, settings):
    """That part alone; and the pictures are those of transformers' class, and not those of the plain folder."""
    own = load("inpaint", copied, own_clip=True)
    plain = draw("inpaint", own, few)
    change(copied / component / file, **settings)
    own, theirs = load("inpaint", copied, own_clip=True), load("inpaint", copied)
    assert classes(own) == {**OWN, component: THEIRS[component]}
    picture = draw("inpaint", own, few)
    torch.testing.assert_close(picture, draw("inpaint", theirs, few), rtol=0, atol=1e-5)
    assert not torch.allclose(picture, plain, atol=1e-5)


@pytest.mark.parametrize("file", ["adapter_config.json", "processor_config.json"])
def test_folders_that_hold_more_are_transformers(copied, file):
    for name in ("tokenizer", "feature_extractor"):
        (copied / name / file).write_text("{}")
    own = load("inpaint", copied, own_clip=True)
    assert classes(own) == {**OWN, "tokenizer": THEIRS["tokenizer"], "feature_extractor": THEIRS["feature_extractor"]}


def test_the_layout_of_2022(copied, few):
    """vocab.json and merges.txt, tables of positions among the weights, and old names of the classes."""
    from safetensors.torch import load_file, save_file

    expected = draw("inpaint", load("inpaint", copied), few)
    own = load("inpaint", copied, own_clip=True)
    shutil.rmtree(copied / "tokenizer")
    own.tokenizer.save_pretrained(copied / "tokenizer")
    weights = copied / "text_encoder" / "model.safetensors"
    more = {"text_model.embeddings.position_ids": torch.arange(11)[None]}
    save_file(load_file(weights) | more, weights, metadata={"format": "pt"})
    index = json.loads((copied / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    (copied / "model_index.json").write_text(json.dumps(index))
    own = load("inpaint", copied, own_clip=True)
    assert classes(own) == OWN
    torch.testing.assert_close(draw("inpaint", own, few), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("own_clip", [False, True])
@pytest.mark.parametrize(
    ("component", "file", "content"),
    [
        ("text_encoder", "config.json", "{"),
        ("text_encoder", "model.safetensors", "no weights"),
        ("tokenizer", "tokenizer.json", "{"),
        ("feature_extractor", "preprocessor_config.json", "[]"),
    ],
)
def test_broken_files_are_reported(copied, own_clip, component, file, content):
    (copied / component / file).write_text(content)
    with pytest.raises(CheckpointError, match=rf"component '{component}' \(CLIP\w+\) cannot be loaded"):
        load("inpaint", copied, own_clip=own_clip)


def test_transformers_reads_the_saved_files(saved, few, tmp_path):
    own = load("inpaint", saved / "inpaint", own_clip=True)
    own.save_pretrained(tmp_path / "again")
    index = {}
    for folder in (saved / "inpaint", tmp_path / "again"):
        index[folder] = json.loads((folder / "model_index.json").read_text())
    assert len({json.dumps(entries) for entries in index.values()}) == 1
    theirs = load("inpaint", tmp_path / "again")
    assert classes(theirs) == THEIRS
    expected = draw("inpaint", own, few)
    torch.testing.assert_close(draw("inpaint", theirs, few), expected, rtol=0, atol=1e-5)
    assert classes(load("inpaint", tmp_path / "again", own_clip=True)) == OWN


def test_parts_that_are_given_stay(saved, tiny_pipeline):
    own = load("text", saved / "text", own_clip=True, tokenizer=tiny_pipeline.tokenizer)
    assert type(own.tokenizer) is CLIPTokenizer
    assert classes(own)["text_encoder"] == OWN["text_encoder"]


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading(saved, few, offload):
    own = load("inpaint", saved / "inpaint", own_clip=True)
    expected = draw("inpaint", own, few)
    getattr(own, f"enable_{offload}_cpu_offload")(device="cpu")
    torch.testing.assert_close(draw("inpaint", own, few), expected, rtol=0, atol=1e-5)
    assert own.device == torch.device("cpu")


def test_a_prompt_that_is_cut_gives_the_same_warning(saved, few):
    said = []
    for own_clip in (False, True):
        pipeline = load("text", saved / "text", own_clip=own_clip)
        with pytest.warns(UserWarning, match="ignored: 'ple a red apple a red apple'") as told:
            pipeline("a red apple " * 4, **few)
        said.append([str(warning.message) for warning in told])
    assert said[0] == said[1]
