"""Folders made out of original files, text-to-image folders and pickles; a failure leaves nothing behind."""

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from unclip.checkpoints import karlo, layout
from unclip.checkpoints.files import read_json
from unclip.checkpoints.tensor_file import fingerprint
from unclip.checkpoints.weights import check_finite, read_header, read_tensors
from unclip.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    MissingFileError,
    OutputExistsError,
    UnsafeFileError,
    WeightsError,
)
from unclip.models import UNet2DConditionModel, UNet2DModel
from unclip.models.pca import PrincipalComponents
from unclip.pipelines import convert
from unclip.pipelines.convert import convert_karlo, convert_pickle, convert_text_to_image_to_variation

from ..karlo_export import export_prior, export_text_projection, export_unet

CLIP_DIM = 24
NETWORKS = ("prior", "text_proj", "decoder", "super_res_first", "super_res_last")


@pytest.fixture(scope="session")
def originals(reference, tmp_path_factory) -> dict[str, Any]:
    """The tiny model as Karlo's files, and the arguments that name them."""
    folder = tmp_path_factory.mktemp("originals")
    prior, mean, std = export_prior(reference["prior"], head_dim=8)
    decoder = export_unet(reference["decoder"], kind="decoder", head_dim=8)
    decoder |= export_text_projection(reference["text_proj"])
    super_res: dict[str, Any] = {}
    for part, prefix in (("super_res_first", "model_first_steps."), ("super_res_last", "model_last_step.")):
        super_res |= export_unet(reference[part], kind="super_res", prefix=prefix)
    torch.save({"state_dict": prior, "global_step": 3}, folder / "prior.ckpt")
    torch.save({"state_dict": decoder}, folder / "decoder.ckpt")
    save_file({name: tensor.contiguous() for name, tensor in super_res.items()}, folder / "sr.safetensors")
    torch.save((mean, std), folder / "stats.th")
    names = {"prior": "prior.ckpt", "decoder": "decoder.ckpt", "super_res": "sr.safetensors", "stats": "stats.th"}
    return {"head_dim": 8, **{key: folder / name for key, name in names.items()}}


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A whole CLIP in transformers' layout, tokenizer and preprocessor included."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokens = ["!", '"', "a", "b", "a</w>", "b</w>", "!</w>", "<|startoftext|>", "<|endoftext|>"]
    text = {
        "vocab_size": len(tokens), "hidden_size": CLIP_DIM, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 9, "bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    torch.manual_seed(1)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=CLIP_DIM)).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 8, "size": 8, "do_resize": True})
    )
    return folder


@pytest.fixture(scope="session")
def converted(originals, clip, tmp_path_factory) -> Path:
    return convert_karlo(**originals, clip=clip, out=tmp_path_factory.mktemp("converted") / "karlo")


@pytest.fixture
def nothing_left(tmp_path):
    """Whatever the test does, `tmp_path` has the same entries afterwards as when the test asked."""
    before: set[str] = set()
    yield lambda: before.update(os.listdir(tmp_path))
    assert set(os.listdir(tmp_path)) == before


# -- Karlo ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_loads_in_the_reference_library_with_equal_weights(converted, reference, reference_modules, name):
    kind = type(reference_modules[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded, info = kind.from_pretrained(converted / name, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(value, reference[name][key]) for key, value in loaded.state_dict().items())
    assert set(loaded.state_dict()) == set(reference[name])
    for key, value in reference_modules[name].config.items():
        if not key.startswith("_"):
            found = loaded.config[key]
            assert (list(found) if isinstance(found, tuple) else found) == (
                list(value) if isinstance(value, tuple) else value
            ), key


@pytest.mark.parametrize(("kind", "part"), [("decoder", "decoder"), ("super_res", "super_res_first")])
def test_a_time_embedding_of_a_width_of_its_own_is_written_down(reference_modules, kind, part):
    """Karlo's is four times the first level's, which the published configurations leave to the default."""
    config = {key: value for key, value in reference_modules[part].config.items() if not key.startswith("_")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = type(reference_modules[part])(**config | {"time_embedding_dim": 48}).state_dict()
    original = export_unet(state, kind=kind, prefix="model.", head_dim=8)
    back = karlo.convert_unet(original, kind=kind, prefix="model.", head_dim=8)
    written = layout.decoder_config(back, 8) if kind == "decoder" else layout.super_res_config(back, part)
    assert written["time_embedding_dim"] == 48
    with torch.device("meta"):
        network = (UNet2DConditionModel if kind == "decoder" else UNet2DModel).from_config(written)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    assert {name: tensor.shape for name, tensor in network.state_dict().items()} == shapes


def test_karlos_time_embedding_is_left_to_the_default(converted):
    for part in ("decoder", "super_res_first", "super_res_last"):
        assert "time_embedding_dim" not in read_json(converted / part / "config.json")


def test_clips_text_half_and_its_tokenizer_come_along(converted, clip):
    from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

    text = CLIPTextModelWithProjection.from_pretrained(converted / "text_encoder").eval()
    whole = CLIPModel.from_pretrained(clip).eval()
    tokens = torch.tensor([[7, 4, 5, 8]])
    with torch.no_grad():
        embeds = text(tokens).text_embeds
        expected = whole.text_projection(whole.text_model(tokens).pooler_output)
    torch.testing.assert_close(embeds, expected, rtol=1e-5, atol=1e-5)
    assert set(load_file(converted / "text_encoder" / "model.safetensors")) == set(text.state_dict())
    tokenizer = CLIPTokenizer.from_pretrained(converted / "tokenizer")
    assert tokenizer.pad_token == "!"
    assert tokenizer.pad_token_id == 0
    ids = tokenizer("a b", padding="max_length", max_length=9)["input_ids"]
    assert ids == [7, 4, 5, 8, 0, 0, 0, 0, 0]


def test_the_folder_is_the_published_layout(converted):
    index = read_json(converted / "model_index.json")
    assert index == {
        "_class_name": "UnCLIPPipeline",
        "_diffusers_version": "0.26.3",
        "decoder": ["diffusers", "UNet2DConditionModel"],
        "decoder_scheduler": ["diffusers", "UnCLIPScheduler"],
        "prior": ["diffusers", "PriorTransformer"],
        "prior_scheduler": ["diffusers", "UnCLIPScheduler"],
        "super_res_first": ["diffusers", "UNet2DModel"],
        "super_res_last": ["diffusers", "UNet2DModel"],
        "super_res_scheduler": ["diffusers", "UnCLIPScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_proj": ["unclip", "UnCLIPTextProjModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    assert {entry.name for entry in converted.iterdir()} == {"model_index.json"} | {n for n in index if n[0] != "_"}
    for path in converted.rglob("*.safetensors"):
        for name, tensor in read_tensors(read_header(path)):
            check_finite(tensor, name)


@pytest.mark.parametrize(
    ("name", "variance", "prediction", "clip_range"),
    [
        ("prior_scheduler", "fixed_small_log", "sample", 10.0),
        ("decoder_scheduler", "learned_range", "epsilon", 1.0),
        ("super_res_scheduler", "fixed_small_log", "epsilon", 1.0),
    ],
)
def test_schedulers_are_karlos(converted, name, variance, prediction, clip_range):
    from diffusers import UnCLIPScheduler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = UnCLIPScheduler.from_pretrained(converted / name).config
    assert (config.variance_type, config.prediction_type, config.clip_sample_range) == (
        variance,
        prediction,
        clip_range,
    )
    assert config.num_train_timesteps == 1000
    assert config.clip_sample
    assert config.beta_schedule == "squaredcos_cap_v2"


def test_variant_type_and_the_published_clamp(originals, clip, tmp_path, reference):
    out = convert_karlo(
        **originals, clip=clip, out=tmp_path / "out", variant="fp16", dtype=torch.float16, prior_clip_range=5
    )
    weights = load_file(out / "prior" / "diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.equal(tensor, reference["prior"][name].half()) for name, tensor in weights.items())
    assert (out / "text_encoder" / "model.fp16.safetensors").exists()
    assert read_json(out / "prior_scheduler" / "scheduler_config.json")["clip_sample_range"] == 5.0


@pytest.mark.parametrize("clip_range", [0, -1, float("nan"), float("inf")])
def test_a_clamp_that_is_none_is_refused(originals, clip, tmp_path, nothing_left, clip_range):
    nothing_left()
    with pytest.raises(InputError, match="prior_clip_range"):
        convert_karlo(**originals, clip=clip, out=tmp_path / "out", prior_clip_range=clip_range)


def test_an_existing_folder_is_replaced_only_when_asked(originals, clip, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputExistsError):
        convert_karlo(**originals, clip=clip, out=tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]
    convert_karlo(**originals, clip=clip, out=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    assert (tmp_path / "out" / "model_index.json").exists()


class Evil:
    def __reduce__(self):
        return (os.system, ("touch owned",))


def make_bad(kind: str, path: Path, good: Path) -> None:
    if kind == "absent":
        return
    if kind == "code":
        torch.save({"state_dict": {"model.x": Evil()}}, path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[:-2000])
    elif kind == "noise":
        path.write_bytes(b"\x00\x01 no checkpoint" * 10)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no dict":
        torch.save([torch.ones(3)], path)
    elif kind == "no tensors":
        torch.save({"state_dict": {"model.x": 3}}, path)
    elif kind == "other names":
        torch.save({"state_dict": {"net.x": torch.ones(3)}}, path)
    elif kind == "NaN":
        state = torch.load(good, weights_only=True)["state_dict"]
        state["model.out_proj.bias"][3] = float("nan")
        torch.save({"state_dict": state}, path)
    elif kind == "legacy":
        state = torch.load(good, weights_only=True)
        torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("kind", "error", "match"),
    [
        ("absent", MissingFileError, "bad.ckpt"),
        ("code", UnsafeFileError, "more than tensors"),
        ("plain pickle", UnsafeFileError, "more than tensors"),
        ("truncated", (WeightsError, UnsafeFileError), "bad.ckpt"),
        ("noise", (WeightsError, UnsafeFileError), "bad.ckpt"),
        ("empty", WeightsError, "truncated"),
        ("no dict", WeightsError, "not a state dict"),
        ("no tensors", WeightsError, "not a state dict"),
        ("other names", WeightsError, "net.x"),
        ("NaN", WeightsError, "proj_to_clip_embeddings.bias"),
    ],
)
def test_bad_originals_are_refused_and_nothing_is_written(
    originals, clip, tmp_path, monkeypatch, nothing_left, kind, error, match
):
    monkeypatch.chdir(tmp_path)
    make_bad(kind, tmp_path / "bad.ckpt", originals["prior"])
    nothing_left()
    with pytest.raises(error, match=match):
        convert_karlo(**{**originals, "prior": tmp_path / "bad.ckpt"}, clip=clip, out=tmp_path / "out")
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_in_torchs_old_format_is_read(originals, tmp_path):
    make_bad("legacy", tmp_path / "old.ckpt", originals["prior"])
    assert set(convert._read(tmp_path / "old.ckpt")) == set(convert._read(originals["prior"]))


@pytest.mark.parametrize("content", [[1, 2], (torch.ones(3),), (torch.ones(3), 1), torch.ones(3, dtype=torch.int64)])
def test_statistics_are_a_pair(tmp_path, content):
    torch.save(content, tmp_path / "stats.th")
    with pytest.raises(WeightsError, match="the pair"):
        convert._read_stats(tmp_path / "stats.th")


def test_statistics_as_safetensors(tmp_path):
    save_file({"mean": torch.zeros(1, 3), "std": torch.ones(3)}, tmp_path / "stats.safetensors")
    mean, std = convert._read_stats(tmp_path / "stats.safetensors")
    assert mean.shape == std.shape == (3,)
    save_file({"mean": torch.zeros(1, 3)}, tmp_path / "stats.safetensors")
    with pytest.raises(WeightsError, match="the pair"):
        convert._read_stats(tmp_path / "stats.safetensors")


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda f: change_json(f / "config.json", projection_dim=99), WeightsError, "belong to different models"),
        (lambda f: change_json(f / "config.json", projection_dim="x"), ConfigError, "projection_dim in .* is 'x'"),
        (lambda f: change_json(f / "config.json", text_config=3), ConfigError, r"text_config in .* is 3; it must"),
        (lambda f: (f / "config.json").unlink(), MissingFileError, "config.json"),
        (lambda f: (f / "vocab.json").unlink(), MissingFileError, "no tokenizer"),
        (lambda f: (f / "model.safetensors").unlink(), MissingFileError, "model.safetensors"),
        (
            lambda f: save_file({"text_model.x": torch.ones(1)}, f / "model.safetensors"),
            WeightsError,
            "no weights text_projection",
        ),
        (lambda folder: change_json(folder / "config.json", qk_norm=True), ConfigError, "the setting 'qk_norm'"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused(originals, clip, tmp_path, nothing_left, damage, error, match):
    shutil.copytree(clip, tmp_path / "clip")
    damage(tmp_path / "clip")
    nothing_left()
    with pytest.raises(error, match=match):
        convert_karlo(**originals, clip=tmp_path / "clip", out=tmp_path / "out")


# -- image variations ----------------------------------------------------------------------------------------------


def test_a_variation_folder_shares_weights_and_has_clips_eyes(converted, clip, tmp_path):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection

    out = convert_text_to_image_to_variation(converted, tmp_path / "out", clip=clip)
    index = read_json(out / "model_index.json")
    assert index["_class_name"] == "UnCLIPImageVariationPipeline"
    assert "prior" not in index
    assert index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]
    assert index["text_proj"] == ["unclip", "UnCLIPTextProjModel"]
    assert {entry.name for entry in out.iterdir()} == {"model_index.json"} | {n for n in index if n[0] != "_"}
    name = Path("decoder", "diffusion_pytorch_model.safetensors")
    assert (out / name).samefile(converted / name)
    assert (out / "decoder" / "config.json").read_text() == (converted / "decoder" / "config.json").read_text()
    assert not (out / "decoder" / "config.json").samefile(converted / "decoder" / "config.json")
    encoder = CLIPVisionModelWithProjection.from_pretrained(out / "image_encoder").eval()
    whole = CLIPModel.from_pretrained(clip).eval()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = whole.visual_projection(whole.vision_model(pixels).pooler_output)
        torch.testing.assert_close(encoder(pixels).image_embeds, expected, rtol=1e-5, atol=1e-5)
    assert CLIPImageProcessor.from_pretrained(out / "feature_extractor").do_resize


def test_a_variation_folder_keeps_what_is_recommended_for_its_stages(converted, clip, tmp_path):
    shutil.copytree(converted, tmp_path / "model")
    settings = {"prior_num_inference_steps": 9, "num_prior_candidates": 4, "prior_guidance_scale": 2.0}
    kept = {"decoder_num_inference_steps": 20, "super_res_num_inference_steps": 3, "decoder_guidance_scale": 2.0}
    (tmp_path / "model" / "generation_defaults.json").write_text(json.dumps(settings | kept))
    out = convert_text_to_image_to_variation(tmp_path / "model", tmp_path / "out", clip=clip)
    assert read_json(out / "generation_defaults.json") == kept
    (tmp_path / "model" / "generation_defaults.json").write_text(json.dumps(settings))
    out = convert_text_to_image_to_variation(tmp_path / "model", tmp_path / "none", clip=clip)
    assert not (out / "generation_defaults.json").exists()


def test_a_variation_folder_keeps_the_components_of_its_own_image_encoder(converted, clip, tmp_path):
    from transformers import CLIPVisionModelWithProjection

    model = shutil.copytree(converted, tmp_path / "model")
    first = convert_text_to_image_to_variation(model, tmp_path / "first", clip=clip)
    encoder = CLIPVisionModelWithProjection.from_pretrained(first / "image_encoder")
    components = PrincipalComponents.fit([torch.randn(40, CLIP_DIM)])
    for known, made in (("yes", fingerprint([encoder.state_dict()])), ("no", "0" * 16), ("unknown", None)):
        about = {} if made is None else {"image_encoder": made}
        file = components.save(model / layout.PROBE_FILE, about=about, overwrite=True)
        out = convert_text_to_image_to_variation(model, tmp_path / known, clip=clip)
        assert (out / layout.PROBE_FILE).exists() == (known == "yes")
        if known == "yes":
            assert (out / layout.PROBE_FILE).read_bytes() == file.read_bytes()


def test_variations_squash_pictures_unless_told_to_crop(converted, clip, tmp_path):
    from transformers import CLIPImageProcessor

    wide = Image.new("RGB", (24, 8), "white")
    wide.paste("black", (0, 0, 6, 8))  # outside the central square
    original = read_json(clip / "preprocessor_config.json")
    seen = {}
    for crop in (False, True):
        out = convert_text_to_image_to_variation(converted, tmp_path / f"{crop}", clip=clip, crop=crop)
        settings = read_json(out / "feature_extractor" / "preprocessor_config.json")
        changed = {} if crop else {"do_center_crop": False, "size": {"height": 8, "width": 8}}
        kept = {key: value for key, value in original.items() if key != "feature_extractor_type"}
        assert settings == {**kept, "image_processor_type": "CLIPImageProcessor", **changed}
        processor = CLIPImageProcessor.from_pretrained(out / "feature_extractor")
        seen[crop] = processor(wide, return_tensors="pt")["pixel_values"]
        assert seen[crop].shape == (1, 3, 8, 8)
    assert seen[True].std(dim=(2, 3)).max() < 1e-6
    assert seen[False][..., 0].max() < seen[False][..., -1].min()


def test_weights_are_copied_where_links_are_not_to_be_had(converted, clip, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("another device")

    monkeypatch.setattr(os, "link", no_links)
    out = convert_text_to_image_to_variation(converted, tmp_path / "out", clip=clip)
    name = Path("decoder", "diffusion_pytorch_model.safetensors")
    assert not (out / name).samefile(converted / name)
    assert (out / name).read_bytes() == (converted / name).read_bytes()


def test_a_whole_clip_as_transformers_5_saves_it_keeps_its_preprocessor_elsewhere(converted, clip, tmp_path):
    shutil.copytree(clip, tmp_path / "clip")
    settings = read_json(tmp_path / "clip" / "preprocessor_config.json") | {"image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    (tmp_path / "clip" / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    out = convert_text_to_image_to_variation(converted, tmp_path / "out", clip=tmp_path / "clip")
    written = read_json(out / "feature_extractor" / "preprocessor_config.json")
    assert written["image_mean"] == [0.1, 0.2, 0.3]
    assert "image_processor" not in written


def test_variation_of_something_else_is_refused(converted, clip, tmp_path, nothing_left):
    shutil.copytree(converted, tmp_path / "model")
    shutil.copytree(clip, tmp_path / "clip")
    nothing_left()
    out = tmp_path / "out"
    change_json(tmp_path / "clip" / "config.json", projection_dim=99)
    with pytest.raises(WeightsError, match="width 99"):
        convert_text_to_image_to_variation(tmp_path / "model", out, clip=tmp_path / "clip")
    shutil.rmtree(tmp_path / "model" / "decoder")
    with pytest.raises(MissingFileError, match="decoder"):
        convert_text_to_image_to_variation(tmp_path / "model", out, clip=clip)
    (tmp_path / "model" / "decoder").symlink_to(converted / "decoder")
    with pytest.raises(UnsafeFileError, match="link that leaves"):
        convert_text_to_image_to_variation(tmp_path / "model", out, clip=clip)
    (tmp_path / "model" / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="lacks decoder, text_encoder"):
        convert_text_to_image_to_variation(tmp_path / "model", out, clip=clip)


# -- pickles -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pickled(converted, tmp_path) -> Path:
    """The converted pipeline with .bin files instead, one of them sharded, as old folders have them."""
    folder = tmp_path / "pickled"
    shutil.copytree(converted, folder)
    for path in list(folder.rglob("*.safetensors")):
        state = load_file(path)
        name = path.name.replace(".safetensors", ".bin")
        if path.name == "model.safetensors":
            name = "pytorch_model.bin"
        if path.parent.name == "prior":
            half = len(state) // 2
            for i, part in enumerate((list(state)[:half], list(state)[half:]), 1):
                shard = path.with_name(f"diffusion_pytorch_model-{i:05d}-of-00002.bin")
                torch.save({key: state[key] for key in part}, shard)
            path.with_name("diffusion_pytorch_model.bin.index.json").write_text("{}")
        else:
            torch.save(state, path.with_name(name))
        path.unlink()
    torch.save({"a": torch.ones(1)}, folder / "prior" / "diffusion_pytorch_model.fp16.bin")
    return folder


def test_pickles_become_safetensors(pickled, converted, tmp_path):
    out = convert_pickle(pickled, tmp_path / "out")
    assert not list(out.rglob("*.bin*"))
    for path in converted.rglob("*.safetensors"):
        ours, theirs = load_file(out / path.relative_to(converted)), load_file(path)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert list(load_file(out / "prior" / "diffusion_pytorch_model.fp16.safetensors")) == ["a"]
    assert read_json(out / "model_index.json") == read_json(converted / "model_index.json")
    single = convert_pickle(pickled / "decoder", tmp_path / "single")
    assert sorted(os.listdir(single)) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_safetensors_that_are_there_already_win_over_a_pickle(converted, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(converted / "prior", folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"anything")
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    out = convert_pickle(folder, tmp_path / "out")
    assert sorted(os.listdir(out)) == ["config.json", "diffusion_pytorch_model.safetensors", "model.safetensors"]


def test_pickles_that_cannot_be_converted_leave_nothing(pickled, tmp_path, monkeypatch, nothing_left):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    nothing_left()
    out = tmp_path / "out"
    with pytest.raises(MissingFileError, match="is not a folder"):
        convert_pickle(tmp_path / "absent", out)
    with pytest.raises(MissingFileError, match="to convert"):
        convert_pickle(tmp_path / "empty", out)
    with pytest.raises(OutputExistsError):
        convert_pickle(pickled, pickled)
    shutil.copy(
        pickled / "prior" / "diffusion_pytorch_model-00001-of-00002.bin",
        pickled / "prior" / "diffusion_pytorch_model-00002-of-00002.bin",
    )
    with pytest.raises(WeightsError, match="another shard has too"):
        convert_pickle(pickled, out)
    torch.save({"a": Evil()}, pickled / "decoder" / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsafeFileError, match="more than tensors"):
        convert_pickle(pickled, out)
    assert not (tmp_path / "owned").exists()
