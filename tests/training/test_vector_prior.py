"""Priors on vectors and tokens: losses and samples, the tasks, and identification."""

import dataclasses

import numpy as np
import pytest
import torch

from unclip import ConfigError, DataError, EmbeddingPrior, InputError, PriorTransformer, VectorPrior
from unclip.pipelines.vector_prior import identification, vector_model
from unclip.training import vector_prior
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
    drawn = VectorPrior.from_pretrained(tmp_path / "model").sample(task.source.conditions[:2], seed=0)
    assert drawn.shape == (2, 6)


def test_pairs_that_do_not_fit(recipe, tmp_path):
    condition = recipe.condition
    with pytest.raises(DataError, match="only 60 pairs"):
        make_task(dataclasses.replace(recipe, condition=dataclasses.replace(condition, held_out=60)))
    np.save(tmp_path / "vectors.npy", np.zeros((59, 7), np.float32))
    with pytest.raises(DataError, match=r"59 rows, but .* has 60"):
        make_task(recipe)


def test_several_conditions_are_dropped_by_themselves(recipe, tmp_path):
    """The second file stands for captions, as `unclip embed --captions` writes them."""
    np.save(tmp_path / "captions.npy", np.ones((60, 6), np.float32))
    text = RECIPE.replace('file = "vectors.npy"', 'file = ["vectors.npy", "captions.npy"]\ndrop = 0.5')
    (tmp_path / "recipe.toml").write_text(text)
    task = make_task(read_recipe(tmp_path / "recipe.toml"))
    assert task.stage.prior.config.embedding_proj_dim == 13
    vectors = task.batch(0, 200, torch.Generator().manual_seed(0))["vectors"]
    kept = torch.stack([vectors[:, :7].any(dim=1), vectors[:, 7:].all(dim=1)]).long()
    assert set(map(tuple, kept.T.tolist())) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    task.save(tmp_path / "model")
    both = task.source.conditions[:2]
    assert VectorPrior.from_pretrained(tmp_path / "model").sample(both, seed=0).shape == (2, 6)


GRIDS = RECIPE.replace('file = "vectors.npy"', 'kind = "tokens"\nfile = "tokens.npy"')


@pytest.mark.parametrize("target", [(60, 4, 6), (60, 6)], ids=["grid", "vector"])
@pytest.mark.parametrize("condition", [(60, 3, 10), (60, 4, 6)], ids=str)
def test_the_task_on_tokens(tmp_path, target, condition):
    draw = np.random.default_rng(0)
    np.save(tmp_path / "tokens.npy", draw.normal(size=condition).astype(np.float32))
    np.save(tmp_path / "embeddings.npy", draw.normal(size=target).astype(np.float32) * 3)
    (tmp_path / "recipe.toml").write_text(GRIDS)
    task = make_task(read_recipe(tmp_path / "recipe.toml"))
    config = task.stage.prior.config
    assert config.scale == pytest.approx(1 / 3, rel=0.1)
    assert task.stage.process.clip_range is None
    batch = task.batch(0, 8, torch.Generator().manual_seed(0))
    assert batch["x0"].shape == (8, 4 if len(target) == 3 else 1, 6)
    part = task.batch(0, 8, torch.Generator().manual_seed(0), torch.tensor([2, 3]))
    torch.testing.assert_close(part["condition"], batch["condition"][2:4])
    task.module(batch)["loss"].backward()
    task.save(tmp_path / "model")
    task.sample_sheet(tmp_path / "sheet.png")
    assert "two_way" in (tmp_path / "sheet.txt").read_text()
    prior = EmbeddingPrior.from_pretrained(tmp_path / "model")
    assert prior.sample(task.source.conditions[:2], seed=0, num_inference_steps=2).shape == (2, *config.embedding_shape)


def test_vectors_to_a_grid(recipe, tmp_path):
    np.save(tmp_path / "embeddings.npy", np.random.default_rng(0).normal(size=(60, 4, 6)).astype(np.float32))
    config = make_task(recipe).stage.prior.config
    assert (config.condition_shape, config.embedding_shape) == ((1, 7), (4, 6))


def test_a_few_steps_on_tokens_learn_the_identity(tmp_path):
    tokens = np.random.default_rng(0).normal(size=(60, 4, 6)).astype(np.float32)
    for name in ("tokens", "embeddings"):
        np.save(tmp_path / f"{name}.npy", tokens)
    (tmp_path / "recipe.toml").write_text(GRIDS)
    task = make_task(read_recipe(tmp_path / "recipe.toml"))
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        loss = task.module(task.batch(step, 32, torch.Generator().manual_seed(step)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_large_data_stay_in_their_files(recipe, monkeypatch):
    loaded = make_task(recipe)
    monkeypatch.setattr(vector_prior, "LOADED_BYTES", 0)
    lazy = make_task(recipe)
    assert lazy.source.conditions.loaded is None
    ours, theirs = (task.batch(3, 8, torch.Generator().manual_seed(3)) for task in (lazy, loaded))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)


def test_conditions_of_another_kind(recipe, tmp_path):
    def refused(error, words, old, new):
        (tmp_path / "recipe.toml").write_text(RECIPE.replace(old, new))
        with pytest.raises(error, match=words):
            make_task(read_recipe(tmp_path / "recipe.toml"))

    line = 'file = "vectors.npy"'
    refused(ConfigError, "needs one file with an array", line, f'{line}\nkind = "tokens"')
    np.save(tmp_path / "tokens.npy", np.zeros((60, 3, 5), np.float32))
    refused(DataError, "a grid of tokens", line, 'file = "tokens.npy"')
    refused(ConfigError, "one file", line, 'kind = "tokens"\nfile = ["tokens.npy", "tokens.npy"]')
    np.save(tmp_path / "embeddings.npy", np.ones((60, 4, 6), np.float32))
    refused(ConfigError, "several conditions at once need vectors", line, 'file = ["vectors.npy", "vectors.npy"]')
    np.save(tmp_path / "embeddings.npy", np.ones((60, 4, 5), np.float32))
    refused(ConfigError, "embedding_dim is 5; it must be even", line, line)
