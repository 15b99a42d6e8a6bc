"""The list of what a model knows: its file, search, nearest concepts, and warnings of unknown captions."""

import json
import warnings

import pytest
import torch

from unclip import Concepts, UnCLIPImageVariationPipeline, UnCLIPPipeline, UnknownCaptionWarning
from unclip.checkpoints.tensor_file import write_tensor_file
from unclip.clip.concepts import best_threshold
from unclip.errors import CheckpointError, OutputExistsError

NAMES = (("Cat face", "cat", "kitten"), ("Red apple", "fruit"), ("Cats", "two cats"))


@pytest.fixture
def concepts():
    return Concepts("tiny", NAMES, torch.eye(3, 16) * 4, 0.3)


def test_a_file_keeps_everything(concepts, tmp_path):
    concepts.write(tmp_path)
    found = Concepts.read(tmp_path)
    assert (found.model, found.names, found.threshold) == ("tiny", NAMES, 0.3)
    assert torch.equal(found.embeddings, concepts.embeddings)
    with pytest.raises(OutputExistsError):
        concepts.write(tmp_path)
    assert Concepts.read(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"names": "[", "threshold": "0"},
        {"names": "[]", "threshold": "0"},
        {"names": '[["a"], []]', "threshold": "0"},
        {"names": '[["a"], ["b"]]', "threshold": "high"},
        {"names": "3", "threshold": "0"},
    ],
)
def test_a_damaged_file(tmp_path, about):
    tensors = {"embeddings": torch.zeros(2, 4)}
    write_tensor_file(tmp_path / "concepts.safetensors", tensors, kind="concepts", version=1, about=about)
    with pytest.raises(CheckpointError, match=r"concepts\.safetensors"):
        Concepts.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "places"), [("cat", [0, 2]), ("CAT face", [0]), ("kitten", [0]), ("ruit", []), ("a.b", []), ("app", [1])]
)
def test_search(concepts, text, places):
    assert concepts.search(text) == places


def test_unknown_captions_are_reported_with_the_nearest(concepts):
    embeds = torch.zeros(3, 16)
    embeds[0, 1] = 7.0
    embeds[1, :4] = torch.tensor([0.3, 0.2, 0.1, 1.0])
    embeds[2, 5] = 1.0
    closeness, places = concepts.nearest(embeds, 2)
    assert places[1].tolist() == [0, 1]
    assert closeness[0] == pytest.approx(1 - 1 / 3)
    assert concepts.reports(["apple", "asdfgh", " "], embeds) == [
        "'asdfgh' is not close to anything tiny knows; nearest: Cat face, Red apple, Cats"
    ]
    assert concepts.reports(["x"], torch.zeros(1, 8)) == []  # of another text encoder


def test_the_threshold_separates_best():
    unknown = torch.tensor([0.0, 0.05, 0.2, 0.3])
    assert 0.3 < best_threshold(torch.tensor([0.4, 0.5, 0.6, 0.7]), unknown) < 0.4
    assert 0.05 < best_threshold(torch.tensor([0.1, 0.5, 0.6, 0.7]), unknown) < 0.1  # false alarms count more


def far(pipe, model="tiny"):
    """Concepts that no caption reaches."""
    return Concepts(model, NAMES, torch.eye(3, pipe.text_encoder.config.projection_dim), 2.0)


def test_pipelines_warn_and_make_the_same_pictures(own_pipeline, few, tmp_path):
    before = own_pipeline("asdfgh", seed=1, output_type="pt", negative_prompt="blur", **few).images
    own_pipeline.concepts = far(own_pipeline)
    with pytest.warns(UnknownCaptionWarning, match="'asdfgh' is not close to anything tiny knows; nearest: ") as found:
        after = own_pipeline("asdfgh", seed=1, output_type="pt", negative_prompt="blur", **few).images
    assert len(found) == 1
    assert torch.equal(before, after)
    with pytest.warns(UnknownCaptionWarning) as found:
        own_pipeline.embed_captions(["asdfgh", "qwerty"], num_inference_steps=2)
    assert len(found) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own_pipeline("", seed=1, **few)
        own_pipeline(image_embeddings=torch.zeros(1, 16), seed=1, **few)
    own_pipeline.save_pretrained(tmp_path / "model")
    loaded = UnCLIPPipeline.from_pretrained(tmp_path / "model")
    assert loaded.concepts.names == NAMES
    with pytest.warns(UnknownCaptionWarning):
        loaded("asdfgh", seed=1, **few)
    other = UnCLIPPipeline.from_pretrained(tmp_path / "model", text_encoder=own_pipeline.text_encoder)
    assert other.concepts is None  # its similarities would be others


def test_concepts_of_another_width_are_refused(own_pipeline, tmp_path):
    own_pipeline.save_pretrained(tmp_path / "model")
    Concepts("other", NAMES, torch.eye(3, 8), 0.5).write(tmp_path / "model")
    with pytest.raises(CheckpointError, match="embeddings of width 8, but the text encoder has width 16"):
        UnCLIPPipeline.from_pretrained(tmp_path / "model")


def test_pipelines_share_concepts(own_variation):
    own_variation.concepts = far(own_variation)
    made = UnCLIPImageVariationPipeline.from_pipe(own_variation)
    assert made.concepts is own_variation.concepts


def test_names_are_json(concepts, tmp_path):
    from safetensors import safe_open

    concepts.write(tmp_path)
    with safe_open(tmp_path / "concepts.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["names"])[1] == ["Red apple", "fruit"]
