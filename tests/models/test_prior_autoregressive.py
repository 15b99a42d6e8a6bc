"""The autoregressive prior's network: codes and back, cached and whole sequences, bad settings and shapes, folders."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from unclip import AutoregressivePrior
from unclip.errors import ConfigError, InputError, WeightsError
from unclip.models.pca import PrincipalComponents
from unclip.models.prior_autoregressive import AutoregressivePriorConfig, dot_product

from ..rounding import assert_equal_but_rounding

SETTINGS = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 3,
    "embedding_dim": 12,
    "text_dim": 10,
    "num_embeddings": 5,
    "num_components": 7,
    "num_buckets": 9,
    "num_dot_buckets": 4,
}


def embeddings(count=400, seed=0):
    """Embeddings that vary much in some directions and little in others, around a mean."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    return torch.randn(count, 12, generator=generator) * torch.logspace(0, -2, 12) @ turn + 3


@pytest.fixture
def prior():
    """Random weights in which every layer matters, and codes of `embeddings()`."""
    generator = torch.Generator().manual_seed(1)
    prior = AutoregressivePrior(SETTINGS).initialize_for_training(generator).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    data = embeddings()
    prior.fit_codes(PrincipalComponents.fit([data]), data, dot_product(data, data.roll(1, 0)))
    return prior


@pytest.fixture
def text():
    """(proj_embedding, encoder_hidden_states, attention_mask, dot_codes) of three captions of different lengths."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    states = torch.randn(3, 5, 10, generator=generator)
    return torch.randn(3, 12, generator=generator), states, mask, torch.tensor([0, 4, 2])


# Codes


def test_a_round_trip_is_off_by_half_a_bucket_at_most(prior):
    data = embeddings()
    codes = prior.encode(data)
    assert codes.shape == (400, 7)
    assert codes.min() == 0
    assert codes.max() == 8
    assert all(len(codes[:, k].unique()) > 5 for k in range(7))
    kept = (data - prior.pca_mean) @ prior.pca_components.T
    found = (prior.decode(codes) - prior.pca_mean) @ prior.pca_components.T
    half = (prior.code_high - prior.code_low) / 18
    assert ((kept - found).abs() <= half * 1.001 + 1e-6).all()
    assert ((kept - found).abs().amax(dim=0) > half * 0.5).all()  # and the bound is not idle
    assert torch.equal(prior.encode(prior.decode(codes)), codes)


def test_more_buckets_lose_less():
    data, losses = embeddings(), []
    for num_buckets in (4, 16, 64):
        prior = AutoregressivePrior(SETTINGS | {"num_components": 12, "num_buckets": num_buckets})
        prior.fit_codes(PrincipalComponents.fit([data]), data, torch.linspace(0, 1, 50))
        losses.append((prior.decode(prior.encode(data)) - data).square().mean().item())
    assert losses[0] > 10 * losses[1] > 100 * losses[2]


def test_components_are_orthonormal_and_the_first_varies_most(prior):
    product = prior.pca_components @ prior.pca_components.T
    torch.testing.assert_close(product, torch.eye(7), rtol=0, atol=1e-5)
    spread = ((embeddings() - prior.pca_mean) @ prior.pca_components.T).std(dim=0)
    assert (spread.diff() < 0).all()
    assert spread[0] > 5 * spread[-1]


def test_what_lies_beyond_the_data_falls_into_the_outermost_buckets(prior):
    far = prior.pca_mean + 100 * prior.pca_components[0]
    assert prior.encode(far)[0, 0] == 8
    assert prior.encode(2 * prior.pca_mean - far)[0, 0] == 0


def test_fewer_codes_leave_the_other_components_at_the_mean(prior):
    codes = prior.encode(embeddings(5))
    for count in (0, 3):
        coordinates = (prior.decode(codes[:, :count]) - prior.pca_mean) @ prior.pca_components.T
        torch.testing.assert_close(coordinates[:, count:], torch.zeros(5, 7 - count), rtol=0, atol=1e-5)
        whole = (prior.decode(codes) - prior.pca_mean) @ prior.pca_components.T
        torch.testing.assert_close(coordinates[:, :count], whole[:, :count], rtol=0, atol=1e-5)


def test_buckets_of_the_dot_product_are_quantiles_of_directions(prior):
    data = embeddings()
    codes = prior.dot_code(data, data.roll(1, 0))
    assert codes.bincount(minlength=4).tolist() == [100] * 4
    assert torch.equal(codes, prior.dot_code(7 * data, 0.1 * data.roll(1, 0)))  # lengths do not matter
    assert prior.dot_code(data, data).eq(3).all()
    assert prior.no_dot_code == 4


def test_data_of_too_few_dimensions(prior):
    data = embeddings()
    flat = prior.pca_mean + (data - prior.pca_mean) @ prior.pca_components[:3].T @ prior.pca_components[:3]
    for data in (embeddings(5), flat):
        with pytest.raises(ConfigError, match="num_components 7: reduce num_components"):
            prior.fit_codes(PrincipalComponents.fit([data]), data, torch.zeros(3))
    with pytest.raises(ConfigError, match="embeddings have width 6"):
        prior.fit_codes(PrincipalComponents.fit([torch.randn(40, 6)]), torch.randn(40, 6), torch.zeros(3))


# The transformer


@torch.no_grad()
def test_cached_steps_equal_the_whole_sequence(prior, text):
    codes = torch.randint(9, (3, 7), generator=torch.Generator().manual_seed(3))
    embedding, states, mask, dots = text
    whole, _ = prior(codes[:, :6], dots, embedding, states, mask)
    assert whole.shape == (3, 7, 9)
    for first in range(4):  # from a memory that holds that many codes
        logits, memory = prior(codes[:, :first], dots, embedding, states, mask)
        torch.testing.assert_close(logits, whole[:, : first + 1], rtol=1e-4, atol=1e-5)
        for k in range(first, 6):
            before = memory
            logits, memory = prior(codes[:, k : k + 1], memory=memory)
            torch.testing.assert_close(logits[:, 0], whole[:, k + 1], rtol=1e-4, atol=1e-5)
            again, _ = prior(codes[:, k : k + 1], memory=before)  # a memory can be used twice
            assert torch.equal(again, logits)
        with pytest.raises(InputError, match="all 7 codes were predicted"):
            prior(codes[:, 6:], memory=memory)


@torch.no_grad()
def test_a_code_sees_the_text_and_the_codes_before_it_alone(prior, text):
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(9, (3, 7), generator=generator)
    embedding, states, mask, dots = text

    def logits(codes, dots, embedding, states):
        return prior(codes[:, :-1], dots, embedding, states, mask)[0]

    before = logits(codes, dots, embedding, states)

    def changed(after):
        return [bool((after[:, k] - before[:, k]).abs().max() > 1e-4) for k in range(7)]

    other = codes.clone()
    other[:, 3] = (other[:, 3] + 4) % 9
    assert changed(logits(other, dots, embedding, states)) == [False] * 4 + [True] * 3
    assert all(changed(logits(codes, (dots + 1) % 5, embedding, states)))
    assert all(changed(logits(codes, dots, embedding.roll(1, 0), states)))
    assert all(changed(logits(codes, dots, embedding, states.roll(1, 0))))
    noisy = states.where(mask[..., None], torch.randn(states.shape, generator=generator))
    assert not any(changed(logits(codes, dots, embedding, noisy)))


@torch.no_grad()
def test_padding_can_be_left_out(prior, text):
    codes = torch.randint(9, (3, 7), generator=torch.Generator().manual_seed(3))
    embedding, states, mask, dots = text
    whole, _ = prior(codes[:, :6], dots, embedding, states, mask)
    short, _ = prior(codes[:, :6], dots, embedding, states[:, :4], mask[:, :4])
    torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-5)
    first, memory = prior(codes[:, :0], dots, embedding, states[:, :4], mask[:, :4])
    torch.testing.assert_close(first, whole[:, :1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prior(codes[:, :1], memory=memory)[0], whole[:, 1:2], rtol=1e-4, atol=1e-5)


def test_a_fresh_prior_takes_all_codes_for_about_alike():
    prior = AutoregressivePrior(SETTINGS).initialize_for_training(torch.Generator().manual_seed(0))
    again = AutoregressivePrior(SETTINGS).initialize_for_training(torch.Generator().manual_seed(0))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in prior.state_dict().items())
    codes, dots = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    states = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(1))
    logits, _ = prior(codes, dots, torch.ones(2, 12), states, torch.ones(2, 5))
    assert (logits.log_softmax(-1) + torch.tensor(9.0).log()).abs().mean() < 1
    logits.square().mean().backward()
    untouched = {name for name, p in prior.named_parameters() if p.grad is None}
    assert untouched == {"pca_mean", "pca_components", "code_low", "code_high", "dot_edges"}


class Counter(ModelHook):
    """Counts what offloading would bring the weights for."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@torch.no_grad()
def test_every_entry_passes_through_a_wrapped_forward(prior, text):
    embedding, states, mask, dots = text
    hook = Counter()
    add_hook_to_module(prior, hook)
    codes = prior.encode(embedding)
    prior.decode(codes)
    prior.dot_code(embedding, embedding)
    _, memory = prior(codes[:, :0], dots, embedding, states, mask)
    prior(codes[:, :1], memory=memory)
    assert hook.calls == 5
    remove_hook_from_module(prior)


# Bad settings and shapes, folders


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_components": 13}, "num_components is 13; it must be at most embedding_dim, 12"),
        ({"num_components": 0}, "num_components is 0"),
        ({"num_components": 2.0}, "num_components is 2.0"),
        ({"num_buckets": 1}, "num_buckets is 1; it must be a whole number from 2"),
        ({"num_buckets": 10**9}, "num_buckets is 1000000000"),
        ({"num_dot_buckets": 1}, "num_dot_buckets is 1"),
        ({"num_layers": 1000}, "num_layers is 1000"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"num_attention_heads": 16_384, "attention_head_dim": 16_384}, "from 2 to 65536"),
        ({"num_attention_heads": 1024, "num_layers": 256, "attention_head_dim": 64}, "the limit is"),
        ({"num_embeddings": 16_384}, "at most 16384 tokens"),
        ({"text_dim": 0}, "text_dim is 0"),
        ({"added_emb_type": "prd"}, "has no setting 'added_emb_type'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_allocated(settings, words, monkeypatch):
    def build(self, config):
        raise AssertionError("layers were built")

    monkeypatch.setattr(AutoregressivePrior, "build", build)
    with pytest.raises(ConfigError, match=words):
        AutoregressivePrior(SETTINGS | settings)


def test_the_papers_counts_are_the_default():
    config = AutoregressivePriorConfig()
    assert (config.num_components, config.num_buckets, config.num_tokens) == (319, 1024, 77 + 2 + 318)
    with torch.device("meta"):
        prior = AutoregressivePrior()
    count = sum(parameter.numel() for parameter in prior.parameters())
    assert count == pytest.approx(1e9, rel=0.05)
    assert config.approximate_parameters() == pytest.approx(count, rel=0.01)


def test_wrong_shapes(prior, text):
    embedding, states, mask, dots = text
    codes = torch.zeros(3, 6, dtype=torch.long)
    good = {"proj_embedding": embedding, "encoder_hidden_states": states, "attention_mask": mask, "dot_codes": dots}
    for name, bad, words in (
        ("proj_embedding", embedding[:, :5], r"proj_embedding is \(3, 5\)"),
        ("encoder_hidden_states", states[..., :5], r"encoder_hidden_states is \(3, 5, 5\)"),
        ("encoder_hidden_states", states.repeat(1, 2, 1), "with at most 5 tokens"),
        ("attention_mask", mask[:, :3], r"attention_mask is \(3, 3\)"),
        ("dot_codes", dots.float(), r"dot_codes is torch.float32"),
        ("dot_codes", dots[:2], "batch sizes differ"),
        ("proj_embedding", embedding[:2], "batch sizes differ"),
    ):
        with pytest.raises(InputError, match=words):
            prior(codes, **(good | {name: bad}))
    for bad, words in ((codes.repeat(1, 2), r"codes are \(3, 12\)"), (codes[:2], "batch sizes differ")):
        with pytest.raises(InputError, match=words):
            prior(bad, **good)
    _, memory = prior(codes[:, :0], **good)
    for bad, words in ((codes[:, :2], r"codes are \(3, 2\)"), (codes[:2, :1], "batch sizes differ")):
        with pytest.raises(InputError, match=words):
            prior(bad, memory=memory)
    with pytest.raises(InputError, match="or a memory"):
        prior(codes)
    with pytest.raises(InputError, match=r"codes are \(3, 12\)"):
        prior.decode(codes.repeat(1, 2))
    with pytest.raises(InputError, match=r"image_embedding is \(3, 5\)"):
        prior.encode(embedding[:, :5])
    with pytest.raises(InputError, match=r"text_embedding is \(3, 5\)"):
        prior.dot_code(embedding[:, :5], embedding)


@torch.no_grad()
def test_a_folder_round_trip(prior, text, tmp_path):
    prior.save_pretrained(tmp_path)
    read = AutoregressivePrior.from_pretrained(tmp_path)
    assert read.config == prior.config
    embedding, states, mask, dots = text
    codes = prior.encode(embeddings(3))
    assert torch.equal(read.encode(embeddings(3)), codes)
    assert torch.equal(*(net(codes[:, :6], dots, embedding, states, mask)[0] for net in (read, prior)))
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('_buckets": 9', '_buckets": 8')
    )
    with pytest.raises(WeightsError):
        AutoregressivePrior.from_pretrained(tmp_path)


@torch.no_grad()
def test_half_types(prior, text):
    embedding, states, mask, dots = text
    codes = prior.encode(embeddings(3))
    for dtype in (torch.bfloat16, torch.float16):
        narrow = copy.deepcopy(prior).to(dtype)
        logits, _ = narrow(codes[:, :-1], dots, embedding.to(dtype), states.to(dtype), mask)
        assert logits.dtype == torch.float32
        assert_equal_but_rounding(
            logits, lambda: prior(codes[:, :-1], dots, embedding, states, mask)[0], [prior], dtype=dtype
        )
        assert narrow.decode(codes).dtype == torch.float32
