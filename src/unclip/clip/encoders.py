"""Encodes captions and pictures into CLIP's embedding space, with transformers' encoders or unclip's own."""

import re
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from unclip.clip.config import Pixels
from unclip.errors import ConfigError, InputError
from unclip.images import Pictures, as_pictures, rgb
from unclip.limits import described, fits

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection
    from transformers.image_processing_utils import BaseImageProcessor

    from unclip.clip.networks import CLIPImageEncoder, CLIPTextEncoder
    from unclip.clip.preprocessing import PicturePreprocessor
    from unclip.clip.tokenizer import CaptionTokenizer


@dataclass(frozen=True)
class Batched:
    """Base of values whose tensors (and nested values) all have the batch as first dimension.

    A field other than the first may be None; it is None in all values that are joined.
    """

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return getattr(self, fields(self)[0].name).device

    def join(self, *others: Self) -> Self:
        """This value followed by the others, along the batch: null before given, for guidance."""
        joined = {}
        for field in fields(self):
            parts = [getattr(value, field.name) for value in (self, *others)]
            if parts[0] is None:
                joined[field.name] = None
            else:
                joined[field.name] = parts[0].join(*parts[1:]) if isinstance(parts[0], Batched) else torch.cat(parts)
        return type(self)(**joined)

    def repeat(self, count: int) -> Self:
        """Each row `count` times: [a, b] becomes [a, a, b, b] for two pictures per prompt."""
        return self._map(lambda value: value.repeat_interleave(count, dim=0))

    def select(self, rows: Tensor | Sequence[int] | slice) -> Self:
        """The rows with these indices."""
        return self._map(lambda value: value[rows])

    def to(self, device: torch.device | str) -> Self:
        """The same value on a device."""
        return self._map(lambda value: value.to(device))

    def _map(self, function) -> Self:
        def mapped(value):
            if value is None:
                return None
            return value._map(function) if isinstance(value, Batched) else function(value)

        return type(self)(**{field.name: mapped(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class TextEmbedding(Batched):
    """Captions encoded by CLIP's text encoder.

    Attributes:
        embeds: [batch, embedding_dim], the projected embedding.
        hidden_states: [batch, tokens, text_width], the last layer's.
        mask: bool [batch, tokens], true for the caption's own tokens.
    """

    embeds: Tensor
    hidden_states: Tensor
    mask: Tensor


MAX_PROMPT_CHARACTERS = 100_000

_SPECIAL_TOKEN = re.compile(r"<\|(startoftext|endoftext)\|>", re.IGNORECASE | re.ASCII)

# A tokenizer keeps padding and truncation as state between calls, so only one thread at a time may use it.
_tokenizing = threading.Lock()


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text encoder with its tokenizer."""

    text_encoder: "CLIPTextModelWithProjection | CLIPTextEncoder"
    tokenizer: "CLIPTokenizer | CaptionTokenizer"

    def encode(self, prompts: Sequence[str], device: torch.device | str | None = None) -> TextEmbedding:
        """Encode captions, each padded to the whole context. Equal captions are encoded once.

        Args:
            prompts: any text; text that does not fit into the context is cut off, and a warning shows it.
            device: the device of the computation and the result; the encoder's own by default.

        Raises: InputError for a value that is not a string, or has over 100,000 characters.
        """
        for prompt in prompts:
            check_prompt(prompt)
        unique = list(dict.fromkeys(prompts))
        device = device or self.text_encoder.device
        context = self._context()
        texts = [_plain(prompt) for prompt in unique]
        with _tokenizing:
            tokens = self.tokenizer(
                texts, padding="max_length", max_length=context, truncation=True, return_tensors="pt"
            )
            full = tokens["attention_mask"].sum(dim=1) == context
            self._warn_of_cut([text for text, is_full in zip(texts, full.tolist(), strict=True) if is_full], context)
        output = self.text_encoder(tokens["input_ids"].to(device))
        encoded = TextEmbedding(
            output.text_embeds, output.last_hidden_state, tokens["attention_mask"].bool().to(output.text_embeds.device)
        )
        if len(unique) == len(prompts):
            return encoded
        places = {prompt: row for row, prompt in enumerate(unique)}
        return encoded.select([places[prompt] for prompt in prompts])

    def _context(self) -> int:
        return int(min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings))

    def _warn_of_cut(self, texts: Sequence[str], context: int) -> None:
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) > context - 2:
                cut = str(self.tokenizer.decode(ids[context - 2 :]))
                shown = cut if len(cut) <= 200 else cut[:200] + "…"
                warnings.warn(
                    f"the prompt has {len(ids)} tokens, but the text encoder reads {context - 2}; ignored: {shown!r}",
                    stacklevel=4,
                )


@dataclass(frozen=True)
class ImageEncoder:
    """A CLIP image encoder with its preprocessing."""

    image_encoder: "CLIPVisionModelWithProjection | CLIPImageEncoder"
    feature_extractor: "BaseImageProcessor | PicturePreprocessor"

    def check(self) -> None:
        """Raises: ConfigError if the preprocessing's sizes are unusable, or differ from the encoder's."""
        size = self.image_encoder.config.image_size
        made: tuple[object, object] = (size, size)
        for switch, setting in (("do_resize", "size"), ("do_center_crop", "crop_size")):
            if not getattr(self.feature_extractor, switch, False):
                continue
            sides = {key: px for key, px in dict(getattr(self.feature_extractor, setting) or {}).items() if px}
            if sides and not fits(tuple(sides.values()), tuple[Pixels, ...]):
                raise ConfigError(f"feature_extractor.{setting} is {sides}; it must be {described(Pixels)}")
            if "height" in sides:
                made = (sides["height"], sides.get("width"))
        if made != (size, size):
            raise ConfigError(
                f"the components do not fit: feature_extractor makes pictures of {made[0]}×{made[1]} pixels, "
                f"image_encoder takes {size}×{size}"
            )

    def encode(self, images: Pictures | Tensor, device: torch.device | str | None = None) -> Tensor:
        """Image embeddings [batch, embedding_dim], not normalised.

        Args:
            images: pictures as `as_pictures` takes them (of any mode; their EXIF orientation is applied, transparency
                stands on white), or a tensor [batch, 3, height, width] already preprocessed.

        Raises: ImageError for a picture that cannot be used, InputError for something else.
        """
        if isinstance(images, Tensor):
            pixels = self._checked(images if images.ndim == 4 else images[None])
        else:
            pictures = [rgb(picture) for picture in as_pictures(images)]
            prepared = self.feature_extractor(images=pictures, return_tensors="pt")
            pixels = self._checked(prepared["pixel_values"])  # of pictures that are not square it may make others
        pixels = pixels.to(device=device or self.image_encoder.device, dtype=self.image_encoder.dtype)
        return self.image_encoder(pixels).image_embeds

    def _checked(self, pixels: Tensor) -> Tensor:
        size = self.image_encoder.config.image_size
        if pixels.ndim != 4 or len(pixels) < 1 or pixels.shape[1:] != (3, size, size):
            raise InputError(f"an image tensor must be [batch, 3, {size}, {size}]; this one is {tuple(pixels.shape)}")
        if not pixels.is_floating_point() or pixels.is_meta or not pixels.isfinite().all():
            raise InputError(f"an image tensor must have finite floating-point numbers; this one is {pixels.dtype}")
        return pixels


def check_prompt(prompt: object) -> None:
    """Raises: InputError unless `prompt` is a valid string of at most 100,000 characters."""
    if not isinstance(prompt, str):
        raise InputError(f"a prompt must be a string, not {type(prompt).__name__}: {prompt!r:.100}")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise InputError(f"the prompt has {len(prompt):,} characters; at most {MAX_PROMPT_CHARACTERS:,} are read")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        where = f"at {error.start} (a lone surrogate)"
        raise InputError(f"the prompt is not valid Unicode {where}: {prompt!a:.100}") from None


def _plain(prompt: str) -> str:
    """The prompt with special tokens split, so that "<|endoftext|>" in a prompt does not end it early.

    Capital letters are included: some tokenizers search for special tokens after conversion to lower case.
    """
    return _SPECIAL_TOKEN.sub(r"< |\1| >", prompt)
