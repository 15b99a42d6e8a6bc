"""Settings that no component can have are refused with a typed error when the component is read."""

import json
import shutil

import pytest
import safetensors

from unclip.errors import ConfigError, UnclipError
from unclip.pipelines.component import read_component

HUGE = (10**30, -(10**30), 10**400)
NO_NUMBER = (True, "x", [], {}, [10**30])
NO_SIZE = (*HUGE, *NO_NUMBER, 0, -1, 1.5, 2**31, None)
NO_TOKEN = (*HUGE, *NO_NUMBER, -1, 1.5, 2**31)
NO_SHARE = (*HUGE, *NO_NUMBER, -1, 1, 1e30)
NO_SWITCH = (0, 1, "x", [], {}, 10**30)

NETWORKS = {"decoder": "UNet2DConditionModel", "super_res_first": "UNet2DModel", "prior": "PriorTransformer"}
SCHEDULERS = {"prior_scheduler": "UnCLIPScheduler", "ddim": "DDIMScheduler", "dpm": "DPMSolverMultistepScheduler"}
KINDS = NETWORKS | SCHEDULERS | {
    "text_proj": "UnCLIPTextProjModel",
    "text_encoder": "CLIPTextModelWithProjection",
    "image_encoder": "CLIPVisionModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "feature_extractor": "CLIPImageProcessor",
}  # fmt: skip

TABLE: dict[tuple[str, ...], dict[str, tuple]] = {
    ("text_encoder", "image_encoder"): {
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), NO_SIZE),
        "projection_dim": NO_SIZE,
        "layer_norm_eps": NO_SHARE,
        "attention_dropout": NO_SHARE,
        "hidden_act": (*HUGE, True, None, [], {}, "x"),
        "initializer_range": (*HUGE, *NO_NUMBER),
        "initializer_factor": (*HUGE, *NO_NUMBER),
    },
    ("text_encoder",): {
        **dict.fromkeys(("vocab_size", "max_position_embeddings"), NO_SIZE),
        **dict.fromkeys(("bos_token_id", "pad_token_id"), NO_TOKEN),
        "eos_token_id": (*NO_TOKEN, None),
    },
    ("image_encoder",): dict.fromkeys(("image_size", "patch_size", "num_channels"), NO_SIZE),
    ("tokenizer",): {
        "model_max_length": (-(10**30), True, False, 0, 2, -1, 5.5, 1e-300, "5", "x", [], {}),
        "pad_token": (None, 7, []),
        "model_input_names": ("x", [], [1], {}, ["input_ids"]),
    },
    ("feature_extractor",): {
        "size": (*NO_SIZE, {"shortest_edge": 0}, {"shortest_edge": 10**30}, {"height": True, "width": 16}),
        "crop_size": (*NO_SIZE[:-1], {"height": 10**30, "width": 16}, {"height": None}),
        "resample": (*HUGE, *NO_NUMBER, -1, 6, 1.5, None),
        "rescale_factor": (*HUGE, *NO_NUMBER, 0, -1, 1e30, 1e-300, None),
        "image_mean": (*HUGE, "x", [], {}, [1, 2], [10**30] * 3, [True] * 3, 1e308, None),
        "image_std": (*HUGE, "x", [], {}, [1, 2], [0, 1, 1], 0, False, 1e-300, None),
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), NO_SWITCH),
    },
    tuple(SCHEDULERS): {
        "clip_sample_range": (*HUGE, *NO_NUMBER, 0, -1, 1e30, 1e308),
        "clip_sample": (0, 1, None, "x", []),
        "num_train_timesteps": (*HUGE, *NO_NUMBER, 0, -1, 1.5, None),
        "beta_schedule": (*HUGE, *NO_NUMBER, None),
        "prediction_type": (*HUGE, *NO_NUMBER, None),
        "variance_type": (*HUGE, *NO_NUMBER),
    },
    ("ddim", "dpm"): {
        **dict.fromkeys(("beta_start", "beta_end"), (*HUGE, *NO_NUMBER, 0, -1, 1, 1e-300, None)),
        "timestep_spacing": (*HUGE, *NO_NUMBER, None),
    },
    ("ddim",): {"eta": (*HUGE, *NO_NUMBER, -1, 1e30, None)},
    ("dpm",): {"solver_order": (*HUGE, *NO_NUMBER, 0, -1, 1.5, None)},
    tuple(NETWORKS): {"dropout": NO_SHARE},
    ("decoder", "super_res_first"): {
        **dict.fromkeys(("in_channels", "out_channels", "norm_num_groups"), NO_SIZE),
        "layers_per_block": (*HUGE, True, "x", {}, 0, -1, 1.5, None),
        "block_out_channels": (*HUGE, *NO_NUMBER, 0, None, [0, 0]),
        "norm_eps": NO_SHARE,
        "sample_size": (*HUGE, True, "x", {}, 0, -1, 1.5),
        "freq_shift": (*HUGE, *NO_NUMBER, -1, 1e30),
        "flip_sin_to_cos": (0, 1, None, "x"),
    },
    ("prior",): dict.fromkeys(("num_layers", "embedding_dim", "num_embeddings", "num_attention_heads"), NO_SIZE),
    ("text_proj",): dict.fromkeys(
        ("clip_extra_context_tokens", "clip_embeddings_dim", "time_embed_dim", "cross_attention_dim"), NO_SIZE
    ),
}  # fmt: skip
CASES = sorted({(part, key) for parts, keys in TABLE.items() for part in parts for key in keys})


@pytest.fixture(scope="module")
def saved(tiny_pipeline, tiny_variation, tmp_path_factory):
    from unclip import DDIMScheduler, DPMSolverMultistepScheduler

    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline.save_pretrained(folder / "text")
    tiny_variation.save_pretrained(folder / "variation")
    shutil.copytree(folder / "variation", folder / "all")
    shutil.copytree(folder / "text", folder / "all", dirs_exist_ok=True)
    DDIMScheduler(clip_sample=True).save_pretrained(folder / "all" / "ddim")
    DPMSolverMultistepScheduler().save_pretrained(folder / "all" / "dpm")
    return folder / "all"


def read(folder, part, own_clip):
    return read_component(folder, part, KINDS[part], torch_dtype=None, variant=None, own_clip=own_clip)


@pytest.mark.parametrize(("part", "key"), CASES)
def test_a_value_that_cannot_be_is_refused_at_load(saved, part, key):
    (values,) = [keys[key] for parts, keys in TABLE.items() if part in parts and key in keys]
    names = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
    (path,) = [saved / part / name for name in names if (saved / part / name).exists()]
    before = path.read_text()
    try:
        for value in values:
            path.write_text(json.dumps(json.loads(before) | {key: value}))
            for own_clip in (False, True):
                with pytest.raises(UnclipError) as caught:
                    pytest.fail(f"{key} = {value!r:.60} was read as {read(saved, part, own_clip)!r:.60}")
                assert part in str(caught.value)
    finally:
        path.write_text(before)
    read(saved, part, False)


def test_settings_that_are_not_used_may_be_null(saved, tmp_path):
    shutil.copytree(saved / "feature_extractor", tmp_path / "feature_extractor")
    path = tmp_path / "feature_extractor" / "preprocessor_config.json"
    nothing = {"do_resize": False, "size": None, "resample": None, "do_center_crop": False, "crop_size": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | nothing))
    read(tmp_path, "feature_extractor", False)


@pytest.mark.parametrize("limit", [None, 5, 5.0, 1e30, 10**30, 10**400])
def test_lengths_that_tokenizers_have(saved, tmp_path, limit, tiny_pipeline):
    from unclip.clip.encoders import TextEncoder

    shutil.copytree(saved / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": limit}))
    encoded = [
        TextEncoder(tiny_pipeline.text_encoder, read(tmp_path, "tokenizer", own)).encode(["a cat"]) for own in (0, 1)
    ]
    assert encoded[0].mask.shape == (1, 5 if limit in (5, 5.0) else 11)
    assert (encoded[0].hidden_states == encoded[1].hidden_states).all()


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("text_encoder", {"vocab_size": 1_000_000}),
        ("text_encoder", {"vocab_size": 1_000_000, "hidden_size": 16_384}),
        ("text_encoder", {"intermediate_size": 65_536}),
        ("text_encoder", {"max_position_embeddings": 65_536}),
        ("text_encoder", {"num_hidden_layers": 20}),
        ("text_encoder", {"num_hidden_layers": 1}),
        ("image_encoder", {"image_size": 4096, "patch_size": 1}),
        ("image_encoder", {"num_channels": 16}),
        ("image_encoder", {"projection_dim": 16_384}),
        ("prior", {"num_embeddings": 16_384}),
        ("prior", {"num_layers": 20}),
        ("text_proj", {"time_embed_dim": 65_536, "cross_attention_dim": 16_384, "clip_extra_context_tokens": 1024}),
        ("decoder", {"cross_attention_dim": 16_384}),
        ("decoder", {"layers_per_block": 3}),
        ("super_res_first", {"in_channels": 16_384}),
    ],
)
@pytest.mark.parametrize("own_clip", [False, True])
def test_shapes_are_compared_before_anything_is_built(saved, tmp_path, part, changes, own_clip, monkeypatch, capsys):
    import transformers

    def forbidden(*given, **named):
        raise AssertionError("weights were read, or a model was built")

    def header_alone(path, framework, **named):
        return safe_open(path, framework=framework) if framework == "np" else forbidden()

    shutil.copytree(saved / part, tmp_path / part)
    path = tmp_path / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", forbidden)
    safe_open = safetensors.safe_open
    monkeypatch.setattr("safetensors.safe_open", header_alone)
    with pytest.raises(UnclipError, match="do not fit the model"):
        read(tmp_path, part, own_clip)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "changes",
    [{"projection_dim": 16_384}, {"text_config": {"vocab_size": 10**6}}, {"vision_config": {"image_size": 64}}],
)
def test_a_whole_clip_is_compared_too(tiny_pipeline, tiny_variation, tmp_path, changes, monkeypatch):
    from transformers import CLIPConfig, CLIPModel

    halves = {
        "text_config": tiny_pipeline.text_encoder.config.to_dict(),
        "vision_config": tiny_variation.image_encoder.config.to_dict(),
    }
    CLIPModel(CLIPConfig(**halves, projection_dim=12)).save_pretrained(tmp_path)
    read_component(tmp_path, ".", "CLIPModel", torch_dtype=None, variant=None)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *given, **named: pytest.fail("a model was built"))
    with pytest.raises(UnclipError, match="do not fit the model"):
        read_component(tmp_path, ".", "CLIPModel", torch_dtype=None, variant=None)


def test_the_error_of_an_absurd_setting_is_one_of_configuration(saved, tmp_path):
    shutil.copytree(saved / "text_encoder", tmp_path / "text_encoder")
    path = tmp_path / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 10**30}))
    with pytest.raises(ConfigError, match=r"eos_token_id in .* is 10000.*; it must be a whole number from 0 "):
        read(tmp_path, "text_encoder", False)


def test_heads_that_do_not_divide_the_width(saved, tmp_path):
    shutil.copytree(saved / "text_encoder", tmp_path / "text_encoder")
    path = tmp_path / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 3}))
    words = r"hidden_size in .* is 16; it must be a multiple of num_attention_heads, 3"
    for own_clip in (False, True):
        with pytest.raises(ConfigError, match=words):
            read(tmp_path, "text_encoder", own_clip)
