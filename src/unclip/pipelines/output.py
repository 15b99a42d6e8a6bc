"""What a pipeline returns, and the forms that pictures take at its end.

Knows the output types; knows no component. Called by the pipelines.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.errors import InputError, NonFiniteError
from unclip.images import to_numpy, to_pil, to_unit

Images = list[Image.Image] | np.ndarray | Tensor
OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass
class ImagePipelineOutput:
    """The pictures of one call; also readable as a mapping (`out["images"]`) and as a tuple (`out[0]`).

    Attributes:
        images: a list of PIL images ("pil"), a float32 array [batch, height, width, 3] in [0, 1] ("np"), or a float32
            tensor [batch, 3, height, width] in [0, 1] ("pt").
        image_embeddings: float32 [batch, embedding_dim], when intermediate results were asked for.
        small_images: the decoder's pictures before super-resolution, in the form of `images`, likewise.
    """

    images: Images
    image_embeddings: Tensor | None = None
    small_images: Images | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """All that is not None, in order."""
        return tuple(value for field in fields(self) if (value := getattr(self, field.name)) is not None)

    def keys(self) -> list[str]:
        """The names of all that is not None."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


def in_form(images: Tensor, output_type: str) -> Images:
    """float [batch, 3, height, width] in [-1, 1] → pictures in the form that was asked for."""
    forms = {"pil": to_pil, "np": to_numpy, "pt": lambda x: to_unit(x).cpu()}
    return forms[output_type](images)


def check_output_type(output_type: str) -> None:
    """Raises: InputError for a form that there is none of."""
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type is {output_type!r}; it must be one of {', '.join(map(repr, OUTPUT_TYPES))}")


def check_finite(results: Mapping[str, Tensor], *, has_float16: bool) -> None:
    """Look once, when all is computed, whether it came out as numbers.

    Args:
        results: by what a person calls them, in the order in which they were made.
        has_float16: whether some network's weights are of that type.

    Raises: NonFiniteError that names the first that is not finite, and the likely cause.
    """
    for name, result in results.items():
        if bool(result.isfinite().all()):
            continue
        inputs = "embeddings, latents or text_model_output that were given are too large"
        cause = f"the {inputs}, or the model's weights are damaged"
        if has_float16:
            largest = f"{torch.finfo(torch.float16).max:g}"
            cause = (
                f"float16 ends at {largest}, which some number exceeded: load the model with "
                f"torch_dtype=torch.bfloat16 or torch.float32; or the {inputs}"
            )
        raise NonFiniteError(f"the {name} came out as NaN or infinity. Most likely {cause}")
