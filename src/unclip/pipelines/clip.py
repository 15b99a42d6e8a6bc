"""Reads a CLIP from a folder: the components of a pipeline, or a `CLIPModel` of transformers."""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection
from transformers.image_processing_utils import BaseImageProcessor

from unclip.checkpoints.files import read_json
from unclip.errors import CheckpointError, ConfigError
from unclip.pipelines.component import read_component

COMPONENTS = {
    "text_encoder": "CLIPTextModelWithProjection",
    "image_encoder": "CLIPVisionModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "feature_extractor": "CLIPImageProcessor",
}


@dataclass(frozen=True)
class PretrainedClip:
    """The parts of a CLIP.

    Attributes:
        text_encoder, image_encoder, tokenizer, feature_extractor: the components of a pipeline.
        logit_scale: the logarithm of the factor of its similarities; None if the folder does not contain it.
        fingerprint: SHA-256 of its files of weights.
    """

    text_encoder: CLIPTextModelWithProjection
    image_encoder: CLIPVisionModelWithProjection
    tokenizer: CLIPTokenizer
    feature_extractor: BaseImageProcessor
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
        kinds = COMPONENTS.items()
        parts = {name: read_component(folder, name, kind, torch_dtype=None, variant=None) for name, kind in kinds}
        return parts, None
    if is_whole_clip(folder):
        return _parts_of_whole(folder)
    raise ConfigError(
        f"{folder} holds no trained CLIP (neither text_encoder/ nor a config.json of transformers' CLIPModel): "
        "train that stage first, or give another folder"
    )


def _parts_of_whole(folder: Path) -> tuple[dict[str, Any], float]:
    def read(kind: str) -> Any:
        return read_component(folder, ".", kind, torch_dtype=None, variant=None)

    clip = read("CLIPModel")
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
        "tokenizer": read("CLIPTokenizer"),
        "feature_extractor": read("CLIPImageProcessor"),
    }
    return parts, float(clip.logit_scale.detach())
