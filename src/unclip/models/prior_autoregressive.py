"""The autoregressive prior: it predicts an image embedding from a text's encoding, as a sequence of codes."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.errors import ConfigError, InputError
from unclip.limits import Range, Share
from unclip.models.component import Component, Depth, ModelConfig, Width, check_rows, check_shape
from unclip.models.entry import entry_point, routes_entry_points
from unclip.models.kernels import Embedding, Linear
from unclip.models.layers import MASKED, KeyValue, PriorBlock, initialize_blocks, mask_bias
from unclip.models.pca import PrincipalComponents

MAX_TOKENS = 16_384
SMALLEST_RANGE = 1e-12
Buckets = Annotated[int, Range(2, 65_536)]
SMALLEST_VARIANCE = 1e-10
"""Share of the largest variance; smaller values are rounding errors."""


@dataclass(frozen=True, eq=False)
class AutoregressivePriorConfig(ModelConfig):
    """Settings of `AutoregressivePrior`. The default numbers of components and buckets are those of arXiv 2204.06125.

    The tokens are, in order: `num_embeddings` of the text, each `text_dim` wide (by default `embedding_dim`); the text
    embedding; the bucket of its dot product with the image embedding, one of `num_dot_buckets`; and one code for each
    of `num_components` principal components, one of `num_buckets`.
    """

    num_attention_heads: Width = 32
    attention_head_dim: Width = 64
    num_layers: Depth = 20
    embedding_dim: Width = 1024
    text_dim: Width | None = None
    num_embeddings: Width = 77
    num_components: Width = 319
    num_buckets: Buckets = 1024
    num_dot_buckets: Buckets = 1024
    dropout: Share = 0.0

    @property
    def width(self) -> int:
        """Width of a token inside the transformer."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def text_width(self) -> int:
        """Width of the text's tokens in the input."""
        return self.text_dim or self.embedding_dim

    @property
    def prefix_length(self) -> int:
        """Number of tokens before the first code."""
        return self.num_embeddings + 2

    @property
    def num_tokens(self) -> int:
        """Number of input tokens; the last code is only predicted."""
        return self.prefix_length + self.num_components - 1

    def check(self) -> None:
        width = f"num_attention_heads × attention_head_dim is {self.width}; it must be from 2 to 65536"
        self.require(2 <= self.width <= 65_536, width)
        components = f"num_components is {self.num_components}; it must be at most embedding_dim, {self.embedding_dim}"
        self.require(self.num_components <= self.embedding_dim, components)
        self.require(
            self.num_tokens <= MAX_TOKENS, f"it has {self.num_tokens} tokens; at most {MAX_TOKENS} tokens work"
        )

    def approximate_parameters(self) -> int:
        tables = 2 * self.num_buckets + self.num_dot_buckets + self.num_tokens + self.embedding_dim + self.text_width
        return self.num_layers * 12 * self.width**2 + tables * self.width


@dataclass(frozen=True)
class CodeMemory:
    """What the tokens so far contribute to the next code.

    `layers` are their keys and values in each layer. `bias` [batch, 1, 1, tokens] is added to their scores. `num_codes`
    is the number of codes among them.
    """

    layers: tuple[KeyValue, ...]
    bias: Tensor
    num_codes: int


class AutoregressivePrior(Component[AutoregressivePriorConfig]):
    """A causal transformer over the text, its embedding, their dot product with the image, and the image's codes.

    Source: arXiv 2204.06125 §2.2 ("autoregressive prior"). An image embedding is projected to its principal
    components, the one of the largest variance first. The range of each coordinate in the training data is divided into
    `num_buckets` buckets of equal width, and the code is the number of the bucket.

    The dot product is that of normalised embeddings, because CLIP was trained to compare directions. Its buckets are
    quantiles of the training data. One further token means that the dot product is unknown.

    `fit_codes` sets the tables: `pca_mean` [1, embedding_dim], `pca_components` [num_components, embedding_dim],
    `code_low` and `code_high` [num_components], `dot_edges` [num_dot_buckets − 1].
    """

    config_class: ClassVar = AutoregressivePriorConfig

    def build(self, config: AutoregressivePriorConfig) -> None:
        width, count = config.width, config.num_components
        self.encoder_hidden_states_proj = Linear(config.text_width, width)
        self.embedding_proj = Linear(config.embedding_dim, width)
        self.dot_embedding = Embedding(config.num_dot_buckets + 1, width)
        self.code_embedding = Embedding(config.num_buckets, width)
        self.positional_embedding = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        self.transformer_blocks = nn.ModuleList(
            [PriorBlock(width, config.attention_head_dim, config.dropout) for _ in range(config.num_layers)]
        )
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_codes = Linear(width, config.num_buckets)

        def table(values: Tensor) -> nn.Parameter:  # statistics of the data: in the state dict, but not trained
            return nn.Parameter(values, requires_grad=False)

        self.pca_mean = table(torch.zeros(1, config.embedding_dim))
        # On the meta device, `eye` and `linspace` would import PyTorch's compiler, which takes seconds.
        buckets = config.num_dot_buckets
        axes = torch.zeros(count, config.embedding_dim)
        axes.diagonal().fill_(1)
        self.pca_components = table(axes)
        self.code_low = table(torch.full((count,), -1.0))
        self.code_high = table(torch.ones(count))
        self.dot_edges = table(torch.tensor([2 * edge / buckets - 1 for edge in range(1, buckets)]))

    def initialize_for_training(self, generator: torch.Generator | None = None) -> Self:
        """Initialize as `Component` does, with small random embeddings, and branches scaled down by the depth.

        The tables of codes do not change; set them by `fit_codes`.
        """
        super().initialize_for_training(generator)
        nn.init.normal_(self.positional_embedding, std=0.01, generator=generator)
        for tokens in (self.dot_embedding, self.code_embedding):
            nn.init.normal_(tokens.weight, std=0.02, generator=generator)
        initialize_blocks(self.transformer_blocks)
        return self

    # Embeddings and codes

    @torch.no_grad()
    def fit_codes(self, components: PrincipalComponents, image_embeddings: Tensor, dot_products: Tensor) -> None:
        """Compute the tables from the training data.

        Args:
            components: principal components of the embeddings; the first `num_components` are used.
            image_embeddings: [count, embedding_dim], which give the ranges of the codes.
            dot_products: [count], of captions and their pictures (see `dot_product`), which give the quantiles.

        Raises: ConfigError if fewer than `num_components` components vary.
        """
        count = self.config.num_components
        varying = int((components.variances > SMALLEST_VARIANCE * components.variances[0]).sum())
        if components.dim != self.config.embedding_dim or varying < count:
            raise ConfigError(
                f"the data's embeddings have width {components.dim} and vary in {varying} components; the prior has "
                f"embedding_dim {self.config.embedding_dim} and num_components {count}: reduce num_components"
            )
        coordinates = components.project(image_embeddings, count)
        shares = torch.arange(1, self.config.num_dot_buckets) / self.config.num_dot_buckets
        self.pca_mean.copy_(components.mean[None])
        self.pca_components.copy_(components.components[:count])
        self.code_low.copy_(coordinates.amin(dim=0))
        self.code_high.copy_(coordinates.amax(dim=0))
        self.dot_edges.copy_(torch.quantile(dot_products.float(), shares.to(dot_products.device)))

    @entry_point
    def encode(self, image_embedding: Tensor) -> Tensor:
        """Image embeddings [batch, embedding_dim] as codes, int64 [batch, num_components].

        Coordinates outside the range of the training data fall into the outermost bucket.

        Raises: InputError for another shape.
        """
        check_shape("image_embedding", image_embedding, "batch", self.config.embedding_dim)
        coordinates = (image_embedding.float() - self.pca_mean.float()) @ self.pca_components.float().T
        low, width = self._buckets()
        return ((coordinates - low) / width).floor().long().clamp(0, self.config.num_buckets - 1)

    @entry_point
    def decode(self, codes: Tensor) -> Tensor:
        """Image embeddings, float32 [batch, embedding_dim], of codes [batch, count]: the centres of their buckets.

        With fewer codes than `num_components`, the other components are those of the mean embedding.

        Raises: InputError for more codes than components.
        """
        count = codes.shape[-1]
        if codes.dim() != 2 or count > self.config.num_components:
            raise InputError(f"codes are {tuple(codes.shape)}; they must be [batch, {self.config.num_components}]")
        low, width = self._buckets()
        coordinates = low[:count] + (codes + 0.5) * width[:count]
        return self.pca_mean.float() + coordinates @ self.pca_components[:count].float()

    @entry_point
    def dot_code(self, text_embedding: Tensor, image_embedding: Tensor) -> Tensor:
        """The bucket of each pair's dot product, int64 [batch], from 0 to num_dot_buckets − 1.

        Args:
            text_embedding, image_embedding: [batch, embedding_dim].

        Raises: InputError for another shape.
        """
        for name, embedding in (("text_embedding", text_embedding), ("image_embedding", image_embedding)):
            check_shape(name, embedding, "batch", self.config.embedding_dim)
        return torch.bucketize(dot_product(text_embedding, image_embedding), self.dot_edges.float())

    @property
    def no_dot_code(self) -> int:
        """The code of an unknown dot product."""
        return self.config.num_dot_buckets

    def _buckets(self) -> tuple[Tensor, Tensor]:
        low, high = self.code_low.float(), self.code_high.float()
        return low, (high - low).clamp_min(SMALLEST_RANGE) / self.config.num_buckets

    # The transformer

    def _prefix(
        self, proj_embedding: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor, dot_codes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The tokens before the codes [batch, text tokens + 2, width], and the bias that masks the text's padding."""
        config = self.config
        check_shape("proj_embedding", proj_embedding, "batch", config.embedding_dim)
        check_shape("encoder_hidden_states", encoder_hidden_states, "batch", "tokens", config.text_width)
        if not 1 <= encoder_hidden_states.shape[1] <= config.num_embeddings:
            raise InputError(f"encoder_hidden_states must not be empty, with at most {config.num_embeddings} tokens")
        check_shape("attention_mask", attention_mask, *encoder_hidden_states.shape[:2])
        if dot_codes.dim() != 1 or dot_codes.is_floating_point():
            raise InputError(f"dot_codes is {dot_codes.dtype} {tuple(dot_codes.shape)}; it must be integers [batch]")
        check_rows(proj_embedding=proj_embedding, encoder_hidden_states=encoder_hidden_states, dot_codes=dot_codes)
        text = self.encoder_hidden_states_proj(encoder_hidden_states)
        summary = self.embedding_proj(proj_embedding)[:, None]
        others = torch.cat([summary, self.dot_embedding(dot_codes)[:, None].to(summary.dtype)], dim=1)
        tokens = torch.cat([self._placed(text, 0), self._placed(others, config.num_embeddings)], dim=1)
        return tokens, F.pad(mask_bias(attention_mask, tokens.dtype), (0, 2))

    def _placed(self, tokens: Tensor, first: int) -> Tensor:
        return tokens + self.positional_embedding[:, first : first + tokens.shape[1]].to(tokens.dtype)

    def _causal(self, tokens: Tensor, bias: Tensor) -> Tensor:
        length = tokens.shape[1]
        causal = torch.full((length, length), MASKED, dtype=tokens.dtype, device=tokens.device).triu_(1)
        return F.pad(bias, (0, length - bias.shape[-1])) + causal

    def _run(self, tokens: Tensor, bias: Tensor, first_read: int) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """Logits from token `first_read` on, float32 [batch, tokens, num_buckets], and all keys and values."""
        layers = []
        last = len(self.transformer_blocks) - 1
        for place, block in enumerate(self.transformer_blocks):
            tokens, own = block(tokens, bias, first_read=first_read if place == last else 0)
            layers.append(own)
        return self.proj_to_codes(self.norm_out(tokens)).float(), tuple(layers)

    def _read_on(self, codes: Tensor, memory: CodeMemory) -> tuple[Tensor, CodeMemory]:
        """`forward` for one more code [batch, 1] of each row."""
        if memory.num_codes + 1 >= self.config.num_components:
            raise InputError(f"all {self.config.num_components} codes were predicted, and none can follow")
        check_rows(codes=codes, memory=memory.bias)
        if codes.shape != (len(codes), 1):
            raise InputError(f"codes are {tuple(codes.shape)}; with a memory they must be [batch, 1]")
        tokens = self.code_embedding(codes).to(memory.layers[0].key.dtype)
        tokens = self._placed(tokens, self.config.prefix_length + memory.num_codes)
        bias = F.pad(memory.bias, (0, 1))
        layers = []
        for block, before in zip(self.transformer_blocks, memory.layers, strict=True):
            tokens, own = block(tokens, bias, before=before)
            layers.append(before.then(*own))
        logits = self.proj_to_codes(self.norm_out(tokens)).float()
        return logits, CodeMemory(tuple(layers), bias, memory.num_codes + 1)

    @routes_entry_points
    def forward(
        self,
        codes: Tensor,
        dot_codes: Tensor | None = None,
        proj_embedding: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        memory: CodeMemory | None = None,
    ) -> tuple[Tensor, CodeMemory]:
        """Logits of the code that follows the text, and of the code that follows each of `codes`.

        Args:
            codes: int64 [batch, count], the first codes of each row, from `encode`; count is from 0 to
                num_components - 1. With `memory`: [batch, 1], the code that follows those of the memory.
            dot_codes: int64 [batch], from `dot_code`, or `no_dot_code`.
            proj_embedding: the text's embedding [batch, embedding_dim].
            encoder_hidden_states: the text's tokens [batch, tokens, text_dim], at most num_embeddings. Padding that is
                common to all rows may be omitted.
            attention_mask: [batch, tokens], true or 1 for the text's own tokens.
            memory: the result of an earlier call, instead of the text. It is not changed.

        Returns: float32 [batch, 1 + count, num_buckets], or with `memory` [batch, 1, num_buckets]; and the memory of
            the text and the codes so far.

        Raises: InputError for a wrong shape, if all codes were predicted, or unless exactly one of text and memory is
            given.
        """
        if memory is not None:
            return self._read_on(codes, memory)
        if dot_codes is None or proj_embedding is None or encoder_hidden_states is None or attention_mask is None:
            raise InputError("give dot_codes, proj_embedding, encoder_hidden_states and attention_mask, or a memory")
        if codes.dim() != 2 or codes.shape[1] >= self.config.num_components:
            most = self.config.num_components - 1
            raise InputError(f"codes are {tuple(codes.shape)}; they must be [batch, count] with at most {most} codes")
        prefix, bias = self._prefix(proj_embedding, encoder_hidden_states, attention_mask, dot_codes)
        check_rows(codes=codes, proj_embedding=prefix)
        given = self._placed(self.code_embedding(codes), self.config.prefix_length).to(prefix.dtype)
        tokens = torch.cat([prefix, given], dim=1)
        logits, layers = self._run(tokens, self._causal(tokens, bias), prefix.shape[1] - 1)
        return logits, CodeMemory(layers, F.pad(bias, (0, codes.shape[1])), codes.shape[1])


def dot_product(text_embedding: Tensor, image_embedding: Tensor) -> Tensor:
    """The dot product of normalised embeddings (cosine), float32 [batch], of two tensors [batch, embedding_dim]."""
    return F.cosine_similarity(text_embedding.float(), image_embedding.float(), dim=-1)
