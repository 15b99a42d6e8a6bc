"""The U-Net of Kandinsky's decoders: the decoder's network, with the projection of its embeddings.

Source: Razzhigaev et al. 2310.03502. Files have the keys of diffusers' UNet2DConditionModel with an
`encoder_hid_dim_type` of "image_proj" (Kandinsky 2.2) or "text_image_proj" (2.1).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from unclip.errors import InputError
from unclip.models.component import WideWidth, check_shape
from unclip.models.entry import entry_point, routes_entry_points
from unclip.models.kernels import Linear
from unclip.models.unet import DeepOutput, UNet2DConditionModel, UNet2DConditionOutput, UNetContext
from unclip.models.unet_config import UNet2DConditionConfig

NUM_IMAGE_TOKENS = {"image_proj": 32, "text_image_proj": 10}
"""Context tokens that are made of the image embedding, in Kandinsky 2.2 and 2.1."""
_PAIRS = {"image_proj": "image", "text_image_proj": "text_image"}


@dataclass(frozen=True, eq=False)
class KandinskyUNetConfig(UNet2DConditionConfig):
    """Settings of `KandinskyUNet`, with the keys of diffusers.

    `encoder_hid_dim` is the width of the image embedding with "image_proj", and of the text's hidden states with
    "text_image_proj", where image and text embeddings have the width `cross_attention_dim`.
    """

    encoder_hid_dim: WideWidth = None  # pyright: ignore[reportAssignmentType]
    encoder_hid_dim_type: Literal["image_proj", "text_image_proj"] = None  # pyright: ignore[reportAssignmentType]
    addition_embed_type: Literal["image", "text_image"] = None  # pyright: ignore[reportAssignmentType]

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        name: values
        for name, values in UNet2DConditionConfig.NEUTRAL.items()
        if name not in ("encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type")
    }

    @property
    def adds_class_labels(self) -> bool:
        return True

    @property
    def has_text(self) -> bool:
        """Whether the decoder sees the text too, as in Kandinsky 2.1."""
        return self.encoder_hid_dim_type == "text_image_proj"

    @property
    def image_embedding_dim(self) -> int:
        """Width of the image embedding."""
        return self.cross_attention_dim if self.has_text else self.encoder_hid_dim

    def check(self) -> None:
        super().check()
        wanted = _PAIRS[self.encoder_hid_dim_type]
        found = f"addition_embed_type is {self.addition_embed_type!r} and encoder_hid_dim_type"
        self.require(
            self.addition_embed_type == wanted,
            f"{found} {self.encoder_hid_dim_type!r}; addition_embed_type must be {wanted!r}",
        )
        self.require(self.class_embed_type is None, f"class_embed_type is {self.class_embed_type!r}; it must be None")


class _Tokens(nn.Module):
    """The context tokens: those of the image embedding, and in 2.1 the projected text."""

    def __init__(self, config: KandinskyUNetConfig) -> None:
        super().__init__()
        width = config.cross_attention_dim
        self.num_tokens = NUM_IMAGE_TOKENS[config.encoder_hid_dim_type]
        self.image_embeds = Linear(config.image_embedding_dim, self.num_tokens * width)
        self.norm = None if config.has_text else nn.LayerNorm(width)
        self.text_proj = Linear(config.encoder_hid_dim, width) if config.has_text else None

    def forward(self, image: Tensor, text_states: Tensor | None) -> Tensor:
        tokens = self.image_embeds(image).unflatten(-1, (self.num_tokens, -1))
        tokens = tokens if self.norm is None else self.norm(tokens)
        return tokens if self.text_proj is None else torch.cat([tokens, self.text_proj(text_states)], dim=1)


class _Addition(nn.Module):
    """What is added to the time embedding: the projected image embedding, and in 2.1 that of the text."""

    def __init__(self, config: KandinskyUNetConfig) -> None:
        super().__init__()
        width = config.embedding_width
        self.image_proj = Linear(config.image_embedding_dim, width)
        if config.has_text:
            self.text_proj = Linear(config.cross_attention_dim, width)
            self.text_norm = nn.LayerNorm(width)
        else:
            self.image_norm = nn.LayerNorm(width)
        self.has_text = config.has_text

    def forward(self, image: Tensor, text: Tensor | None) -> Tensor:
        added = self.image_proj(image)
        return added + self.text_norm(self.text_proj(text)) if self.has_text else self.image_norm(added)


class KandinskyUNet(UNet2DConditionModel):
    """`UNet2DConditionModel` with Kandinsky's projection of the embeddings, in one file as diffusers has it.

    `UNet2DConditionModel.from_pretrained` of such a folder returns this class.
    """

    config_class: ClassVar = KandinskyUNetConfig
    saved_as: ClassVar[str] = "UNet2DConditionModel"
    projections: ClassVar[tuple[str, ...]] = ("image_proj", "text_image_proj")
    config: KandinskyUNetConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def build(self, config: KandinskyUNetConfig) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().build(config)
        self.encoder_hid_proj = _Tokens(config)
        self.add_embedding = _Addition(config)

    def _project(
        self, image_embeds: Tensor, text_states: Tensor | None = None, text_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The context tokens, and the embedding that is added to the time embedding.

        Args:
            image_embeds: [batch, image_embedding_dim], not whitened.
            text_states: the text's hidden states [batch, tokens, encoder_hid_dim]; only for Kandinsky 2.1.
            text_embeds: the text's embedding [batch, cross_attention_dim]; only for Kandinsky 2.1.

        Returns:
            [batch, tokens, cross_attention_dim] and [batch, time embedding width].

        Raises:
            InputError: a shape is wrong, or the text is missing.
        """
        config = self.config
        check_shape("image_embeds", image_embeds, "batch", config.image_embedding_dim)
        if config.has_text:
            if text_states is None or text_embeds is None:
                raise InputError("this decoder needs the text's hidden states and embedding")
            check_shape("the text's hidden states", text_states, len(image_embeds), "tokens", config.encoder_hid_dim)
            check_shape("text_embeds", text_embeds, len(image_embeds), config.cross_attention_dim)
        return self.encoder_hid_proj(image_embeds, text_states), self.add_embedding(image_embeds, text_embeds)

    project = entry_point(_project)

    @routes_entry_points
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        *,
        context: UNetContext | None = None,
        deep: Tensor | None = None,
        keep_deep: bool = False,
        added_cond_kwargs: dict[str, Any] | None = None,
    ) -> UNet2DConditionOutput | DeepOutput | tuple[Tensor]:
        """One step's raw output [batch, out_channels, height, width].

        Args:
            sample, timestep, return_dict, context, deep, keep_deep: as in `UNet2DConditionModel`.
            encoder_hidden_states: with `added_cond_kwargs`, the text's hidden states (2.1) or None (2.2).
            class_labels: with `context`, the addition from `project`.
            attention_mask, encoder_attention_mask: as in `UNet2DConditionModel`; Kandinsky's pipelines use none.
            added_cond_kwargs: diffusers' form of the embeddings: `image_embeds`, and `text_embeds` in 2.1.

        Raises:
            InputError: a shape is wrong, or an embedding is missing.
        """
        if added_cond_kwargs is not None:
            image_embeds, text_embeds = (added_cond_kwargs.get(name) for name in ("image_embeds", "text_embeds"))
            if image_embeds is None:
                raise InputError("added_cond_kwargs needs image_embeds, [batch, image_embedding_dim]")
            encoder_hidden_states, class_labels = self._project(image_embeds, encoder_hidden_states, text_embeds)
        return super().forward(
            sample,
            timestep,
            encoder_hidden_states,
            class_labels,
            attention_mask,
            encoder_attention_mask,
            return_dict,
            context=context,
            deep=deep,
            keep_deep=keep_deep,
        )
