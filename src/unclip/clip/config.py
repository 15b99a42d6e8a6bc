"""Checks the settings of a CLIP and of its image preprocessor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from unclip.checkpoints.files import read_json, safe_join
from unclip.errors import ConfigError, MissingFileError
from unclip.limits import Range, Share, described, fits

Pixels = Annotated[int, Range(1, 4096)]
Token = Annotated[int, Range(0, 1_000_000)] | None
OptionalShare = Share | None
Factor = Annotated[float, Range(-1e6, 1e6)]

SIZES = {
    "hidden_size": Annotated[int, Range(1, 16_384)],
    "intermediate_size": Annotated[int, Range(1, 65_536)],
    "projection_dim": Annotated[int, Range(1, 16_384)],
    "num_hidden_layers": Annotated[int, Range(1, 256)],
    "num_attention_heads": Annotated[int, Range(1, 1024)],
    "vocab_size": Annotated[int, Range(1, 1_000_000)],
    "max_position_embeddings": Annotated[int, Range(1, 65_536)],
    "image_size": Pixels,
    "patch_size": Pixels,
    "num_channels": Annotated[int, Range(1, 16)],
}
"""The settings that determine the shapes of the weights, and their limits."""

HONOURED = SIZES | {
    "pad_token_id": Token,
    "bos_token_id": Token,
    "eos_token_id": Token,
    "layer_norm_eps": Share,
    "attention_dropout": OptionalShare,
    "initializer_range": Factor,
    "initializer_factor": Factor,
    "logit_scale_init_value": Factor,
    "hidden_act": Literal["quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish"],
}
"""Settings of CLIP's encoders and of their training, and their limits."""

DESCRIPTIVE = {
    "architectures", "transformers_version", "dtype", "torch_dtype", "attn_implementation", "output_attentions",
    "output_hidden_states", "chunk_size_feed_forward", "tie_word_embeddings", "tie_encoder_decoder",
    "tf_legacy_loss",
    # of old files, never read by CLIP: its dropout is `attention_dropout`
    "dropout",
    # of classifiers and of tokenizers
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    "tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id",
    # of text generation: before version 5, transformers wrote these into every configuration
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p", "use_cache",
}  # fmt: skip
"""Settings that have no effect on CLIP's encoders at any value."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "model_type": ("clip", "clip_text_model", "clip_vision_model"),
    "pruned_heads": ({}, None),
    "return_dict": (True, None),
    "torchscript": (False, None),
    "use_bfloat16": (False, None),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "quantization_config": (None,),
    "auto_map": (None, {}),
}
"""Settings that would change results and are not implemented, each with its neutral values."""

HALVES = ("text_config", "vision_config")
OLD_HALVES = {"text_config_dict": "text_config", "vision_config_dict": "vision_config"}
"""Old names of the inner configurations; in transformers these take precedence."""

_Size = Pixels | tuple[Pixels, ...]
_Mean, _Std = Annotated[float, Range(-1e4, 1e4)], Annotated[float, Range(1e-6, 1e4)]

PROCESSOR_HONOURED = {
    "size": _Size,
    "resample": Annotated[int, Range(0, 5)],
    "crop_size": _Size,
    "pad_size": _Size,
    "rescale_factor": Annotated[float, Range(1e-6, 1e3)],
    "image_mean": _Mean | tuple[_Mean, _Mean, _Mean],
    "image_std": _Std | tuple[_Std, _Std, _Std],
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad"), bool | None),
    **dict.fromkeys(("do_convert_rgb", "default_to_square"), bool | None),
}
"""Settings of an image preprocessor, and their limits."""
_SWITCHES = {
    "size": "do_resize",
    "resample": "do_resize",
    "crop_size": "do_center_crop",
    "pad_size": "do_pad",
    "rescale_factor": "do_rescale",
    "image_mean": "do_normalize",
    "image_std": "do_normalize",
}
"""The switch that enables the use of a setting, which may be null if it is off."""

PROCESSOR_DESCRIPTIVE = {
    # input and output formats, which the caller of a preprocessor chooses
    "processor_class", "input_data_format", "return_tensors", "device", "disable_grouping", "image_seq_length",
}  # fmt: skip
_PROCESSORS = ("CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")
PROCESSOR_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "image_processor_type": (*_PROCESSORS, None),
    "feature_extractor_type": (*_PROCESSORS, None),
    "data_format": ("channels_first", None),
    "use_square_size": (False, None),
    "auto_map": (None, {}),
}


def check_clip_settings(settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings that would change results and are not implemented, in a parsed config.json of `where`.

    Either encoder's configuration, or a whole CLIP's with both. Keys with a leading _ are skipped.

    Raises: ConfigError naming the setting; also if a whole CLIP has two different configurations of an encoder.
    """
    whole = {*HALVES, *OLD_HALVES}
    _check({key: value for key, value in settings.items() if key not in whole}, HONOURED, DESCRIPTIVE, NEUTRAL, where)
    for name in sorted(whole & settings.keys()):
        half = settings[name]
        if half is None:
            continue
        if not isinstance(half, Mapping):
            raise ConfigError(f"{name} in {where} is {half!r:.100}; it must be an object in braces")
        _check(half, HONOURED, DESCRIPTIVE, NEUTRAL, f"{where} ({name})")
        old = OLD_HALVES.get(name, "")
        other = settings.get(old) or {}
        for key in half.keys() & other.keys() & HONOURED.keys():
            if half[key] != other[key]:
                twice = f"{half[key]!r} in {name}, {other[key]!r} in {old}"
                raise ConfigError(f"{where} has two values of {key}: {twice}; remove {name}")


def read_image_processor_settings(folder: Path) -> dict[str, Any]:
    """The settings of the CLIP image preprocessor in `folder`, checked.

    They are in preprocessor_config.json, or, for a whole CLIP saved by transformers 5, in processor_config.json.

    Raises: MissingFileError if neither exists; ConfigError naming a setting that would change results and is not
    implemented.
    """
    combined = safe_join(folder, "processor_config.json")
    inner = read_json(combined).get("image_processor") if combined.is_file() else None
    path = safe_join(folder, "preprocessor_config.json") if inner is None else combined
    if inner is None and not path.is_file():
        raise MissingFileError(f"{path} does not exist; it describes how pictures are preprocessed for CLIP")
    settings = read_json(path) if inner is None else inner
    if not isinstance(settings, dict):
        raise ConfigError(f"image_processor in {path} is {settings!r:.100}; it must be an object in braces")
    check_image_processor_settings(settings, str(path))
    return settings


def max_length_of(settings: Mapping[str, Any], where: str) -> int | None:
    """`model_max_length` of a tokenizer's settings, in tokens; None if they set no limit.

    Raises: ConfigError unless it is a whole number from 3 (start, one token, end).
    """
    limit = settings.get("model_max_length")
    if limit is not None and (not fits(limit, Annotated[float, Range(3)]) or limit % 1):
        raise ConfigError(f"model_max_length in {where} is {limit!r:.80}; it must be a whole number from 3")
    return None if limit is None else int(limit)


def check_image_processor_settings(settings: Mapping[str, Any], where: str) -> None:
    """Raises: ConfigError naming a setting of an image preprocessor that is unknown or not implemented."""
    used = dict(settings)
    for key, switch in _SWITCHES.items():
        if used.get(key, 0) is None and not settings.get(switch, switch != "do_pad"):
            del used[key]
    _check(used, PROCESSOR_HONOURED, PROCESSOR_DESCRIPTIVE, PROCESSOR_NEUTRAL, where)


def _check(
    settings: Mapping[str, Any], kinds: Mapping[str, Any], ignored: set[str], neutral: Mapping[str, Any], where: str
) -> None:
    for key, value in settings.items():
        if key in kinds:
            sides = [one for one in value.values() if one is not None] if isinstance(value, Mapping) else value
            if not fits(tuple(sides) if isinstance(sides, list) else sides, kinds[key]):
                raise ConfigError(f"{key} in {where} is {value!r:.80}; it must be {described(kinds[key])}")
        elif key.startswith("_") or key in ignored:
            continue
        elif key not in neutral:
            raise ConfigError(
                f"{where} has the setting {key!r} (its value is {value!r:.100}), which is not implemented; "
                "remove it if it does not change the model's results"
            )
        elif value not in neutral[key]:
            allowed = ", ".join(map(repr, neutral[key]))
            raise ConfigError(f"{key} = {value!r:.100} in {where} is not implemented; supported: {allowed}")
    width, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    if width and heads and width % heads:
        raise ConfigError(f"hidden_size in {where} is {width}; it must be a multiple of num_attention_heads, {heads}")
