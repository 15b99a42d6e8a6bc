"""The manipulator with tiny random components: inversion, noise, captions and files."""

import copy
import functools

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import (
    AutoregressivePrior,
    CheckpointError,
    DDIMScheduler,
    ImageError,
    InputError,
    NonFiniteError,
    UnCLIPImageVariationPipeline,
    UnCLIPInpaintPipeline,
    UnCLIPPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from unclip.checkpoints.layout import PROBE_FILE
from unclip.cli.latents import Record
from unclip.images import to_square
from unclip.models.pca import PrincipalComponents
from unclip.pipelines.manipulation import Manipulator
from unclip.pipelines.model_files import fingerprint, recorded_settings
from unclip.stages import prior
from unclip.stages.arithmetic import difference
from unclip.stages.manipulation import BipartiteLatent, edit, even_places, interpolate, jumps, path_at

from ..rounding import assert_equal_but_rounding

STEPS = {"decoder_num_inference_steps": 6, "super_res_num_inference_steps": 3}


@pytest.fixture(scope="module")
def tool(tiny_components, build_pipeline):
    """Networks that predict v, with small weights, so that steps are invertible."""
    parts = tiny_components()
    for name in ("decoder_scheduler", "super_res_scheduler"):
        parts[name] = UnCLIPScheduler.from_config(parts[name].config, prediction_type="v_prediction")
    with torch.no_grad():
        for name in ("decoder", "super_res_first", "super_res_last"):
            parts[name].conv_out.weight.mul_(0.3)
            parts[name].conv_out.bias.mul_(0.3)
    return Manipulator(build_pipeline("variation", parts), build_pipeline("text", parts))


@pytest.fixture(scope="module")
def pictures():
    noise = np.random.default_rng(0).integers(60, 200, (20, 24, 3), dtype=np.uint8)
    return [Image.fromarray(noise), Image.radial_gradient("L").resize((16, 16))]


def networks(tool):
    parts = tool.text.components.values()
    return [part for part in parts if isinstance(part, torch.nn.Module)]


def mean_alone(tool, captions, seeds, **settings):
    """The mean of the embeddings of single seeds."""
    each = [tool.embed_captions(captions, seed=seed, **settings) for seed in seeds]
    return torch.stack(each).mean(dim=0).squeeze(0)


def psnr(one, other):
    return float(-10 * (one - other).square().mean().log10())


def distance(one, other):
    return float((one - other).abs().max())


def test_inverted_pictures_are_reconstructed(tool, pictures):
    latent = tool.invert(pictures, super_res=True, num_rounds=12, **STEPS)
    output = tool.decode(latent, output_type="pt", return_intermediates=True, **STEPS)
    wanted = torch.stack([to_square(picture, 8) for picture in pictures]) / 2 + 0.5
    other = tool.fresh(latent.image_embedding, seed=1)
    from_noise = tool.decode(other, output_type="pt", return_intermediates=True, **STEPS)
    assert psnr(output.small_images, wanted) > psnr(from_noise.small_images, wanted) + 10
    large = torch.stack([to_square(picture, 16) for picture in pictures]) / 2 + 0.5
    assert psnr(output.images, large) > psnr(from_noise.images, large) + 10


def test_arrays_are_inverted(tool, pictures):
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    wanted = tool.invert([picture.convert("RGB") for picture in pictures], **STEPS)
    assert torch.equal(tool.invert(arrays, **STEPS).decoder_latents, wanted.decoder_latents)
    with pytest.raises(InputError, match="images must be a PIL image, a numpy array, or a list"):
        tool.invert("cat.png")


def test_super_resolution_in_tiles_is_inverted_in_tiles(tool, pictures):
    """Without tiles the noise would be of another network, and the picture would not be reconstructed."""
    wanted = torch.stack([to_square(picture, 16) for picture in pictures]) / 2 + 0.5

    def inverted():
        return tool.invert(pictures, super_res=True, num_rounds=12, **STEPS)

    as_a_whole = inverted()
    tool.variation.enable_super_res_tiling(8, 4)
    try:
        far, near = (
            psnr(tool.decode(latent, output_type="pt", **STEPS).images, wanted) for latent in (as_a_whole, inverted())
        )
    finally:
        tool.variation.disable_super_res_tiling()
    assert near > far + 3


@pytest.fixture(scope="module")
def in_three_stages(tool, tiny_configs, build_pipeline):
    """With a further super-resolution stage, 16 → 32 px."""
    generator = torch.Generator().manual_seed(9)
    network = UNet2DModel(**tiny_configs["super_res"] | {"sample_size": 32}).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + float(parameter.dim() == 1))
        network.conv_out.weight.mul_(0.3)
    scheduler = UnCLIPScheduler(beta_schedule="linear", prediction_type="v_prediction")
    more = {"super_res_2_first": network, "super_res_2_scheduler": scheduler}
    return Manipulator(build_pipeline("variation", tool.variation.components | more))


@pytest.mark.parametrize("steps", [3, [3, 5]])
def test_every_super_resolution_stage_is_inverted(in_three_stages, pictures, steps, tmp_path):
    tool, given = in_three_stages, STEPS | {"super_res_num_inference_steps": steps}
    latent = tool.invert(pictures, super_res=True, num_rounds=12, **given)
    assert [tuple(noise.shape) for noise in latent.super_res_noise] == [(2, 3, 16, 16), (2, 3, 32, 32)]
    read, _ = tool.load(tool.save(latent, tmp_path / "x.safetensors"))
    back = tool.decode(read, output_type="pt", **given).images
    wanted = torch.stack([to_square(picture, 32) for picture in pictures]) / 2 + 0.5
    without = BipartiteLatent(latent.image_embedding, latent.decoder_latents)
    half = BipartiteLatent(latent.image_embedding, latent.decoder_latents, latent.super_res_latents)
    for other in (without, half):
        assert psnr(back, wanted) > psnr(tool.decode(other, output_type="pt", **given).images, wanted) + 10
    assert tool.variation.super_res_2_scheduler is tool.variation.components["super_res_2_scheduler"]
    assert not isinstance(tool.variation.super_res_2_scheduler, DDIMScheduler)


def test_a_cascade_takes_the_steps_that_it_recommends(in_three_stages, pictures, monkeypatch):
    tool = in_three_stages
    recommended = {**STEPS, "super_res_num_inference_steps": [2, 4]}
    monkeypatch.setattr(type(tool.variation), "recommended", property(lambda pipe: recommended))
    told = []

    def callback(pipeline, step, timestep, about):
        told.append(about["stage"])

    latent = tool.invert(pictures[0], super_res=True, callback_on_step_end=callback)
    inverted = [told.count(stage) for stage in ("decoder", "super_res", "super_res_2")]
    told.clear()
    tool.decode(latent, callback_on_step_end=callback)
    assert [told.count(stage) for stage in ("super_res", "super_res_2")] == [2, 4]
    assert inverted == [2 * 6, 2 * 2, 2 * 4]  # two rounds a step
    with pytest.raises(InputError, match="3 values for 2"):
        tool.invert(pictures[0], super_res=True, super_res_num_inference_steps=[2, 2, 2])


def test_noise_of_more_stages_than_there_are(tool, in_three_stages, pictures):
    latent = in_three_stages.invert(pictures[0], super_res=True, **STEPS)
    with pytest.raises(InputError, match="2 super-resolution stages, but this model has 1"):
        tool.decode(latent, **STEPS)


def test_more_rounds_are_more_exact(tool, pictures):
    wanted = torch.stack([to_square(picture, 8) for picture in pictures]) / 2 + 0.5

    def found(rounds):
        latent = tool.invert(pictures, num_rounds=rounds, **STEPS)
        return psnr(tool.decode(latent, output_type="pt", return_intermediates=True, **STEPS).small_images, wanted)

    assert found(12) > found(1) + 3


def test_eta_varies_and_seeds_count_then(tool, pictures):
    latent = tool.invert(pictures[:1], **STEPS)

    def draw(**more):
        return tool.decode(latent, output_type="pt", return_intermediates=True, **STEPS, **more).small_images

    assert torch.equal(draw(eta=0, seed=1), draw(eta=0, seed=2))
    assert not torch.equal(draw(eta=0.5, seed=1), draw(eta=0.5, seed=2))
    assert not torch.equal(draw(eta=0.5, seed=1), draw(eta=0, seed=1))
    assert torch.equal(draw(eta=0.5, seed=1), draw(eta=0.5, seed=1))


def test_one_noise_for_every_row(tool):
    """Equal latents give equal pictures in any row, also after super-resolution, so films do not flicker."""
    same = tool.fresh(torch.ones(1, 16).expand(3, -1), seed=4)
    images = tool.decode(same, output_type="pt", seed=9, **STEPS).images
    assert distance(images[0], images[2]) < 1e-5
    each = tool.decode(same, output_type="pt", seed=[9, 10, 11], **STEPS).images
    assert distance(each[0], images[0]) < 1e-5
    assert distance(each[0], each[1]) > 1e-3
    with torch.random.fork_rng():
        torch.manual_seed(1)
        any_, other = (tool.decode(same, output_type="pt", seed=None, **STEPS).images for _ in range(2))
    assert distance(any_[0], any_[1]) > 1e-3
    assert distance(any_[0], other[0]) > 1e-3


def test_the_ends_of_an_interpolation_are_the_reconstructions(tool, pictures):
    latent = tool.invert(pictures, **STEPS)
    path = tool.decode(interpolate(latent, 3), output_type="pt", **STEPS).images
    alone = tool.decode(latent, output_type="pt", **STEPS).images
    assert distance(path[0], alone[0]) < 1e-4
    assert distance(path[-1], alone[1]) < 1e-4
    assert distance(path[2], alone[0]) > 1e-2


def test_the_decoders_pictures_alone(tool, pictures):
    """The pictures that `decode` enlarges, with every setting of the decoder; super-resolution does not run."""
    given = {"decoder_num_inference_steps": 6, "decoder_guidance_scale": 3.0, "prompt": "a cat"}
    latent, heard = tool.invert(pictures, **STEPS), []
    whole = tool.decode(
        latent, output_type="pt", return_intermediates=True, super_res_num_inference_steps=3, **given
    ).small_images

    def hear(pipe, step, timestep, tensors):
        heard.append(step)
        return tensors

    small = tool.decode_small(latent, callback_on_step_end=hear, **given)
    torch.testing.assert_close(small, whole, rtol=0, atol=1e-6)
    assert len(heard) == 6
    for name in given:
        assert distance(tool.decode_small(latent, **{other: given[other] for other in given if other != name}), small)
    each = tool.decode_small(latent, **{**given, "prompt": ["a cat", "a red apple"]})
    assert_equal_but_rounding(each[0], lambda: tool.decode_small(latent, **given)[0], networks(tool))
    assert distance(each[1], small[1]) > 1e-4
    for wrong in ({"decoder_num_inference_steps": 0}, {"decoder_guidance_scale": float("nan")}, {"prompt": 3}):
        with pytest.raises(InputError):
            tool.decode_small(latent, **wrong)
    with pytest.raises(InputError, match="decoder_latents"):
        tool.decode_small(BipartiteLatent(latent.image_embedding, torch.zeros(2, 3, 4, 4)))


@pytest.mark.parametrize("one_noise", [False, True])
def test_frames_are_placed_by_what_is_drawn(tool, pictures, one_noise):
    """With every setting of the decoder."""
    latent = tool.invert(pictures, **STEPS)
    settings = {"decoder_num_inference_steps": 6, "decoder_guidance_scale": 2.0, "prompt": "a cat"}
    draw = functools.partial(tool.decode_small, **settings)

    def unevenness(num_drawings):
        places = even_places(latent, 4, draw, one_noise=one_noise, num_drawings=num_drawings)
        steps = jumps(draw(path_at(latent, places, one_noise=one_noise)))
        return float(steps.max() / steps.mean())

    assert unevenness(4) < 1 + (unevenness(0) - 1) * 0.5


def test_an_edit_changes_the_picture_by_its_strength(tool, pictures):
    latent = tool.invert(pictures[0], **STEPS)
    direction = tool.caption_difference("a cat", "a red apple")
    assert float(direction.norm()) == pytest.approx(1, abs=1e-5)
    images = tool.decode(edit(latent, direction, [0, 0.1, 0.5]), output_type="pt", **STEPS).images
    assert distance(images[0], tool.decode(latent, output_type="pt", **STEPS).images[0]) < 1e-4
    assert (images[2] - images[0]).square().mean() > (images[1] - images[0]).square().mean() > 0


def test_two_ways_to_a_difference(tool):
    by_prior, by_text = (tool.caption_difference("a cat", "a red apple", through_prior=way) for way in (True, False))
    assert distance(by_prior, by_text) > 1e-2
    back = tool.caption_difference("a red apple", "a cat", through_prior=False)
    torch.testing.assert_close(back, -by_text, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="same embedding"):
        tool.caption_difference("a cat", "a cat", through_prior=False)


def test_captions_through_the_prior(tool):
    both = tool.embed_captions(["a cat", "a red apple"], seed=3)
    assert both.shape == (2, 16)
    one = tool.embed_captions("a red apple", seed=3)
    assert_equal_but_rounding(one, lambda: tool.embed_captions(["a cat", "a red apple"], seed=3)[1:], networks(tool))
    assert distance(tool.embed_captions("a cat", seed=4), both[0]) > 1e-3
    mean = tool.embed_captions("a cat", seed=3, num_samples=2)
    assert_equal_but_rounding(mean[0], lambda: mean_alone(tool, "a cat", (3, 4)), networks(tool))


def test_seeds_wrap_around_at_the_largest(tool):
    mean = tool.embed_captions("a cat", seed=2**64 - 1, num_samples=2)
    assert_equal_but_rounding(mean[0], lambda: mean_alone(tool, "a cat", (2**64 - 1, 0)), networks(tool))
    with pytest.raises(InputError, match="the seed is -1"):
        tool.embed_captions("a cat", seed=-1, num_samples=2)


@pytest.fixture
def recommending(tool, monkeypatch):
    """For a model that recommends several candidates."""
    recommended = {"num_prior_candidates": 4, "prior_num_inference_steps": 2}
    monkeypatch.setattr(tool.text, "_presets", {"exact": recommended})
    return tool


def test_a_caption_has_the_embedding_of_its_picture(recommending):
    tool, seeds = recommending, range(8)
    prompts = ["a red apple"] * len(seeds)
    few = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2, "return_intermediates": True}
    made = tool.text(prompts, seed=list(seeds), **few, **tool.text.recommended).image_embeddings
    found = tool.embed_captions(prompts, seed=list(seeds))
    torch.testing.assert_close(found, made, rtol=0, atol=1e-5)
    assert distance(tool.embed_captions(prompts, seed=list(seeds), num_prior_candidates=1), made) > 1e-3
    with pytest.raises(InputError, match="a diffusion prior samples no codes"):
        tool.embed_captions("a cat", prior_temperature=0.5)
    with pytest.raises(InputError, match="a diffusion prior samples no codes"):
        tool.caption_difference("a cat", "an apple", prior_top_p=0.5)


def test_a_difference_is_of_one_candidate_for_both_captions(recommending, monkeypatch):
    """Candidates of different noise would add their difference in noise."""
    tool, drawn, apart = recommending, [], 0
    captions = ["a red apple", "a cat"]
    text = tool.text.caption_encoder.encode(captions, "cpu").embeds

    def closest(text_embeddings, candidates, captions_per_choice=1):
        drawn.append(candidates)
        return original(text_embeddings, candidates, captions_per_choice)

    original = prior.closest
    monkeypatch.setattr(prior, "closest", closest)
    for seed in range(12):
        found = tool.caption_difference(*captions, seed=seed, num_samples=1, num_prior_candidates=4)
        cosines = torch.nn.functional.cosine_similarity(text, drawn[-1], dim=-1)
        assert cosines.shape == (4, 2)
        target, source = drawn[-1][cosines.sum(dim=1).argmax()]
        torch.testing.assert_close(found, difference(target, source), rtol=0, atol=1e-5)
        own = cosines.argmax(dim=0)
        apart += int(own[0] != own[1])
    assert apart  # else this test tells nothing
    both = tool.embed_captions(captions, seed=3, num_samples=2, one_choice=True)
    assert_equal_but_rounding(both, lambda: mean_alone(tool, captions, (3, 4), one_choice=True), networks(tool))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seed": None}, "the seed is None"),
        ({"seed": np.float64(3)}, r"the seed is np.float64\(3"),
        ({"seed": [1, None, 2]}, "the seed is None"),
        ({"seed": [1, 2, 3]}, "3 seeds for 1"),
        ({"captions": None}, "prompt must be a string"),
        ({"captions": []}, "prompt must be a string"),
        ({"num_samples": 0}, "num_samples is 0"),
    ],
)
def test_wrong_arguments_of_captions(tool, arguments, words):
    with pytest.raises(InputError, match=words):
        tool.embed_captions(**{"captions": "a cat", **arguments})


def test_a_part_that_only_one_of_the_pipelines_has(tiny_inpaint, tmp_path):
    tiny_inpaint.save_pretrained(tmp_path / "model")
    settings = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "embedding_dim": 16}
    settings |= {"num_embeddings": 11, "num_components": 4, "num_buckets": 8, "num_dot_buckets": 4}
    prior, encoder = AutoregressivePrior(settings).eval(), copy.deepcopy(tiny_inpaint.image_encoder)
    tool = Manipulator.from_pretrained(tmp_path / "model", prior=prior, image_encoder=encoder)
    assert tool.text.prior is prior
    assert tool.variation.image_encoder is encoder
    decoder = tiny_inpaint.decoder
    tool = Manipulator.from_pretrained(tmp_path / "model", decoder=decoder, torch_dtype=torch.bfloat16)
    assert tool.text.decoder is tool.variation.decoder is decoder
    assert tool.text.prior.dtype == tool.variation.image_encoder.dtype == torch.bfloat16
    with pytest.raises(InputError, match="no argument or component 'unet'"):
        Manipulator.from_pretrained(tmp_path / "model", unet=decoder)


def test_without_a_prior(tiny_variation, pictures):
    tool = Manipulator(tiny_variation)
    with pytest.raises(CheckpointError, match="no prior"):
        tool.embed_captions("a cat")
    assert tool.caption_difference("a cat", "an apple", through_prior=False).shape == (16,)
    assert len(tool.invert(pictures, **STEPS)) == 2


def test_nothing_in_the_pipelines_changes(tool, pictures):
    before = dict(tool.variation.components)
    tool.decode(tool.invert(pictures, **STEPS), eta=0.2, **STEPS)
    assert all(tool.variation.components[name] is part for name, part in before.items())
    assert not isinstance(tool.variation.decoder_scheduler, DDIMScheduler)


def test_principal_components_of_pictures(tool, pictures):
    components = tool.fit_components([pictures, [Image.new("RGB", (8, 8), "red"), Image.new("L", (8, 8))]])
    assert components.num_components == 3
    embeddings = tool.embed_images(pictures)
    torch.testing.assert_close(components.reconstruct(components.project(embeddings)), embeddings, rtol=1e-3, atol=1e-3)


def test_principal_components_are_saved_with_a_model(tool, pictures, tmp_path, build_pipeline):
    model, again = tmp_path / "model", tmp_path / "again"
    tool.variation.save_pretrained(model)
    assert not (model / PROBE_FILE).exists()
    tool.save_components(tool.fit_components([pictures]), model / PROBE_FILE)
    content = (model / PROBE_FILE).read_bytes()
    pipe = UnCLIPImageVariationPipeline.from_pretrained(model)
    pipe.save_pretrained(again)
    assert (again / PROBE_FILE).read_bytes() == content
    pipe.save_pretrained(model, overwrite=True)
    assert (model / PROBE_FILE).read_bytes() == content
    UnCLIPImageVariationPipeline.from_pipe(pipe.to(torch.float16)).save_pretrained(tmp_path / "half")
    assert (tmp_path / "half" / PROBE_FILE).read_bytes() == content
    PrincipalComponents.load(again / PROBE_FILE).save(again / PROBE_FILE, overwrite=True)  # of an encoder unknown
    UnCLIPImageVariationPipeline.from_pretrained(again).save_pretrained(tmp_path / "unknown")
    assert (tmp_path / "unknown" / PROBE_FILE).exists()
    pipe.image_encoder = copy.deepcopy(pipe.image_encoder)
    with torch.no_grad():
        pipe.image_encoder.visual_projection.weight.neg_()
    pipe.save_pretrained(model, overwrite=True)
    assert not (model / PROBE_FILE).exists()


def test_a_model_without_an_image_encoder_has_no_components(tool, pictures, tmp_path, tiny_inpaint):
    tiny_inpaint.save_pretrained(tmp_path / "model")
    tool.save_components(tool.fit_components([pictures]), tmp_path / "model" / PROBE_FILE)
    text = UnCLIPPipeline.from_pretrained(tmp_path / "model")
    text.save_pretrained(tmp_path / "text")
    assert not (tmp_path / "text" / PROBE_FILE).exists()
    seeing = {name: getattr(tiny_inpaint, name) for name in ("image_encoder", "feature_extractor")}
    UnCLIPInpaintPipeline.from_pipe(text, **seeing).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / PROBE_FILE).exists()
    (tmp_path / "model" / PROBE_FILE).write_bytes(b"damaged")
    assert UnCLIPInpaintPipeline.from_pretrained(tmp_path / "model").image_encoder is not None


def test_components_of_another_image_encoder_are_refused(tool, pictures, tmp_path, own_variation):
    components = tool.fit_components([pictures])
    path = tool.save_components(components, tmp_path / "pca.safetensors", about={"model": "tiny"})
    assert torch.equal(tool.load_components(path).components, components.components)
    other = Manipulator(own_variation.to(torch.bfloat16))
    assert torch.equal(other.load_components(path).mean, components.mean)  # the same weights, in a smaller type
    with torch.no_grad():
        own_variation.image_encoder.visual_projection.weight.neg_()
    with pytest.raises(CheckpointError, match="image encoder of the model tiny"):
        other.load_components(path)
    unnamed = components.save(tmp_path / "old.safetensors")
    assert other.load_components(unnamed).dim == 16
    narrow = type(components)(torch.zeros(2), torch.eye(2), torch.ones(2), 2.0).save(tmp_path / "narrow.safetensors")
    with pytest.raises(CheckpointError, match="another model"):
        tool.load_components(narrow)


def test_latents_of_another_model_are_refused(tool, pictures, tmp_path, own_variation):
    latent = tool.invert(pictures, **STEPS)
    path = tool.save(latent, tmp_path / "x.safetensors", about={"model": "tiny"})
    read, about = tool.load(path)
    assert torch.equal(read.decoder_latents, latent.decoder_latents)
    assert about == {"model": "tiny"}
    assert recorded_settings(about) == {}
    with torch.no_grad():
        for parameter in own_variation.decoder.parameters():
            parameter.neg_()
    with pytest.raises(CheckpointError, match="made with the model tiny"):
        Manipulator(own_variation).load(path)
    narrow = BipartiteLatent(torch.ones(1, 12), torch.ones(1, 3, 8, 8)).save(tmp_path / "narrow.safetensors")
    with pytest.raises(CheckpointError, match=r"\[batch, 16\]"):
        tool.load(narrow)


@pytest.mark.parametrize("network", ["super_res_first", "super_res_last"])
def test_noise_of_other_super_resolution_networks_is_refused(tool, pictures, tmp_path, build_pipeline, network):
    other = dict(tool.variation.components)
    other[network] = copy.deepcopy(other[network])
    with torch.no_grad():
        other[network].conv_in.weight.neg_()
    other = Manipulator(build_pipeline("variation", other))
    with_noise = tool.save(tool.invert(pictures, super_res=True, **STEPS), tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="noise of other super-resolution networks"):
        other.load(with_noise)
    assert tool.load(with_noise)[1] == {}
    without = tool.save(tool.invert(pictures, **STEPS), tmp_path / "x.safetensors")
    assert len(other.load(without)[0]) == 2
    old = BipartiteLatent.load(with_noise)[0].save(tmp_path / "old.safetensors")  # says nothing of its networks
    assert len(other.load(old)[0]) == 2


def test_a_file_has_the_settings_of_the_inversion(tool, pictures, tmp_path):
    settings = {**STEPS, "decoder_guidance_scale": 1.5, "prompt": "a cat 🐈"}
    latent = tool.invert(pictures, **settings)
    path = tool.save(latent, tmp_path / "x.safetensors", settings=settings, about={"model": "tiny"})
    read, about = tool.load(path)
    assert about == {
        "model": "tiny",
        "decoder_num_inference_steps": "6",
        "super_res_num_inference_steps": "3",
        "decoder_guidance_scale": "1.5",
        "prompt": "a cat 🐈",
    }
    assert recorded_settings(about) == settings
    back = tool.decode(read, output_type="pt", **recorded_settings(about)).images
    assert torch.equal(back, tool.decode(latent, output_type="pt", **settings).images)
    assert Record.read(path).settings == settings
    few = {"super_res_num_inference_steps": (2, 3), "decoder_num_inference_steps": None}
    path = tool.save(latent, tmp_path / "few.safetensors", settings=few)
    assert recorded_settings(tool.load(path)[1]) == {"super_res_num_inference_steps": [2, 3]}
    with pytest.raises(CheckpointError, match="are not numbers"):
        recorded_settings({"decoder_guidance_scale": "much"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eta": 0.5}, "settings have the unknown name 'eta'; a latent's file has decoder_num_inference_steps"),
        ({"decoder_num_inference_steps": 2.5}, "decoder_num_inference_steps is 2.5"),
        ({"decoder_guidance_scale": "much"}, "decoder_guidance_scale is 'much'"),
        ({"prompt": ["a cat"]}, "it must be a text"),
    ],
)
def test_unknown_settings_of_a_file(tool, tmp_path, settings, words):
    latent = tool.fresh(torch.ones(1, 16))
    with pytest.raises(InputError, match=words):
        tool.save(latent, tmp_path / "x.safetensors", settings=settings)
    assert not list(tmp_path.iterdir())


def test_fingerprints_do_not_depend_on_the_type(own_variation):
    with torch.no_grad():
        own_variation.decoder.conv_in.weight[0, 0, 0, 0] = 1e-9  # 0 in float16
    whole = fingerprint(own_variation)
    assert fingerprint(own_variation.to(torch.bfloat16)) == whole
    assert fingerprint(own_variation.to(torch.float16)) == whole
    with torch.no_grad():
        next(own_variation.decoder.parameters()).neg_()
    assert fingerprint(own_variation) != whole


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"decoder_num_inference_steps": 1}, "two or more ascending timesteps"),
        ({"decoder_guidance_scale": float("nan")}, "decoder_guidance_scale"),
        ({"num_rounds": 0}, "num_rounds"),
        ({"super_res": True, "super_res_num_inference_steps": 1001, "decoder_num_inference_steps": 2}, "1001"),
    ],
)
def test_wrong_arguments(tool, pictures, arguments, words):
    with pytest.raises(ValueError, match=words):
        tool.invert(pictures, **arguments)


def test_an_inversion_that_gives_nan(tool, pictures, monkeypatch):
    run = UNet2DConditionModel._run

    def broken(*given):
        output = run(*given)
        return output._replace(sample=output.sample * float("nan"))

    monkeypatch.setattr(UNet2DConditionModel, "_run", broken)
    with pytest.raises(NonFiniteError, match="decoder's noise: the result is NaN"):
        tool.invert(pictures)


def test_wrong_pictures_and_latents(tool, pictures):
    with pytest.raises(InputError, match="list of them"):
        tool.invert([])
    with pytest.raises(ImageError):
        tool.invert(Image.new("RGB", (1, 1000)))
    with pytest.raises(InputError, match="decoder_latents"):
        tool.decode(BipartiteLatent(torch.ones(1, 16), torch.ones(1, 3, 9, 9)))
    with pytest.raises(ValueError, match="eta"):
        tool.decode(tool.invert(pictures, **STEPS), eta=2)


# ---- the built-in model, as the bars of the method have it ----


@pytest.fixture(scope="module")
def built_in():
    tool = Manipulator.from_pretrained("unclip-emoji")
    for pipe in (tool.variation, tool.text):
        pipe.set_progress_bar_config(disable=True)
    return tool


@pytest.fixture(scope="module")
def drawn(built_in):
    """Two pictures from the model itself, so that the tests need no data set."""
    pipe = built_in.text
    return pipe(["cat face", "red heart"], seed=1, **pipe.recommended).images


@pytest.mark.slow
def test_the_built_in_model_reconstructs_pictures(built_in, drawn):
    latent = built_in.invert(drawn, super_res=True)
    output = built_in.decode(latent, output_type="pt", return_intermediates=True)
    for small, large, picture in zip(output.small_images, output.images, drawn, strict=True):
        assert psnr(small, to_square(picture, 32) / 2 + 0.5) > 30
        assert psnr(large, to_square(picture, 128) / 2 + 0.5) > 25


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["pictures", "captions"])
@pytest.mark.parametrize("one_noise", [False, True])
def test_the_built_in_model_interpolates_evenly(built_in, drawn, ends, one_noise):
    """The final pictures too, although frames are placed by small ones; with the guidance of the command."""
    if ends == "pictures":
        latent, settings = built_in.invert(drawn), {}
    else:
        latent = built_in.fresh(built_in.embed_captions(["rocket", "automobile"]))
        settings = {"decoder_guidance_scale": built_in.variation.recommended["decoder_guidance_scale"]}
    draw = functools.partial(built_in.decode_small, **settings)
    places = even_places(latent, 7, draw, one_noise=one_noise)
    path = path_at(latent, places, one_noise=one_noise)
    steps = jumps(built_in.decode(path, output_type="pt", **settings).images)
    assert float(steps.max()) <= 3 * float(steps.median())
    assert float(steps.min()) > 0


@pytest.mark.slow
def test_the_built_in_model_edits_the_colour(built_in, drawn):
    latent = built_in.invert(drawn[1])
    blue = built_in.caption_difference("blue heart", "red heart")
    before, after = built_in.decode(edit(latent, blue, [0, 0.5]), output_type="pt").images
    middle = (slice(None), slice(48, 80), slice(48, 80))
    red, _, other = before[middle].mean(dim=(1, 2))
    now_red, _, now_blue = after[middle].mean(dim=(1, 2))
    assert red > other + 0.2
    assert now_blue > now_red
    assert float((before - after)[:, :8, :8].abs().mean()) < 0.1  # the corner stays white


@pytest.mark.parametrize("wrong", [torch.zeros(1, 3, 16, 16), [torch.zeros(3, 16, 16)], None, 3, "cat.png"])
def test_only_pil_pictures_are_inverted(tool, wrong):
    with pytest.raises(ImageError, match="PIL"):
        tool.invert(wrong, **STEPS)
