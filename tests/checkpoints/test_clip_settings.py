"""What a CLIP's configuration and its preprocessor's may say: published files pass, what is not honoured does not."""

import json

import pytest

from unclip.clip.config import check_clip_settings, read_image_processor_settings
from unclip.errors import CheckpointError, ConfigError, MissingFileError

# What transformers 4.16 wrote into each half of openai/clip-vit-*: everything that any model of its could have.
GENERIC = json.loads(
    """{"_name_or_path": "", "add_cross_attention": false, "architectures": null, "attention_dropout": 0.0,
    "bad_words_ids": null, "bos_token_id": null, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": null,
    "decoder_start_token_id": null, "diversity_penalty": 0.0, "do_sample": false, "dropout": 0.0,
    "early_stopping": false, "encoder_no_repeat_ngram_size": 0, "eos_token_id": null, "finetuning_task": null,
    "forced_bos_token_id": null, "forced_eos_token_id": null, "hidden_act": "quick_gelu",
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "initializer_factor": 1.0, "initializer_range": 0.02,
    "is_decoder": false, "is_encoder_decoder": false, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "layer_norm_eps": 1e-05, "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0,
    "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1, "output_attentions": false,
    "output_hidden_states": false, "output_scores": false, "pad_token_id": null, "prefix": null,
    "problem_type": null, "pruned_heads": {}, "remove_invalid_values": false, "repetition_penalty": 1.0,
    "return_dict": true, "return_dict_in_generate": false, "sep_token_id": null, "task_specific_params": null,
    "temperature": 1.0, "tie_encoder_decoder": false, "tie_word_embeddings": true, "tokenizer_class": null,
    "top_k": 50, "top_p": 1.0, "torch_dtype": null, "torchscript": false, "transformers_version": "4.16.0.dev0",
    "use_bfloat16": false}"""
)
LATER = {
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "tf_legacy_loss": False,
    "typical_p": 1.0,
}
TEXT_SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
IMAGE_SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
TEXT = GENERIC | TEXT_SIZES | {"model_type": "clip_text_model", "projection_dim": 768, "vocab_size": 49408}
TEXT |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "max_position_embeddings": 77}
IMAGE = GENERIC | IMAGE_SIZES | {"model_type": "clip_vision_model", "projection_dim": 768, "image_size": 224}
IMAGE |= {"patch_size": 14, "num_channels": 3}
WHOLE = {
    "_name_or_path": "clip-vit-large-patch14/",
    "architectures": ["CLIPModel"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": TEXT,
    "text_config_dict": TEXT_SIZES | {"projection_dim": 768},
    "torch_dtype": "float32",
    "transformers_version": None,
    "vision_config": IMAGE | LATER,
    "vision_config_dict": IMAGE_SIZES | {"patch_size": 14, "projection_dim": 768},
}
# A half that stands alone, as Karlo's folders have it.
KARLO_TEXT = TEXT_SIZES | {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModelWithProjection"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.25.0",
    "vocab_size": 49408,
}

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
OPENAI_PROCESSOR = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
    "size": 224,
}
KARLO_PROCESSOR = OPENAI_PROCESSOR | {
    "crop_size": {"height": 224, "width": 224},
    "do_convert_rgb": True,
    "do_rescale": True,
    "image_processor_type": "CLIPFeatureExtractor",
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224},
}
FAST_PROCESSOR = KARLO_PROCESSOR | {
    "_valid_processor_keys": ["images", "do_resize"],
    "data_format": "channels_first",
    "default_to_square": False,
    "device": None,
    "disable_grouping": None,
    "image_processor_type": "CLIPImageProcessorFast",
    "input_data_format": None,
    "processor_class": "CLIPProcessor",
    "return_tensors": None,
}


@pytest.mark.parametrize("settings", [TEXT, TEXT | LATER, IMAGE, WHOLE, KARLO_TEXT, {"_auto_class": "x"}])
def test_the_published_configurations_pass(settings):
    check_clip_settings(settings, "config.json")


@pytest.mark.parametrize(
    "kind", ["CLIPTextConfig", "CLIPVisionConfig", "CLIPConfig", "CLIPImageProcessorPil"]
)  # whatever this version of transformers writes
def test_what_transformers_writes_passes(tmp_path, kind):
    import transformers

    getattr(transformers, kind)().save_pretrained(tmp_path)
    if kind.endswith("Config"):
        check_clip_settings(json.loads((tmp_path / "config.json").read_text()), "config.json")
    else:
        assert read_image_processor_settings(tmp_path)["image_mean"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"qk_norm": True}, r"config\.json has the setting 'qk_norm' \(its value is True\), which is not implemented"),
        ({"per_layer_config": {"0": {"hidden_act": "relu"}}}, "has the setting 'per_layer_config'"),
        ({"is_decoder": True}, r"is_decoder = True in config\.json is not implemented; supported: False, None"),
        ({"pruned_heads": {"0": [1]}}, r"pruned_heads = \{'0': \[1\]\}"),
        ({"return_dict": False}, "return_dict = False"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization_config = "),
        ({"auto_map": {"AutoModel": "other.Model"}}, "auto_map = "),
        ({"model_type": "siglip_text_model"}, "model_type = 'siglip_text_model'"),
        ({"text_config": {"add_pooling_layer": True}}, r"config\.json \(text_config\) has the setting 'add_pooling"),
        ({"vision_config_dict": {"use_head": False}}, r"\(vision_config_dict\) has the setting 'use_head'"),
        ({"text_config": [1]}, r"text_config in config\.json is \[1\]; it must be an object"),
        (
            {"text_config": TEXT, "text_config_dict": {"hidden_size": 512}},
            "has two values of hidden_size: 512 in text_config_dict, 768 in text_config; remove text_config_dict",
        ),
    ],
    ids=str,
)
def test_what_would_be_ignored_is_refused_by_name(settings, words):
    with pytest.raises(ConfigError, match=words):
        check_clip_settings(KARLO_TEXT | settings, "config.json")


@pytest.mark.parametrize("settings", [OPENAI_PROCESSOR, KARLO_PROCESSOR, FAST_PROCESSOR])
@pytest.mark.parametrize("combined", [False, True])
def test_the_published_preprocessors_pass(tmp_path, settings, combined):
    name = "processor_config.json" if combined else "preprocessor_config.json"
    held = {"image_processor": settings, "processor_class": "CLIPProcessor"} if combined else settings
    (tmp_path / name).write_text(json.dumps(held))
    assert read_image_processor_settings(tmp_path) == settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"do_flip_channel_order": True}, r"preprocessor_config\.json has the setting 'do_flip_channel_order'"),
        ({"crop_pct": 0.875}, r"has the setting 'crop_pct' \(its value is 0\.875\), which is not implemented"),
        ({"use_square_size": True}, "use_square_size = True"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type = 'ViTImageProcessor'"),
        ({"data_format": "channels_last"}, "data_format = 'channels_last'"),
    ],
    ids=str,
)
def test_a_preprocessor_that_does_more_is_refused_by_name(tmp_path, settings, words):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(OPENAI_PROCESSOR | settings))
    with pytest.raises(ConfigError, match=words):
        read_image_processor_settings(tmp_path)


def test_a_preprocessor_that_is_none(tmp_path):
    with pytest.raises(MissingFileError, match=r"preprocessor_config\.json does not exist"):
        read_image_processor_settings(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor": 3}')
    with pytest.raises(ConfigError, match=r"image_processor in .* is 3; it must be an object"):
        read_image_processor_settings(tmp_path)
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(CheckpointError):
        read_image_processor_settings(tmp_path)
