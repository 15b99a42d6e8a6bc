"""The prior's measure: figures by hand, and the same samples as the pipeline's."""

import json

import pytest
import torch
from PIL import Image

from unclip import UnCLIPPipeline
from unclip.clip.encoders import ImageEncoder, TextEncoder
from unclip.data.folder import square_pixels
from unclip.errors import InputError
from unclip.evaluation.retrieval import Judge, Plan
from unclip.evaluation.stages import compare, mean_of_others, prior

FEW = {"prior_num_inference_steps": 2, "prior_guidance_scale": 2.0}


@pytest.fixture
def own(_shared_components):
    parts = _shared_components
    return Judge(
        TextEncoder(parts["text_encoder"], parts["tokenizer"]),
        ImageEncoder(parts["image_encoder"], parts["feature_extractor"]),
    )


@pytest.fixture
def data(tmp_path):
    rows = []
    for name in ("red", "green", "blue", "black"):
        Image.new("RGB", (16, 16), name).save(tmp_path / f"{name}.png")
        rows.append({"file_name": f"{name}.png", "concept": name, "text": f"a {name}", "held_out": name == "black"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_figures_by_hand():
    true = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    drawn = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    text = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    found = compare(drawn, true, text, mean_of_others(true, true))
    half = 0.5**0.5
    assert found["cosine"] == {
        "prior": pytest.approx((1 + half) / 2, abs=1e-4),
        "text": 0.5,
        "other": 0.0,
        "mean": 0.0,  # of two pictures the other one
    }
    assert found["text_dot"] == {"prior": pytest.approx(half / 2, abs=1e-4), "true": 0.5}
    assert found["norm"] == {"prior": pytest.approx((3 + 2**0.5) / 2, abs=1e-4), "true": 3.0}
    assert (found["at_1"], found["at_5"]) == (0.5, 1.0)  # the second is as near to the other: not found


def test_mean_of_others():
    seen = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, 1.0]])
    torch.testing.assert_close(mean_of_others(seen, seen), torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]))
    torch.testing.assert_close(mean_of_others(torch.ones(1, 2), seen), torch.tensor([[1 / 3, 2 / 3]]))
    torch.testing.assert_close(mean_of_others(seen[:1], seen[:1]), torch.tensor([[1.0, 0.0]]))


def test_a_report_of_both_groups(tiny_pipeline, own, data):
    found = prior(tiny_pipeline, own, Plan(data, seed=3, batch_size=2), **FEW)
    assert (found["seen"]["num"], found["held_out"]["num"]) == (3, 1)
    assert found["seen"]["seeds"] == [3, 5]
    assert found["held_out"]["at_1"] == 1  # among one
    assert set(found["seen"]["cosine"]) == {"prior", "text", "other", "mean"}
    one_by_one = prior(tiny_pipeline, own, Plan(data, seed=3, batch_size=1), **FEW)
    assert one_by_one["seen"]["cosine"]["prior"] == pytest.approx(found["seen"]["cosine"]["prior"], abs=2e-4)


def test_a_prior_that_knows(tiny_pipeline, own, data, monkeypatch):
    """One that gives the true embedding is found to be perfect, and told apart from the baselines."""
    pictures = {f"a {name}": Image.new("RGB", (16, 16), name) for name in ("red", "green", "blue", "black")}
    monkeypatch.setattr(
        UnCLIPPipeline, "embed_captions", lambda self, captions, **more: own.embed([pictures[c] for c in captions])
    )
    seen = prior(tiny_pipeline, own, Plan(data), **FEW)["seen"]
    assert seen["cosine"]["prior"] == 1
    assert max(seen["cosine"][key] for key in ("text", "other", "mean")) < 0.9999
    assert seen["at_1"] == 1
    assert seen["text_dot"]["prior"] == seen["text_dot"]["true"]
    assert seen["norm"]["prior"] == seen["norm"]["true"]


def test_true_embeddings_are_those_that_training_knows(tiny_pipeline, own, tmp_path, monkeypatch):
    """A picture that is not square is padded with white there, and neither squashed nor cropped."""
    pictures = []
    for place, name in enumerate(("red", "green")):
        picture = Image.new("RGB", (30, 12), name)
        picture.paste((20, 20, 200), (0, 0, 7, 12))
        picture.save(tmp_path / f"{place}.png")
        size = own.image.image_encoder.config.image_size
        pictures.append(Image.fromarray(square_pixels(picture, size).permute(1, 2, 0).numpy()))
    rows = [{"file_name": f"{place}.png", "text": f"{place}"} for place in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(
        UnCLIPPipeline, "embed_captions", lambda self, captions, **more: own.embed([pictures[int(c)] for c in captions])
    )
    seen = prior(tiny_pipeline, own, Plan(tmp_path), **FEW)["seen"]
    assert seen["cosine"]["prior"] > 0.9999
    assert seen["norm"]["prior"] == pytest.approx(seen["norm"]["true"], rel=1e-3)


def test_numbers(tiny_pipeline, own, data):
    with pytest.raises(InputError, match="batch_size is 0"):
        prior(tiny_pipeline, own, Plan(data, batch_size=0))
    with pytest.raises(InputError):
        prior(tiny_pipeline, own, Plan(data), prior_num_inference_steps=0)
    with pytest.raises(InputError, match="from 0"):
        prior(tiny_pipeline, own, Plan(data), prior_guidance_scale=float("nan"))
