"""Losses on the clean picture for the last step of super-resolution: absolute error, and perceptual."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.checkpoints.files import read_json
from unclip.checkpoints.weights import check_finite, open_weights, read_tensors
from unclip.clip.preprocessing import numbers
from unclip.clip.pretrained import is_whole_clip, read_clip
from unclip.errors import CheckpointError, ConfigError, MissingFileError, WeightsError
from unclip.training.conditions import normalized, scaled

Hidden = Sequence[Tensor]
"""Hidden states of a network by layer: [batch, tokens, width] or [batch, channels, height, width]."""


def absolute_error(found: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """The mean absolute difference of pictures [batch, 3, height, width], as `loss`."""
    return {"loss": (found - wanted).abs().mean()}


@dataclass(frozen=True)
class PerceptualLoss:
    """The absolute difference of pixels, plus `weight` times the distance between features of a frozen network.

    The features of each layer are normalised along the channels and compared by squared difference
    (Zhang et al. 2018, arXiv 1801.03924, eq. 1, without their learned weights).

    Attributes:
        network: the frozen network. It is not saved.
        features: (network, pictures [batch, 3, height, width] in [-1, 1]) → hidden states. It takes the network as an
            argument, so that a copy of the loss uses its own copy of the network.
        weight: weight of the feature distance.
    """

    network: nn.Module
    features: Callable[[nn.Module, Tensor], Hidden]
    weight: float

    def __call__(self, found: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """`loss` and its parts `l1` and `perceptual`, for pictures in [-1, 1]."""
        self.network.to(found.device)
        with torch.no_grad():
            right = self.features(self.network, wanted)
        left = self.features(self.network, found)
        distance = torch.stack([_distance(a, b) for a, b in zip(left, right, strict=True)]).mean()
        error = (found - wanted).abs().mean()
        return {"loss": error + self.weight * distance, "l1": error.detach(), "perceptual": distance.detach()}


def perceptual_loss(folder: Path, weight: float) -> PerceptualLoss:
    """The loss with features of a CLIP's image encoder, or of another image model that transformers loads.

    Args:
        folder: a CLIP in either layout, or the `config.json` and safetensors of a model. The mean and standard
            deviation of its pictures are read from `preprocessor_config.json`, and default to 0.5.
        weight: weight of the feature distance relative to the pixel error.

    Raises:
        ConfigError: the model returns no hidden states.
        CheckpointError: the model is missing or broken.
    """
    if (folder / "text_encoder").is_dir() or is_whole_clip(folder):
        clip = read_clip(folder)
        network: Any = clip.image_encoder.vision_model
        ready, size = functools.partial(normalized, feature_extractor=clip.feature_extractor), clip.image_size
    else:
        network, mean, spread = _image_model(folder)
        ready = functools.partial(scaled, mean=mean, spread=spread)
        size = getattr(network.config, "image_size", None)
    network.eval().requires_grad_(False)

    def features(network: nn.Module, pixels: Tensor) -> Hidden:
        if isinstance(size, int) and pixels.shape[-1] != size:
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        hidden = network(pixel_values=ready(pixels), output_hidden_states=True).hidden_states
        if not hidden:
            raise ConfigError(f"the model in {folder} returns no hidden states; use a CLIP, or another image model")
        return hidden

    return PerceptualLoss(network, features, weight)


def _image_model(folder: Path) -> tuple[Any, Sequence[float], Sequence[float]]:
    from transformers import AutoModel

    if not (folder / "config.json").is_file():
        raise MissingFileError(f"{folder} has no config.json; it must be a CLIP's folder, or another image model's")
    for name, tensor in read_tensors(open_weights(folder, stem="model")):
        check_finite(tensor, name, str(folder))
    how: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        network, about_weights = AutoModel.from_pretrained(folder, dtype=torch.float32, **how)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{folder} is not an image model that transformers can load: {error}") from error
    # The checkpoint of a classifier has no pooling layer; hidden states do not need it.
    missing = sorted(name for name in map(str, about_weights["missing_keys"]) if not name.startswith("pooler."))
    if missing:
        raise WeightsError(
            f"{folder} lacks {len(missing)} weights of the model that its config.json describes ({missing[0]}…)"
        )
    return network, *_mean_and_spread(folder)


def _mean_and_spread(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """The mean and standard deviation of each channel in `preprocessor_config.json`; 0.5 without the file."""
    path = folder / "preprocessor_config.json"
    about = read_json(path) if path.is_file() else {}
    if about.get("do_normalize") is False:
        return (0.0,) * 3, (1.0,) * 3
    found = (about.get(name, 0.5) for name in ("image_mean", "image_std"))
    mean, spread = (numbers(values if isinstance(values, list) else [values] * 3, 3) for values in found)
    if min(spread) <= 0:
        raise ConfigError(f"image_std is {spread!r} in {path}; it must be above 0")
    return mean, spread


def _distance(found: Tensor, right: Tensor) -> Tensor:
    along = -1 if found.ndim == 3 else 1
    gap = F.normalize(found.float(), dim=along) - F.normalize(right.float(), dim=along)
    return gap.pow(2).sum(dim=along).mean()
