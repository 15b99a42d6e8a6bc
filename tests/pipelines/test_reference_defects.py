"""Known defects of diffusers' unCLIP pipelines, with one test each, by their numbers in the project's notes."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import InputError, UnCLIPImageVariationPipeline, UnCLIPPipeline, UnCLIPScheduler
from unclip.pipelines.convert import convert_karlo, convert_text_to_image_to_variation
from unclip.stages.super_res import enlarge

from ..karlo_export import export_prior, export_text_projection, export_unet


def watch(request, network):
    """The numbers of rows of a network's calls, until the test is over."""
    rows = []
    hook = network.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    request.addfinalizer(hook.remove)
    return rows


def test_defect_01_what_was_saved_loads_again(tiny_pipeline, tiny_variation, tmp_path):
    for pipeline, cls in ((tiny_pipeline, UnCLIPPipeline), (tiny_variation, UnCLIPImageVariationPipeline)):
        pipeline.save_pretrained(tmp_path / cls.__name__)
        assert isinstance(cls.from_pretrained(tmp_path / cls.__name__), cls)


@pytest.mark.parametrize("stage", ["prior", "decoder", "super_res"])
def test_defect_02_numbers_of_steps_at_their_limits(make, tiny_pipeline, stage):
    name = f"{stage}_num_inference_steps"
    assert make("a cat", seed=1, **{name: 1}).isfinite().all()
    for steps in (0, -1, 1001):
        with pytest.raises(InputError):
            make("a cat", **{name: steps})
    timesteps = getattr(tiny_pipeline, f"{stage}_scheduler").spaced_timesteps(1000)
    assert len(set(timesteps)) == 1000


def test_defect_03_guidance_belongs_to_a_stage(make, tiny_pipeline, request):
    prior = watch(request, tiny_pipeline.prior)
    decoder = watch(request, tiny_pipeline.decoder)
    off = make("a cat", seed=1, prior_guidance_scale=1.0)
    assert (prior, decoder) == ([1, 1], [2, 2])
    assert torch.equal(make("a cat", seed=1, prior_guidance_scale=0.5), off)  # with the decoder guided …
    both_off = [make("a cat", seed=1, prior_guidance_scale=s, decoder_guidance_scale=1.0) for s in (0.5, 1.0)]
    assert torch.equal(*both_off)  # … and without


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_defect_04_the_schedules_arithmetic_is_float32(own_pipeline, few, dtype):
    seen = []
    own_pipeline.to(dtype)
    own_pipeline("a cat", seed=1, callback_on_step_end=lambda *given: seen.append(given[3]), **few)
    assert {about["latents"].dtype for about in seen} == {torch.float32}
    assert {about["x0"].dtype for about in seen} == {torch.float32}
    # The state has more digits than the networks' type could hold.
    assert any(not torch.equal(about["latents"].to(dtype).float(), about["latents"]) for about in seen[:-1])


def test_defect_05_the_empty_prompt_is_encoded_once(make, tiny_pipeline, request):
    rows = watch(request, tiny_pipeline.text_encoder)
    make(["a cat", "an apple", "a red cat"], num_images_per_prompt=2, seed=1)
    assert rows == [3, 1]


def test_defect_06_negative_prompts_and_captions_for_variations(make, vary):
    assert not torch.equal(make("a cat", seed=1, negative_prompt="an apple"), make("a cat", seed=1))
    picture = Image.new("RGB", (16, 16), "red")
    assert not torch.equal(vary(picture, seed=1, prompt="an apple"), vary(picture, seed=1))


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": None},
        {"text_model_output": (torch.zeros(1, 16), torch.zeros(1, 11, 16))},
        {"prompt": "a cat", "output_type": "latent"},
    ],
    ids=["no prompt", "no mask", "unknown output"],
)
def test_defect_07_inputs_are_checked(tiny_pipeline, few, arguments):
    with pytest.raises(InputError):
        tiny_pipeline(**few | arguments)


@pytest.mark.parametrize("name", ["decoder_latents", "super_res_latents"])
def test_defect_07_variations_check_latents(vary, name):
    with pytest.raises(InputError, match=f"{name} have shape"):
        vary(image_embeddings=torch.zeros(1, 16), **{name: torch.zeros(1, 3, 4, 4)})


def test_defect_08_a_step_reads_no_tensor_back(make, monkeypatch):
    """Timesteps are Python numbers in the loop, and nothing asks a tensor for its value."""
    embeddings = torch.zeros(1, 16)
    arguments = {"image_embeddings": embeddings, "seed": 1, "decoder_guidance_scale": 1.0}
    make("a cat", seed=1)

    read = []
    for name in ("item", "__int__", "__float__", "__index__", "tolist", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, f=original, n=name: read.append(n) or f(self))
    few_reads, many_reads = [], []
    for steps, reads in ((2, few_reads), (12, many_reads)):
        read.clear()
        make("a cat", **arguments, decoder_num_inference_steps=steps, super_res_num_inference_steps=steps)
        reads.extend(read)
    assert len(few_reads) == len(many_reads)


def test_defect_09_the_priors_clamp_is_a_setting(own_pipeline, few):
    assert own_pipeline.prior_scheduler.process.clip_range == 5.0
    own_pipeline.prior_scheduler = UnCLIPScheduler.from_config(
        own_pipeline.prior_scheduler.config, clip_sample_range=0.25
    )
    with torch.no_grad():
        own_pipeline.prior.clip_std.fill_(1)
        own_pipeline.prior.clip_mean.zero_()
    output = own_pipeline("a cat", seed=1, return_intermediates=True, **few)
    assert output.image_embeddings.abs().max() <= 0.25 + 1e-6


def test_defect_09_a_converted_folder_has_karlos_clamp(tiny_pipeline, tiny_variation, tmp_path):
    tiny_variation.save_pretrained(tmp_path / "clip")
    prior, mean, std = export_prior(tiny_pipeline.prior.state_dict(), head_dim=8)
    decoder = export_unet(tiny_pipeline.decoder.state_dict(), kind="decoder", head_dim=8)
    decoder |= export_text_projection(tiny_pipeline.text_proj.state_dict())
    super_res = {}
    for part, prefix in (("super_res_first", "model_first_steps."), ("super_res_last", "model_last_step.")):
        state = getattr(tiny_pipeline, part).state_dict()
        super_res |= export_unet(state, kind="super_res", prefix=prefix)
    files = {"prior": prior, "decoder": decoder, "super_res": super_res}
    for name, state in files.items():
        torch.save({"state_dict": state}, tmp_path / f"{name}.ckpt")
    torch.save((mean, std), tmp_path / "stats.th")
    out = convert_karlo(
        **{name: tmp_path / f"{name}.ckpt" for name in files},
        stats=tmp_path / "stats.th",
        clip=tmp_path / "clip",
        out=tmp_path / "karlo",
        head_dim=8,
    )
    ranges = {
        name: UnCLIPScheduler.from_pretrained(out, f"{name}_scheduler").process.clip_range
        for name in ("prior", "decoder", "super_res")
    }
    assert ranges == {"prior": 10.0, "decoder": 1.0, "super_res": 1.0}


def test_defect_10_preprocessing_is_the_feature_extractors(tiny_pipeline, own_variation, tmp_path):
    """As it is configured: one that crops sees the centre only, one that squashes (as Karlo's code) sees it all.

    The file decides, so that a folder gives the reference's pictures; the code has no second rule. Folders
    made here squash, from whatever CLIP they are made, unless they were asked to crop.
    """
    wide = np.full((16, 48, 3), 255, dtype=np.uint8)
    marked = wide.copy()
    marked[:, :8] = 0  # outside the central square
    steps = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2, "output_type": "pt"}

    def sees_the_edge(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        pictures = [pipeline(Image.fromarray(pixels), seed=1, **steps).images for pixels in (wide, marked)]
        return not torch.equal(*pictures)

    assert sees_the_edge(own_variation)
    processor = own_variation.feature_extractor
    processor.size, processor.do_center_crop = {"shortest_edge": 16}, True  # OpenAI's and the published folder's
    assert not sees_the_edge(own_variation)

    tiny_pipeline.save_pretrained(tmp_path / "text")
    own_variation.save_pretrained(tmp_path / "clip")
    for crop in (False, True):
        out = convert_text_to_image_to_variation(
            tmp_path / "text", tmp_path / f"crop {crop}", clip=tmp_path / "clip", crop=crop
        )
        assert sees_the_edge(UnCLIPImageVariationPipeline.from_pretrained(out)) is not crop


def test_defect_11_enlarging_is_bicubic_everywhere(monkeypatch):
    """Where the accelerator has no such kernel the CPU does it; nothing falls back to nearest neighbours."""
    import torch.nn.functional as F

    small = torch.rand(1, 3, 8, 8)
    expected = F.interpolate(small, size=(16, 16), mode="bicubic", antialias=True, align_corners=False)
    assert torch.equal(enlarge(small, 16), expected)

    class OnMps(torch.Tensor):
        device = torch.device("mps")
        moved = 0

        def cpu(self):
            OnMps.moved += 1
            return self.as_subclass(torch.Tensor)

    back = []
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, to: back.append(to) or original(self, "cpu"))
    assert torch.equal(enlarge(small.as_subclass(OnMps), 16), expected)
    assert OnMps.moved == 1
    assert back == [torch.device("mps")]


def test_defect_12_no_parameter_is_used_outside_a_forward(own_pipeline, few, make):
    """Offloading that wraps forwards finds every use: un-whitening the embedding, the learned null embedding, …"""
    own_pipeline.enable_sequential_cpu_offload(device="cpu")
    picture = own_pipeline("a cat", seed=1, output_type="pt", **few).images
    torch.testing.assert_close(picture, make("a cat", seed=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}], ids=str)
def test_defect_12_group_offloading(own_pipeline, few, make, options):
    """Diffusers' own: its hooks hand each group of layers copies of the lists and tuples that go in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    groups = {"num_blocks_per_group": 1} if options["offload_type"] == "block_level" else {}
    for name, network in own_pipeline.networks.items():
        if name != "text_encoder":
            apply_group_offloading(network, onload_device=cpu, offload_device=cpu, **options, **groups)
    picture = own_pipeline("a cat", seed=1, output_type="pt", **few).images
    torch.testing.assert_close(picture, make("a cat", seed=1), rtol=0, atol=1e-5)


def test_defect_13_noise_can_be_held_along_an_interpolation(make):
    """One seed for every frame: the picture changes with the embedding alone."""
    ends = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    weights = torch.linspace(0, 1, 3)[:, None]
    frames = (1 - weights) * ends[:1] + weights * ends[1:]
    film = make(image_embeddings=frames, seed=[7] * 3)
    for i in range(3):
        torch.testing.assert_close(film[i : i + 1], make(image_embeddings=frames[i : i + 1], seed=7), rtol=0, atol=1e-5)
    still = make(image_embeddings=frames[:1].expand(2, -1), seed=[7, 7])
    torch.testing.assert_close(still[0], still[1], rtol=0, atol=1e-5)


def test_defect_14_a_seed_gives_the_same_picture_again(make):
    assert torch.equal(make("a cat", seed=3), make("a cat", seed=3))
    assert not torch.equal(make("a cat", seed=3), make("a cat", seed=4))


def test_defect_15_importing_is_fast():
    """What takes seconds is torch; test_package.py measures the time."""
    subprocess.run([sys.executable, "-c", "import unclip, sys; assert 'torch' not in sys.modules"], check=True)
