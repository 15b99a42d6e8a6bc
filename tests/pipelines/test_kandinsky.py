"""Kandinsky's pipelines: folders, seeds, and combinations that are refused before anything is computed."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import unclip
from unclip import (
    ConfigError,
    InputError,
    KandinskyCombinedPipeline,
    KandinskyPipeline,
    KandinskyPriorPipeline,
    KandinskyV22CombinedPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UNet2DConditionModel,
    VQModel,
    WeightsError,
)

from ..conftest import randomize
from ..kandinsky_parts import MOVQ, UNET, decoder_parts, prior_parts, unet_settings

FEW = {"num_inference_steps": 2, "output_type": "pt", "height": 16, "width": 16}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def prior():
    return quiet(KandinskyV22PriorPipeline(**prior_parts()))


@pytest.fixture(scope="module")
def decoder():
    return quiet(KandinskyV22Pipeline(**decoder_parts("2.2")))


@pytest.fixture(scope="module")
def text_decoder():
    return quiet(KandinskyPipeline(**decoder_parts("2.1")))


def embeddings(rows=2, width=16, seed=1):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def given(rows=2, **more):
    return {"image_embeds": embeddings(rows), "negative_image_embeds": embeddings(rows, seed=2), **FEW, **more}


# ---- folders ----


def test_a_combined_folder(prior, decoder, tmp_path):
    joined = quiet(KandinskyV22CombinedPipeline.from_pipes(prior, decoder))
    joined.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "KandinskyV22CombinedPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["movq"] == ["diffusers", "VQModel"]
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert index["prior_image_processor"] == ["transformers", "CLIPImageProcessor"]
    loaded = quiet(KandinskyV22CombinedPipeline.from_pretrained(tmp_path / "model"))
    call = {"prompt": "a cat", "seed": 3, "prior_num_inference_steps": 2, **FEW}
    torch.testing.assert_close(loaded(**call).images, joined(**call).images)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "model", subfolder="unet", torch_dtype=torch.float16)
    assert unet.dtype == torch.float16
    assert unet.config.encoder_hid_dim_type == "image_proj"


@pytest.mark.parametrize(("name", "version"), [("KandinskyV22Pipeline", "2.2"), ("KandinskyPipeline", "2.1")])
def test_folders_of_diffusers_and_folders_for_it(decoder, text_decoder, tmp_path, name, version):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        ours = decoder if version == "2.2" else text_decoder
        ours.save_pretrained(tmp_path / "ours")
        theirs = getattr(diffusers, name).from_pretrained(tmp_path / "ours")
        theirs.set_progress_bar_config(disable=True)
        theirs.save_pretrained(tmp_path / "theirs")
    again = quiet(getattr(unclip, name).from_pretrained(tmp_path / "theirs"))
    call = given(1, output_type="np") | ({"prompt": "a cat"} if version == "2.1" else {})
    pictures = [pipe(**call, generator=torch.Generator().manual_seed(4)).images for pipe in (theirs, again)]
    np.testing.assert_allclose(*pictures, rtol=0, atol=1e-3)  # their schedule is in float32
    assert type(again.scheduler) is type(ours.scheduler)
    kept = ("set_alpha_to_one", "steps_offset", "thresholding", "sample_max_value", "timestep_spacing")
    for setting in kept:
        assert again.scheduler.config.get(setting) == ours.scheduler.config.get(setting)


def test_a_folder_of_the_multilingual_prior(prior, tmp_path):
    quiet(KandinskyPriorPipeline(**prior.components)).save_pretrained(tmp_path / "prior")
    loaded = quiet(KandinskyPriorPipeline.from_pretrained(tmp_path / "prior", own_clip=True))
    outputs = [pipe("a cat", num_inference_steps=2, seed=1) for pipe in (loaded, prior)]
    torch.testing.assert_close(*(output.image_embeds for output in outputs))


def test_broken_multilingual_weights_are_named(text_decoder, tmp_path):
    from safetensors.torch import load_file, save_file

    text_decoder.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "text_encoder" / "model.safetensors"
    state = load_file(path)
    del state["LinearTransformation.bias"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"'text_encoder' .*LinearTransformation\.bias"):
        KandinskyPipeline.from_pretrained(tmp_path / "model")


# ---- seeds, sizes and types ----


def test_a_picture_does_not_depend_on_its_batch(prior, decoder):
    joined = quiet(KandinskyV22CombinedPipeline.from_pipes(prior, decoder))
    call = {"prior_num_inference_steps": 2, "negative_prompt": "red", **FEW}
    both = joined(["a cat", "an apple"], seed=5, **call).images
    alone = joined("an apple", seed=6, **call).images
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)
    assert not torch.allclose(both[1:], joined("an apple", seed=7, **call).images, atol=1e-2)


def test_captions_in_any_number(text_decoder):
    one = text_decoder(["a cat", "a cat"], **given(seed=3)).images
    torch.testing.assert_close(text_decoder("a cat", **given(seed=3)).images, one)
    assert not torch.allclose(text_decoder("an apple", **given(seed=3)).images, one, atol=1e-4)


def test_sizes_are_rounded_up(decoder):
    images = decoder(**given(1) | {"height": 17, "width": 6, "output_type": "pil"}).images
    assert [image.size for image in images] == [(8, 20)]
    assert decoder(**given(1) | {"height": 17, "width": 6, "output_type": "latent"}).images.shape == (1, 4, 10, 4)


def test_without_guidance_no_negative_embedding_is_needed(decoder):
    call = given(1, guidance_scale=1.0, num_images_per_prompt=2, seed=[1, 1])
    del call["negative_image_embeds"]
    first, second = decoder(**call).images
    torch.testing.assert_close(first, second)


def test_the_callback_sees_latents_and_stops(decoder):
    seen = []

    def look(pipe, index, t, state):
        seen.append((index, tuple(state["latents"].shape)))
        return {"latents": torch.zeros_like(state["latents"]), "stop": index == 1}

    with pytest.raises(unclip.Cancelled):
        decoder(**given(1) | {"num_inference_steps": 3}, callback_on_step_end=look)
    assert seen == [(0, (1, 4, 8, 8)), (1, (1, 4, 8, 8))]


def test_half_precision(prior, decoder):
    from copy import deepcopy

    joined = quiet(KandinskyV22CombinedPipeline.from_pipes(prior, decoder))
    half = quiet(KandinskyV22CombinedPipeline(**deepcopy(joined.components))).to(torch.bfloat16)
    call = {"prompt": "a cat", "seed": 3, "prior_num_inference_steps": 2, **FEW}
    assert float((half(**call).images - joined(**call).images).abs().mean()) < 0.05


def test_offloading_gives_the_same_picture(decoder):
    from copy import deepcopy

    moved = quiet(KandinskyV22Pipeline(**deepcopy(decoder.components)))
    for enable in (moved.enable_model_cpu_offload, moved.enable_sequential_cpu_offload):
        enable(device="cpu")
        torch.testing.assert_close(moved(**given(seed=1)).images, decoder(**given(seed=1)).images)
        moved.remove_all_hooks()


def test_interpolation_is_a_plain_sum(prior):
    picture = Image.fromarray(np.full((20, 16, 3), 90, np.uint8))
    single = prior.interpolate([picture], [1.0], num_inference_steps=1, seed=1).image_embeds
    double = prior.interpolate([picture, picture], [1.0, 1.5], num_inference_steps=1, seed=1).image_embeds
    torch.testing.assert_close(double, 2.5 * single)


def test_a_prior_of_eclipse(prior):
    settings = dict(prior.prior.config) | {"additional_embeddings": 3}
    network = randomize(PriorTransformer(**settings), 5)
    pipe = quiet(KandinskyV22PriorPipeline(**prior.components | {"prior": network}))
    calls = []
    network.register_forward_hook(lambda *given: calls.append(1))
    out = pipe(["a cat", "an apple"], "red", seed=1)
    assert len(calls) == 1
    assert out.image_embeds.shape == out.negative_image_embeds.shape == (2, 16)
    torch.testing.assert_close(out.image_embeds[:1], pipe("a cat", "red", seed=1).image_embeds)


# ---- what is refused ----


def refused(error, match, call, *networks):
    """The call raises before any of the networks runs."""

    def fail(*args):
        raise AssertionError("a network was run")

    hooks = [network.register_forward_pre_hook(fail) for network in networks]
    try:
        with pytest.raises(error, match=match):
            call()
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("match", "more"),
    [
        (r"image_embeds have shape \(2, 24\); this decoder needs \[batch, 16\]", {"image_embeds": embeddings(2, 24)}),
        (r"negative_image_embeds have shape \(2, 24\)", {"negative_image_embeds": embeddings(2, 24)}),
        (r"image_embeds have shape \(2, 3, 16\)", {"image_embeds": torch.zeros(2, 3, 16)}),
        ("there are 1 negative_image_embeds for 2", {"negative_image_embeds": embeddings(1)}),
        ("guidance_scale is above 1: give negative_image_embeds", {"negative_image_embeds": None}),
        ("image_embeds has NaN", {"image_embeds": torch.full((2, 16), torch.nan)}),
        ("must be a tensor, or a list of tensors", {"image_embeds": [1, 2]}),
        ("output_type is 'jpg'", {"output_type": "jpg"}),
        ("height is 0", {"height": 0}),
        ("width is 100000", {"width": 100_000}),
        (r"latents have shape \(1, 4, 8, 8\)", {"latents": torch.zeros(1, 4, 8, 8)}),
        ("only 'latents' is supported", {"callback_on_step_end_tensor_inputs": ["image_embeds"]}),
        ("the number of steps is 0", {"num_inference_steps": 0}),
        ("give seed or generator", {"seed": 1, "generator": torch.Generator()}),
    ],
)
def test_wrong_arguments_of_the_decoder(decoder, match, more):
    refused(InputError, match, lambda: decoder(**given() | more), decoder.unet, decoder.movq)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("there are 2 images_and_prompts and 1 weights", lambda pipe: pipe.interpolate(["a", "b"], [1.0])),
        ("images_and_prompts has a int", lambda pipe: pipe.interpolate(["a", 3], [1.0, 1.0])),
        ("a weight is", lambda pipe: pipe.interpolate(["a"], [float("nan")])),
        ("output_type is 'pil'", lambda pipe: pipe("a", output_type="pil")),
        ("there are 3 captions for 2", lambda pipe: pipe(["a", "b"], ["c"] * 3)),
        (
            r"latents have shape \(1, 16\); this call needs \(2, 16\)",
            lambda pipe: pipe("a", "b", latents=embeddings(1)),
        ),
    ],
)
def test_wrong_arguments_of_the_prior(prior, match, call):
    refused(InputError, match, lambda: call(prior), prior.prior, prior.text_encoder, prior.image_encoder)


def test_a_prior_of_another_clip(prior, decoder):
    wide = unet_settings("2.2", encoder_hid_dim=24)
    parts = decoder.components | {"unet": UNet2DConditionModel.from_config(wide)}
    with pytest.raises(ConfigError, match=r"prior_prior.embedding_dim is 16, but the image embedding of unet is 24"):
        KandinskyV22CombinedPipeline.from_pipes(prior, KandinskyV22Pipeline(**parts))


@pytest.mark.parametrize(
    ("cls", "match", "settings"),
    [
        (KandinskyV22Pipeline, "'unet' is a network of Kandinsky 2.1; this pipeline is for 2.2", {"kind": "2.1"}),
        (KandinskyV22Pipeline, "unet.in_channels is 9, but those of this pipeline is 4", {"in_channels": 9}),
        (KandinskyV22InpaintPipeline, "unet.in_channels is 4, but those of this pipeline is 9", {}),
        (
            KandinskyV22Img2ImgPipeline,
            "unet.out_channels is 4, but twice those of movq's latents is 8",
            {"out_channels": 4},
        ),
    ],
)
def test_networks_of_another_pipeline(decoder, cls, match, settings):
    unet = UNet2DConditionModel.from_config(unet_settings(**{"kind": "2.2", "encoder_hid_dim": 16, **settings}))
    with pytest.raises(ConfigError, match=match):
        cls(**decoder.components | {"unet": unet})


def test_a_network_that_is_not_kandinsky_s(decoder):
    plain = {name: value for name, value in UNET.items() if name != "encoder_hid_dim"}
    with pytest.raises(ConfigError, match="is not a network of Kandinsky"):
        KandinskyV22Pipeline(**decoder.components | {"unet": UNet2DConditionModel(**plain)})
    with pytest.raises(ConfigError, match=r"'movq' is a .*must be unclip's VQModel"):
        KandinskyV22Pipeline(**decoder.components | {"movq": UNet2DConditionModel(**plain)})


def test_a_text_encoder_of_another_width(prior, text_decoder):
    unet = UNet2DConditionModel.from_config(unet_settings("2.1", cross_attention_dim=32))
    with pytest.raises(ConfigError, match=r"text_encoder.numDims is 16, but unet.cross_attention_dim is 32"):
        KandinskyPipeline(**text_decoder.components | {"unet": unet})
    with pytest.raises(ConfigError, match=r"'text_encoder' is .*unclip's MultilingualCLIP"):
        KandinskyPipeline(**text_decoder.components | {"text_encoder": prior.text_encoder})
    KandinskyCombinedPipeline.from_pipes(KandinskyPriorPipeline(**prior.components), text_decoder)


@pytest.mark.parametrize(
    ("match", "more"),
    [
        ("norm_type", {"norm_type": "group"}),
        ("lookup_from_codebook", {"lookup_from_codebook": True}),
        ("must divide all block_out_channels", {"block_out_channels": (48, 64)}),
        ("up_block_types has 2 entries", {"block_out_channels": (32,), "down_block_types": ("DownEncoderBlock2D",)}),
    ],
)
def test_autoencoders_that_are_not_movq(match, more):
    with pytest.raises(ConfigError, match=match):
        VQModel(**MOVQ | more)


def test_the_codebook_is_not_used():
    movq = randomize(VQModel(**MOVQ), 1)
    with pytest.raises(InputError, match="does not quantise"):
        movq.decode(torch.zeros(1, 4, 4, 4), force_not_quantize=False)


def test_strength(decoder):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    pipe = quiet(KandinskyV22Img2ImgPipeline(**decoder.components))
    near, far = (pipe(**given(1, seed=1, num_inference_steps=10), image=picture, strength=s).images for s in (0.1, 1.0))
    own = decoder.movq(unclip_tensor(picture)).sample.clamp(-1, 1) / 2 + 0.5
    assert (near - own).abs().mean() < 0.7 * (far - own).abs().mean()
    for strength in (0, 1.5):
        refused(InputError, "strength is", lambda s=strength: pipe(**given(1), image=picture, strength=s), pipe.unet)
    refused(InputError, "takes none of 2 steps", lambda: pipe(**given(1), image=picture, strength=0.3), pipe.unet)


def unclip_tensor(picture):
    from unclip.images import to_tensor

    return to_tensor(picture)[None]
