"""Both kinds of prior in the pipeline, and several candidates of either."""

import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from unclip import (
    AutoregressivePrior,
    Cancelled,
    ConfigError,
    EmbeddingPrior,
    EmbeddingPriorNetwork,
    EmbeddingStatistics,
    InputError,
    PriorTransformer,
    UnCLIPPipeline,
)
from unclip.models.pca import PrincipalComponents
from unclip.models.prior_autoregressive import dot_product

from ..conftest import randomize

SETTINGS = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "embedding_dim": 16,
    "num_embeddings": 11,
    "num_components": 6,
    "num_buckets": 8,
    "num_dot_buckets": 4,
}
DECODING = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2, "output_type": "pt"}


def autoregressive_prior(**settings):
    generator = torch.Generator().manual_seed(0)
    prior = AutoregressivePrior(SETTINGS | settings).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    data = torch.randn(200, prior.config.embedding_dim, generator=generator)
    prior.fit_codes(PrincipalComponents.fit([data]), data, dot_product(data, data.roll(1, 0)))
    return prior


@pytest.fixture(scope="module")
def pipe(tiny_components, build_pipeline):
    components = tiny_components() | {"prior": autoregressive_prior()}
    del components["prior_scheduler"]
    return build_pipeline("text", components)


@pytest.fixture
def draw(pipe):
    def run(*arguments, **more):
        return pipe(*arguments, return_intermediates=True, **{**DECODING, **more})

    return run


def test_pictures_by_an_autoregressive_prior(draw, pipe):
    assert pipe.prior_scheduler is None
    made = draw(["a cat", "a red apple"], seed=3)
    assert made.images.shape == (2, 3, 16, 16)
    codes = pipe.prior.encode(made.image_embeddings)
    torch.testing.assert_close(pipe.prior.decode(codes), made.image_embeddings, rtol=0, atol=1e-5)  # made of codes
    assert torch.equal(draw(["a cat", "a red apple"], seed=3).images, made.images)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    assert torch.equal(draw(["a cat", "a red apple"], generator=generators).images, made.images)
    alone = draw("a red apple", seed=4)
    torch.testing.assert_close(alone.images[0], made.images[1], rtol=0, atol=1e-5)
    assert not torch.equal(draw("a red apple", seed=5).image_embeddings, alone.image_embeddings)
    assert not torch.equal(draw("a cat", seed=4, prior_guidance_scale=0).image_embeddings, alone.image_embeddings)


def test_a_prior_from_a_folder_by_its_class_name(pipe, draw, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["prior"] == ["unclip", "AutoregressivePrior"]
    assert "prior_scheduler" not in index
    read = UnCLIPPipeline.from_pretrained(tmp_path / "model")
    read.set_progress_bar_config(disable=True)
    assert isinstance(read.prior, AutoregressivePrior)
    found, wanted = read("a cat", seed=1, **DECODING).images, draw("a cat", seed=1).images
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    again = UnCLIPPipeline.from_pipe(read)
    assert again.prior_scheduler is None


def test_how_codes_are_drawn(draw):
    plain = draw("a cat", seed=1).image_embeddings
    assert torch.equal(draw("a cat", seed=1, prior_temperature=1, prior_top_p=1).image_embeddings, plain)
    for how in ({"prior_temperature": 3.0}, {"prior_top_p": 0.2}, {"prior_guidance_scale": 60.0}):
        assert not torch.equal(draw("a cat", seed=1, **how).image_embeddings, plain)
    greedy = [draw("a cat", seed=s, prior_temperature=0.0, prior_guidance_scale=1).image_embeddings for s in range(8)]
    assert len(torch.cat(greedy).unique(dim=0)) <= 2  # one for each of the two upper dot products
    for name, value in (("prior_temperature", -1.0), ("prior_top_p", 0.0), ("prior_top_p", "x")):
        with pytest.raises(InputError, match=f"{name} is"):
            draw("a cat", **{name: value})


def test_an_autoregressive_prior_takes_one_step_for_each_code(draw):
    steps = []
    draw("a cat", seed=1, prior_num_inference_steps=3, callback_on_step_end=lambda *about: steps.append(about))
    prior = [(index, t, told["num_steps"]) for _, index, t, told in steps if told["stage"] == "prior"]
    assert prior == [(k, 5 - k, 6) for k in range(6)]

    def stop(pipeline, step, t, told):
        return {"stop": step == 2}

    with pytest.raises(Cancelled, match="stage 'prior' after step 3 of 6"):
        draw("a cat", callback_on_step_end=stop)
    with pytest.raises(InputError, match="cannot be replaced"):
        draw("a cat", callback_on_step_end=lambda *about: {"latents": torch.zeros(1, 16)})


def test_given_noise(draw):
    numbers = torch.randn(1, 7, generator=torch.Generator().manual_seed(0))
    first = draw("a cat", seed=1, prior_latents=numbers).image_embeddings
    assert torch.equal(draw("a cat", seed=2, prior_latents=numbers).image_embeddings, first)
    with pytest.raises(InputError, match=r"prior_latents have shape \(1, 16\); this call needs \(1, 7\)"):
        draw("a cat", prior_latents=torch.zeros(1, 16))


def test_parts_that_do_not_fit(tiny_components, build_pipeline):
    components = tiny_components()
    for settings, words in (
        ({"embedding_dim": 12}, r"prior\.embedding_dim is 12"),
        ({"num_embeddings": 9}, r"prior\.num_embeddings is 9"),
        ({"text_dim": 20}, r"prior\.text_dim is 20, but text_encoder\.hidden_size is 16"),
    ):
        with pytest.raises(ConfigError, match=words):
            build_pipeline("text", components | {"prior": autoregressive_prior(**settings)})
    with pytest.raises(InputError, match="needs the component 'prior_scheduler': its prior is a diffusion prior"):
        build_pipeline("text", components | {"prior_scheduler": None})
    with pytest.raises(
        ConfigError, match="is None; it must be unclip's PriorTransformer or unclip's AutoregressivePrior"
    ):
        build_pipeline("text", components).prior = None
    with pytest.raises(ConfigError, match="Linear; it must be unclip's PriorTransformer or unclip's A"):
        build_pipeline("text", components).prior = torch.nn.Linear(2, 2)


def test_priors_can_be_replaced(tiny_components, build_pipeline):
    pipe = build_pipeline("text", tiny_components())
    diffused = pipe("a cat", seed=1, **DECODING).images
    first, pipe.prior = pipe.prior, autoregressive_prior()
    assert not torch.equal(pipe("a cat", seed=1, **DECODING).images, diffused)
    pipe.prior = first
    assert torch.equal(pipe("a cat", seed=1, **DECODING).images, diffused)


# Candidates, of either prior


@pytest.fixture(params=["diffusion", "autoregressive"])
def either(request, pipe, tiny_pipeline):
    chosen = pipe if request.param == "autoregressive" else tiny_pipeline

    def run(*arguments, **more):
        settings = {**DECODING, "prior_num_inference_steps": 2, "return_intermediates": True}
        return chosen(*arguments, **settings | more)

    run.pipe = chosen
    return run


def scores(pipe, prompts, embeddings):
    with torch.no_grad():
        return F.cosine_similarity(pipe.caption_encoder.encode(prompts).embeds, embeddings)


def test_more_candidates_are_closer_to_the_caption(either):
    prompts = ["a cat", "a red apple"] * 6
    made = {count: either(prompts, seed=5, num_prior_candidates=count) for count in (1, 2, 4)}
    assert torch.equal(made[1].images, either(prompts, seed=5).images)
    found = {count: scores(either.pipe, prompts, one.image_embeddings) for count, one in made.items()}
    for few, many in ((1, 2), (2, 4)):
        assert (found[many] >= found[few] - 1e-6).all()
        assert found[many].mean() > found[few].mean()
        same = (made[few].image_embeddings == made[many].image_embeddings).all(dim=1)
        assert 0 < same.sum() < len(prompts)
        # Where the same embedding is kept, the picture is the same too.
        torch.testing.assert_close(made[few].images[same], made[many].images[same], rtol=0, atol=1e-5)
    alone = either("a red apple", seed=8, num_prior_candidates=4)
    torch.testing.assert_close(alone.images[0], made[4].images[3], rtol=0, atol=1e-5)


def test_candidates_by_one_generator_and_by_none(either):
    def picture(**more):
        return either(["a cat", "an apple"], num_prior_candidates=3, **more).images

    def generator():
        return torch.Generator().manual_seed(2)

    assert torch.equal(picture(generator=generator()), picture(generator=generator()))
    used = generator()
    first, second = (picture(generator=used) for _ in range(2))
    assert torch.equal(first, picture(generator=generator()))
    assert not torch.equal(first, second)
    with torch.random.fork_rng():
        found = []
        for _ in range(2):
            torch.manual_seed(4)
            found.append(picture())
    assert torch.equal(*found)


def test_invalid_numbers_of_candidates(either):
    for count in (0, -1, 1001, 1.5, True, "2", None):
        with pytest.raises(InputError, match=r"num_prior_candidates is .*from 1 to 1000"):
            either("a cat", num_prior_candidates=count)


def test_given_embeddings_need_no_candidates(either):
    embedding = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    made = either("a cat", seed=1, image_embeddings=embedding, num_prior_candidates=4)
    assert torch.equal(made.images, either("a cat", seed=1, image_embeddings=embedding).images)


def test_a_diffusion_prior_draws_no_codes(tiny_pipeline):
    for more in ({"prior_temperature": 0.5}, {"prior_top_p": 0.9}):
        with pytest.raises(InputError, match="but a diffusion prior samples no codes"):
            tiny_pipeline("a cat", **more)


# The same embeddings wherever captions become some


EDITED = {"prior_num_inference_steps": 2, "num_resamples": 1, "strength": 0.5, "return_intermediates": True} | DECODING


@pytest.fixture
def edited(either, tiny_components, build_pipeline):
    """Image to image with the same prior."""
    shared = {**tiny_components(), **either.pipe.components}
    if either.pipe.prior_scheduler is None:
        del shared["prior_scheduler"]
    pipe = build_pipeline("inpaint", shared)
    pictures = [Image.radial_gradient("L").resize((16, 16))]
    return lambda prompt, **more: pipe(prompt, pictures, **EDITED | more)


def ways(pipe):
    """Ways to draw of which each gives another embedding than the plain one."""
    return [{"prior_temperature": 3.0}, {"prior_top_p": 0.2}] if isinstance(pipe.prior, AutoregressivePrior) else []


def test_captions_alone_and_edits_have_the_embeddings_of_pictures(either, edited):
    prompts = ["a cat", "a red apple"] * 4
    plain = either(prompts, seed=5).image_embeddings
    for how in ({}, {"num_prior_candidates": 4}, *ways(either.pipe)):
        wanted = either(prompts, seed=5, **how).image_embeddings
        assert torch.equal(wanted, plain) == (how == {})
        found = either.pipe.embed_captions(prompts, num_inference_steps=2, seed=5, **how)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(edited(prompts, seed=5, **how).image_embeddings, wanted, rtol=0, atol=1e-5)


def test_one_validation_for_all(either, edited):
    def embed(prompt, **more):
        return either.pipe.embed_captions(prompt, num_inference_steps=2, **more)

    for run in (either, edited, embed):
        for more in ({"num_prior_candidates": 0}, {"num_prior_candidates": 1001}, {"num_prior_candidates": True}):
            with pytest.raises(InputError, match=r"num_prior_candidates is .*from 1 to 1000"):
                run("a cat", **more)
        for more in ({"prior_temperature": 101}, {"prior_top_p": 0.0}):
            with pytest.raises(InputError, match=r"prior_(temperature|top_p) is"):
                run("a cat", **more)
        if not ways(either.pipe):
            with pytest.raises(InputError, match="a diffusion prior samples no codes"):
                run("a cat", prior_temperature=0.5)


def test_captions_that_keep_one_candidate(either):
    pipe = either.pipe

    def embed(prompts, **more):
        return pipe.embed_captions(prompts, num_inference_steps=2, seed=[3] * len(prompts), **more)

    prompts = ["a cat", "a red apple"]
    for count in (2, 4):
        assert torch.equal(embed(prompts, captions_per_choice=2), embed(prompts))  # one candidate, no choice
        same = embed(["a cat", "a cat"], num_prior_candidates=count, captions_per_choice=2)
        torch.testing.assert_close(same, embed(["a cat", "a cat"], num_prior_candidates=count), rtol=0, atol=1e-5)
    for wrong in (0, 3, -1, 1.5):
        with pytest.raises(InputError, match="captions_per_choice is"):
            embed(prompts, captions_per_choice=wrong)


@pytest.fixture(scope="module")
def one_call(tiny_components, build_pipeline, tiny_configs):
    prior = randomize(PriorTransformer(**tiny_configs["prior"], additional_embeddings=3), 8)
    return build_pipeline("text", tiny_components() | {"prior": prior, "prior_scheduler": None})


def test_a_prior_of_eclipse_is_called_once_and_nothing_is_unwhitened(one_call):
    stages, given = [], torch.randn(1, 16)
    settings = {"prior_latents": given, "return_intermediates": True, **DECODING}
    made = one_call("a cat", callback_on_step_end=lambda *told: stages.append(told[3]["stage"]), **settings)
    assert stages.count("prior") == 1
    text = one_call.caption_encoder.encode(["a cat"], "cpu")
    network = one_call.prior(given, 0, text.embeds, text.hidden_states, text.mask)
    torch.testing.assert_close(made.image_embeddings, network.predicted_image_embedding, rtol=0, atol=1e-6)
    settings |= {"prior_guidance_scale": 9.0, "prior_num_inference_steps": 3}
    assert torch.equal(one_call("a cat", **settings).image_embeddings, made.image_embeddings)


def test_candidates_of_a_prior_of_eclipse_are_of_other_noise(one_call):
    drawn = torch.cat([one_call.embed_captions("a cat", seed=seed) for seed in (3, 4)])
    assert not torch.allclose(drawn[0], drawn[1])
    text = one_call.caption_encoder.encode(["a cat"], "cpu").embeds
    best = one_call.embed_captions("a cat", seed=3, num_prior_candidates=8)
    assert F.cosine_similarity(best, text) > F.cosine_similarity(drawn[:1], text)


def test_a_folder_with_a_prior_of_eclipse(one_call, tmp_path):
    one_call.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "prior" / "config.json").read_text())
    for key in ("time_embed_act_fn", "time_embed_dim"):  # those that the authors' files do not have
        del config[key]
    (tmp_path / "model" / "prior" / "config.json").write_text(json.dumps(config))
    read = UnCLIPPipeline.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(read.embed_captions("a cat", seed=1), one_call.embed_captions("a cat", seed=1))


def test_a_prior_of_eclipse_of_another_clip(tiny_components, build_pipeline, tiny_configs):
    wide = PriorTransformer(**(tiny_configs["prior"] | {"embedding_dim": 20}), additional_embeddings=3)
    with pytest.raises(ConfigError, match=r"prior\.embedding_dim is 20, but text_encoder\.projection_dim is 16"):
        build_pipeline("text", tiny_components() | {"prior": wide})


DALLE2 = {"embedding_dim": 16, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 6}
DALLE2 |= {"max_text_len": 20, "use_text_encodings": True, "normalized": True, "num_timesteps": 1000}


@pytest.fixture
def dalle2(tiny_components, build_pipeline):
    def build(**settings):
        prior = randomize(EmbeddingPriorNetwork(**DALLE2 | settings), 8)
        made = build_pipeline("text", tiny_components() | {"prior": prior})
        made.statistics = EmbeddingStatistics(torch.zeros(16), torch.ones(16), 3.0, 0.5)
        return made

    return build


def test_a_prior_of_dalle2_pytorch_in_a_pipeline(dalle2, tmp_path):
    pipe = dalle2()
    settings = {"seed": 1, "prior_num_inference_steps": 3, "return_intermediates": True, **DECODING}
    made = pipe(["a cat", "a red apple"], **settings)
    torch.testing.assert_close(made.image_embeddings.norm(dim=1), torch.full((2,), 3.0))
    text = pipe.caption_encoder.encode(["a cat"], "cpu")
    research = EmbeddingPrior(pipe.prior, pipe.prior_scheduler)
    drawn = research.sample(
        text.embeds, encodings=text.hidden_states, mask=text.mask, num_inference_steps=3, guidance_scale=4.0, seed=1
    )
    wanted = F.normalize(drawn, dim=-1) * 3
    torch.testing.assert_close(pipe.embed_captions("a cat", num_inference_steps=3, seed=1), wanted, rtol=0, atol=1e-4)
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["prior"] == ["unclip", "EmbeddingPriorNetwork"]
    read = UnCLIPPipeline.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(read.embed_captions("a cat", num_inference_steps=3, seed=1), wanted, rtol=0, atol=1e-4)


def test_the_norm_of_the_folder_s_own_prior(tiny_components, build_pipeline, tmp_path):
    """Karlo's folder has no file of statistics, but its prior has means and standard deviations."""
    build_pipeline("text", tiny_components()).save_pretrained(tmp_path / "model")
    whole = UnCLIPPipeline.from_pretrained(tmp_path / "model")
    prior = randomize(EmbeddingPriorNetwork(**DALLE2), 8)
    replaced = UnCLIPPipeline.from_pretrained(tmp_path / "model", prior=prior)
    assert replaced.statistics.norm_mean == pytest.approx(whole.statistics.norm_mean)


def test_priors_of_dalle2_pytorch_that_do_not_fit(dalle2, tiny_components, build_pipeline):
    for settings, words in (
        ({"embedding_dim": 20}, r"prior\.embedding_dim is 20, but text_encoder\.projection_dim is 16"),
        ({"num_tokens": 4, "use_text_encodings": False}, r"prior\.num_tokens is 4, but .* one vector is None"),
        ({"num_timesteps": 10}, "embeddings of 10 timesteps, but its process has 1000"),
    ):
        with pytest.raises(ConfigError, match=words):
            dalle2(**settings)("a cat", **DECODING)
    pipe = dalle2()
    pipe.statistics = None
    with pytest.raises(InputError, match="needs the statistics"):
        pipe("a cat", **DECODING)
    with pytest.raises(InputError, match="needs the component 'prior_scheduler'"):
        build_pipeline("text", tiny_components() | {"prior": pipe.prior, "prior_scheduler": None})
