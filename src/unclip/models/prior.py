"""The diffusion prior: a transformer that predicts an image embedding from a text's encoding."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.errors import InputError
from unclip.limits import Range, Share
from unclip.models.component import Component, Depth, ModelConfig, WideWidth, Width, check_rows, check_shape
from unclip.models.entry import entry_point, routes_entry_points
from unclip.models.kernels import Linear
from unclip.models.layers import (
    MASKED,
    Activation,
    KeyValue,
    PriorBlock,
    TimestepEmbedding,
    initialize_blocks,
    mask_bias,
    sinusoidal_embedding,
    timestep_rows,
)


@dataclass(frozen=True, eq=False)
class PriorConfig(ModelConfig):
    """Settings of `PriorTransformer`, with the keys and defaults of diffusers.

    The tokens are num_embeddings of the text, then additional_embeddings: the text's embedding, the timestep,
    the noised image embedding and, if added_emb_type is "prd", the query whose output is the prediction.

    If the token of the timestep is missing in this count, the network is one of ECLIPSE (arXiv 2312.04655): it makes an
    embedding of noise in one call, and has no time embedding.
    """

    num_attention_heads: Width = 32
    attention_head_dim: Width = 64
    num_layers: Depth = 20
    embedding_dim: Width = 768
    num_embeddings: Width = 77
    additional_embeddings: Annotated[int, Range(0, 1024)] = 4
    dropout: Share = 0.0
    time_embed_act_fn: Activation = "silu"
    norm_in_type: Literal["layer"] | None = None
    embedding_proj_norm_type: Literal["layer"] | None = None
    encoder_hid_proj_type: Literal["linear"] | None = "linear"
    added_emb_type: Literal["prd"] | None = "prd"
    time_embed_dim: WideWidth | None = None
    embedding_proj_dim: WideWidth | None = None
    clip_embed_dim: WideWidth | None = None

    @property
    def width(self) -> int:
        """Width of a token inside the transformer."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def summary_width(self) -> int:
        """Width of the text embedding in the input."""
        return self.embedding_proj_dim or self.embedding_dim

    @property
    def takes_timestep(self) -> bool:
        """Whether it denoises step by step; a prior of ECLIPSE makes the embedding in one call."""
        counts = (self.added_emb_type, self.encoder_hid_proj_type, self.additional_embeddings)
        return counts != ("prd", "linear", 3)

    @property
    def text_width(self) -> int:
        """Width of the text's tokens in the input."""
        return self.embedding_dim if self.encoder_hid_proj_type else self.width

    @property
    def output_width(self) -> int:
        """Width of the predicted embedding."""
        return self.clip_embed_dim or self.embedding_dim

    def check(self) -> None:
        width = f"num_attention_heads × attention_head_dim is {self.width}; it must be from 2 to 65536"
        self.require(2 <= self.width <= 65_536, width)

    def approximate_parameters(self) -> int:
        return self.num_layers * 12 * self.width**2


class PriorTransformerOutput(NamedTuple):
    """Output of `PriorTransformer`: `predicted_image_embedding` [batch, clip_embed_dim]."""

    predicted_image_embedding: Tensor


@dataclass(frozen=True)
class PriorPrefix:
    """What the tokens before the timestep contribute to every step.

    `layers` are their keys and values in each layer. `bias` is added to the scores of the tokens that follow:
    [batch, 1, following tokens, all tokens].
    """

    layers: tuple[KeyValue, ...]
    bias: Tensor


class PriorTransformer(Component[PriorConfig]):
    """A causal transformer over the text, its embedding, the timestep and the noised image embedding.

    Source: arXiv 2204.06125 §2.2 ("diffusion prior"). It predicts the embedding itself, not the noise.

    The network works on embeddings that `whiten` normalised by `clip_mean` and `clip_std` [1, clip_embed_dim].
    """

    config_class: ClassVar = PriorConfig

    def build(self, config: PriorConfig) -> None:
        width = config.width
        if config.takes_timestep:
            self.time_embedding = TimestepEmbedding(
                width, config.time_embed_dim or width, width, act_fn=config.time_embed_act_fn
            )
        self.proj_in = Linear(config.embedding_dim, width)
        self.embedding_proj_norm = nn.LayerNorm(config.summary_width) if config.embedding_proj_norm_type else None
        self.embedding_proj = Linear(config.summary_width, width)
        self.encoder_hidden_states_proj = Linear(config.embedding_dim, width) if config.encoder_hid_proj_type else None
        num_tokens = config.num_embeddings + config.additional_embeddings
        self.positional_embedding = nn.Parameter(torch.zeros(1, num_tokens, width))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, width)) if config.added_emb_type else None
        self.transformer_blocks = nn.ModuleList(
            [PriorBlock(width, config.attention_head_dim, config.dropout) for _ in range(config.num_layers)]
        )
        self.norm_in = nn.LayerNorm(width) if config.norm_in_type else None
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = Linear(width, config.output_width)
        # Statistics of the data: they are in the state dict, but are not trained.
        self.clip_mean = nn.Parameter(torch.zeros(1, config.output_width), requires_grad=False)
        self.clip_std = nn.Parameter(torch.ones(1, config.output_width), requires_grad=False)

    def initialize_for_training(self, generator: torch.Generator | None = None) -> Self:
        """Initialize as `Component` does, with small random positions, and branches scaled down by the depth.

        `clip_mean` and `clip_std` are set to 0 and 1; replace them by those of the data.
        """
        super().initialize_for_training(generator)
        nn.init.normal_(self.positional_embedding, std=0.01, generator=generator)
        if self.prd_embedding is not None:
            nn.init.normal_(self.prd_embedding, std=0.01, generator=generator)
        initialize_blocks(self.transformer_blocks)
        nn.init.zeros_(self.clip_mean)
        nn.init.ones_(self.clip_std)
        return self

    # The tokens, in their order

    def _text_tokens(self, proj_embedding: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
        """[batch, text tokens + 1, width], without positions."""
        check_shape("proj_embedding", proj_embedding, *_leading(proj_embedding), self.config.summary_width)
        if self.embedding_proj_norm is not None:
            proj_embedding = self.embedding_proj_norm(proj_embedding)
        summary = self.embedding_proj(proj_embedding)
        summary = summary[:, None] if summary.dim() == 2 else summary
        if encoder_hidden_states is None:
            if self.encoder_hidden_states_proj is not None:
                raise InputError('encoder_hid_proj_type is "linear": encoder_hidden_states must be given')
            return summary
        text = encoder_hidden_states
        check_shape("encoder_hidden_states", text, "batch", "tokens", self.config.text_width)
        check_rows(proj_embedding=proj_embedding, encoder_hidden_states=text)
        if self.encoder_hidden_states_proj is not None:
            text = self.encoder_hidden_states_proj(text)
        return torch.cat([text, summary], dim=1)

    def _step_tokens(self, hidden_states: Tensor, timestep: Tensor | float) -> Tensor:
        """[batch, timestep + image tokens + queries, width], without positions."""
        check_shape("hidden_states", hidden_states, *_leading(hidden_states), self.config.embedding_dim)
        batch, image = len(hidden_states), self.proj_in(hidden_states)
        tokens = [image[:, None] if image.dim() == 2 else image]
        if self.config.takes_timestep:
            rows = timestep_rows(timestep, hidden_states)
            time = self.time_embedding(sinusoidal_embedding(rows, self.config.width).to(self.dtype))
            tokens.insert(0, time.to(image.dtype).expand(batch, -1)[:, None])
        if self.prd_embedding is not None:
            tokens.append(self.prd_embedding.to(image.dtype).expand(batch, -1, -1))
        return torch.cat(tokens, dim=1)

    def _placed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        tokens = tokens + positions.to(tokens.dtype)
        return tokens if self.norm_in is None else self.norm_in(tokens)

    def _read_out(self, tokens: Tensor) -> Tensor:
        output = self.proj_to_clip_embeddings(self.norm_out(tokens))
        return output if self.prd_embedding is None else output[:, 0]

    @property
    def _num_queries(self) -> int:
        return 0 if self.prd_embedding is None else 1

    # Prepare once, step many

    def _read_text(
        self, proj_embedding: Tensor, encoder_hidden_states: Tensor | None, attention_mask: Tensor
    ) -> PriorPrefix:
        """What the text contributes to every step. As attention is causal, it does not depend on later tokens.

        Args:
            proj_embedding: the text's embedding [batch, embedding_dim].
            encoder_hidden_states: the text's tokens [batch, num_embeddings, embedding_dim]. Tokens at the end that are
                masked in every row may be omitted: the result is the same, and takes less time.
            attention_mask: [batch, tokens], true or 1 for the text's own tokens.

        Raises:
            InputError: a shape is wrong.
        """
        prefix = self._text_tokens(proj_embedding, encoder_hidden_states)
        (batch, length), most = prefix.shape[:2], self.config.num_embeddings
        num_text = min(length - 1, most) or most
        check_shape("attention_mask", attention_mask, batch, num_text)
        left_out = most - num_text
        num_tokens = self.positional_embedding.shape[1] - left_out
        following = 1 + self.config.takes_timestep + self._num_queries
        if length != num_text + 1 or num_tokens < length + following:
            raise InputError(
                f"there are {length} tokens before the image embedding's; the network has {num_tokens} positions in all"
            )
        seen = F.pad(attention_mask.to(prefix.dtype), (0, num_tokens - attention_mask.shape[1]), value=1.0)
        causal = torch.full((num_tokens, num_tokens), MASKED, dtype=prefix.dtype, device=prefix.device).triu_(1)
        bias = mask_bias(seen, prefix.dtype) + causal

        positions = self.positional_embedding[:, : most + 1]
        if left_out:  # the text embedding keeps its position
            positions = torch.cat([positions[:, :num_text], positions[:, most:]], dim=1)
        tokens = self._placed(prefix, positions)
        own_bias = bias[:, :, :length, :length]
        layers = []
        for block in self.transformer_blocks[:-1]:
            tokens, memory = block(tokens, own_bias)
            layers.append(memory)
        # The output of these tokens is not used, so the last layer computes only keys and values.
        layers.append(self.transformer_blocks[-1].prepare(tokens))  # pyright: ignore[reportCallIssue]
        return PriorPrefix(tuple(layers), bias[:, :, length:])

    prepare = entry_point(_read_text)

    def _denoise(self, hidden_states: Tensor, timestep: Tensor | float, prefix: PriorPrefix) -> Tensor:
        step = self._step_tokens(hidden_states, timestep)
        expected = prefix.bias.shape[2]
        if step.shape[1] != expected:
            raise InputError(f"{step.shape[1]} tokens follow the text; additional_embeddings allows {expected}")
        check_rows(hidden_states=step, prefix=prefix.bias)
        tokens = self._placed(step, self.positional_embedding[:, -expected:])
        last = len(self.transformer_blocks) - 1
        for i, (block, memory) in enumerate(zip(self.transformer_blocks, prefix.layers, strict=True)):
            first_read = 0 if i < last else (expected - 1 if self._num_queries else 1)
            tokens, _ = block(tokens, prefix.bias, before=memory, first_read=first_read)
        return self._read_out(tokens)

    @routes_entry_points
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        proj_embedding: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = True,
        *,
        prefix: PriorPrefix | None = None,
    ) -> PriorTransformerOutput | tuple[Tensor]:
        """The predicted embedding [batch, clip_embed_dim]; [batch, n, clip_embed_dim] without a "prd" query.

        Args:
            hidden_states: the noised image embedding [batch, embedding_dim], or n of them [batch, n, embedding_dim].
            timestep: a number, or a tensor [] or [batch]. A network without a time embedding ignores it.
            proj_embedding, encoder_hidden_states, attention_mask: the text, as for `prepare`. Without a mask,
                every token attends to every other one, as in diffusers' class.
            return_dict: whether the result is a `PriorTransformerOutput` or a plain tuple.
            prefix: the result of `prepare` for the same batch, instead of the text.

        Raises:
            InputError: a shape is wrong, or not exactly one of text and prefix is given.
        """
        if (prefix is None) == (proj_embedding is None):
            raise InputError("give either proj_embedding, or the prefix from prepare()")
        if proj_embedding is not None and attention_mask is not None:
            prefix = self._read_text(proj_embedding, encoder_hidden_states, attention_mask)
        if prefix is not None:
            output = self._denoise(hidden_states, timestep, prefix)
        else:
            assert proj_embedding is not None
            output = self._bidirectional(hidden_states, timestep, proj_embedding, encoder_hidden_states)
        return PriorTransformerOutput(output) if return_dict else (output,)

    def _bidirectional(
        self, hidden_states: Tensor, timestep: Tensor | float, proj_embedding: Tensor, text: Tensor | None
    ) -> Tensor:
        before, step = self._text_tokens(proj_embedding, text), self._step_tokens(hidden_states, timestep)
        check_rows(hidden_states=step, proj_embedding=before)
        length, num_tokens = before.shape[1], before.shape[1] + step.shape[1]
        positions = self.positional_embedding
        if positions.shape[1] < num_tokens:  # then only the image's tokens have positions
            positions = F.pad(positions, (0, 0, length + 1, self._num_queries))
        if positions.shape[1] != num_tokens:
            raise InputError(f"there are {num_tokens} tokens for {positions.shape[1]} positions")
        tokens = self._placed(torch.cat([before, step], dim=1), positions)
        for block in self.transformer_blocks:
            tokens, _ = block(tokens, None)
        return self._read_out(tokens[:, -1:] if self._num_queries else tokens[:, length + 1 :])

    # Whitened and plain embeddings

    @entry_point
    def post_process_latents(self, prior_latents: Tensor) -> Tensor:
        """Undo `whiten`: multiply by `clip_std` and add `clip_mean`; [batch, clip_embed_dim]."""
        return prior_latents * self.clip_std + self.clip_mean

    @entry_point
    def whiten(self, image_embedding: Tensor) -> Tensor:
        """Whiten CLIP embeddings [batch, clip_embed_dim]: subtract `clip_mean` and divide by `clip_std`."""
        return (image_embedding - self.clip_mean) / self.clip_std


def _leading(tensor: Tensor) -> tuple[str, ...]:
    """The names of the dimensions before the last one."""
    return ("batch", "tokens") if tensor.dim() > 2 else ("batch",)
