"""Reads the parts of a CLIP from a folder, by transformers' classes or by unclip's own, which are imported faster."""

import copy
import hashlib
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unclip.checkpoints.files import read_json, safe_join
from unclip.checkpoints.weights import (
    TRANSFORMERS_STEM,
    WeightsIndex,
    check_finite,
    check_fit,
    open_weights,
    read_tensors,
)
from unclip.clip.config import HALVES, SIZES, check_clip_settings, max_length_of, read_image_processor_settings
from unclip.clip.networks import CLIPImageEncoder, CLIPTextEncoder
from unclip.clip.preprocessing import PicturePreprocessor
from unclip.clip.tokenizer import CaptionTokenizer
from unclip.errors import CheckpointError, ConfigError, MissingFileError, UnclipError, WeightsError
from unclip.models.component import Component

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection
    from transformers.image_processing_utils import BaseImageProcessor

OWN = {
    "CLIPTextModelWithProjection": CLIPTextEncoder,
    "CLIPVisionModelWithProjection": CLIPImageEncoder,
    "CLIPTokenizer": CaptionTokenizer,
    "CLIPImageProcessor": PicturePreprocessor,
    "CLIPTextModel": None,
    "CLIPModel": None,
}
"""The classes of transformers in model folders, with unclip's own classes that compute the same."""
ALIASES = {
    "CLIPTokenizerFast": "CLIPTokenizer",
    **dict.fromkeys(("CLIPFeatureExtractor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"), "CLIPImageProcessor"),
}
"""Other names of these classes in existing folders."""

COMPONENTS = {
    "text_encoder": "CLIPTextModelWithProjection",
    "image_encoder": "CLIPVisionModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "feature_extractor": "CLIPImageProcessor",
}

TOKENIZER_JSON = ("tokenizer*.json", "vocab.json", "special_tokens_map.json", "added_tokens.json")
"""The files that the tokenizers of transformers read; tokenizer.json may have a version in its name."""

TEXT_PREFIX = "text_model."

MORE_FILES = ("adapter_config.json", "processor_config.json")
"""Further files that transformers reads, and unclip's own classes do not."""

# The setting of transformers is global, so only one thread at a time may change it.
_bars = threading.Lock()


@dataclass(frozen=True)
class PretrainedClip:
    """The parts of a CLIP.

    Attributes:
        text_encoder, image_encoder, tokenizer, feature_extractor: the components of a pipeline.
        logit_scale: the logarithm of the factor of its similarities; None if the folder does not contain it.
        fingerprint: SHA-256 of its files of weights.
    """

    text_encoder: "CLIPTextModelWithProjection"
    image_encoder: "CLIPVisionModelWithProjection"
    tokenizer: "CLIPTokenizer"
    feature_extractor: "BaseImageProcessor"
    logit_scale: float | None
    fingerprint: str

    @property
    def image_size(self) -> int:
        """Side of the pictures that the image encoder takes, in pixels."""
        size: Any = self.image_encoder.config.image_size
        return size

    @property
    def context_length(self) -> int:
        """Number of tokens that the text encoder takes, start and end included."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    def components(self) -> dict[str, Any]:
        """The parts by component name."""
        return {name: getattr(self, name) for name in COMPONENTS}


def is_whole_clip(folder: Path) -> bool:
    """Whether a folder contains a `CLIPModel` of transformers, with both encoders in one file of weights."""
    try:
        return read_json(folder / "config.json").get("model_type") == "clip"
    except CheckpointError:
        return False


def read_clip(folder: Path) -> PretrainedClip:
    """Read a CLIP in float32.

    Raises:
        ConfigError: the folder contains no CLIP.
        CheckpointError: a part is missing or broken.
    """
    parts, scale = read_parts(folder)
    return PretrainedClip(**parts, logit_scale=scale, fingerprint=fingerprint_of(folder))


def fingerprint_of(folder: Path) -> str:
    """SHA-256 of a CLIP's files of weights; the same CLIP in another precision has another fingerprint."""
    halves = [*folder.glob("text_encoder/*.safetensors"), *folder.glob("image_encoder/*.safetensors")]
    weights = halves if (folder / "text_encoder").is_dir() else folder.glob("*.safetensors")
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(weights))).hexdigest()


def read_parts(folder: Path) -> tuple[dict[str, Any], float | None]:
    """The parts of a CLIP by component name, and its `logit_scale`, without computing a fingerprint.

    Raises: see `read_clip`.
    """
    if (folder / "text_encoder").is_dir():
        return {name: read_part(folder, name, kind) for name, kind in COMPONENTS.items()}, None
    if is_whole_clip(folder):
        return _parts_of_whole(folder)
    raise ConfigError(
        f"{folder} contains no trained CLIP (neither text_encoder/ nor a config.json of transformers' CLIPModel): "
        "train that stage first, or give another folder"
    )


def _parts_of_whole(folder: Path) -> tuple[dict[str, Any], float]:
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    clip = read_part(folder, ".", "CLIPModel")
    # The inner configurations may have another width; only that of the whole CLIP is used.
    text_config, image_config = copy.deepcopy(clip.config.text_config), copy.deepcopy(clip.config.vision_config)
    text_config.projection_dim = image_config.projection_dim = clip.config.projection_dim
    with torch.device("meta"):
        text, image = CLIPTextModelWithProjection(text_config), CLIPVisionModelWithProjection(image_config)
    text.text_model, text.text_projection = clip.text_model, clip.text_projection
    image.vision_model, image.visual_projection = clip.vision_model, clip.visual_projection
    parts = {
        "text_encoder": text.eval(),
        "image_encoder": image.eval(),
        "tokenizer": read_part(folder, ".", "CLIPTokenizer"),
        "feature_extractor": read_part(folder, ".", "CLIPImageProcessor"),
    }
    return parts, float(clip.logit_scale.detach())


@contextmanager
def naming(folder: Path, name: str, class_name: str) -> Iterator[None]:
    """Name the component in errors that occur while it is read.

    Raises: CheckpointError in place of errors that are not unclip's: transformers raises any kind for a broken file.
    """
    try:
        yield
    except UnclipError as error:
        raise type(error)(f"component {name!r} ({class_name}) cannot be loaded: {error}") from error
    except Exception as error:
        raise CheckpointError(f"component {name!r} ({class_name}) cannot be loaded from {folder}: {error}") from error


def read_part(
    folder: Path,
    name: str,
    class_name: str,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    own_clip: bool = False,
) -> Any:
    """Read a part of CLIP from `folder/name`.

    Args:
        class_name: a name in `OWN` or `ALIASES`.
        dtype: of the weights; None for float32.
        variant: of the weights, for example "fp16".
        own_clip: read it by unclip's own class if that implements it.

    Raises: CheckpointError or ConfigError, which names the component.
    """
    with naming(folder, name, class_name):
        place, kind = safe_join(folder, name), ALIASES.get(class_name, class_name)
        if own_clip and (part := _read_own(OWN[kind], place, dtype, variant)) is not None:
            return part
        with no_bars():
            transformers = importlib.import_module("transformers")
            if kind == "CLIPTokenizer":
                return _read_tokenizer(transformers.CLIPTokenizer, place)
            if kind == "CLIPImageProcessor":
                read_image_processor_settings(place)  # checks that all settings are implemented
                return transformers.CLIPImageProcessorPil.from_pretrained(place, local_files_only=True)
            return _read_network(getattr(transformers, kind), place, dtype, variant)


def _read_own(cls: Any, folder: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    """Read a part of CLIP by unclip's own class; None if there is none, or it cannot read the folder.

    The class of transformers is used then: it may read the layout of older files, or explains what is wrong.
    """
    if cls is None or any((folder / file).exists() for file in MORE_FILES):
        return None
    try:
        if not issubclass(cls, Component):
            return cls.from_pretrained(folder)
        _check_config(folder)
        return cls.from_pretrained(folder, torch_dtype=dtype, variant=variant)
    except (ConfigError, CheckpointError):
        return None


def _read_tokenizer(cls: Any, folder: Path) -> Any:
    """A tokenizer with the folder's vocabulary; without vocabulary files, transformers would build an empty one.

    The files are checked first, because transformers accepts duplicate keys.
    """
    for pattern in TOKENIZER_JSON:
        for path in sorted(folder.glob(pattern)):
            settings = read_json(safe_join(folder, path.name))
            if path.name == "tokenizer_config.json":
                max_length_of(settings, str(path))
    safe_join(folder, "merges.txt")
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise MissingFileError(f"{folder} has neither tokenizer.json nor {name}; download the model again")
    tokenizer = cls.from_pretrained(folder, local_files_only=True)
    tried = tokenizer("a", padding="max_length", max_length=8, truncation=True)  # raises if it has no padding token
    if "attention_mask" not in tried:
        raise ConfigError(f"the tokenizer in {folder} gives no attention_mask; its model_input_names must contain it")
    return tokenizer


def _read_network(cls: Any, folder: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    """A CLIP model of transformers; its configuration and the header of its weights are checked first."""
    _check_config(folder)
    index = open_weights(folder, stem=TRANSFORMERS_STEM, variant=variant)
    check_fit(_clip_shapes(cls, folder, index), index.without(CLIPTextEncoder.tables), folder)
    for name, tensor in read_tensors(index):
        check_finite(tensor, name, str(folder))
    model, about = cls.from_pretrained(
        folder,
        dtype=dtype or torch.float32,
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    if missing := sorted(map(str, about["missing_keys"])):  # transformers would initialize them randomly
        raise WeightsError(f"{len(missing)} weights are missing in {folder} ({', '.join(missing[:3])}…)")
    return model.eval()


def _check_config(folder: Path) -> None:
    path = safe_join(folder, "config.json")
    check_clip_settings(read_json(path), str(path))


def _clip_shapes(cls: Any, folder: Path, index: WeightsIndex) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of transformers' CLIP class `cls`, for the configuration in `folder`.

    They are taken from unclip's own classes, built on the meta device. `index` has the names of the weights:
    CLIPTextModel has no projection, and current versions of transformers write its weights without a prefix.
    """
    config = cls.config_class.from_pretrained(folder, local_files_only=True)
    halves = [getattr(config, name) for name in HALVES] if cls.__name__ == "CLIPModel" else [config]
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()} if len(halves) > 1 else {}
    for half in halves:
        encoder = CLIPTextEncoder if hasattr(half, "vocab_size") else CLIPImageEncoder
        known = {field.name for field in fields(encoder.config_class)}
        sizes = {name: getattr(half, name) for name in (*SIZES, "eos_token_id") if name in known}
        with torch.device("meta"):
            built = encoder(sizes | {"projection_dim": config.projection_dim})
        shapes |= {name: tuple(weight.shape) for name, weight in built.state_dict().items()}
    if cls.__name__ == "CLIPTextModel":
        del shapes["text_projection.weight"]
        if not any(name.startswith(TEXT_PREFIX) for name in index):
            shapes = {name.removeprefix(TEXT_PREFIX): shape for name, shape in shapes.items()}
    return shapes


@contextmanager
def no_bars() -> Iterator[None]:
    """Hide the progress bars of transformers, and restore its setting afterwards."""
    from transformers.utils import logging

    # `disable_progress_bar()` would also change the setting of the hub client, which could not be restored.
    with _bars:
        shown = logging.is_progress_bar_enabled()
        logging._tqdm_active = False
        try:
            yield
        finally:
            logging._tqdm_active = shown
