"""Checks the settings of a CLIP and of its image preprocessor: those implemented, and those without effect."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unclip.checkpoints.files import read_json, safe_join
from unclip.errors import ConfigError, MissingFileError

HONOURED = {
    "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "projection_dim",
    "num_hidden_layers", "num_attention_heads", "num_channels", "image_size", "patch_size", "hidden_act",
    "layer_norm_eps", "attention_dropout", "initializer_range", "initializer_factor", "logit_scale_init_value",
    "pad_token_id", "bos_token_id", "eos_token_id",
}  # fmt: skip
"""Settings of CLIP's encoders and of their training."""

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

SIZE_LIMITS = {
    "hidden_size": 16_384,
    "intermediate_size": 65_536,
    "projection_dim": 16_384,
    "num_hidden_layers": 256,
    "num_attention_heads": 1024,
    "vocab_size": 1_000_000,
    "max_position_embeddings": 65_536,
    "image_size": 4096,
    "patch_size": 4096,
    "num_channels": 16,
}
"""The largest value of each size; the smallest is 1."""

TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
SHARES = ("layer_norm_eps", "attention_dropout")
"""Numbers from 0 to below 1."""
FACTORS = ("initializer_range", "initializer_factor", "logit_scale_init_value")
MAX_FACTOR = 1e6

MAX_PREPROCESSED_PX = 4096
"""The largest side of a preprocessed picture."""

HALVES = ("text_config", "vision_config")
OLD_HALVES = {"text_config_dict": "text_config", "vision_config_dict": "vision_config"}
"""Old names of the inner configurations; in transformers these take precedence."""

PROCESSOR_HONOURED = {
    "do_resize", "size", "resample", "default_to_square", "do_center_crop", "crop_size", "do_rescale",
    "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb", "do_pad", "pad_size",
}  # fmt: skip
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
    """Refuse what would change results and is not implemented, in `settings` (a parsed config.json of `where`).

    Either encoder's configuration, or a whole CLIP's with both. Keys with a leading _ are skipped.

    Raises: ConfigError naming the setting; also if a whole CLIP has two different configurations of an encoder.
    """
    whole = {*HALVES, *OLD_HALVES}
    _check({key: value for key, value in settings.items() if key not in whole}, HONOURED | DESCRIPTIVE, NEUTRAL, where)
    for name in sorted(whole & settings.keys()):
        half = settings[name]
        if half is None:
            continue
        if not isinstance(half, Mapping):
            raise ConfigError(f"{name} in {where} is {half!r:.100}; it must be an object in braces")
        _check(half, HONOURED | DESCRIPTIVE, NEUTRAL, f"{where} ({name})")
        other = settings.get(OLD_HALVES.get(name, "")) or {}
        for key in half.keys() & other.keys() & HONOURED:
            if half[key] != other[key]:
                raise ConfigError(
                    f"{where} says {key} twice: {half[key]!r} in {name}, {other[key]!r} in {OLD_HALVES[name]}; "
                    f"remove {name}"
                )


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
        raise MissingFileError(f"{path} is not there; without it nothing says how pictures are made ready for CLIP")
    settings = read_json(path) if inner is None else inner
    if not isinstance(settings, dict):
        raise ConfigError(f"image_processor in {path} is {settings!r:.100}; it must be an object in braces")
    _check(settings, PROCESSOR_HONOURED | PROCESSOR_DESCRIPTIVE, PROCESSOR_NEUTRAL, str(path))
    check_image_processor_values(settings, str(path))
    return settings


def max_length_of(settings: Mapping[str, Any], where: str) -> int | None:
    """`model_max_length` of a tokenizer's settings, in tokens; None if they set no limit.

    Raises: ConfigError unless it is a whole number from 3 (start, one token, end).
    """
    limit = settings.get("model_max_length")
    if limit is not None and (type(limit) not in (int, float) or limit != limit // 1 or limit < 3):
        raise ConfigError(f"model_max_length in {where} is {limit!r:.80}; it must be a whole number from 3")
    return None if limit is None else int(limit)


def check_image_processor_values(settings: Mapping[str, Any], where: str) -> None:
    """Raises: ConfigError for an unusable value of an image preprocessor's setting."""
    for key, value in settings.items():
        if key in _SWITCHES and value is not None and not isinstance(value, bool):
            raise ConfigError(f"{key} in {where} is {value!r:.80}; it must be true or false")
        if key in _PROCESSOR_VALUES:
            switch, is_possible, wanted = _PROCESSOR_VALUES[key]
            is_unused = value is None and not settings.get(switch, switch != "do_pad")
            if not is_unused and not is_possible(value):
                raise ConfigError(f"{key} in {where} is {value!r:.80}; it must be {wanted}")


def _is_real(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _is_size(value: Any) -> bool:
    """Whether it is a number of pixels, or one for each side."""
    sides = list(value.values()) if isinstance(value, Mapping) else [value]
    given = [px for px in sides if px is not None]
    return bool(given) and all(type(px) is int and 1 <= px <= MAX_PREPROCESSED_PX for px in given)


def _are_channels(value: Any, low: float, high: float) -> bool:
    """Whether it is a number, or one for each of the three channels."""
    values = value if isinstance(value, list | tuple) else [value] * 3
    return len(values) == 3 and all(_is_real(number, low, high) for number in values)


_SIZE_WORDS = f"from 1 to {MAX_PREPROCESSED_PX} pixels, one number or one for each side"
_PROCESSOR_VALUES: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "size": ("do_resize", _is_size, _SIZE_WORDS),
    "resample": ("do_resize", lambda value: type(value) is int and 0 <= value <= 5, "a filter of PIL's, 0 to 5"),
    "crop_size": ("do_center_crop", _is_size, _SIZE_WORDS),
    "pad_size": ("do_pad", _is_size, _SIZE_WORDS),
    "rescale_factor": ("do_rescale", lambda value: _is_real(value, 1e-6, 1e3), "a number from 1e-6 to 1000"),
    "image_mean": ("do_normalize", lambda value: _are_channels(value, -1e4, 1e4), "three numbers from -10000 to 10000"),
    "image_std": ("do_normalize", lambda value: _are_channels(value, 1e-6, 1e4), "three numbers from 1e-6 to 10000"),
}
"""For each setting: the switch that enables it (null is allowed if it is off), a check, and the allowed values in
words."""
_SWITCHES = {
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
    "do_pad",
    "default_to_square",
}


def _check(settings: Mapping[str, Any], known: set[str], neutral: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for key, value in settings.items():
        if key in HONOURED:
            _check_value(key, value, where)
        if key.startswith("_") or key in known:
            continue
        if key not in neutral:
            raise ConfigError(
                f"{where} has the setting {key!r} (its value is {value!r:.100}), which is not implemented; "
                "remove it if the model computes the same without it"
            )
        if value not in neutral[key]:
            allowed = ", ".join(repr(choice) for choice in neutral[key])
            raise ConfigError(f"{key} = {value!r:.100} in {where} is not implemented; supported: {allowed}")


def _check_value(key: str, value: Any, where: str) -> None:
    """Raises: ConfigError for an unusable value of an encoder's setting."""
    if key in SIZE_LIMITS and not (type(value) is int and 1 <= value <= SIZE_LIMITS[key]):
        raise ConfigError(f"{key} in {where} is {value!r:.80}; it must be a whole number from 1 to {SIZE_LIMITS[key]}")
    if key in TOKENS and value is not None:
        limit = SIZE_LIMITS["vocab_size"]
        if type(value) is not int or not 0 <= value <= limit:
            raise ConfigError(f"{key} in {where} is {value!r:.80}; it must be a whole number from 0 to {limit}")
    is_share = _is_real(value, 0, 1) and value != 1
    if key in SHARES and not is_share and (key, value) != ("attention_dropout", None):
        raise ConfigError(f"{key} in {where} is {value!r:.80}; it must be a number from 0 to below 1")
    if key in FACTORS and not _is_real(value, -MAX_FACTOR, MAX_FACTOR):
        raise ConfigError(f"{key} in {where} is {value!r:.80}; it must be a number up to {MAX_FACTOR:g}")
    if key == "hidden_act" and not isinstance(value, str):
        raise ConfigError(f"hidden_act in {where} is {value!r:.80}; it must be the name of an activation")
