"""A prior on vectors: its loss and samples, its task, and identification."""

import dataclasses

import numpy as np
import pytest
import torch

from unclip import ConfigError, DataError, InputError, PriorTransformer
from unclip.pipelines.vector_prior import VectorPrior, identification, vector_model
from unclip.training.recipe import read_recipe
from unclip.training.task import make_task

SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
RECIPE = """stage = "prior"
data = "embeddings.npy"
batch_size = 8
precision = "no"
[condition]
file = "vectors.npy"
held_out = 10
[prior.model]
num_attention_heads = 2
attention_head_dim = 8
num_layers = 1
"""


@pytest.fixture
def prior():
    network = PriorTransformer(**vector_model(7, 6), **SMALL)
    network.initialize_for_training(torch.Generator().manual_seed(0))
    return VectorPrior(network)


@pytest.fixture
def recipe(tmp_path):
    draw = np.random.default_rng(0)
    np.save(tmp_path / "vectors.npy", draw.normal(size=(60, 7)).astype(np.float32))
    np.save(tmp_path / "embeddings.npy", draw.normal(size=(60, 6)).astype(np.float32) * 3 + 1)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return read_recipe(tmp_path / "recipe.toml")


def test_the_loss_and_the_prediction(prior):
    vectors, embeddings = torch.randn(5, 7), torch.randn(5, 6)
    loss, prediction = prior.loss(vectors, embeddings, generator=torch.Generator().manual_seed(1))
    again, _ = prior.loss(vectors, embeddings, generator=torch.Generator().manual_seed(1))
    assert prediction.shape == (5, 6)
    assert loss == again
    loss.backward()
    assert prior.prior.proj_in.weight.grad.abs().sum() > 0


def test_a_dropped_vector_has_no_influence(prior):
    pairs = [(torch.randn(5, 7), torch.ones(5, 6)) for _ in range(2)]
    losses = [prior.loss(*pair, drop=1.0, generator=torch.Generator().manual_seed(1))[0] for pair in pairs]
    torch.testing.assert_close(*losses)


def test_samples_are_reproducible_and_do_not_depend_on_their_batch(prior):
    vectors = torch.randn(3, 7)
    drawn = prior.sample(vectors, seed=[4, 5, 6], num_inference_steps=3, guidance_scale=2.0)
    alone = prior.sample(vectors[1:2], seed=5, num_inference_steps=3, guidance_scale=2.0)
    torch.testing.assert_close(drawn[1:2], alone, rtol=0, atol=1e-5)
    one, two = (prior.sample(vectors, generator=torch.Generator().manual_seed(3), num_inference_steps=3) for _ in "ab")
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"must be \[batch, 7\]"):
        prior.sample(torch.randn(3, 6))
    with pytest.raises(InputError, match="NaN"):
        prior.sample(torch.full((3, 7), float("nan")))


def test_a_prior_for_captions_is_refused():
    with pytest.raises(ConfigError, match="not one for vectors"):
        VectorPrior(PriorTransformer(**SMALL, embedding_dim=6, num_embeddings=5))


def test_identification():
    true = torch.eye(4)
    assert identification(true, true) == {"cosine": 1, "two_way": 1, "top_1": 1}
    found = identification(torch.stack([true[0], true[0], true[2], true[3]]), true)
    assert (found["top_1"], found["cosine"]) == (0.75, 0.75)


def test_the_task_trains_on_pairs_and_is_saved(recipe, tmp_path):
    task = make_task(recipe)
    prior = task.stage.prior
    torch.testing.assert_close(prior.clip_mean[0], task.source.embeddings[:50].mean(dim=0))
    batch = task.batch(0, 8, torch.Generator().manual_seed(0))
    part = task.batch(0, 8, torch.Generator().manual_seed(0), torch.tensor([2, 3]))
    torch.testing.assert_close(part["vectors"], batch["vectors"][2:4])
    assert task.module(batch)["loss"].isfinite()
    task.save(tmp_path / "model")
    task.sample_sheet(tmp_path / "sheet.png")
    assert "two_way" in (tmp_path / "sheet.txt").read_text()
    drawn = VectorPrior.from_pretrained(tmp_path / "model").sample(task.source.vectors[:2], seed=0)
    assert drawn.shape == (2, 6)


def test_pairs_that_do_not_fit(recipe, tmp_path):
    condition = recipe.condition
    with pytest.raises(DataError, match="only 60 pairs"):
        make_task(dataclasses.replace(recipe, condition=dataclasses.replace(condition, held_out=60)))
    np.save(tmp_path / "vectors.npy", np.zeros((59, 7), np.float32))
    with pytest.raises(DataError, match=r"59 rows, but .* has 60"):
        make_task(recipe)
