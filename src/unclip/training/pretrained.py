"""A CLIP from its folder, in either layout: a pipeline's components, or transformers' own `CLIPModel`.

Knows both layouts and transformers' classes; knows neither recipe nor task. Called by the tasks and `unclip assemble`.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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
        text_encoder, image_encoder, tokenizer, feature_extractor: as a pipeline has them.
        logit_scale: logarithm of what its similarities are multiplied with; None where the folder does not say it.
        fingerprint: of its weights.
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
        """Tokens that the text encoder takes, start and end included."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    def components(self) -> dict[str, Any]:
        """The parts by their names in a pipeline."""
        return {name: getattr(self, name) for name in COMPONENTS}


def is_whole_clip(folder: Path) -> bool:
    """Whether a folder holds transformers' `CLIPModel`: both encoders in one file of weights."""
    try:
        return read_json(folder / "config.json").get("model_type") == "clip"
    except CheckpointError:
        return False


def read_clip(folder: Path) -> PretrainedClip:
    """Read a CLIP in float32.

    Raises:
        ConfigError: there is none.
        CheckpointError: a part is missing or broken.
    """
    if (folder / "text_encoder").is_dir():
        parts = {
            name: read_component(folder, name, kind, torch_dtype=None, variant=None)
            for name, kind in COMPONENTS.items()
        }
        scale = None
        weights = [*folder.glob("text_encoder/*.safetensors"), *folder.glob("image_encoder/*.safetensors")]
    elif is_whole_clip(folder):
        parts, scale = _parts_of_whole(folder)
        weights = list(folder.glob("*.safetensors"))
    else:
        raise ConfigError(
            f"{folder} holds no trained CLIP (neither text_encoder/ nor a config.json of transformers' CLIPModel): "
            "train that stage first, or name another"
        )
    fingerprint = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(weights))).hexdigest()
    return PretrainedClip(**parts, logit_scale=scale, fingerprint=fingerprint)


def _parts_of_whole(folder: Path) -> tuple[dict[str, Any], float]:
    def read(kind: str) -> Any:
        return read_component(folder, ".", kind, torch_dtype=None, variant=None)

    clip = read("CLIPModel")
    # The two configurations inside may say another width: only the whole one's counts.
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


def normalized(pixels: Tensor, feature_extractor: BaseImageProcessor) -> Tensor:
    """Pictures [batch, 3, size, size] in [-1, 1] in the range, and with the mean and spread, that an encoder wants."""
    settings: Any = feature_extractor
    white = 255 * (settings.rescale_factor if settings.do_rescale else 1)  # 1, in every CLIP that was published
    if not settings.do_normalize:
        return (pixels + 1) * (white / 2)
    return scaled(pixels, settings.image_mean, settings.image_std, white)


def scaled(
    pixels: Tensor, mean: float | Sequence[float], spread: float | Sequence[float], white: float = 1.0
) -> Tensor:
    """Pictures in [-1, 1] less a mean and divided by a spread, which are those of colours in [0, `white`].

    Each of the two is one number, or one a channel.
    """
    middle, unit = (pixels.new_tensor(values).reshape(-1, 1, 1) / white for values in (mean, spread))
    return pixels * (0.5 / unit) + (0.5 - middle) / unit  # exactly the pixels where both are 0.5
