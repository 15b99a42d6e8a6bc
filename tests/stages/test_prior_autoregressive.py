"""The autoregressive prior as a stage: sampling, guidance and callbacks; and the choice among candidates."""

import math

import pytest
import torch
import torch.nn.functional as F

from unclip import AutoregressivePrior, Cancelled, InputError
from unclip.clip.encoders import TextEmbedding
from unclip.diffusion.loop import NoiseSource, generators_from_seed
from unclip.models.pca import PrincipalComponents
from unclip.models.prior_autoregressive import dot_product
from unclip.stages.prior import AutoregressivePriorStage, closest, draw_code, sample_best, upper_half
from unclip.stages.stage import PriorCondition

from ..rounding import TIMES, UNIT

NUM_CODES = 5
NUM_BUCKETS = 6


@pytest.fixture(scope="module")
def prior():
    generator = torch.Generator().manual_seed(0)
    prior = AutoregressivePrior(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=16,
        num_embeddings=11,
        num_components=NUM_CODES,
        num_buckets=NUM_BUCKETS,
        num_dot_buckets=4,
    ).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    data = torch.randn(200, 16, generator=generator)
    prior.fit_codes(PrincipalComponents.fit([data]), data, dot_product(data, data.roll(1, 0)))
    return prior


def condition(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(11) < 5
    states = torch.randn(rows, 11, 16, generator=generator)
    return PriorCondition(TextEmbedding(torch.randn(rows, 16, generator=generator), states, mask.expand(rows, -1)))


def noise(seed=1, rows=3):
    return NoiseSource(generators_from_seed(seed, rows), rows)


# How a code is drawn


def test_codes_have_their_probabilities():
    logits = torch.tensor([[0.0, 2.0, -1.0, 1.0]])
    places = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature in (1.0, 0.5, 3.0):
        codes = draw_code(logits.expand(20_000, -1), places, temperature, 1.0)
        shares = codes.bincount(minlength=4) / 20_000
        torch.testing.assert_close(shares, (logits[0] / temperature).softmax(-1), rtol=0, atol=1e-4)
        assert (codes.diff() >= 0).all()  # in the order of the buckets, so a little more noise is a little more


def test_at_temperature_zero_the_likeliest_is_taken():
    logits = torch.tensor([[0.0, 2.0, -1.0], [3.0, 2.0, 1.0]])
    for place in (0.0, 0.5, 1.0):
        assert draw_code(logits, torch.full((2,), place, dtype=torch.float64), 0.0, 1.0).tolist() == [1, 0]


def test_the_smallest_temperature_takes_the_likeliest_code():
    logits = torch.tensor([[0.0, 2.0, -1.0], [-3.0, -5.0, -4.0]])
    places = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert draw_code(logits, places, 5e-324, 1.0).tolist() == [1, 0]
    assert draw_code(logits, places, 1e-308, 0.9).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, {1}), (0.499, {1}), (0.501, {1, 3}), (0.799, {1, 3}), (0.801, {0, 1, 3})]
)
def test_top_p_leaves_the_likeliest(top_p, kept):
    chances = torch.tensor([0.15, 0.5, 0.05, 0.3])
    places = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    shares = draw_code(chances.log().expand(4000, -1), places, 1.0, top_p).bincount(minlength=4) / 4000
    wanted = torch.tensor([chance if code in kept else 0.0 for code, chance in enumerate(chances.tolist())])
    torch.testing.assert_close(shares, wanted / wanted.sum(), rtol=0, atol=1e-3)


def test_extreme_noise_draws_codes_of_positive_probability():
    logits = torch.tensor([[-math.inf, 1.0, 1.0, -math.inf]])
    for place, code in ((0.0, 1), (0.49, 1), (0.51, 2), (1.0, 2)):
        assert draw_code(logits, torch.tensor([place], dtype=torch.float64), 1.0, 1.0).tolist() == [code]


@pytest.mark.parametrize("num_buckets", [2, 5, 64])
def test_dot_products_are_of_the_upper_half(num_buckets):
    places = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    counts = upper_half(places, num_buckets).bincount(minlength=num_buckets)
    assert counts[: num_buckets // 2].sum() == 0
    upper = counts[num_buckets // 2 :]
    assert upper.max() - upper.min() <= 2


# The stage


class Recorder:
    """Records the prior's logits of one `sample` for each call, and the number of rows."""

    def __init__(self, prior):
        self.logits, self.rows, self.codes, self.dots = [], [], [], []

        def seen(module, arguments, output):
            logits = output[0][:, -1]
            self.logits.append(logits)
            self.rows.append(len(logits))
            (self.dots if len(arguments) > 1 else self.codes).append(arguments[len(arguments) > 1].squeeze(-1))

        prior.register_forward_hook(seen)


@torch.no_grad()
def test_likelihood_by_teacher_forcing_equals_that_of_sampling(prior):
    stage, asked = AutoregressivePriorStage(prior), condition()
    seen = Recorder(prior)
    codes = prior.encode(stage.sample(asked, noise=noise()))
    assert torch.equal(torch.stack(seen.codes, dim=1), codes[:, :-1])
    drawn = [row.log_softmax(-1).gather(1, codes[:, k : k + 1]) for k, row in enumerate(seen.logits)]
    found = stage.log_likelihood(asked, seen.dots[0], codes)
    assert found.shape == (3, NUM_CODES)
    torch.testing.assert_close(found, torch.cat(drawn, dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum(dim=1), torch.cat(drawn, dim=1).sum(dim=1), rtol=1e-4, atol=1e-4)
    assert found.max() < 0


@torch.no_grad()
def test_samples_follow_the_likelihood(prior):
    """The share of each first pair of codes against its probability under the three upper dot products' mixture."""
    count = 6000
    asked = condition(1)
    stage, wide = AutoregressivePriorStage(prior), asked.repeat(count)
    drawn = prior.encode(stage.sample(wide, noise=NoiseSource(torch.Generator().manual_seed(0), count)))
    pairs = torch.cartesian_prod(torch.arange(NUM_BUCKETS), torch.arange(NUM_BUCKETS))
    codes = F.pad(pairs, (0, NUM_CODES - 2))
    chances = torch.zeros(len(pairs))
    for dot in (2, 3):
        dots = torch.full((len(pairs),), dot)
        chances += stage.log_likelihood(asked.repeat(len(pairs)), dots, codes)[:, :2].sum(dim=1).exp() / 2
    shares = (drawn[:, 0] * NUM_BUCKETS + drawn[:, 1]).bincount(minlength=len(pairs)) / count
    assert chances.sum().item() == pytest.approx(1, abs=1e-4)
    assert (shares - chances).abs().max() < 5 * (0.25 / count) ** 0.5
    assert (shares - chances).abs().sum() < 0.1 < (chances - 1 / len(pairs)).abs().sum()


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_without_guidance_there_is_one_forward_of_one_batch(prior, scale):
    seen = Recorder(prior)
    plain = AutoregressivePriorStage(prior).sample(
        condition(), noise=noise(), null=condition(seed=9), guidance_scale=scale
    )
    assert seen.rows == [3] * NUM_CODES
    assert torch.equal(plain, AutoregressivePriorStage(prior).sample(condition(), noise=noise()))


@torch.no_grad()
def test_guidance_pushes_each_code_away_from_the_null_text(prior):
    seen = Recorder(prior)
    asked, null = condition(), condition(seed=9)
    codes = prior.encode(
        AutoregressivePriorStage(prior, temperature=0).sample(asked, noise=noise(), null=null, guidance_scale=3.0)
    )
    assert seen.rows == [6] * NUM_CODES
    assert seen.dots[0][:3].eq(prior.no_dot_code).all()
    assert (seen.dots[0][3:] >= 2).all()
    for k, logits in enumerate(seen.logits):
        empty, given = logits.chunk(2)
        assert torch.equal(codes[:, k], (empty + 3 * (given - empty)).argmax(dim=1))
    joined, seen_logits = null.join(asked), torch.stack(seen.logits, dim=1)
    whole, _ = prior(
        codes[:, :-1].repeat(2, 1), seen.dots[0], joined.text.embeds, joined.text.hidden_states, joined.text.mask
    )  # the null branch reads the codes that were drawn, too
    torch.testing.assert_close(seen_logits, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_row_is_the_same_alone_and_among_others(prior, scale):
    stage, asked, null = AutoregressivePriorStage(prior), condition(), condition(seed=9)
    together = stage.sample(asked, noise=noise(seed=5), null=null, guidance_scale=scale)
    for i in range(3):
        alone = stage.sample(asked.select([i]), noise=noise(5 + i, 1), null=null.select([i]), guidance_scale=scale)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    assert not torch.equal(together, stage.sample(asked, noise=noise(seed=6), null=null, guidance_scale=scale))


@torch.no_grad()
def test_given_latents_are_the_noise(prior):
    stage, asked = AutoregressivePriorStage(prior), condition()
    shape = stage.sample_shape(len(asked))
    assert shape == (3, 1 + NUM_CODES)
    numbers = noise().draw(shape, "cpu")
    drawn = stage.sample(asked, noise=noise())
    assert torch.equal(drawn, stage.sample(asked, noise=noise(99), latents=numbers))
    assert torch.equal(drawn, stage.sample(asked, noise=noise(99), latents=numbers.double()))


@torch.no_grad()
def test_a_callback_gets_every_code(prior):
    stage, asked, told, bars = AutoregressivePriorStage(prior), condition(), [], []
    drawn = stage.sample(asked, noise=noise(), on_step=told.append, progress=lambda s: bars.append(len(s)) or s)
    assert bars == [NUM_CODES]
    assert [(step.index, step.num_steps, step.t) for step in told] == [(k, 5, 4 - k) for k in range(NUM_CODES)]
    assert torch.equal(told[-1].x0, drawn)
    distances = [(step.x0 - drawn).norm().item() for step in told]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0
    with pytest.raises(InputError, match="cannot be replaced"):
        stage.sample(asked, noise=noise(), on_step=lambda step: step.x)

    def stop(step):
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        stage.sample(asked, noise=noise(), on_step=stop)


# Candidates


def best(stage, asked, *, num_candidates, noise, latents=None):
    def draw(noise, latents):
        return stage.sample(asked, noise=noise, latents=latents)

    return sample_best(draw, asked.text.embeds, num_candidates=num_candidates, noise=noise, latents=latents)


def test_the_closest_candidate_by_direction():
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    candidates = torch.tensor([[[1.0, 1.0], [0.1, 0.1]], [[0.9, 0.1], [-9.0, 9.0]], [[50.0, 50.0], [0.0, 0.01]]])
    assert torch.equal(closest(text, candidates), torch.tensor([[0.9, 0.1], [0.0, 0.01]]))
    assert torch.equal(closest(text, torch.stack([candidates[0], candidates[0] * 2])), candidates[0])  # ties: the first


def test_captions_that_keep_candidates_of_the_same_number():
    """Alone, one of each pair keeps candidate 0 and the other candidate 1; together, the one closer to both."""
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [3.0, 0.0]])
    candidates = torch.tensor(
        [[[1.0, 0.0], [9.0, 0.0], [0.0, 1.0], [0.0, 9.0]], [[0.8, 0.6], [0.8, 0.6], [1.0, 0.0], [0.8, 0.6]]]
    )
    alone = closest(text, candidates)
    assert torch.equal(alone, torch.stack([candidates[k, i] for i, k in enumerate((0, 1, 0, 1))]))
    together = closest(text, candidates, 2)
    assert torch.equal(together, torch.stack([candidates[k, i] for i, k in enumerate((1, 1, 0, 0))]))
    assert torch.equal(closest(text, candidates, 4), candidates[1])


@torch.no_grad()
def test_more_candidates_never_lower_the_dot_product(prior):
    stage, asked = AutoregressivePriorStage(prior), condition(24)
    found, scores = {}, {}
    for count in (1, 2, 4, 8):
        source = noise(7, 24)
        found[count] = best(stage, asked, num_candidates=count, noise=source)
        scores[count] = F.cosine_similarity(found[count], asked.text.embeds)
        # What follows draws as it would without the other candidates.
        following = noise(7, 24)
        stage.sample(asked, noise=following)
        assert torch.equal(source.draw((24, 3), "cpu"), following.draw((24, 3), "cpu"))
    assert torch.equal(found[1], stage.sample(asked, noise=noise(7, 24)))
    for few, many in ((1, 2), (2, 4), (4, 8)):
        kept = ((found[many] - found[few]).abs() < 1e-4).all(dim=1)  # far more than rounding, far less than a bucket
        assert kept.any()  # the first ones are drawn again as they were
        assert (scores[many] > scores[few])[~kept].all()
    assert scores[8].mean() > scores[1].mean() + 0.05


@torch.no_grad()
def test_candidates_of_a_row_do_not_depend_on_its_batch(prior):
    stage, asked = AutoregressivePriorStage(prior), condition(4)
    together = best(stage, asked, num_candidates=3, noise=noise(7, 4))
    for i in range(4):
        alone = best(stage, asked.select([i]), num_candidates=3, noise=noise(7 + i, 1))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)


@torch.no_grad()
def test_given_noise_is_for_the_first_candidate(prior):
    stage, asked = AutoregressivePriorStage(prior), condition(1)
    numbers = torch.randn(1, 1 + NUM_CODES, generator=torch.Generator().manual_seed(4))
    first = stage.sample(asked, noise=noise(0, 1), latents=numbers)
    others = [best(stage, asked, num_candidates=4, noise=noise(s, 1), latents=numbers) for s in range(8)]
    largest = F.cosine_similarity(torch.cat(others), asked.text.embeds.expand(8, -1))
    assert (largest >= F.cosine_similarity(first, asked.text.embeds) - TIMES * UNIT).all()
    assert any((other - first).abs().max() > 1e-3 for other in others)
