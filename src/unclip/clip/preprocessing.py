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
from unclip.clip.config import check_image_processor_values
from unclip.errors import ConfigError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""Statistics of the training pictures of OpenAI's CLIP: the defaults of image_mean and image_std."""

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
        return cls._from_settings(read_json(safe_join(folder, "preprocessor_config.json")))

    @classmethod
    def _from_settings(cls, settings: Mapping[str, Any]) -> Self:
        given = {name: value for name, value in settings.items() if name not in _NAMES}
        for name, only in _ALWAYS.items():
            if given.pop(name, only) is not only:
                raise ConfigError(f"{name} = {settings[name]!r:.80} in preprocessor_config.json is not implemented")
        made = cls(
            do_resize=_switch(given.pop("do_resize", True)),
            size=_sides(given.pop("size", 224), ("shortest_edge",)),
            resample=_filter(given.pop("resample", 3)),
            do_center_crop=_switch(given.pop("do_center_crop", True)),
            crop_size=_sides(given.pop("crop_size", 224), ("height", "width")),
            rescale_factor=numbers([given.pop("rescale_factor", 1 / 255)], 1)[0],
            image_mean=numbers(given.pop("image_mean", OPENAI_MEAN), 3),
            image_std=numbers(given.pop("image_std", OPENAI_STD), 3),
        )
        if given:
            raise ConfigError(f"{', '.join(sorted(given)):.80} in preprocessor_config.json is not implemented")
        check_image_processor_values(settings, "preprocessor_config.json")
        return made

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


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{value!r:.80} in preprocessor_config.json is neither true nor false")
    return value


def _sides(value: Any, names: tuple[str, ...]) -> dict[str, int]:
    """A size as a mapping; a single number applies to all of `names`."""
    sides = dict.fromkeys(names, value) if type(value) is int else value
    kinds = ({"height", "width"}, {"shortest_edge"} & set(names))
    if not isinstance(sides, Mapping) or set(sides) not in kinds or not all(type(px) is int for px in sides.values()):
        raise ConfigError(f"the size {value!r:.80} in preprocessor_config.json is not implemented")
    return dict(sides)


def _filter(value: Any) -> int:
    if type(value) is not int or value not in list(Image.Resampling):
        raise ConfigError(f"resample = {value!r:.80} in preprocessor_config.json is not a filter of PIL")
    return value


def numbers(values: Any, count: int) -> tuple[float, ...]:
    """A list in preprocessor_config.json as `count` finite numbers. Raises: ConfigError for anything else."""
    if not isinstance(values, list | tuple) or len(values) != count:
        raise ConfigError(f"{values!r:.80} in preprocessor_config.json must be {count} numbers")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise ConfigError(f"{values!r:.80} in preprocessor_config.json must be {count} numbers")
    return tuple(values)
