"""The network of DALLE2-pytorch's and MindEye's priors: sizes, prefixes, conditions, and training."""

import pytest
import torch

from unclip import ConfigError, InputError
from unclip.models.prior_dalle2 import ARITHMETIC, EmbeddingPriorNetwork
from unclip.pipelines.embedding_prior import EmbeddingPrior

from ..conftest import randomize

SMALL = {"embedding_dim": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 6}
TEXT = SMALL | {"max_text_len": 5, "use_text_encodings": True, "normalized": True}
GRID = SMALL | {"num_tokens": 4, "causal": False}
LAION = {
    "embedding_dim": 768,
    "num_layers": 24,
    "num_attention_heads": 32,
    "num_timesteps": 1000,
    "normformer": True,
}
MINDEYE = {"num_layers": 6, "causal": False}
ROTARY = 16
"""Frequencies that the package counts as parameters; they are computed here."""


def network(seed=0, **settings):
    return randomize(EmbeddingPriorNetwork(**settings), seed)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        (LAION | {"max_text_len": 256}, 249_416_720 - ROTARY),
        (LAION | {"max_text_len": 77}, 249_279_248 - ROTARY),
        (MINDEYE | {"embedding_dim": 768, "num_attention_heads": 12, "num_tokens": 257}, 56_055_184 - ROTARY),
        (
            MINDEYE | {"embedding_dim": 1664, "num_attention_heads": 32, "attention_head_dim": 52, "num_tokens": 256},
            259_865_200,
        ),
    ],
    ids=["laion", "laion 77", "mindeye 1", "mindeye 2"],
)
def test_full_size(settings, count):
    with torch.device("meta"):
        made = EmbeddingPriorNetwork(**settings)
    assert sum(parameter.numel() for parameter in made.parameters()) == count
    if "normformer" in settings:
        shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
        assert shapes["causal_transformer.layers.23.0.to_kv.weight"] == (128, 768)
        assert shapes["causal_transformer.layers.23.1.1.weight"] == (6144, 768)
        assert shapes["causal_transformer.layers.23.1.3.g"] == (3072,)
        assert shapes["causal_transformer.rel_pos_bias.relative_attention_bias.weight"] == (32, 32)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@torch.no_grad()
def test_a_causal_prefix_gives_what_the_whole_sequence_gives(arithmetic):
    made = network(**TEXT, arithmetic=arithmetic)
    x, text, encodings = torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    prefix = made.prepare(text, encodings, mask)
    found = made(x, 7, prefix)
    whole = type(prefix)(prefix.tokens, prefix.seen, None)
    torch.testing.assert_close(made(x, 7, whole), found, rtol=1e-4, atol=1e-5)
    alone = made(x[1:], 7, made.prepare(text[1:], encodings[1:], mask[1:]))
    torch.testing.assert_close(alone, found[1:], rtol=1e-4, atol=1e-5)
    changed = made.prepare(text, encodings + ~mask[..., None], mask)  # what the padding contains has no influence
    torch.testing.assert_close(made(x, 7, changed), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", ["none", "token", "pos_emb", "all_pos_emb"])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_grids(queries, causal):
    made = network(**GRID | {"queries": queries, "causal": causal})
    x, condition = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    found = made(x, torch.tensor([3, 5]), made.prepare(condition))
    assert found.shape == (2, 4, 8)
    other = made(x, torch.tensor([3, 5]), made.prepare(condition.flip(0)))
    assert not torch.allclose(found, other)
    nothing = torch.zeros(2, dtype=torch.bool)
    null = [made(x, 3, made.prepare(given, given=nothing)) for given in (condition, condition.flip(0))]
    torch.testing.assert_close(*null)
    hidden = [made(given, 3, made.prepare(condition), nothing) for given in (x, x.flip(0))]
    torch.testing.assert_close(*hidden)


@torch.no_grad()
def test_a_condition_of_another_shape_than_the_grid():
    made = network(**GRID, condition_tokens=1, condition_dim=30)
    prefix = made.prepare(torch.randn(2, 1, 30))
    assert prefix.tokens.shape == (2, 1, 8)
    assert made(torch.randn(2, 4, 8), 3, prefix).shape == (2, 4, 8)
    with pytest.raises(InputError, match=r"the condition is \(2, 4, 8\); it must be \[batch, 1, 30\]"):
        made.prepare(torch.randn(2, 4, 8))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"arithmetic": "2.0"}, r"it must be one of 0\.15"),
        ({"embedding_dim": 7}, "must be even"),
        ({"attention_head_dim": 5}, "need an even one"),
        (GRID | {"arithmetic": "1.4.3"}, "a grid of tokens has the arithmetic"),
        ({"condition_dim": 5}, "need num_tokens"),
        ({"queries": "some"}, "queries is 'some'"),
    ],
)
def test_settings_that_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        EmbeddingPriorNetwork(SMALL | settings)


def test_wrong_shapes_are_refused_before_anything_is_computed():
    prior = EmbeddingPrior(network(**GRID))
    for condition in (torch.randn(2, 8), torch.randn(2, 5, 8), torch.randn(2, 4, 7)):
        with pytest.raises(InputError, match=r"it must be \[batch, 4, 8\]"):
            prior.sample(condition)
    with pytest.raises(InputError, match=r"the target is \(2, 8\); it must be \(2, 4, 8\)"):
        prior.loss(torch.randn(2, 4, 8), torch.randn(2, 8))
    with pytest.raises(InputError, match="NaN"):
        prior.sample(torch.full((2, 4, 8), float("nan")))
    text = EmbeddingPrior(network(**TEXT))
    with pytest.raises(InputError, match="takes encodings of the text"):
        text.sample(torch.randn(2, 8))
    with pytest.raises(InputError, match="takes no encodings"):
        prior.sample(torch.randn(2, 4, 8), encodings=torch.randn(2, 5, 8))
    table = network(**SMALL, num_timesteps=10)
    with pytest.raises(ConfigError, match="embeddings of 10 timesteps, but its process has 1000"):
        EmbeddingPrior(table)


@pytest.mark.parametrize("settings", [TEXT, GRID], ids=["text", "grid"])
def test_the_loss_trains_every_weight_and_changes_no_argument(settings):
    made = EmbeddingPriorNetwork(**settings).initialize_for_training(torch.Generator().manual_seed(0))
    prior, shape = EmbeddingPrior(made), made.config.embedding_shape
    target, condition = torch.randn(16, *shape), torch.randn(16, *made.config.condition_shape)
    kept = target.clone(), condition.clone()
    text = {"encodings": torch.randn(16, 3, 8)} if settings is TEXT else {}
    loss, prediction = prior.loss(condition, target, drop=0.3, generator=torch.Generator().manual_seed(1), **text)
    again, _ = prior.loss(condition, target, drop=0.3, generator=torch.Generator().manual_seed(1), **text)
    assert loss == again
    assert prediction.shape == target.shape
    loss.backward()
    without = [name for name, one in made.named_parameters() if one.grad is None or not one.grad.abs().sum() > 0]
    assert without == []
    torch.testing.assert_close((target, condition), kept, rtol=0, atol=0)


def test_a_few_steps_reduce_the_loss():
    torch.manual_seed(0)
    made = EmbeddingPriorNetwork(**GRID).initialize_for_training()
    prior = EmbeddingPrior(made)
    target = torch.randn(32, 4, 8)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        loss, _ = prior.loss(target, target, drop=0.0, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("settings", [TEXT, GRID], ids=["text", "grid"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_samples_are_reproducible_and_do_not_depend_on_their_batch(settings, scale):
    prior = EmbeddingPrior(network(**settings))
    condition = torch.randn(3, *prior.prior.config.condition_shape)
    text = {"encodings": torch.randn(3, 5, 8)} if settings is TEXT else {}
    steps = {"num_inference_steps": 3, "guidance_scale": scale}
    drawn = prior.sample(condition, seed=[4, 5, 6], **steps, **text)
    one = {name: value[1:2] for name, value in text.items()}
    torch.testing.assert_close(prior.sample(condition[1:2], seed=5, **steps, **one), drawn[1:2], rtol=1e-3, atol=1e-4)
    twice = [prior.sample(condition, generator=torch.Generator().manual_seed(3), **steps, **text) for _ in "ab"]
    assert torch.equal(*twice)
    noise = torch.randn(drawn.shape)
    given = [prior.sample(condition, latents=noise, seed=1, **steps, **text) for _ in "ab"]
    assert torch.equal(*given)


def test_a_folder(tmp_path):
    prior = EmbeddingPrior(network(**GRID))
    prior.save_pretrained(tmp_path / "model")
    read = EmbeddingPrior.from_pretrained(tmp_path / "model")
    condition = torch.randn(2, 4, 8)
    drawn = [one.sample(condition, seed=1, num_inference_steps=2) for one in (read, prior)]
    torch.testing.assert_close(*drawn, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="compatible sampling takes 2 to 1000"):
        read.sample(condition, compatible=True, num_inference_steps=1)


@torch.no_grad()
def test_half_precision():
    made, x, condition = network(**GRID), torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    wanted = made(x, 3, made.prepare(condition))
    half = made.to(torch.bfloat16)
    found = half(x.bfloat16(), 3, half.prepare(condition.bfloat16()))
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < 0.1 * wanted.norm()
