"""Components of pipelines: sharing, loading, saving, moving, offloading and slicing."""

import inspect
import json
import os
import re
import shutil
import threading
from functools import partial

import diffusers as reference
import numpy as np
import pytest
import torch
from transformers.utils import logging

import unclip.pipelines.pipeline as pipeline_module
from unclip import (
    Cancelled,
    CheckpointError,
    ConfigError,
    DDIMScheduler,
    ImagePipelineOutput,
    InputError,
    Manipulator,
    MissingFileError,
    OutputError,
    OutputExistsError,
    PriorTransformer,
    UnCLIPImageVariationPipeline,
    UnCLIPInpaintPipeline,
    UnCLIPPipeline,
    UnCLIPScheduler,
    UnCLIPTextProjModel,
    UNet2DConditionModel,
    UNet2DModel,
    UnsafeFileError,
    WeightsError,
)
from unclip.checkpoints.layout import CLASSES, FURTHER
from unclip.checkpoints.loading_arguments import IGNORED, REFUSED
from unclip.models import kernels


def picture(pipeline, few, seed=1):
    return pipeline("a cat", seed=seed, output_type="pt", **few).images


def variation(pipeline):
    steps = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}
    return pipeline(torch.ones(1, 3, 16, 16), seed=1, output_type="pt", **steps).images


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def saved(tiny_pipeline, tiny_variation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline.save_pretrained(folder / "text")
    tiny_variation.save_pretrained(folder / "variation")
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of a pipeline's folder, to damage."""
    return shutil.copytree(saved / "text", tmp_path / "copied")


# ---- sharing ----


def test_components_are_named_and_shared(tiny_pipeline, few):
    assert list(tiny_pipeline.components) == list(UnCLIPPipeline.COMPONENTS)
    assert list(tiny_pipeline.networks) == [
        "text_encoder",
        "prior",
        "text_proj",
        "decoder",
        "super_res_first",
        "super_res_last",
    ]
    twin = quiet(UnCLIPPipeline(**tiny_pipeline.components))
    assert all(part is getattr(tiny_pipeline, name) for name, part in twin.components.items())
    assert torch.equal(picture(twin, few), picture(tiny_pipeline, few))
    assert repr(twin).startswith("UnCLIPPipeline(text_encoder=CLIPTextModelWithProjection, tokenizer=")


def test_from_pipe_shares_what_both_have(tiny_pipeline, tiny_variation):
    more = {name: getattr(tiny_variation, name) for name in ("image_encoder", "feature_extractor")}
    made = quiet(UnCLIPImageVariationPipeline.from_pipe(tiny_pipeline, **more))
    assert made.decoder is tiny_pipeline.decoder
    assert torch.equal(variation(made), variation(tiny_variation))
    other = DDIMScheduler.from_config(tiny_pipeline.decoder_scheduler.config)
    assert UnCLIPPipeline.from_pipe(tiny_pipeline, decoder_scheduler=other).decoder_scheduler is other


@pytest.fixture(scope="module")
def whole(tiny_inpaint, tmp_path_factory):
    """A folder with every component, as of the built-in model."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    tiny_inpaint.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("own_clip", [False, True])
def test_from_pipe_reads_the_rest_from_the_same_folder(whole, tiny_variation, tiny_pipeline, few, own_clip):
    text = quiet(UnCLIPPipeline.from_pretrained(whole, own_clip=own_clip))
    vary = UnCLIPImageVariationPipeline.from_pipe(text)
    assert all(part is getattr(text, name) for name, part in vary.components.items() if name in text.components)
    assert type(vary.image_encoder).__name__.startswith("CLIPImage" if own_clip else "CLIPVision")
    torch.testing.assert_close(variation(vary), variation(tiny_variation), rtol=0, atol=1e-5)
    back = UnCLIPPipeline.from_pipe(UnCLIPImageVariationPipeline.from_pretrained(whole, own_clip=own_clip))
    torch.testing.assert_close(picture(quiet(back), few), picture(tiny_pipeline, few), rtol=0, atol=1e-5)
    assert back.prior_scheduler.config == tiny_pipeline.prior_scheduler.config
    edit = UnCLIPInpaintPipeline.from_pipe(vary)  # a pipeline that was made so knows the folder too
    assert edit.image_encoder is vary.image_encoder
    assert edit.prior is not None
    assert UnCLIPInpaintPipeline.from_pipe(text).image_encoder is not None


def test_from_pipe_reads_in_the_pipelines_type(whole, tmp_path):
    text = UnCLIPPipeline.from_pretrained(whole, torch_dtype=torch.float64).to(torch.bfloat16)
    vary = UnCLIPImageVariationPipeline.from_pipe(text)
    assert {network.dtype for network in vary.networks.values()} == {torch.bfloat16}
    UnCLIPInpaintPipeline.from_pretrained(whole).save_pretrained(tmp_path / "model", variant="fp16")
    shutil.copytree(whole / "image_encoder", tmp_path / "model" / "image_encoder", dirs_exist_ok=True)
    (tmp_path / "model" / "image_encoder" / "model.fp16.safetensors").unlink()
    text = UnCLIPPipeline.from_pretrained(tmp_path / "model", variant="fp16")
    assert UnCLIPImageVariationPipeline.from_pipe(text).image_encoder is not None


def test_from_pipe_prefers_what_is_given(whole, tiny_variation):
    text, given = UnCLIPPipeline.from_pretrained(whole), tiny_variation.image_encoder
    vary = UnCLIPImageVariationPipeline.from_pipe(text, image_encoder=given)
    assert vary.image_encoder is given
    assert vary.feature_extractor is not None


def test_from_pipe_of_a_folder_that_lacks_the_rest(saved):
    text = UnCLIPPipeline.from_pretrained(saved / "text")
    with pytest.raises(CheckpointError, match=r"without 'image_encoder', which .* needs; .*load a model that has it"):
        UnCLIPImageVariationPipeline.from_pipe(text)
    assert UnCLIPInpaintPipeline.from_pipe(text).image_encoder is None
    with pytest.raises(CheckpointError, match="without 'prior'"):
        UnCLIPPipeline.from_pipe(UnCLIPImageVariationPipeline.from_pretrained(saved / "variation"))


def test_from_pipe_does_not_bring_back_what_was_left_out(build_pipeline, tiny_components, tmp_path):
    third = {f"super_res_2_{part}": tiny_components({"sample_size": 32})[f"super_res_{part}"] for part in ("first",)}
    pipe = build_pipeline("text", tiny_components())
    large = UnCLIPPipeline(**pipe.components, **third, super_res_2_scheduler=UnCLIPScheduler())
    large.save_pretrained(tmp_path / "model")
    loaded = UnCLIPPipeline.from_pretrained(tmp_path / "model")
    loaded.super_res_2_first = loaded.super_res_2_scheduler = None
    assert list(UnCLIPInpaintPipeline.from_pipe(loaded).cascade) == ["super_res"]


def test_a_missing_component(tiny_pipeline):
    with pytest.raises(InputError, match=r"needs image_encoder, feature_extractor, but .*not loaded from a folder"):
        UnCLIPImageVariationPipeline.from_pipe(tiny_pipeline)
    with pytest.raises(InputError, match="UnCLIPImageVariationPipeline needs the component 'image_encoder'"):
        UnCLIPImageVariationPipeline(**tiny_pipeline.components)
    with pytest.raises(InputError, match="needs the component 'text_encoder'"):
        UnCLIPPipeline()


@pytest.mark.parametrize("part", ["prior", "decoder", "super_res_scheduler", "text_proj"])
def test_a_component_of_another_kind(tiny_pipeline, part):
    with pytest.raises(ConfigError, match=rf"component '{part}' is a torch\..*Identity; it must be unclip's"):
        UnCLIPPipeline(**tiny_pipeline.components | {part: torch.nn.Identity()})


def test_a_network_of_diffusers_is_refused_with_a_remedy(tiny_pipeline, tiny_configs):
    import diffusers

    theirs = diffusers.PriorTransformer(**tiny_configs["prior"])
    with pytest.raises(ConfigError, match=r"diffusers\.models.*from_pretrained"):
        UnCLIPPipeline(**tiny_pipeline.components | {"prior": theirs})


DEEP = {
    "block_out_channels": (8,) * 6,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 6,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 6,
}


@pytest.mark.parametrize(
    ("part", "settings", "words"),
    [
        ("prior", {"embedding_dim": 24}, "prior.embedding_dim is 24"),
        ("prior", {"num_embeddings": 12}, "prior.num_embeddings is 12"),
        ("prior", {"clip_embed_dim": 20}, "prior.clip_embed_dim is 20"),
        ("prior", {"embedding_proj_dim": 12}, "prior.embedding_proj_dim is 12"),
        ("prior", {"encoder_hid_proj_type": None, "attention_head_dim": 16}, "prior.text_dim is 32"),
        ("prior", {"added_emb_type": None}, "prior.added_emb_type is None"),
        ("prior", {"additional_embeddings": 5}, "prior.additional_embeddings is 5"),
        ("decoder", {"cross_attention_dim": 16}, "text_proj.cross_attention_dim is 12"),
        ("decoder", {"out_channels": 3}, "decoder.out_channels is 3"),
        ("decoder", {"block_out_channels": (16, 16)}, "text_proj.time_embed_dim is 32"),
        ("decoder", {"sample_size": None}, "sample_size is None"),
        ("decoder", {"sample_size": 9}, "decoder.sample_size is 9, but its 2 levels need a multiple of 2"),
        ("decoder", {"class_embed_type": None}, "decoder.class_embed_type is None; it must be 'identity'"),
        ("super_res_first", {"in_channels": 3}, "super_res_first.in_channels is 3"),
        ("super_res_first", {"sample_size": 17}, "super_res_first.sample_size is 17, but its 2 levels"),
        ("super_res_first", {"sample_size": 4}, "super_res_first.sample_size is 4, less than the 8"),
        ("super_res_first", {"class_embed_type": "identity"}, "super_res_first.class_embed_type is identity"),
        ("super_res_last", {"class_embed_type": "identity"}, "super_res_last.class_embed_type is identity"),
        ("super_res_last", DEEP, "super_res_last.sample_size is 16, but its 6 levels need a multiple of 32"),
        ("super_res_last", {"in_channels": 3}, "super_res_last.in_channels is 3"),
        ("super_res_last", {"sample_size": 32}, "super_res_last.sample_size is 32"),
        ("super_res_last", {"out_channels": 6}, "super_res_last.out_channels is 6"),
        ("text_proj", {"clip_embeddings_dim": 24}, "text_proj.clip_embeddings_dim is 24"),
    ],
)
def test_components_that_do_not_fit(tiny_pipeline, part, settings, words):
    there = getattr(tiny_pipeline, part)
    with torch.device("meta"):
        other = type(there)(there.config, **settings)
    with pytest.raises(ConfigError, match=words):
        UnCLIPPipeline(**tiny_pipeline.components | {part: other})


def test_a_learned_variance_needs_a_scheduler_that_knows_it(tiny_pipeline, few):
    plain = UnCLIPScheduler()
    with pytest.raises(ConfigError, match=r"decoder\.out_channels is 6, but its scheduler's .*fixed_small_log.* is 3"):
        UnCLIPPipeline(**tiny_pipeline.components | {"decoder_scheduler": plain})
    torch.manual_seed(0)
    decoder = UNet2DConditionModel(tiny_pipeline.decoder.config, out_channels=3).eval()
    without = quiet(UnCLIPPipeline.from_pipe(tiny_pipeline, decoder=decoder, decoder_scheduler=plain))
    assert picture(without, few).isfinite().all()


def test_a_prior_without_a_projection_of_text_tokens(tiny_pipeline, few):
    torch.manual_seed(0)
    prior = PriorTransformer(tiny_pipeline.prior.config, encoder_hid_proj_type=None).eval()
    assert picture(quiet(UnCLIPPipeline.from_pipe(tiny_pipeline, prior=prior)), few).isfinite().all()


def test_a_time_embedding_of_a_width_of_its_own(tiny_pipeline, few):
    """`time_embedding_dim` sets it where it is not four times the first level's width."""
    torch.manual_seed(0)
    decoder = UNet2DConditionModel(tiny_pipeline.decoder.config, time_embedding_dim=20).eval()
    with pytest.raises(ConfigError, match=r"text_proj\.time_embed_dim is 32, but decoder's is 20"):
        UnCLIPPipeline.from_pipe(tiny_pipeline, decoder=decoder)
    proj = UnCLIPTextProjModel(tiny_pipeline.text_proj.config, time_embed_dim=20).eval()
    assert (
        picture(quiet(UnCLIPPipeline.from_pipe(tiny_pipeline, decoder=decoder, text_proj=proj)), few).isfinite().all()
    )


def test_an_image_encoder_that_does_not_fit(tiny_variation):
    from transformers import CLIPVisionModelWithProjection

    config = tiny_variation.image_encoder.config.__class__(
        hidden_size=16,
        intermediate_size=8,
        projection_dim=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
    )
    with pytest.raises(ConfigError, match=r"image_encoder\.projection_dim is 24"):
        UnCLIPImageVariationPipeline.from_pipe(tiny_variation, image_encoder=CLIPVisionModelWithProjection(config))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": {"height": 32, "width": 32}}, "makes pictures of 32×32 pixels, image_encoder takes 16×16"),
        ({"do_center_crop": True, "crop_size": {"height": 8, "width": 16}}, "makes pictures of 8×16 pixels"),
        ({"size": {"height": 10**6, "width": 10**6}}, r"size in .* is .'height': 1000000.* from 1 to 4,096"),
        ({"size": {"shortest_edge": 10**6}}, "size in .* is .'shortest_edge': 1000000"),
    ],
    ids=str,
)
def test_a_feature_extractor_that_does_not_fit(saved, tmp_path, settings, words):
    folder = shutil.copytree(saved / "variation", tmp_path / "changed")
    file = folder / "feature_extractor" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ConfigError, match=words):
        UnCLIPImageVariationPipeline.from_pretrained(folder)


# ---- saving and loading ----


def test_saved_and_loaded_is_the_same(tiny_pipeline, tiny_variation, saved, few):
    loaded = quiet(UnCLIPPipeline.from_pretrained(saved / "text"))
    torch.testing.assert_close(picture(loaded, few), picture(tiny_pipeline, few), rtol=0, atol=1e-5)
    for name, network in loaded.networks.items():
        before = tiny_pipeline.networks[name].state_dict()
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items()), name
        assert not network.training
    for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
        assert getattr(loaded, name).config == getattr(tiny_pipeline, name).config
    loaded = quiet(UnCLIPImageVariationPipeline.from_pretrained(str(saved / "variation")))
    torch.testing.assert_close(variation(loaded), variation(tiny_variation), rtol=0, atol=1e-5)


def test_the_index_names_the_ecosystems_classes(saved):
    index = json.loads((saved / "variation" / "model_index.json").read_text())
    assert index["_class_name"] == "UnCLIPImageVariationPipeline"
    assert index["text_proj"] == ["unclip", "UnCLIPTextProjModel"]
    assert index["decoder"] == ["diffusers", "UNet2DConditionModel"]
    assert index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]


def test_no_bars_while_loading_and_saving(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)
    UnCLIPPipeline.from_pretrained(saved / "text").save_pretrained(tmp_path / "again")
    assert capsys.readouterr().err == ""
    assert logging.is_progress_bar_enabled()
    monkeypatch.setattr(logging, "_tqdm_active", False)
    UnCLIPPipeline.from_pretrained(saved / "text")
    assert not logging.is_progress_bar_enabled()


def test_other_schedulers_are_saved_too(tiny_pipeline, few, tmp_path):
    other = DDIMScheduler.from_config(tiny_pipeline.decoder_scheduler.config)
    mixed = quiet(UnCLIPPipeline.from_pipe(tiny_pipeline, decoder_scheduler=other))
    mixed.save_pretrained(tmp_path / "mixed")
    loaded = quiet(UnCLIPPipeline.from_pretrained(tmp_path / "mixed"))
    assert type(loaded.decoder_scheduler) is DDIMScheduler
    assert loaded.decoder_scheduler.config == other.config
    torch.testing.assert_close(picture(loaded, few, 2), picture(mixed, few, 2), rtol=0, atol=1e-5)


def test_parts_in_place_of_the_folders(saved, tiny_pipeline, copied):
    shutil.rmtree(copied / "prior")
    loaded = UnCLIPPipeline.from_pretrained(copied, prior=tiny_pipeline.prior)
    assert loaded.prior is tiny_pipeline.prior


def test_an_unknown_component(saved):
    with pytest.raises(InputError, match=r"UnCLIPPipeline\.from_pretrained has no argument or component 'vae'; it has"):
        UnCLIPPipeline.from_pretrained(saved / "text", vae=None)


@pytest.mark.parametrize("typo", ["torch_dtyp", "torch_dtpe", "prio", "decoder_schedular", "low_cpu_mem_usag"])
def test_a_typo(saved, typo):
    for cls in (UnCLIPPipeline, Manipulator):
        with pytest.raises(InputError, match=rf"no argument or component '{typo}'; did you mean '{typo[:4]}"):
            cls.from_pretrained(saved / "text", **{typo: None})
    with pytest.raises(
        InputError, match=r"PriorTransformer\.from_pretrained has no argument 'torch_dtyp'; did you mean"
    ):
        PriorTransformer.from_pretrained(saved / "text", subfolder="prior", torch_dtyp=torch.float16)


def arguments_of_the_reference():
    source = inspect.getsource(reference.DiffusionPipeline.from_pretrained)
    return {
        *re.findall(r'kwargs\.pop\("(\w+)"', source),
        "pretrained_model_name_or_path",
        "output_loading_info",
        "mirror",
    }


def test_every_argument_of_the_reference_is_known():
    own = {*inspect.signature(UnCLIPPipeline.from_pretrained).parameters}
    assert arguments_of_the_reference() <= own | {*IGNORED, *REFUSED}
    assert not own & {*IGNORED, *REFUSED}
    assert not {*IGNORED} & {*REFUSED}


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_an_argument_that_is_ignored(saved, name):
    for load in (
        partial(UnCLIPPipeline.from_pretrained, saved / "text"),
        partial(PriorTransformer.from_pretrained, saved / "text", subfolder="prior"),
        partial(UnCLIPScheduler.from_pretrained, saved / "text", "prior_scheduler"),
    ):
        with pytest.warns(UserWarning, match=rf"from_pretrained ignores {name} \(") as told:
            load(**{name: "a value"})
        assert len(told) == 1
        load(**{name: None})


@pytest.mark.parametrize("name", sorted({*REFUSED} - {"subfolder"}))
def test_an_argument_that_is_refused(saved, name):
    for load in (
        partial(UnCLIPPipeline.from_pretrained, saved / "text"),
        partial(Manipulator.from_pretrained, saved / "text"),
        partial(PriorTransformer.from_pretrained, saved / "text", subfolder="prior"),
        partial(UnCLIPScheduler.from_pretrained, saved / "text", "prior_scheduler"),
    ):
        with pytest.raises(InputError, match=f"from_pretrained does not support {name}: ") as told:
            load(**{name: "a secret"})
        assert "secret" not in str(told.value)


def test_arguments_without_effect(saved):
    arguments = {"low_cpu_mem_usage": True, "safety_checker": None, "use_safetensors": True, "token": False}
    arguments |= {"force_download": False, "trust_remote_code": False, "local_files_only": True, "device_map": None}
    assert UnCLIPPipeline.from_pretrained(saved / "text", **arguments).dtype == torch.float32


def test_several_arguments_give_one_warning(tiny_inpaint, tmp_path):
    tiny_inpaint.save_pretrained(tmp_path / "model")
    arguments = {"low_cpu_mem_usage": False, "offload_folder": "x", "max_memory": {0: "1GB"}}
    for cls in (UnCLIPInpaintPipeline, Manipulator):
        with pytest.warns(UserWarning, match="low_cpu_mem_usage.*offload_folder.*max_memory") as told:
            cls.from_pretrained(tmp_path / "model", **arguments)
        assert len(told) == 1
        assert told[0].filename == __file__


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu")], ids=repr)
def test_a_device_map_of_one_device(saved, device_map):
    assert UnCLIPPipeline.from_pretrained(saved / "text", device_map=device_map).device == torch.device("cpu")


@pytest.mark.parametrize("device_map", ["auto", "balanced", {"prior": "cpu"}, "tpu9", 1.5, "cuda:99"], ids=repr)
def test_a_device_map_of_several_devices(saved, device_map):
    with pytest.raises(InputError, match=r"device_map is .* one device, .* enable_model_cpu_offload"):
        UnCLIPPipeline.from_pretrained(saved / "text", device_map=device_map)


def test_devices_that_hold_no_weights_or_do_not_exist(saved):
    with pytest.raises(InputError, match="the meta device holds no weights"):
        UnCLIPPipeline.from_pretrained(saved / "text", device_map="meta")
    pipe = UnCLIPPipeline.from_pretrained(saved / "text")
    for offload in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.raises(InputError, match="device is 'nonsense'"):
            offload(device="nonsense")


def test_variations_from_a_folder_without_an_image_encoder(saved, tiny_variation):
    with pytest.raises(CheckpointError, match="describes a UnCLIPPipeline without 'image_encoder'"):
        UnCLIPImageVariationPipeline.from_pretrained(saved / "text")
    more = {name: getattr(tiny_variation, name) for name in ("image_encoder", "feature_extractor")}
    loaded = quiet(UnCLIPImageVariationPipeline.from_pretrained(saved / "text", **more))
    torch.testing.assert_close(variation(loaded), variation(tiny_variation), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorFast"])
def test_old_names_of_the_feature_extractor(saved, tmp_path, name):
    folder = shutil.copytree(saved / "variation", tmp_path / "old")
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", name]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert UnCLIPImageVariationPipeline.from_pretrained(folder).feature_extractor.crop_size["height"] == 16


def test_weights_in_bfloat16(saved, few):
    loaded = quiet(UnCLIPPipeline.from_pretrained(saved / "text", torch_dtype=torch.bfloat16))
    assert loaded.dtype == torch.bfloat16
    for network in loaded.networks.values():
        assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    made = picture(loaded, few)
    assert made.dtype == torch.float32
    assert made.isfinite().all()


def test_variants(tiny_pipeline, few, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model", variant="fp16")
    assert (tmp_path / "model/prior/diffusion_pytorch_model.fp16.safetensors").exists()
    assert (tmp_path / "model/text_encoder/model.fp16.safetensors").exists()
    loaded = quiet(UnCLIPPipeline.from_pretrained(tmp_path / "model", variant="fp16"))
    torch.testing.assert_close(picture(loaded, few), picture(tiny_pipeline, few), rtol=0, atol=1e-5)
    with pytest.raises(MissingFileError, match="component 'text_encoder'"):
        UnCLIPPipeline.from_pretrained(tmp_path / "model")


def test_a_variant_that_only_some_components_have(copied, tiny_pipeline, few):
    """The plain weights of the other components are read, as they are downloaded."""
    with pytest.raises(MissingFileError, match="no fp16 weights; leave variant out"):
        UnCLIPPipeline.from_pretrained(copied, variant="fp16")
    (copied / "prior" / "diffusion_pytorch_model.safetensors").rename(
        copied / "prior" / "diffusion_pytorch_model.fp16.safetensors"
    )
    loaded = quiet(UnCLIPPipeline.from_pretrained(copied, variant="fp16"))
    torch.testing.assert_close(picture(loaded, few), picture(tiny_pipeline, few), rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="must be a word"):
        UnCLIPPipeline.from_pretrained(copied, variant="../fp16")


def test_nothing_is_overwritten_without_overwrite(tiny_pipeline, copied):
    (copied / "mine.txt").write_text("keep")
    with pytest.raises(OutputExistsError):
        tiny_pipeline.save_pretrained(copied)
    assert (copied / "mine.txt").read_text() == "keep"
    tiny_pipeline.save_pretrained(copied, overwrite=True)
    assert not (copied / "mine.txt").exists()
    UnCLIPPipeline.from_pretrained(copied)


@pytest.mark.parametrize("part", ["pipeline", "prior", "prior_scheduler"])
@pytest.mark.parametrize(
    "name", ["", "a\0b", "x" * 300, "/".join(["y" * 200] * 25)], ids=["empty", "NUL", "long", "deep"]
)
def test_invalid_folder_names(tiny_pipeline, tmp_path, monkeypatch, part, name):
    monkeypatch.chdir(tmp_path)
    saved = tiny_pipeline if part == "pipeline" else getattr(tiny_pipeline, part)
    with pytest.raises(InputError, match=r"not a valid output path|bytes a part"):
        saved.save_pretrained(name)
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        with pytest.raises(OutputExistsError, match="is a file; name a folder"):
            saved.save_pretrained(place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("subfolder", ["../text/prior", "/tmp", "a\0b", "p" * 300])
@pytest.mark.parametrize("cls", [PriorTransformer, UnCLIPScheduler])
def test_a_subfolder_stays_inside(saved, cls, subfolder):
    with pytest.raises(UnsafeFileError):
        cls.from_pretrained(saved / "text", subfolder=subfolder)


def test_no_pickles_are_written(tiny_pipeline, tmp_path):
    with pytest.raises(UnsafeFileError, match="not write pickles"):
        tiny_pipeline.save_pretrained(tmp_path / "model", safe_serialization=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("last", ["tokenizer", "super_res_scheduler"])
def test_an_incomplete_folder_is_never_visible(tiny_pipeline, tmp_path, monkeypatch, last):
    original = pipeline_module.write_component

    def broken(component, folder, **options):
        if folder.name == last:
            raise OSError(28, "No space left on device")
        original(component, folder, **options)

    monkeypatch.setattr(pipeline_module, "write_component", broken)
    with pytest.raises(OSError, match="No space left"):
        tiny_pipeline.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


# ---- broken folders name the component ----


def rewrite_index(folder, **entries):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | entries))


def test_a_missing_part(copied):
    shutil.rmtree(copied / "decoder")
    with pytest.raises(MissingFileError, match=r"component 'decoder' \(UNet2DConditionModel\).*does not exist"):
        UnCLIPPipeline.from_pretrained(copied)


def test_no_index(tmp_path):
    with pytest.raises(MissingFileError, match=r"model_index\.json"):
        UnCLIPPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("entry", [None, "UNet2DModel", ["diffusers"], ["diffusers", None], [None, None]])
def test_an_index_entry_that_names_no_class(copied, entry):
    rewrite_index(copied, decoder=entry)
    with pytest.raises(CheckpointError, match="without 'decoder'"):
        UnCLIPPipeline.from_pretrained(copied)


@pytest.mark.parametrize("name", ["StableDiffusionSafetyChecker", "os.system", "__class__", "Component", ""])
def test_an_unknown_class(copied, name):
    rewrite_index(copied, decoder=["diffusers", name])
    with pytest.raises(ConfigError, match=r"component 'decoder'.*unclip has no class"):
        UnCLIPPipeline.from_pretrained(copied)


@pytest.mark.parametrize("name", ["UNet2DModel", "CLIPTokenizer", "CLIPTextModelWithProjection", "UnCLIPScheduler"])
def test_a_class_of_another_component(copied, name):
    rewrite_index(copied, decoder=["diffusers", name])
    with pytest.raises((ConfigError, CheckpointError), match="decoder"):
        UnCLIPPipeline.from_pretrained(copied)


def test_swapped_parts(copied):
    rewrite_index(copied, decoder=["diffusers", "UNet2DModel"])
    shutil.rmtree(copied / "decoder")
    shutil.copytree(copied / "super_res_first", copied / "decoder")
    with pytest.raises(ConfigError, match=r"component 'decoder' is a unclip\.models\.unet\.UNet2DModel"):
        UnCLIPPipeline.from_pretrained(copied)


@pytest.mark.parametrize("part", ["text_encoder", "prior"])
def test_damaged_weights(copied, part):
    (file,) = (copied / part).glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(WeightsError, match=f"component '{part}'"):
        UnCLIPPipeline.from_pretrained(copied)


@pytest.mark.parametrize("change", ["nan", "missing", "shape"])
def test_weights_of_the_text_encoder_are_checked(copied, change):
    from safetensors.torch import load_file, save_file

    file = copied / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("text_projection.weight"))
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name] * float("nan") if change == "nan" else tensors[name][:8].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="component 'text_encoder'"):
        UnCLIPPipeline.from_pretrained(copied)


def rewrite_config(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("hidden_size", 10**7),
        ("num_hidden_layers", 10**6),
        ("num_hidden_layers", "two"),
        ("max_position_embeddings", 10**11),
        ("vocab_size", 10**10),
        ("projection_dim", -1),
        ("num_attention_heads", 0),
        ("intermediate_size", 2.5),
    ],
)
def test_absurd_sizes_of_a_text_encoder_are_refused_by_name(copied, setting, value):
    rewrite_config(copied / "text_encoder", **{setting: value})
    with pytest.raises(
        ConfigError, match=rf"component 'text_encoder'.*{setting} in .* it must be a whole number from 1 to"
    ):
        UnCLIPPipeline.from_pretrained(copied)


def test_settings_of_clip_that_are_not_implemented_are_refused_by_name(copied, saved, tmp_path):
    rewrite_config(copied / "text_encoder", qk_norm=True)
    with pytest.raises(ConfigError, match=r"component 'text_encoder'.*config\.json has the setting 'qk_norm'"):
        UnCLIPPipeline.from_pretrained(copied)
    folder = shutil.copytree(saved / "variation", tmp_path / "variation")
    file = folder / "feature_extractor" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_flip_channel_order": True}))
    with pytest.raises(ConfigError, match=r"component 'feature_extractor'.*'do_flip_channel_order'"):
        UnCLIPImageVariationPipeline.from_pretrained(folder)


def test_an_activation_that_transformers_does_not_have(copied):
    rewrite_config(copied / "text_encoder", hidden_act="unknown")
    with pytest.raises(ConfigError, match=r"component 'text_encoder'.*hidden_act"):
        UnCLIPPipeline.from_pretrained(copied)


def test_a_text_encoder_with_more_weights_than_layers(copied):
    """Without an error, only half of the encoder would run, and all pictures would be wrong."""
    rewrite_config(copied / "text_encoder", num_hidden_layers=1)
    with pytest.raises(WeightsError, match=r"component 'text_encoder'.*16 that the model does not have"):
        UnCLIPPipeline.from_pretrained(copied)


def test_the_position_ids_of_old_files_are_ignored(copied):
    from safetensors.torch import load_file, save_file

    file = copied / "text_encoder" / "model.safetensors"
    ids = {"text_model.embeddings.position_ids": torch.arange(11)[None]}
    save_file(load_file(file) | ids, file, metadata={"format": "pt"})
    UnCLIPPipeline.from_pretrained(copied)


def test_a_tokenizer_without_files(copied):
    for file in (copied / "tokenizer").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="component 'tokenizer'"):
        UnCLIPPipeline.from_pretrained(copied)


def test_a_tokenizer_with_old_files(copied, tiny_pipeline):
    tokenizer = json.loads((copied / "tokenizer" / "tokenizer.json").read_text())
    (copied / "tokenizer" / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (copied / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(MissingFileError, match=r"neither tokenizer\.json nor merges\.txt"):
        UnCLIPPipeline.from_pretrained(copied)
    merges = "\n".join(" ".join(pair) for pair in tokenizer["model"]["merges"])
    (copied / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    loaded = UnCLIPPipeline.from_pretrained(copied)
    text = "a red apple, an emoji 🍏 and a cat"
    assert loaded.tokenizer(text)["input_ids"] == tiny_pipeline.tokenizer(text)["input_ids"]


def test_a_tokenizer_of_another_text_encoder(tiny_pipeline):
    from unclip.training.clip import train_tokenizer

    captions = ["the quick brown fox jumps over the lazy dog"] * 3
    other = train_tokenizer(captions, vocabulary_size=540, context_length=11)
    with pytest.raises(ConfigError, match=r"largest token id is 5\d\d, but text_encoder has 520"):
        UnCLIPPipeline(**tiny_pipeline.components | {"tokenizer": other})


@pytest.mark.parametrize("own_clip", [False, True])
def test_a_token_id_that_the_text_encoder_does_not_have(copied, own_clip):
    """As many tokens as the text encoder has, but one id is too large."""
    file = copied / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    name = next(token for token, number in vocabulary.items() if number == 7)
    vocabulary[name] = 700
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="largest token id is 700, but text_encoder has 520"):
        UnCLIPPipeline.from_pretrained(copied, own_clip=own_clip)


@pytest.mark.parametrize("own_clip", [False, True])
@pytest.mark.parametrize(
    ("file", "before", "after", "words"),
    [
        ("tokenizer.json", "{", '{"twice": 1, "twice": 2, ', "is not JSON: it has the key 'twice' twice"),
        ("tokenizer.json", "}", "", "is not JSON"),
        ("tokenizer_config.json", "{", '{"twice": 1, "twice": 2, ', "is not JSON: it has the key 'twice' twice"),
        ("special_tokens_map.json", "{", '{"twice": 1, "twice": 2, ', "is not JSON: it has the key 'twice' twice"),
    ],
)
def test_untrusted_json_of_a_tokenizer(copied, file, before, after, words, own_clip):
    path = copied / "tokenizer" / file
    text = path.read_text() if path.exists() else '{"bos_token": "<|startoftext|>"}'
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(CheckpointError, match=rf"component 'tokenizer'.*{file} {words}"):
        UnCLIPPipeline.from_pretrained(copied, own_clip=own_clip)


def test_a_link_that_leaves_the_folder(copied, saved):
    shutil.rmtree(copied / "prior")
    (copied / "prior").symlink_to(saved / "text" / "prior")
    with pytest.raises(UnsafeFileError, match="component 'prior'"):
        UnCLIPPipeline.from_pretrained(copied)


@pytest.mark.parametrize("own_clip", [False, True])
@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "generation_defaults.json",
        "probe.safetensors",
        "decoder/config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/merges.txt",
        "image_encoder/config.json",
        "feature_extractor/preprocessor_config.json",
        "decoder_scheduler/scheduler_config.json",
    ],
)
def test_a_file_that_is_a_link_out_of_the_folder(saved, tmp_path, file, own_clip):
    folder, outside = shutil.copytree(saved / "variation", tmp_path / "linked"), tmp_path / "outside"
    path = folder / file
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text("{}")
    if path.name == "merges.txt":  # nobody reads it beside a tokenizer.json
        path.with_name("tokenizer.json").rename(path.with_name("vocab.json"))
    path.symlink_to(outside)
    with pytest.raises(UnsafeFileError, match=rf"{path.name} is a link that leaves its folder"):
        UnCLIPImageVariationPipeline.from_pretrained(folder, own_clip=own_clip)


@pytest.mark.parametrize("own_clip", [False, True])
def test_a_snapshot_of_the_hubs_cache_is_links_throughout(saved, tmp_path, own_clip):
    root = tmp_path / "models--owner--name"
    snapshot = shutil.copytree(saved / "variation", root / "snapshots" / "abc")
    (root / "blobs").mkdir()
    (snapshot / "generation_defaults.json").write_text('{"decoder_num_inference_steps": 3}')
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(root / "blobs" / str(number))
        path.symlink_to(os.path.relpath(root / "blobs" / str(number), path.parent))
    pipe = UnCLIPImageVariationPipeline.from_pretrained(snapshot, own_clip=own_clip)
    assert pipe.recommended == {"decoder_num_inference_steps": 3}


# ---- type and place ----


def test_to_another_type_and_back(own_pipeline, tiny_pipeline, few):
    assert own_pipeline.dtype == torch.float32
    assert own_pipeline.to(torch.bfloat16) is own_pipeline
    assert own_pipeline.dtype == torch.bfloat16
    rough = picture(own_pipeline, few)
    assert rough.isfinite().all()
    own_pipeline.to("cpu", torch.float64)
    assert own_pipeline.dtype == torch.float64
    assert own_pipeline.to(dtype=torch.float32).dtype == torch.float32
    assert own_pipeline.device == torch.device("cpu")


def test_bfloat16_is_close_to_float32(own_pipeline, tiny_pipeline):
    """With little randomness: from a given embedding, with one step."""
    arguments = {
        "seed": 1,
        "return_intermediates": True,
        "prior_num_inference_steps": 5,
        "decoder_num_inference_steps": 1,
        "super_res_num_inference_steps": 1,
        "prior_guidance_scale": 1.0,
    }
    exact = tiny_pipeline("a cat", **arguments).image_embeddings
    rough = own_pipeline.to(torch.bfloat16)("a cat", **arguments).image_embeddings
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()


def test_mixed_types(own_pipeline, few):
    own_pipeline.text_encoder.to(torch.bfloat16)
    own_pipeline.super_res_last.to(torch.bfloat16)
    assert picture(own_pipeline, few).isfinite().all()


# ---- slicing ----


def test_attention_slicing_acts_and_changes_nothing(own_pipeline, tiny_pipeline, few, monkeypatch):
    import unclip.models.layers as attention

    calls = []
    original = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *given: calls.append(given[0].shape[1]) or original(*given))
    expected = picture(tiny_pipeline, few)
    whole = list(calls)
    for size in ("auto", "max", 1):
        calls.clear()
        own_pipeline.enable_attention_slicing(size)
        torch.testing.assert_close(picture(own_pipeline, few), expected, rtol=0, atol=1e-5)
        assert len(calls) > len(whole)
        assert set(calls) == {1}  # of two heads, one at a time
    calls.clear()
    own_pipeline.disable_attention_slicing()
    assert torch.equal(picture(own_pipeline, few), expected)
    assert calls == whole
    with pytest.raises(InputError, match="slice_size"):
        own_pipeline.enable_attention_slicing("some")


# ---- offloading ----


def hooked(pipeline):
    return [name for name, n in pipeline.networks.items() if any(hasattr(m, "_hf_hook") for m in n.modules())]


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloading_changes_no_picture(own_pipeline, tiny_pipeline, few, kind):
    getattr(own_pipeline, f"enable_{kind}_cpu_offload")(device="cpu")
    assert hooked(own_pipeline) == list(own_pipeline.networks)
    assert own_pipeline.device == torch.device("cpu")
    for _ in range(2):
        torch.testing.assert_close(picture(own_pipeline, few), picture(tiny_pipeline, few), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="offloaded"):
        own_pipeline.to("cpu")
    own_pipeline.remove_all_hooks()
    assert hooked(own_pipeline) == []
    torch.testing.assert_close(picture(own_pipeline, few), picture(tiny_pipeline, few), rtol=0, atol=1e-5)
    own_pipeline.to(torch.float64)


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloading_of_variations(own_variation, tiny_variation, kind):
    getattr(own_variation, f"enable_{kind}_cpu_offload")(device="cpu")
    torch.testing.assert_close(variation(own_variation), variation(tiny_variation), rtol=0, atol=1e-5)


def test_sequential_offload_removes_the_weights(own_pipeline, tiny_pipeline, few):
    """Between uses no weight has memory in the networks: all of them are in the map of the hooks."""
    own_pipeline.enable_sequential_cpu_offload(device="cpu")

    def all_away():
        return all(p.is_meta for network in own_pipeline.networks.values() for p in network.parameters())

    assert all_away()
    picture(own_pipeline, few)
    assert all_away()
    own_pipeline.remove_all_hooks()
    for name, network in own_pipeline.networks.items():
        expected = tiny_pipeline.networks[name].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items()), name


def test_model_offload_keeps_one_network_at_a_time(own_pipeline, few, monkeypatch):
    """Every network runs through its hook, in order, and each hook offloads the one before it.

    On a machine with one device nothing moves, so what is held here is who enters and whom a hook would send away.
    """
    import accelerate.hooks as hooks

    own_pipeline.enable_model_cpu_offload(device="cpu")
    names = {id(network): name for name, network in own_pipeline.networks.items()}
    events = []
    enter, leave = hooks.CpuOffload.pre_forward, hooks.UserCpuOffloadHook.offload

    def entering(self, module, *args, **kwargs):
        events.append(("in", names[id(module)]))
        return enter(self, module, *args, **kwargs)

    def leaving(self):
        events.append(("out", names[id(self.model)]))
        leave(self)

    monkeypatch.setattr(hooks.CpuOffload, "pre_forward", entering)
    monkeypatch.setattr(hooks.UserCpuOffloadHook, "offload", leaving)
    picture(own_pipeline, few)
    entered = [name for event, name in events if event == "in"]
    assert list(dict.fromkeys(entered)) == list(own_pipeline.networks)
    chain = [network._hf_hook.prev_module_hook for network in own_pipeline.networks.values()]
    assert [None if hook is None else names[id(hook.model)] for hook in chain] == [None, *list(names.values())[:-1]]
    assert events[-len(names) :] == [("out", name) for name in names.values()]  # at the end of the call, all


def test_a_stopped_run_frees_the_accelerator_too(own_pipeline, few, monkeypatch):
    freed = []
    own_pipeline.enable_model_cpu_offload(device="cpu")
    monkeypatch.setattr(own_pipeline, "maybe_free_model_hooks", lambda: freed.append(True))
    with pytest.raises(Cancelled):
        own_pipeline("a cat", callback_on_step_end=lambda *given: {"stop": True}, **few)
    assert freed


def test_offloading_twice_and_otherwise(own_pipeline, tiny_pipeline, few):
    own_pipeline.enable_sequential_cpu_offload(device="cpu")
    own_pipeline.enable_model_cpu_offload(device="cpu")
    assert not any(p.is_meta for network in own_pipeline.networks.values() for p in network.parameters())
    torch.testing.assert_close(picture(own_pipeline, few), picture(tiny_pipeline, few), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_an_offloaded_pipeline_is_saved_with_its_weights(own_pipeline, tiny_pipeline, tmp_path, kind):
    getattr(own_pipeline, f"enable_{kind}_cpu_offload")(device="cpu")
    own_pipeline.save_pretrained(tmp_path / "saved")
    own_pipeline.prior.save_pretrained(tmp_path / "prior")
    assert hooked(own_pipeline) == list(own_pipeline.networks)
    loaded = {**UnCLIPPipeline.from_pretrained(tmp_path / "saved").networks}
    loaded["alone"] = PriorTransformer.from_pretrained(tmp_path / "prior")
    for name, network in loaded.items():
        expected = tiny_pipeline.networks["prior" if name == "alone" else name].state_dict()
        state = network.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in state.items()), name


def test_weights_on_the_meta_device_are_not_saved(tiny_configs, tmp_path):
    with torch.device("meta"):
        empty = PriorTransformer(tiny_configs["prior"])
    with pytest.raises(InputError, match=r"of PriorTransformer .* are on the meta device.*remove_all_hooks"):
        empty.save_pretrained(tmp_path / "prior")
    assert not (tmp_path / "prior").exists()


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_a_pipeline_of_offloaded_parts_is_offloaded(own_pipeline, tiny_pipeline, few, kind):
    getattr(own_pipeline, f"enable_{kind}_cpu_offload")(device="cpu")
    made = UnCLIPPipeline.from_pipe(own_pipeline)
    with pytest.raises(InputError, match="offloaded"):
        made.to("cpu")
    torch.testing.assert_close(picture(made, few), picture(tiny_pipeline, few), rtol=0, atol=1e-5)
    made.remove_all_hooks()
    assert hooked(made) == hooked(own_pipeline) == []
    assert own_pipeline.to(torch.float64).dtype == made.dtype == torch.float64  # they share them


def test_a_pipeline_of_offloaded_parts_frees_them_too(own_pipeline, few, monkeypatch):
    from accelerate import hooks

    own_pipeline.enable_model_cpu_offload(device="cpu")
    made, back = UnCLIPPipeline.from_pipe(own_pipeline), []
    monkeypatch.setattr(hooks.UserCpuOffloadHook, "offload", lambda self: back.append(self.model))
    picture(made, few)
    assert back[-len(made.networks) :] == list(made.networks.values())


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_a_network_that_is_two_components_is_offloaded_once(own_pipeline, tiny_pipeline, few, kind):
    own_pipeline.super_res_last = own_pipeline.super_res_first
    expected = picture(own_pipeline, few)
    getattr(own_pipeline, f"enable_{kind}_cpu_offload")(device="cpu")
    torch.testing.assert_close(picture(own_pipeline, few), expected, rtol=0, atol=1e-5)
    own_pipeline.remove_all_hooks()
    assert hooked(own_pipeline) == []


def test_from_pipe_keeps_bars_and_tiling(tiny_components, build_pipeline, tiny_pipeline, tiny_variation, few, capsys):
    pipe = build_pipeline("text", tiny_components({"sample_size": 32}))
    pipe.enable_super_res_tiling(16, 4)
    made = UnCLIPPipeline.from_pipe(pipe)
    assert made._tiling == pipe._tiling
    picture(made, few)
    assert capsys.readouterr().err == ""  # no bars
    made.set_progress_bar_config(disable=False)
    made.disable_super_res_tiling()
    assert pipe._progress == {"disable": True}  # options of one are not the other's
    assert pipe._tiling is not None
    more = {name: getattr(tiny_variation, name) for name in ("image_encoder", "feature_extractor")}
    assert UnCLIPImageVariationPipeline.from_pipe(pipe, **more)._tiling == pipe._tiling
    assert UnCLIPPipeline.from_pipe(tiny_pipeline)._tiling is None
    with pytest.raises(InputError, match="not a str"):
        UnCLIPPipeline.from_pipe("unclip-emoji")


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloading_needs_an_accelerator(own_pipeline, monkeypatch, kind):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs an accelerator"):
        getattr(own_pipeline, f"enable_{kind}_cpu_offload")()


def test_offloading_finds_the_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert pipeline_module._accelerator(None, None) == torch.device("cuda", 0)
    assert pipeline_module._accelerator(1, None) == torch.device("cuda", 1)
    assert pipeline_module._accelerator(np.int64(1), None) == torch.device("cuda", 1)
    with pytest.raises(InputError, match="gpu_id"):
        pipeline_module._accelerator(True, None)
    assert pipeline_module._accelerator(1, "cpu") == torch.device("cpu")


def test_loading_in_several_threads(saved, monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(UnCLIPPipeline.from_pretrained(saved / "text"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert logging.is_progress_bar_enabled()


def test_the_output_is_what_the_package_exports(tiny_pipeline, few):
    assert isinstance(tiny_pipeline("a cat", **few), ImagePipelineOutput)
    assert isinstance(tiny_pipeline.super_res_first, UNet2DModel)


def test_recommended_settings_are_saved_with_a_model(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    assert UnCLIPPipeline.from_pretrained(tmp_path / "model").recommended == {}
    settings = '{"prior_guidance_scale": 2, "decoder_num_inference_steps": 3}'
    (tmp_path / "model" / "generation_defaults.json").write_text(settings)
    pipe = UnCLIPPipeline.from_pretrained(tmp_path / "model")
    assert pipe.recommended == {"prior_guidance_scale": 2, "decoder_num_inference_steps": 3}
    pipe.save_pretrained(tmp_path / "again")
    assert UnCLIPPipeline.from_pretrained(tmp_path / "again").recommended == pipe.recommended
    drawing = {"num_prior_candidates": 4, "prior_temperature": 0.7, "prior_top_p": 0.9}
    (tmp_path / "model" / "generation_defaults.json").write_text(json.dumps(drawing))
    for kind in (UnCLIPPipeline, UnCLIPInpaintPipeline):
        assert kind.from_pretrained(tmp_path / "model").recommended == drawing
        assert kind.from_pipe(UnCLIPPipeline.from_pretrained(tmp_path / "model")).recommended == drawing
    (tmp_path / "model" / "generation_defaults.json").write_text('{"decoder_num_inference_steps": 2.5}')
    with pytest.raises(ConfigError, match="whole number"):
        UnCLIPPipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "wrong",
    ['{"decoder_num_inference_steps": [2]}']
    + [f'{{"super_res_num_inference_steps": {value}}}' for value in ("[]", "[2.5]", "[true]", '["2"]')],
)
def test_lists_are_for_the_stages_of_super_resolution(tiny_pipeline, tmp_path, wrong):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_defaults.json").write_text(wrong)
    with pytest.raises(ConfigError, match=r"whole number|empty list"):
        UnCLIPPipeline.from_pretrained(tmp_path / "model")


def test_a_replaced_component_is_checked(own_pipeline, few):
    with pytest.raises(ConfigError, match="is None; it must be"):
        own_pipeline.prior = None
    own_pipeline.decoder_scheduler = UnCLIPScheduler(variance_type="fixed_small_log")
    with pytest.raises(ConfigError, match=r"decoder\.out_channels"):
        own_pipeline("a cat", **few)


def test_progress_options_are_checked_when_they_are_set(own_pipeline):
    with pytest.raises(InputError, match="nonsense"):
        own_pipeline.set_progress_bar_config(nonsense=1)


def test_only_safetensors_are_read(saved):
    for cls, folder in ((UnCLIPPipeline, saved / "text"), (PriorTransformer, saved / "text" / "prior")):
        with pytest.raises(UnsafeFileError, match="unclip convert pickle"):
            cls.from_pretrained(folder, use_safetensors=False)
        for use in (None, True):
            assert cls.from_pretrained(folder, use_safetensors=use).dtype == torch.float32


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16", torch.bfloat16], ids=str)
def test_a_type_by_its_name(saved, name):
    for argument in ("torch_dtype", "dtype"):
        pipe = UnCLIPPipeline.from_pretrained(saved / "text", **{argument: name})
        assert {network.dtype for network in pipe.networks.values()} == {torch.bfloat16}
        prior = PriorTransformer.from_pretrained(saved / "text" / "prior", **{argument: name})
        assert prior.dtype == torch.bfloat16


@pytest.mark.parametrize("own_clip", [False, True])
def test_the_types_of_the_files(own_pipeline, tmp_path, own_clip):
    types = {"text_encoder": torch.bfloat16, "prior": torch.float16, "decoder": torch.float64}
    for name, kind in types.items():
        getattr(own_pipeline, name).to(kind)
    own_pipeline.save_pretrained(tmp_path / "model")
    loaded = UnCLIPPipeline.from_pretrained(tmp_path / "model", torch_dtype="stored", own_clip=own_clip)
    for name, network in loaded.networks.items():
        assert network.dtype == types.get(name, torch.float32)
    assert PriorTransformer.from_pretrained(tmp_path / "model" / "prior", torch_dtype="stored").dtype == torch.float16
    assert UnCLIPPipeline.from_pretrained(tmp_path / "model", own_clip=own_clip).decoder.dtype == torch.float32


@pytest.mark.parametrize("computes", [True, False])
def test_the_fastest_type(saved, monkeypatch, computes):
    monkeypatch.setattr(kernels, "_cpu_computes", lambda dtype: computes)
    fastest = torch.bfloat16 if computes else torch.float32
    pipe = UnCLIPPipeline.from_pretrained(saved / "text", torch_dtype="auto")
    assert {network.dtype for network in pipe.networks.values()} == {fastest}
    assert PriorTransformer.from_pretrained(saved / "text" / "prior", torch_dtype="auto").dtype == fastest
    some = UnCLIPPipeline.from_pretrained(saved / "text", torch_dtype={"prior": "auto"})
    assert (some.prior.dtype, some.decoder.dtype) == (fastest, torch.float32)
    assert kernels.automatic_type(torch.device("cuda")) == torch.float16


def test_a_type_for_each_component(saved):
    types = {"prior": "float16", "text_encoder": torch.float64, "default": torch.bfloat16}
    pipe = UnCLIPPipeline.from_pretrained(saved / "text", torch_dtype=types)
    found = {name: network.dtype for name, network in pipe.networks.items()}
    others = dict.fromkeys(found, torch.bfloat16)
    assert found == others | {"prior": torch.float16, "text_encoder": torch.float64}
    some = UnCLIPPipeline.from_pretrained(saved / "text", torch_dtype={"prior": torch.float16})
    assert (some.prior.dtype, some.decoder.dtype) == (torch.float16, torch.float32)
    with pytest.raises(InputError, match="'priorr', but no pipeline has"):
        UnCLIPPipeline.from_pretrained(saved / "text", torch_dtype={"priorr": torch.float16})
    with pytest.raises(InputError, match="torch_dtype is 5"):
        UnCLIPPipeline.from_pretrained(saved / "text", torch_dtype={"prior": 5})


@pytest.mark.parametrize("dtype", ["fp16", "int8", "nn", "", torch.int8, torch.complex64, 16, float], ids=str)
def test_a_type_that_weights_cannot_have(saved, dtype):
    for cls, folder in ((UnCLIPPipeline, saved / "text"), (PriorTransformer, saved / "text" / "prior")):
        with pytest.raises(InputError, match=r"torch_dtype is .*torch\.float16"):
            cls.from_pretrained(folder, torch_dtype=dtype)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("text_encoder", "x"),
        ("text_encoder", torch.nn.Linear(2, 2)),
        ("tokenizer", "x"),
        ("tokenizer", object()),
        ("tokenizer", len),
        ("image_encoder", 5),
        ("feature_extractor", "x"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_value_that_is_not_a_clip_component(own_variation, part, wrong):
    with pytest.raises(ConfigError, match=rf"component '{part}' is a .*; it must be transformers' \w+"):
        UnCLIPImageVariationPipeline(**own_variation.components | {part: wrong})
    before = getattr(own_variation, part)
    with pytest.raises(ConfigError, match=part):
        setattr(own_variation, part, wrong)
    assert getattr(own_variation, part) is before


def test_a_part_of_clip_of_another_class(own_variation, own_pipeline):
    from transformers import CLIPTextModel, CLIPTokenizer

    swapped = {"text_encoder": own_variation.image_encoder, "image_encoder": own_variation.text_encoder}
    for part, wrong in {**swapped, "tokenizer": CLIPTokenizer}.items():
        with pytest.raises(ConfigError, match=part):
            UnCLIPImageVariationPipeline(**own_variation.components | {part: wrong})
    with pytest.raises(ConfigError, match=r"CLIPTextModel; it must be transformers' CLIPTextModelWithProjection"):
        own_pipeline.text_encoder = CLIPTextModel(own_pipeline.text_encoder.config)


@pytest.mark.parametrize("typo", ["super_res2_first", "prior_schedulr", "safety_checker"])
def test_a_name_that_no_pipeline_has(tiny_pipeline, tiny_variation, typo):
    for pipe in (tiny_pipeline, tiny_variation):
        for value in (3, None):
            with pytest.raises(InputError, match=rf"no pipeline has a component '{typo}'.* has text_encoder"):
                type(pipe)(**pipe.components, **{typo: value})
            with pytest.raises(InputError, match=typo):
                type(pipe).from_pipe(pipe, **{typo: value})
    # What another kind has is passed over.
    assert "prior" not in UnCLIPImageVariationPipeline(**tiny_variation.components, prior=3).components
    assert "image_encoder" not in UnCLIPPipeline(**tiny_pipeline.components, image_encoder=3).components


def test_the_names_that_pipelines_have_are_those_of_the_folders():
    kinds = (UnCLIPPipeline, UnCLIPImageVariationPipeline, UnCLIPInpaintPipeline)
    assert {name for cls in kinds for name in cls.component_names()} == {*CLASSES, *FURTHER}
    assert all(UnCLIPPipeline.kind(name) for name in {*CLASSES, *FURTHER})


# ---- full disks, the current folder, torch's default type ----


@pytest.mark.parametrize("room_bytes", [10, 5_000, 20_000])
def test_saving_on_a_full_disk_leaves_the_old_folder(own_pipeline, tmp_path, little_room, room_bytes):
    own_pipeline.save_pretrained(tmp_path / "model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with torch.no_grad():
        own_pipeline.decoder.conv_out.weight.add_(1)
    for folder, overwrite in (("model", True), ("new", False)):
        with little_room(room_bytes), pytest.raises(OutputError, match=f"{folder} cannot be written"):
            own_pipeline.save_pretrained(tmp_path / folder, overwrite=overwrite)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["text_encoder", "decoder", "tokenizer", "prior_scheduler"])
def test_a_component_alone_on_a_full_disk(own_pipeline, tmp_path, little_room, name):
    own_pipeline.save_pretrained(tmp_path / "model")
    part = type(own_pipeline).from_pretrained(tmp_path / "model", own_clip=True).components[name]
    with little_room(10), pytest.raises(OutputError):
        part.save_pretrained(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_current_folder_is_never_replaced(own_pipeline, tmp_path, monkeypatch, overwrite):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputExistsError, match="is the current folder"):
        own_pipeline.save_pretrained(".", overwrite=overwrite)
    assert os.path.samefile(".", tmp_path)
    assert list(tmp_path.iterdir()) == []
    own_pipeline.save_pretrained("model")
    own_pipeline.decoder.save_pretrained(".")  # a component is written into its folder
    assert os.path.samefile(".", tmp_path)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("own_clip", [False, True])
def test_torchs_default_type_changes_no_picture(tiny_pipeline, make, tmp_path, few, default, own_clip):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    expected = make("a cat", seed=1)
    torch.set_default_dtype(default)
    try:
        pipe = type(tiny_pipeline).from_pretrained(tmp_path / "model", own_clip=own_clip)
        pipe.set_progress_bar_config(disable=True)
        pictures = pipe("a cat", seed=1, output_type="pt", **few).images
        shared = make("a cat", seed=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for network in pipe.networks.values() for tensor in network.parameters()} == {torch.float32}
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-5)
    assert torch.equal(shared, expected)
