"""Pictures as a CLIP's image encoder wants them.

Knows preprocessors' settings; knows neither recipe nor task. Called by the tasks.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor


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
