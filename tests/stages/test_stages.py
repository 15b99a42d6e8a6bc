"""The stages: shapes, preparation, sampling and inversion."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from unclip import ConfigError, InputError
from unclip.clip.encoders import TextEmbedding
from unclip.diffusion.loop import NoiseSource, generators_from_seed
from unclip.diffusion.sampler import DDIMSampler
from unclip.stages.decoder import DecoderStage
from unclip.stages.prior import PriorStage
from unclip.stages.stage import DecoderCondition, PriorCondition, SuperResCondition, invert, sample, size_px
from unclip.stages.super_res import SuperResStage, Tiling, enlarge

from ..rounding import assert_equal_but_rounding


def text(rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(11) < 5
    return TextEmbedding(
        torch.randn(rows, 16, generator=generator),
        torch.randn(rows, 11, 16, generator=generator),
        mask.expand(rows, -1),
    )


@pytest.fixture
def stages(tiny_pipeline):
    pipe = tiny_pipeline
    return {
        "prior": PriorStage(pipe.prior, pipe.prior_scheduler.process),
        "decoder": DecoderStage(pipe.decoder, pipe.text_proj, pipe.decoder_scheduler.process),
        "super_res": SuperResStage(pipe.super_res_first, pipe.super_res_last, pipe.super_res_scheduler.process),
    }


CONDITIONS = {
    "prior": lambda: PriorCondition(text()),
    "decoder": lambda: DecoderCondition.of(text(), text(seed=3).embeds),
    "super_res": lambda: SuperResCondition(torch.rand(2, 3, 8, 8) * 2 - 1),
}


def networks(stage):
    return [part for part in vars(stage).values() if isinstance(part, torch.nn.Module)]


SHAPES = {"prior": (2, 16), "decoder": (2, 3, 8, 8), "super_res": (2, 3, 16, 16)}


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_shapes(stages, name):
    stage, condition = stages[name], CONDITIONS[name]()
    assert stage.sample_shape(len(condition)) == SHAPES[name]
    x = torch.randn(SHAPES[name])
    output = stage.prepare(condition)(x, 500)
    assert output.dtype == torch.float32
    assert output.shape == (2, 6, 8, 8) if name == "decoder" else SHAPES[name]


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_one_timestep_for_each_row_as_in_training(stages, name):
    stage, condition = stages[name], CONDITIONS[name]()
    denoise, x = stage.prepare(condition), torch.randn(SHAPES[name])
    rows = denoise(x, torch.tensor([10, 700]))
    for i, t in enumerate((10, 700)):
        # Prepare again, since the result depends on the weights too.
        assert_equal_but_rounding(rows[i], lambda i=i, t=t: stage.prepare(condition)(x, t)[i], networks(stage))


@pytest.mark.parametrize("name", SHAPES)
def test_training_reaches_the_weights(own_pipeline, name):
    pipe = own_pipeline
    stage = {
        "prior": PriorStage(pipe.prior, pipe.prior_scheduler.process),
        "decoder": DecoderStage(pipe.decoder, pipe.text_proj, pipe.decoder_scheduler.process),
        "super_res": SuperResStage(pipe.super_res_first, pipe.super_res_first, pipe.super_res_scheduler.process),
    }[name]
    stage.prepare(CONDITIONS[name]())(torch.randn(SHAPES[name]), torch.tensor([10, 700])).square().mean().backward()
    trained = [getattr(stage, part) for part in ("prior", "decoder", "text_proj", "first") if hasattr(stage, part)]
    for network in trained:
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


@torch.no_grad()
def test_a_null_image_embedding_is_the_learned_one(stages, tiny_pipeline):
    stage, x = stages["decoder"], torch.randn(2, 3, 8, 8)
    null = stage.prepare(DecoderCondition.null(text()))(x, 5)
    learned = tiny_pipeline.text_proj.learned_classifier_free_guidance_embeddings.expand(2, -1)
    assert torch.equal(null, stage.prepare(DecoderCondition.of(text(), learned))(x, 5))
    assert not torch.equal(null, stage.prepare(DecoderCondition.of(text(), torch.zeros(2, 16)))(x, 5))


@torch.no_grad()
def test_padding_is_not_seen(stages):
    """Values under the mask have no effect."""
    here, x = text(), {"prior": torch.randn(2, 16), "decoder": torch.randn(2, 3, 8, 8)}
    noisy = here.hidden_states.where(here.mask[..., None], torch.randn_like(here.hidden_states))
    there = TextEmbedding(here.embeds, noisy, here.mask)
    for name, condition in (("prior", PriorCondition), ("decoder", lambda t: DecoderCondition.of(t, here.embeds))):

        def denoised(given, stage=stages[name], condition=condition, x_t=x[name]):
            return stage.prepare(condition(given))(x_t, 5)

        assert_equal_but_rounding(denoised(there), lambda denoised=denoised: denoised(here), networks(stages[name]))


@torch.no_grad()
def test_finishing(stages, tiny_pipeline):
    x = torch.randn(2, 16)
    prior = tiny_pipeline.prior
    assert torch.equal(stages["prior"].finish(x), x * prior.clip_std + prior.clip_mean)
    for name in ("decoder", "super_res"):
        assert stages[name].finish(torch.tensor([-3.0, 0.5, 3.0])).tolist() == [-1, 0.5, 1]


@torch.no_grad()
def test_super_resolution_changes_networks_at_its_last_timestep(stages, tiny_pipeline):
    stage, condition, x = stages["super_res"], CONDITIONS["super_res"](), torch.randn(2, 3, 16, 16)
    large = enlarge(condition.low_res, 16)
    denoise, stacked = stage.prepare(condition), torch.cat([x, large], dim=1)
    assert torch.equal(denoise(x, 0), tiny_pipeline.super_res_last(stacked, 0).sample)
    assert torch.equal(denoise(x, 5), tiny_pipeline.super_res_first(stacked, 5).sample)


@torch.no_grad()
def test_super_resolution_in_two_types(own_pipeline):
    own_pipeline.super_res_last.to(torch.bfloat16)
    pipe = own_pipeline
    stage = SuperResStage(pipe.super_res_first, pipe.super_res_last, pipe.super_res_scheduler.process)
    denoise = stage.prepare(CONDITIONS["super_res"]())
    for t in (0, 5):
        assert denoise(torch.randn(2, 3, 16, 16), t).dtype == torch.float32


def test_enlarging():
    small = torch.rand(2, 3, 8, 8)
    large = enlarge(small, 16)
    assert large.shape == (2, 3, 16, 16)
    assert torch.equal(large, F.interpolate(small, (16, 16), mode="bicubic", antialias=True, align_corners=False))
    flat = torch.full((1, 3, 4, 4), 0.25)
    torch.testing.assert_close(enlarge(flat, 16), torch.full((1, 3, 16, 16), 0.25))
    torch.testing.assert_close(enlarge(torch.rand(1, 3, 32, 16), 16).shape, (1, 3, 16, 16))


@pytest.mark.parametrize("size", [None, (64, 64), "64"])
def test_a_configuration_without_a_sample_size(size):
    assert size_px(64) == 64
    with pytest.raises(ConfigError, match="sample_size is"):
        size_px(size)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_sampling(stages, tiny_pipeline, name):
    scheduler = getattr(tiny_pipeline, f"{name}_scheduler")

    def draw(seed, **more):
        noise = NoiseSource(generators_from_seed(seed, 2), 2)
        timesteps = scheduler.spaced_timesteps(2)
        torch.manual_seed(0)
        condition = CONDITIONS[name]()
        return sample(stages[name], condition, sampler=scheduler.sampler(), timesteps=timesteps, noise=noise, **more)

    first = draw(1)
    assert first.shape == SHAPES[name]
    assert first.dtype == torch.float32
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    x = torch.randn(SHAPES[name], dtype=torch.float64)
    assert draw(1, latents=x).isfinite().all()


@torch.no_grad()
def test_inverting_under_guidance_undoes_guided_sampling(stages, tiny_pipeline):
    """Sampling and inversion use the same guided denoiser, so x_T depends on the scale."""
    condition, null = CONDITIONS["prior"](), PriorCondition(text(seed=9))
    x0 = torch.randn(SHAPES["prior"], generator=torch.Generator().manual_seed(1)) * 0.5
    more = {"timesteps": (999, 500, 200, 50, 0), "num_rounds": 2}
    plain = invert(stages["prior"], condition, x0, **more)
    guided = invert(stages["prior"], condition, x0, null=null, guidance_scale=3.0, **more)
    assert plain.shape == x0.shape
    assert (plain - guided).abs().max() > 1e-3
    with pytest.raises(InputError, match="two or more ascending timesteps"):
        invert(stages["prior"], condition, x0, timesteps=(999,))


@torch.no_grad()
def test_sampling_with_guidance_needs_a_null_condition(stages, tiny_pipeline):
    scheduler = tiny_pipeline.prior_scheduler
    arguments = {"sampler": scheduler.sampler(), "timesteps": (999, 0), "noise": NoiseSource(None, 2)}
    with pytest.raises(AssertionError):
        sample(stages["prior"], CONDITIONS["prior"](), guidance_scale=2.0, **arguments)
    null = PriorCondition(text(seed=9))
    assert sample(stages["prior"], CONDITIONS["prior"](), null=null, guidance_scale=2.0, **arguments).shape == (2, 16)


# ---- a path that departs from a picture, and sizes ----


@torch.no_grad()
def test_an_origin_is_noised_to_the_first_timestep(stages):
    stage, condition = stages["super_res"], CONDITIONS["super_res"]()
    origin, seen = torch.rand(2, 3, 16, 16), []

    class Watching(type(stage)):
        def prepare(self, condition):
            return lambda x, t: seen.append(x) or x

    latents = torch.randn(2, 3, 16, 16)
    sample(
        Watching(stage.first, stage.last, stage.process),
        condition,
        sampler=DDIMSampler(stage.process),
        timesteps=(300, 0),
        noise=NoiseSource(None, 2),
        latents=latents,
        origin=origin,
    )
    torch.testing.assert_close(seen[0], stage.process.add_noise(origin, latents, 300))


@torch.no_grad()
def test_stages_of_other_sizes(stages, tiny_pipeline):
    decoder = DecoderStage(tiny_pipeline.decoder, tiny_pipeline.text_proj, stages["decoder"].process, (4, 12))
    assert decoder.sample_shape(2) == (2, 3, 4, 12)
    large = SuperResStage(*[tiny_pipeline.super_res_first] * 2, stages["super_res"].process, (8, 24))
    condition = SuperResCondition(torch.rand(2, 3, 4, 12))
    assert large.sample_shape(2) == (2, 3, 8, 24)
    assert large.prepare(condition)(torch.randn(2, 3, 8, 24), 5).shape == (2, 3, 8, 24)
    assert enlarge(condition.low_res, (8, 24)).shape == (2, 3, 8, 24)


# ---- steps with less computation ----


@pytest.fixture
def rows_of(monkeypatch):
    """`rows_of(network)` is the list of the batch sizes of its calls from now on."""

    def watch(network):
        seen, forward = [], type(network).forward
        monkeypatch.setattr(
            type(network),
            "forward",
            lambda self, x, *given, **named: seen.append(len(x)) or forward(self, x, *given, **named),
        )
        return seen

    return watch


@pytest.mark.parametrize(
    ("interval", "rows"),
    [((0, 1), [4, 4, 4, 4]), ((0.5, 1), [4, 4, 2, 2]), ((0, 0.6), [2, 4, 4, 4]), ((0.3, 0.6), [2, 4, 2, 2])],
)
@torch.no_grad()
def test_guidance_in_an_interval(stages, rows_of, interval, rows):
    stage, condition, null = stages["decoder"], CONDITIONS["decoder"](), DecoderCondition.null(text(seed=9))
    seen, x_T = rows_of(stage.decoder), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def draw(timesteps, **more):
        sampler, noise = DDIMSampler(stage.process), NoiseSource(None, 2)
        return sample(stage, condition, sampler=sampler, timesteps=timesteps, noise=noise, latents=x_T, **more)

    guided = draw((999, 500, 200, 0), null=null, guidance_scale=3.0, guidance_interval=interval)
    assert seen == rows
    whole = draw((999, 500, 200, 0), null=null, guidance_scale=3.0)
    assert torch.equal(guided, whole) == (interval == (0, 1))
    nowhere = draw((999, 500, 200, 0), null=null, guidance_scale=3.0, guidance_interval=(0.7, 0.8))
    assert torch.equal(nowhere, draw((999, 500, 200, 0)))


@pytest.mark.parametrize("name", ["decoder", "super_res"])
@pytest.mark.parametrize("every", [1, 2, 4])
@torch.no_grad()
def test_deep_levels_are_computed_in_every_nth_step(stages, name, every):
    stage, count = stages[name], []
    network = stage.decoder if name == "decoder" else stage.first
    num_steps = 6 if name == "decoder" else 5  # the last step of super-resolution has its own network
    timesteps, condition = (900, 700, 500, 300, 100, 0), CONDITIONS[name]()
    latents = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1))

    def draw(stage):
        sampler, noise = DDIMSampler(stage.process), NoiseSource(None, 2)
        return sample(stage, condition, sampler=sampler, timesteps=timesteps, noise=noise, latents=latents)

    whole = draw(stage)
    hooks = [
        part.register_forward_hook(lambda *given: count.append(1))
        for part in (network.mid_block, network.down_blocks[0].downsamplers[0])
    ]
    made = draw(replace(stage, reuse=every))
    for hook in hooks:
        hook.remove()
    assert len(count) == 2 * -(-num_steps // every)
    assert torch.equal(made, whole) == (every == 1)
    assert made.isfinite().all()


@torch.no_grad()
def test_tiles_are_computed_exactly(stages):
    stage = replace(stages["super_res"], tiling=Tiling(8, 4), reuse=2)
    conditions = CONDITIONS["super_res"]()
    denoise, exact = (each.prepare(conditions) for each in (stage, replace(stage, reuse=1)))
    for t in (900, 500):
        x = torch.randn(2, 3, 16, 16)
        assert torch.equal(denoise(x, t), exact(x, t))
