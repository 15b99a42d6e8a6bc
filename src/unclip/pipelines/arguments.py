"""The checks and small conversions of a call's arguments, shared by the pipelines.

Knows limits and messages; knows no component. Called at the start of every pipeline call.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unclip.clip.encoders import TextEmbedding, check_prompt
from unclip.diffusion.loop import NoiseSource, OnStep, StepInfo, generators_from_seed
from unclip.errors import Cancelled, InputError, NonFiniteError
from unclip.images import to_numpy, to_pil, to_unit
from unclip.numbers import whole

MAX_PICTURES = 1000
MAX_CANDIDATES = 1000

Callback = Callable[[Any, int, int, dict[str, Any]], Mapping[str, Any] | None]
"""(pipeline, step, timestep, {"stage", "num_steps", "latents", "x0"}) → None, or {"latents": …}, or {"stop": True}."""


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


def check_count(count: object, num_prompts: int, name: str = "num_images_per_prompt") -> int:
    """`count`, of each prompt, as an int.

    Raises: InputError unless it is a whole number, and there are between 1 and 1000 pictures in all.
    """
    number = whole(count, name, 1, MAX_PICTURES)
    if not 1 <= (total := number * num_prompts) <= MAX_PICTURES:
        raise InputError(f"this call asks for {total} pictures; between 1 and {MAX_PICTURES} are made at once")
    return number


def check_candidates(num_prior_candidates: object) -> int:
    """The number of candidates as an int. Raises: InputError unless it is a whole number from 1 to 1000."""
    return whole(num_prior_candidates, "num_prior_candidates", 1, MAX_CANDIDATES)


def noise_source(
    generator: torch.Generator | Sequence[torch.Generator] | None, seed: int | Sequence[int] | None, batch_size: int
) -> NoiseSource:
    """Where a call's randomness comes from: a generator in the reference's order, or a seed a picture.

    Raises: InputError when both are given, or their number is not the number of pictures.
    """
    if seed is None:
        return NoiseSource(generator, batch_size)
    if generator is not None:
        raise InputError("give seed or generator, not both: they say the same thing in two ways")
    return NoiseSource(generators_from_seed(seed, batch_size), batch_size)


def check_tensor(tensor: object, name: str) -> None:
    """Raises: InputError unless it is a finite floating-point tensor that has values."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = getattr(tensor, "dtype", type(tensor).__name__)
        raise InputError(f"{name} must be a floating-point tensor, not {found}")
    if tensor.is_meta:
        raise InputError(f"{name} lies on the meta device, where tensors have no values")
    if not tensor.isfinite().all():
        raise InputError(f"{name} holds NaN or infinity")


def check_latents(latents: Tensor | None, name: str, shape: tuple[int, ...]) -> None:
    """Raises: InputError for given noise that is no finite floating-point tensor of that shape."""
    if latents is None:
        return
    check_tensor(latents, name)
    if tuple(latents.shape) != shape:
        raise InputError(f"{name} have shape {tuple(latents.shape)}; this call needs {shape}")


def check_embeddings(image_embeddings: Tensor, width: int) -> None:
    """Raises: InputError unless it is a finite floating tensor [batch, width]."""
    check_tensor(image_embeddings, "image_embeddings")
    if image_embeddings.ndim != 2 or image_embeddings.shape[1] != width or len(image_embeddings) < 1:
        raise InputError(f"image_embeddings have shape {tuple(image_embeddings.shape)}; they must be [batch, {width}]")


def given_text(output: Any, mask: Tensor | None, *, width: int | None, tokens: int, text_width: int) -> TextEmbedding:
    """A caption's embedding that the caller computed.

    Args:
        output: CLIPTextModelOutput, or (text_embeds [batch, width], last_hidden_state [batch, tokens, text_width]).
        mask: [batch, tokens].

    Raises: InputError when the mask is missing, or a shape is another.
    """
    if not isinstance(mask, Tensor):
        raise InputError("text_model_output needs text_attention_mask, a tensor that says which of its tokens count")
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
        raise InputError("text_attention_mask must hold true and false, or 1 and 0, alone")
    return TextEmbedding(embeds, hidden_states, mask.bool().to(embeds.device))


def on_step(pipeline: Any, stage: str, callback: Callback | None) -> OnStep | None:
    """The loop's hook that tells a user's callback of each step of one stage.

    Raises (in the loop): Cancelled when the callback answers {"stop": True}.
    """
    if callback is None:
        return None
    if not callable(callback):
        raise InputError(f"callback_on_step_end must be a function, not {type(callback).__name__}")

    def tell(step: StepInfo) -> Tensor | None:
        about = {"stage": stage, "num_steps": step.num_steps, "latents": step.x, "x0": step.x0}
        answer = callback(pipeline, step.index, step.t, about)
        if answer is None:
            return None
        if not isinstance(answer, Mapping) or not answer.keys() <= {*about, "stop"}:
            raise InputError(
                f"the callback returned {answer!r:.100}; it may return None, or a dict with 'latents' or 'stop'"
            )
        if answer.get("stop"):
            raise Cancelled(
                f"the callback stopped the run in stage {stage!r} after step {step.index + 1} of {step.num_steps}"
            )
        return answer.get("latents")

    return tell


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
