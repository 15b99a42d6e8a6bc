"""What a stage is conditioned on, as small frozen values that join, repeat and select.

Knows tensors' batches only; knows no network. Built by pipelines and by training alike, so the two cannot drift apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batched:
    """A value whose tensors (and nested values) all have the batch as their first dimension."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return getattr(self, fields(self)[0].name).device

    def join(self, *others: Self) -> Self:
        """This value followed by the others, along the batch: null before given, for guidance."""
        joined = {}
        for field in fields(self):
            parts = [getattr(value, field.name) for value in (self, *others)]
            joined[field.name] = parts[0].join(*parts[1:]) if isinstance(parts[0], Batched) else torch.cat(parts)
        return type(self)(**joined)

    def repeat(self, count: int) -> Self:
        """Every row `count` times in a row: [a, b] becomes [a, a, b, b] for two pictures a prompt."""
        return self._map(lambda value: value.repeat_interleave(count, dim=0))

    def select(self, rows: Tensor | Sequence[int] | slice) -> Self:
        """The rows of these indices."""
        return self._map(lambda value: value[rows])

    def to(self, device: torch.device | str) -> Self:
        """The same value on a device."""
        return self._map(lambda value: value.to(device))

    def _map(self, function) -> Self:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return type(self)(**{n: v._map(function) if isinstance(v, Batched) else function(v) for n, v in values})


@dataclass(frozen=True)
class TextEmbedding(Batched):
    """A caption as CLIP's text encoder sees it.

    Attributes:
        embeds: [batch, embedding_dim], the projected embedding.
        hidden_states: [batch, tokens, text_width], the last layer's.
        mask: bool [batch, tokens], true for the caption's own tokens.
    """

    embeds: Tensor
    hidden_states: Tensor
    mask: Tensor


@dataclass(frozen=True)
class PriorCondition(Batched):
    """What the prior needs: the caption."""

    text: TextEmbedding


@dataclass(frozen=True)
class DecoderCondition(Batched):
    """What the decoder needs: the caption and the image embedding.

    Attributes:
        text: the caption's embedding.
        image_embedding: [batch, embedding_dim], not whitened.
        given: bool [batch]; where false, the learned null embedding stands in for the image embedding.
    """

    text: TextEmbedding
    image_embedding: Tensor
    given: Tensor

    @classmethod
    def of(cls, text: TextEmbedding, image_embedding: Tensor) -> Self:
        """The condition of given embeddings."""
        given = torch.ones(len(image_embedding), dtype=torch.bool, device=image_embedding.device)
        return cls(text, image_embedding, given)

    @classmethod
    def null(cls, text: TextEmbedding) -> Self:
        """The condition that guidance pushes away from: an empty (or negative) caption and no image embedding."""
        nothing = torch.zeros_like(text.embeds)
        return cls(text, nothing, torch.zeros(len(nothing), dtype=torch.bool, device=nothing.device))


@dataclass(frozen=True)
class SuperResCondition(Batched):
    """What super-resolution needs: the small picture, float [batch, 3, height, width] in [-1, 1]."""

    low_res: Tensor
