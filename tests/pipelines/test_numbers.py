"""Numbers of numpy and torch as arguments give the same pictures as Python's."""

import json
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    InputError,
    Manipulator,
    PrincipalComponents,
    PriorTransformer,
    UnCLIPScheduler,
)
from unclip.stages.manipulation import BipartiteLatent, edit, even_places, interpolate, path_at, probe
from unclip.stages.super_res import Tiling

SEEDS = [np.arange(2), torch.arange(2), range(2), (np.int64(0), np.uint8(1)), [torch.tensor(0), 1]]
KINDS = {
    "numpy": (np.int64, np.float64),
    "numpy, small": (np.uint8, np.float16),
    "arrays": (np.array, np.array),
    "tensors": (torch.tensor, torch.tensor),
}
COUNTS = {
    "num_images_per_prompt": 2,
    "prior_num_inference_steps": 3,
    "decoder_num_inference_steps": 2,
    "super_res_num_inference_steps": 2,
    "num_prior_candidates": 2,
    "seed": 7,
    "height": 32,
    "width": 16,
}
SCALES = {"prior_guidance_scale": 2.0, "decoder_guidance_scale": 4.5, "prior_top_p": 1.0, "prior_temperature": 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_text_to_image(make, kind):
    of_count, of_scale = KINDS[kind]
    given = {name: of_count(value) for name, value in COUNTS.items()}
    given |= {name: of_scale(value) for name, value in SCALES.items()}
    assert torch.equal(make("a cat", **given), make("a cat", **COUNTS, **SCALES))


@pytest.mark.parametrize("kind", KINDS)
def test_variations_and_inpainting(tiny_variation, tiny_inpaint, kind):
    of_count, of_scale = KINDS[kind]
    picture = Image.effect_noise((16, 16), 90)
    common = {
        "decoder_num_inference_steps": 2,
        "super_res_num_inference_steps": 2,
        "num_images_per_prompt": 2,
        "seed": 3,
    }
    inpainting = {"prior_num_inference_steps": 2, "num_resamples": 2, "jump_length": 1, "height": 16, "width": 32}
    for pipe, counts, scales in (
        (tiny_variation, common, {"decoder_guidance_scale": 4.5}),
        (tiny_inpaint, common | inpainting, {"strength": 0.5, "prior_guidance_scale": 1.5}),
    ):
        prompt = {"prompt": "a cat"} if pipe is tiny_inpaint else {}
        call = partial(pipe, image=picture, output_type="pt", **prompt)
        given = {name: of_count(value) for name, value in counts.items()}
        given |= {name: of_scale(value) for name, value in scales.items()}
        assert torch.equal(call(**given).images, call(**counts, **scales).images)


@pytest.mark.parametrize("seeds", SEEDS, ids=str)
def test_seeds(make, tiny_variation, seeds):
    assert torch.equal(make(["a cat", "a"], seed=seeds), make(["a cat", "a"], seed=[0, 1]))
    tool = Manipulator(tiny_variation)
    latent = tool.fresh(torch.ones(2, 16), seed=np.int64(5))
    assert torch.equal(latent.decoder_latents, tool.fresh(torch.ones(2, 16), seed=5).decoder_latents)
    decode = partial(tool.decode, latent, decoder_num_inference_steps=2, super_res_num_inference_steps=2, eta=0.5)
    assert torch.equal(decode(seed=seeds, output_type="pt").images, decode(seed=[0, 1], output_type="pt").images)
    one = decode(seed=np.int64(7), output_type="pt").images
    assert torch.equal(one, decode(seed=7, output_type="pt").images)


def test_seeds_of_a_numpy_generator(make):
    generator = np.random.default_rng(0)
    assert make("a cat", seed=generator.integers(2**32)).isfinite().all()
    assert make(["a", "a"], seed=generator.integers(2**63, 2**64, 2, dtype=np.uint64)).isfinite().all()


@pytest.mark.parametrize("steps", [np.array([2]), torch.tensor([2]), (np.int64(2),), np.int64(2)], ids=str)
def test_steps_of_each_stage(make, steps):
    assert torch.equal(make("a", seed=1, super_res_num_inference_steps=steps), make("a", seed=1))


@pytest.mark.parametrize("no_number", [True, np.True_, torch.tensor(True)], ids=repr)
@pytest.mark.parametrize("name", [*COUNTS, *SCALES])
def test_booleans_are_not_numbers(make, name, no_number):
    with pytest.raises(InputError, match=f"{'|'.join(name.split('_')[-2:])}|number of steps"):
        make("a cat", **{name: no_number})


def test_captions(tiny_pipeline, tiny_variation):
    def embed(kind, of_scale):
        return tiny_pipeline.embed_captions(
            ["a cat", "a"],
            num_inference_steps=kind(2),
            guidance_scale=of_scale(1.5),
            seed=kind(3),
            num_prior_candidates=kind(2),
            captions_per_choice=kind(2),
        )

    assert torch.equal(embed(np.int64, np.float64), embed(int, float))
    tool = Manipulator(tiny_variation, tiny_pipeline)

    def drawn(kind):
        return tool.embed_captions("a cat", seed=kind(3), num_samples=kind(2), prior_num_inference_steps=kind(2))

    assert torch.equal(drawn(np.uint16), drawn(int))
    assert torch.equal(drawn(torch.tensor), drawn(int))
    for wrong in ({"seed": True}, {"num_samples": True}, {"num_samples": 1.0}):
        with pytest.raises(InputError):
            tool.embed_captions("a cat", **wrong)


def same(one: BipartiteLatent, other: BipartiteLatent) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one._parts().values(), other._parts().values(), strict=True))


def test_latents():
    generator = torch.Generator().manual_seed(0)
    latent = BipartiteLatent(torch.randn(3, 16, generator=generator), torch.randn(3, 3, 8, 8, generator=generator))
    for kind in (np.int64, torch.tensor, np.array):
        assert same(interpolate(latent, kind(2)), interpolate(latent, 2))
        assert same(path_at(latent, [kind(1), 0.5]), path_at(latent, [1, 0.5]))
        assert same(latent.select([kind(2), 0]), latent.select([2, 0]))
        places = even_places(latent, kind(1), lambda x: x.decoder_latents, num_drawings=kind(1), batch_size=kind(2))
        assert places == even_places(latent, 1, lambda x: x.decoder_latents, num_drawings=1, batch_size=2)
    assert same(path_at(latent, np.linspace(0, 2, 5)), interpolate(latent, 1))
    assert same(latent.select(np.arange(2)), latent.select(torch.arange(2)))
    one, direction = latent.select([0]), torch.ones(16)
    for strengths in (np.linspace(0, 1, 3), torch.linspace(0, 1, 3), [0, Fraction(1, 2), np.float32(1)]):
        assert same(edit(one, direction, strengths), edit(one, direction, [0, 0.5, 1]))
    components = PrincipalComponents.fit([torch.randn(9, 16, generator=generator)], np.int64(5))
    assert components.num_components == 5
    for counts in (np.arange(3), torch.arange(3), [np.int64(0), 1, torch.tensor(2)]):
        assert same(probe(one, components, counts), probe(one, components, [0, 1, 2]))
    assert same(probe(one, components, np.int64(2)), probe(one, components, 2))
    for wrong in (
        lambda: latent.select([True]),
        lambda: path_at(latent, [True]),
        lambda: edit(one, direction, True),
        lambda: edit(one, direction, np.array([True])),
        lambda: probe(one, components, True),
        lambda: interpolate(latent, np.True_),
        lambda: PrincipalComponents.fit([torch.randn(9, 16)], True),
    ):
        with pytest.raises(InputError):
            wrong()


def test_settings_of_a_latents_file(tiny_variation, tmp_path):
    tool = Manipulator(tiny_variation)
    latent = tool.fresh(torch.ones(1, 16))
    settings = {"decoder_num_inference_steps": np.int64(3), "super_res_num_inference_steps": np.array([2])}
    settings |= {"decoder_guidance_scale": torch.tensor(1.5), "super_res_tile_px": np.int32(64)}
    tool.save(latent, tmp_path / "a.safetensors", settings=settings)
    about = tool.load(tmp_path / "a.safetensors")[1]
    assert {name: json.loads(about[name]) for name in settings} == {
        "decoder_num_inference_steps": 3,
        "super_res_num_inference_steps": [2],
        "decoder_guidance_scale": 1.5,
        "super_res_tile_px": 64,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_schedulers(kind, tmp_path):
    of_count, of_scale = KINDS[kind]
    x = torch.ones(1, 3, 2, 2)
    for cls, more in (
        (UnCLIPScheduler, {}),
        (DDIMScheduler, {"eta": 0.5}),
        (DPMSolverMultistepScheduler, {"solver_order": 1}),
    ):
        numbers = {"num_train_timesteps": 100, "beta_start": 0.125, "clip_sample_range": 5.0, "beta_schedule": "linear"}
        numbers = {"beta_end": 0.25, **numbers, **more}
        given = {
            name: value if isinstance(value, str) else (of_count if isinstance(value, int) else of_scale)(value)
            for name, value in numbers.items()
        }
        plain, made = cls(**numbers), cls(**given)
        assert dict(made.config) == dict(plain.config)
        assert made.sampler() == plain.sampler()
        made.save_pretrained(tmp_path / cls.__name__)
        assert dict(cls.from_pretrained(tmp_path / cls.__name__).config) == dict(plain.config)
        made.set_timesteps(of_count(2))
        plain.set_timesteps(2)
        assert torch.equal(made.timesteps, plain.timesteps)
        assert type(made.num_inference_steps) is int
        steps = (
            [
                one.step(x, t, x, prev_timestep=t_next).prev_sample
                for one, t, t_next in ((made, of_count(50), of_count(0)), (plain, 50, 0))
            ]
            if cls is DPMSolverMultistepScheduler
            else []
        )
        assert all(torch.equal(step, steps[0]) for step in steps)
        assert torch.equal(made.add_noise(x, x, of_count(7)), plain.add_noise(x, x, 7))


def test_networks_and_tiles(tiny_configs, tiny_variation, tmp_path):
    config = {name: np.int64(value) if type(value) is int else value for name, value in tiny_configs["prior"].items()}
    network = PriorTransformer(config)
    assert dict(network.config) == dict(PriorTransformer(tiny_configs["prior"]).config)
    network.save_pretrained(tmp_path, max_shard_size=np.int64(10**6))
    assert PriorTransformer.from_pretrained(tmp_path).config == network.config
    network.enable_attention_slicing(np.int64(1))
    assert Tiling(np.int64(16), torch.tensor(4)) == Tiling(16, 4)
    for wrong in (True, np.True_, 1.0, "two"):
        with pytest.raises(InputError, match="slice_size"):
            network.enable_attention_slicing(wrong)
