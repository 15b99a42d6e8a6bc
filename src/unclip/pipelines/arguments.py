"""The checks of a pipeline call's arguments, and the form of its output."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.checkpoints.recommended import SAMPLER, chosen_preset
from unclip.clip.encoders import TextEmbedding, check_prompt
from unclip.diffusion.loop import NoiseSource, generators_from_seed
from unclip.errors import InputError
from unclip.images import to_numpy, to_pil, to_unit
from unclip.numbers import whole
from unclip.pipelines.samplers import sampler_switch

MAX_PICTURES = 1000

Callback = Callable[[Any, int, int, dict[str, Any]], Mapping[str, Any] | None]
"""(pipeline, step, timestep, {"stage", "num_steps", "latents", "x0"}) → None, or {"latents": …}, or {"stop": True}."""

Images = list[Image.Image] | np.ndarray | Tensor
FORMS: Mapping[str, Callable[[Tensor], Images]] = {"pil": to_pil, "np": to_numpy, "pt": lambda x: to_unit(x).cpu()}
"""Output types: from float [batch, 3, height, width] in [-1, 1] to the pictures of a call's output."""


P = ParamSpec("P")
R = TypeVar("R")


def takes_preset(call: Callable[P, R]) -> Callable[P, R]:
    """Let a pipeline's call take the settings that are not given from the model's preset that its `preset` names.

    The sampler of the preset holds for this call. Raises (in the call): InputError for an unknown preset.
    """
    signature = inspect.signature(call)

    @functools.wraps(call)
    def of_preset(*given: Any, **named: Any) -> R:
        name = named.pop("preset", None)
        if name is None:
            return call(*given, **named)
        pipe = given[0]
        settings = dict(chosen_preset(pipe.presets, name))
        if (sampler := settings.pop(SAMPLER, None)) is not None:
            pipe = copy.copy(pipe)
            sampler_switch(pipe)(str(sampler))
        known = signature.bind_partial(*given, **named).arguments
        settings = {key: value for key, value in settings.items() if key not in known}
        return call(pipe, *given[1:], **named, **settings)  # pyright: ignore[reportCallIssue]

    return of_preset  # pyright: ignore[reportReturnType]


class PipelineOutput:
    """Base of the outputs of calls: dataclasses that can also be read as a mapping and as a tuple."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not None, in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def keys(self) -> list[str]:
        """The names of the values that are not None."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]  # type: ignore[arg-type]

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


@dataclass
class ImagePipelineOutput(PipelineOutput):
    """The pictures of one call, which can also be read as a mapping (`out["images"]`) and as a tuple (`out[0]`).

    Attributes:
        images: a list of PIL images ("pil"), a float32 array [batch, height, width, 3] in [0, 1] ("np"), or a float32
            tensor [batch, 3, height, width] in [0, 1] ("pt").
        image_embeddings: float32 [batch, embedding_dim]; None without `return_intermediates`.
        small_images: the decoder's pictures before super-resolution, in the form of `images`; None without
            `return_intermediates`.
    """

    images: Images
    image_embeddings: Tensor | None = None
    small_images: Images | None = None


def as_prompts(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several, as a list.

    Raises: InputError for anything but a string or a non-empty list of strings.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts:
        raise InputError(f"prompt must be a string or a non-empty list of strings, not {prompt!r:.100}")
    if len(prompts) > MAX_PICTURES:
        raise InputError(f"there are {len(prompts)} prompts; at most {MAX_PICTURES} pictures are made at once")
    for each in prompts:
        check_prompt(each)
    return list(prompts)


def as_captions(prompt: str | Sequence[str] | None, rows: int) -> list[str]:
    """One caption (the empty one by default), or one for each of `rows` prompts or pictures.

    Raises: InputError for another number of captions.
    """
    captions = [""] if prompt is None else as_prompts(prompt)
    if len(captions) not in (1, rows):
        raise InputError(f"there are {len(captions)} captions for {rows} pictures; give one, or one for each")
    return captions


def check_count(count: object, num_prompts: int, name: str = "num_images_per_prompt") -> int:
    """The number of pictures of each prompt as an int.

    Raises: InputError unless it is a whole number, and the call makes between 1 and 1000 pictures.
    """
    number = whole(count, name, 1, MAX_PICTURES)
    if not 1 <= (total := number * num_prompts) <= MAX_PICTURES:
        raise InputError(f"this call asks for {total} pictures; between 1 and {MAX_PICTURES} are made at once")
    return number


def noise_source(
    generator: torch.Generator | Sequence[torch.Generator] | None, seed: int | Sequence[int] | None, batch_size: int
) -> NoiseSource:
    """The source of a call's noise: a generator in the reference's order, or a seed for each picture.

    Raises: InputError when both are given, or their number is not the number of pictures.
    """
    if seed is None:
        return NoiseSource(generator, batch_size)
    if generator is not None:
        raise InputError("give seed or generator, not both: each of them determines the noise")
    return NoiseSource(generators_from_seed(seed, batch_size), batch_size)


def check_tensor(tensor: object, name: str) -> None:
    """Raises: InputError unless it is a finite floating-point tensor with values."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = getattr(tensor, "dtype", type(tensor).__name__)
        raise InputError(f"{name} must be a floating-point tensor, not {found}")
    if tensor.is_meta:
        raise InputError(f"{name} is on the meta device, where tensors have no values")
    if not tensor.isfinite().all():
        raise InputError(f"{name} has NaN or infinity")


def check_latents(latents: Tensor | None, name: str, shape: tuple[int, ...]) -> None:
    """Raises: InputError unless the given noise is a finite floating-point tensor of this shape."""
    if latents is None:
        return
    check_tensor(latents, name)
    if tuple(latents.shape) != shape:
        raise InputError(f"{name} have shape {tuple(latents.shape)}; this call needs {shape}")


def check_embeddings(image_embeddings: Tensor, width: int) -> None:
    """Raises: InputError unless it is a finite floating-point tensor [batch, width]."""
    check_tensor(image_embeddings, "image_embeddings")
    if image_embeddings.ndim != 2 or image_embeddings.shape[1] != width or len(image_embeddings) < 1:
        raise InputError(f"image_embeddings have shape {tuple(image_embeddings.shape)}; they must be [batch, {width}]")


def given_text(output: Any, mask: Tensor | None, config: Any) -> TextEmbedding:
    """Captions' embeddings that the caller computed.

    Args:
        output: CLIPTextModelOutput, or (text_embeds [batch, width], last_hidden_state [batch, tokens, text_width]).
        mask: [batch, tokens].
        config: the configuration of the text encoder, which has the sizes.

    Raises: InputError for a missing mask or a wrong shape.
    """
    width, tokens, text_width = config.projection_dim, config.max_position_embeddings, config.hidden_size
    if not isinstance(mask, Tensor):
        raise InputError("text_model_output needs text_attention_mask, a tensor that marks the tokens of the caption")
    if hasattr(output, "text_embeds"):
        embeds, hidden_states = output.text_embeds, output.last_hidden_state
    elif isinstance(output, list | tuple) and len(output) >= 2:
        embeds, hidden_states = output[0], output[1]
    else:
        raise InputError("text_model_output must be a CLIPTextModelOutput, or (text_embeds, last_hidden_state)")
    check_tensor(embeds, "text_model_output's text_embeds")
    check_tensor(hidden_states, "text_model_output's last_hidden_state")
    batch = len(embeds) if embeds.ndim else 0
    wanted = ((batch, width), (batch, tokens, text_width), (batch, tokens))
    if batch < 1 or (embeds.shape, hidden_states.shape, mask.shape) != wanted:
        raise InputError(
            f"text_model_output has shapes {tuple(embeds.shape)} and {tuple(hidden_states.shape)}, the mask "
            f"{tuple(mask.shape)}; they must be [batch, {width}], [batch, {tokens}, {text_width}] and [batch, {tokens}]"
        )
    if mask.is_meta or not ((mask == 0) | (mask == 1)).all():
        raise InputError("text_attention_mask must have only true and false, or 1 and 0")
    return TextEmbedding(embeds, hidden_states, mask.bool().to(embeds.device))


def check_output_type(output_type: str) -> None:
    """Raises: InputError for an unknown output type."""
    if output_type not in list(FORMS):
        raise InputError(f"output_type is {output_type!r}; it must be one of {', '.join(map(repr, FORMS))}")
