"""Projects text and image embeddings into the decoder's context tokens and time embedding."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
from torch import Tensor, nn

from unclip.limits import Range
from unclip.models.component import Component, ModelConfig, WideWidth, Width, check_shape
from unclip.models.kernels import Linear


@dataclass(frozen=True, eq=False, kw_only=True)
class UnCLIPTextProjConfig(ModelConfig):
    """Settings of `UnCLIPTextProjModel`, with the keys and defaults of diffusers."""

    clip_extra_context_tokens: Annotated[int, Range(1, 1024)] = 4
    clip_embeddings_dim: Width = 768
    time_embed_dim: WideWidth
    cross_attention_dim: Width

    def approximate_parameters(self) -> int:
        tokens = self.clip_extra_context_tokens + 1
        return self.clip_embeddings_dim * (2 * self.time_embed_dim + tokens * self.cross_attention_dim)


class UnCLIPTextProjModel(Component[UnCLIPTextProjConfig]):
    """Projects CLIP's embeddings into the decoder's context and time embedding.

    Source: arXiv 2204.06125 §2.1: "projecting and adding CLIP embeddings to the existing timestep embedding", and
    "into four extra tokens of context".
    """

    config_class: ClassVar = UnCLIPTextProjConfig

    def build(self, config: UnCLIPTextProjConfig) -> None:
        width, context_width = config.clip_embeddings_dim, config.cross_attention_dim
        self.learned_classifier_free_guidance_embeddings = nn.Parameter(torch.zeros(width))
        self.embedding_proj = Linear(width, config.time_embed_dim)
        self.clip_image_embeddings_project_to_time_embeddings = Linear(width, config.time_embed_dim)
        self.clip_extra_context_tokens_proj = Linear(width, config.clip_extra_context_tokens * context_width)
        self.encoder_hidden_states_proj = Linear(width, context_width)
        self.text_encoder_hidden_states_norm = nn.LayerNorm(context_width)

    def initialize_for_training(self, generator: torch.Generator | None = None) -> Self:
        """Initialize as `Component` does, with the embedding for "no image" at zero."""
        super().initialize_for_training(generator)
        nn.init.zeros_(self.learned_classifier_free_guidance_embeddings)
        return self

    def forward(
        self,
        *,
        image_embeddings: Tensor,
        prompt_embeds: Tensor,
        text_encoder_hidden_states: Tensor,
        do_classifier_free_guidance: bool = False,
        given: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The decoder's context tokens, and the embedding that is added to its time embedding.

        Args:
            image_embeddings: [batch, clip_embeddings_dim], not whitened.
            prompt_embeds: the texts' embeddings [batch, clip_embeddings_dim].
            text_encoder_hidden_states: the texts' tokens [batch, tokens, clip_embeddings_dim].
            do_classifier_free_guidance: the texts are [null; given], twice as many as the images. The images are
                repeated, and the first half is replaced by the learned embedding for "no image". `given` is ignored.
            given: bool [batch]. In rows with False, the learned embedding for "no image" replaces the image embedding.
                None keeps all.

        Returns:
            [batch, clip_extra_context_tokens + tokens, cross_attention_dim] and [batch, time_embed_dim].

        Raises:
            InputError: a shape is wrong.
        """
        if do_classifier_free_guidance:
            given = torch.arange(2 * len(image_embeddings), device=image_embeddings.device) >= len(image_embeddings)
            image_embeddings = torch.cat([image_embeddings, image_embeddings])
        width = self.config.clip_embeddings_dim
        check_shape("image_embeddings", image_embeddings, "batch", width)
        check_shape("prompt_embeds", prompt_embeds, len(image_embeddings), width)
        check_shape("text_encoder_hidden_states", text_encoder_hidden_states, len(image_embeddings), "tokens", width)
        if given is not None:
            check_shape("given", given, len(image_embeddings))
            absent = self.learned_classifier_free_guidance_embeddings.to(image_embeddings.dtype)
            image_embeddings = torch.where(given.bool()[:, None], image_embeddings, absent)

        addition = self.clip_image_embeddings_project_to_time_embeddings(image_embeddings)
        addition = addition + self.embedding_proj(prompt_embeds)
        # In Karlo's weights, the tokens are interleaved: the token index varies fastest.
        extra = self.clip_extra_context_tokens_proj(image_embeddings)
        extra = extra.unflatten(-1, (-1, self.config.clip_extra_context_tokens)).transpose(1, 2)
        text = self.text_encoder_hidden_states_norm(self.encoder_hidden_states_proj(text_encoder_hidden_states))
        return torch.cat([extra, text.to(extra.dtype)], dim=1), addition
