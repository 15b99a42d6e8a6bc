"""Prepares pictures for CLIP's image encoder: resizes, crops and normalises them.

The output equals that of transformers' `CLIPImageProcessor`, but this module imports much faster.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.checkpoints.files import output_folder, read_json, safe_join, write_json
from unclip.clip.config import check_image_processor_settings
from unclip.errors import ConfigError
from unclip.limits import fits

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""Statistics of the training pictures of OpenAI's CLIP: the defaults of image_mean and image_std."""

_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": 224,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 224,
    "rescale_factor": 1 / 255,
    "image_mean": OPENAI_MEAN,
    "image_std": OPENAI_STD,
}
# Further settings, with the only values that are implemented.
_ALWAYS = {"do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "do_pad": None, "pad_size": None}
# Names of classes, which do not change the result.
_NAMES = ("feature_extractor_type", "image_processor_type", "processor_class")


@dataclass(frozen=True)
class PicturePreprocessor:
    """Converts pictures to pixels, with the call arguments of transformers' image processors.

    Attributes:
        do_resize: whether pictures are first resized to `size`.
        size: {"shortest_edge": px}, which keeps the aspect ratio, or {"height": px, "width": px}.
        resample: PIL's number of the filter; 3 is bicubic.
        do_center_crop: whether the centre is then cropped, with black padding if the picture is smaller.
        crop_size: {"height": px, "width": px}.
        rescale_factor: the factor of values from 0 to 255.
        image_mean, image_std: for each of the three channels; applied after rescaling.
    """

    do_resize: bool
    size: Mapping[str, int]
    resample: int
    do_center_crop: bool
    crop_size: Mapping[str, int]
    rescale_factor: float
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read preprocessor_config.json in `folder`.

        Raises: ConfigError for a setting that is not implemented (transformers' class must then be used);
            CheckpointError for a file that cannot be read.
        """
        settings = read_json(safe_join(folder, "preprocessor_config.json"))
        given = {name: value for name, value in settings.items() if name not in _NAMES}
        own = {name: given.pop(name, default) for name, default in _DEFAULTS.items()}
        for name, value in (*given.items(), *own.items()):
            if value is not _ALWAYS.get(name, ...) if name in given else value is None:
                raise ConfigError(f"{name} = {value!r:.80} in preprocessor_config.json is not implemented")
        check_image_processor_settings(settings, "preprocessor_config.json")
        own |= {"size": _sides(own["size"], "shortest_edge"), "crop_size": _sides(own["crop_size"])}
        own |= {name: numbers(own[name], 3) for name in ("image_mean", "image_std")}
        return cls(**own)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json, which transformers can read."""
        settings = {**vars(self), "size": dict(self.size), "crop_size": dict(self.crop_size)}
        always = {name: value for name, value in _ALWAYS.items() if value is not None}
        write_json(
            output_folder(folder) / "preprocessor_config.json",
            {"image_processor_type": "CLIPImageProcessor", **always, **settings},
        )

    def __call__(self, images: Sequence[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        """`pixel_values` of pictures of mode RGB: float32 [batch, 3, height, width].

        Raises: ValueError if the results have different sizes.
        """
        pixels = np.stack([self._prepared(image) for image in images])
        return {"pixel_values": torch.from_numpy(pixels)}

    def _prepared(self, image: Image.Image) -> np.ndarray:
        if self.do_resize:
            image = image.resize(self._resized(*image.size), resample=Image.Resampling(self.resample))
        values = np.asarray(image)
        if self.do_center_crop:
            values = _middle(values, self.crop_size["height"], self.crop_size["width"])
        scaled = (values.astype(np.float64) * self.rescale_factor).astype(np.float32)
        normal = (scaled - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        return np.ascontiguousarray(np.moveaxis(normal, -1, 0))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing."""
        if "shortest_edge" not in self.size:
            return self.size["width"], self.size["height"]
        edge = self.size["shortest_edge"]
        return (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)


def _middle(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """The centre of [old height, old width, 3] as [height, width, 3], padded with black if the picture is smaller."""
    for axis, side in ((0, height), (1, width)):
        old = values.shape[axis]
        start = (old - side) // 2
        if old >= side:
            values = values.take(range(start, start + side), axis)
        else:
            room = [(0, 0)] * 3
            room[axis] = (-start, side - old + start)
            values = np.pad(values, room)
    return values


def _sides(value: Any, edge: str | None = None) -> dict[str, int]:
    """A size as a mapping; a single number is that of the `edge`, or of both sides."""
    sides = dict.fromkeys([edge] if edge else ["height", "width"], value) if type(value) is int else dict(value)
    if set(sides) not in ({"height", "width"}, {edge}) or None in sides.values():
        raise ConfigError(f"the size {value!r:.80} in preprocessor_config.json is not implemented")
    return sides  # pyright: ignore[reportReturnType]


def numbers(values: Any, count: int) -> tuple[float, ...]:
    """A list in preprocessor_config.json as `count` finite numbers. Raises: ConfigError for anything else."""
    found = tuple(values) if isinstance(values, list | tuple) else ()
    if len(found) != count or not all(fits(value, float) and math.isfinite(value) for value in found):
        raise ConfigError(f"{values!r:.80} in preprocessor_config.json must be {count} numbers")
    return found
