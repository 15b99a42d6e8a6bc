"""Translators between the embeddings of two CLIPs."""

from typing import Any

import pytest
import torch

from unclip import (
    CheckpointError,
    ConfigError,
    InputError,
    PriorTransformer,
    Translator,
    UnCLIPImageVariationPipeline,
    UnCLIPPipeline,
    WeightsError,
)
from unclip.checkpoints.tensor_file import write_tensor_file

SOURCE, TARGET = 12, 16


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def mixture():
    return draw(SOURCE, TARGET, seed=1)


@pytest.fixture(scope="module")
def pairs(mixture):
    """Linear mixtures with a little noise, on scales that are not 1 and means that are not 0."""
    source = draw(400, SOURCE) * torch.linspace(0.1, 5, SOURCE) + 3
    return source, source @ mixture + 0.5 * draw(400, TARGET, seed=2) - 7


@pytest.fixture(scope="module")
def translator(pairs):
    return Translator.fit(*pairs, held_out=100)


def test_a_linear_relation_is_found(pairs, translator, mixture):
    source, target = pairs
    exact = Translator.fit(source, source @ mixture, held_out=50)
    torch.testing.assert_close(exact(source[:5]), source[:5] @ mixture, rtol=0, atol=0.02)
    assert exact.measured["explained"] > 0.9999
    assert exact.measured["top_1"] == 1
    # The noise of 0.5 is what no translator can predict.
    assert float((translator(source[300:]) - target[300:]).std()) == pytest.approx(0.5, abs=0.05)


def test_the_measured_error_is_that_of_held_out_pairs(pairs, translator):
    source, target = pairs
    rest = translator(source[300:]) - target[300:]
    explained = 1 - rest.square().sum() / (target[300:] - target[:300].mean(dim=0)).square().sum()
    assert translator.measured["rows"] == 100
    assert translator.measured["explained"] == pytest.approx(float(explained), abs=1e-5)
    assert Translator.fit(*pairs, held_out=0).measured == {}
    shuffled = Translator.fit(
        source, target[torch.randperm(400, generator=torch.Generator().manual_seed(0))], held_out=100
    )
    assert shuffled.measured["explained"] < 0.1


def test_the_penalty_is_chosen_for_few_rows():
    """With as many dimensions as rows, a regression without a penalty is worse than the mean."""
    source, target = draw(60, 40), draw(60, 5, seed=3)
    assert Translator.fit(source, target, held_out=20).measured["explained"] > -0.5


def test_a_hidden_layer_explains_more_of_a_curved_relation():
    source = draw(2000, 4)
    target = torch.stack([source[:, 0] ** 2, source[:, 1].abs(), source[:, 2] * source[:, 3]], dim=1)
    linear = Translator.fit(source, target, held_out=500)
    curved = Translator.fit(source, target, held_out=500, hidden=64, steps=800)
    assert linear.measured["explained"] < 0.1
    assert curved.measured["explained"] > 0.6
    again = Translator.fit(source, target, held_out=500, hidden=64, steps=800)
    torch.testing.assert_close(again(source[:9]), curved(source[:9]), rtol=0, atol=0)


def test_files(translator, pairs, tmp_path):
    curved = Translator.fit(*pairs, held_out=50, hidden=8, steps=50)
    for number, made in enumerate((translator, curved)):
        read = Translator.read(made.write(tmp_path / f"{number}.safetensors"))
        torch.testing.assert_close(read(pairs[0]), made(pairs[0]), rtol=0, atol=0)
        assert read.measured == made.measured
        assert (read.source_dim, read.target_dim) == (SOURCE, TARGET)


def test_files_that_are_no_translators(translator, tmp_path):
    path = translator.write(tmp_path / "one.safetensors")
    parts = {name: getattr(translator, name) for name in ("source_mean", "source_std", "target_mean", "target_std")}
    about = {"kind": "translator", "version": 1}
    for name, weight in (("narrow", translator.weight[:, :3]), ("flat", translator.weight[0])):
        write_tensor_file(tmp_path / f"{name}.safetensors", {**parts, "weight": weight}, **about)
        with pytest.raises(WeightsError, match="a translator has"):
            Translator.read(tmp_path / f"{name}.safetensors")
    write_tensor_file(tmp_path / "other.safetensors", parts, kind="probe", version=1)
    with pytest.raises(CheckpointError, match="'probe'"):
        Translator.read(tmp_path / "other.safetensors")
    broken = {**parts, "weight": translator.weight}
    write_tensor_file(tmp_path / "words.safetensors", broken, **about, about={"measured": '{"cosine": "high"}'})
    with pytest.raises(WeightsError, match="measurements"):
        Translator.read(tmp_path / "words.safetensors")
    assert path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": torch.zeros(9, SOURCE)}, "9 source rows and 400 target rows"),
        ({"source": torch.zeros(400, 2, 3)}, r"must be \[rows, width\]"),
        ({"target": torch.full((400, 3), float("nan"))}, "NaN"),
        ({"held_out": 390}, "20 or more must be left"),
        ({"held_out": -1}, "held_out"),
        ({"hidden": -1}, "hidden"),
        ({"hidden": 4, "steps": 0}, "steps"),
    ],
)
def test_wrong_arguments(pairs, change, message):
    given = {"source": pairs[0], "target": pairs[1], "held_out": 100} | change
    with pytest.raises(InputError, match=message):
        Translator.fit(given.pop("source"), given.pop("target"), **given)


def test_embeddings_of_another_width(translator):
    with pytest.raises(InputError, match=r"takes \[batch, 12\]"):
        translator(torch.zeros(2, TARGET))


def test_pictures_of_another_clips_prior(translator, pairs, tiny_variation):
    """The way from one CLIP's embedding to another's decoder: translate, then decode."""
    embeddings = translator(pairs[0][:2])
    settings = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2, "seed": 1, "output_type": "pt"}
    made = tiny_variation.decode(embeddings, **settings).images
    assert made.shape == (2, 3, 16, 16)
    with pytest.raises(InputError, match=r"\[batch, 16\]"):
        tiny_variation.decode(pairs[0][:2], **settings)


# ---- any prior, any decoder, of one CLIP ----


def test_the_prior_of_another_pipeline_of_the_same_clip(own_pipeline, tiny_components, tmp_path, few):
    other: Any = UnCLIPPipeline(**{n: p for n, p in tiny_components().items() if n in UnCLIPPipeline.component_names()})
    torch.nn.init.constant_(other.prior.proj_to_clip_embeddings.bias, 3.0)
    other.save_pretrained(tmp_path / "other")
    own_pipeline.save_pretrained(tmp_path / "mine")
    prior = {"prior": other.prior, "prior_scheduler": other.prior_scheduler}
    mine: Any = UnCLIPPipeline.from_pretrained(tmp_path / "mine", **prior)
    shared: Any = UnCLIPPipeline.from_pipe(own_pipeline, **prior)
    assert mine.prior is other.prior is shared.prior
    assert shared.decoder is own_pipeline.decoder
    settings = {**few, "seed": 1, "output_type": "pt", "return_intermediates": True}
    expected = other("a cat", **settings).image_embeddings
    for pipe in (mine, shared):
        torch.testing.assert_close(pipe("a cat", **settings).image_embeddings, expected, rtol=0, atol=1e-5)
    variation = UnCLIPImageVariationPipeline.from_pipe(
        mine, **{name: tiny_components()[name] for name in ("image_encoder", "feature_extractor")}
    )
    assert variation.decoder is mine.decoder


def test_a_prior_of_another_width_is_refused_when_it_is_given(own_pipeline, tiny_configs, tmp_path):
    wide = PriorTransformer({**tiny_configs["prior"], "embedding_dim": 24})
    own_pipeline.save_pretrained(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"prior\.embedding_dim is 24, but text_encoder\.projection_dim is 16"):
        UnCLIPPipeline.from_pretrained(tmp_path / "mine", prior=wide)
    with pytest.raises(ConfigError, match=r"prior\.embedding_dim is 24"):
        UnCLIPPipeline.from_pipe(own_pipeline, prior=wide)
