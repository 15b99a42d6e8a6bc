"""The prior network of DALLE2-pytorch and of MindEye: text or a grid of tokens → an image embedding or a grid."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.limits import Range, Share
from unclip.models.component import Component, Depth, ModelConfig, WideWidth, Width, check_rows, check_shape
from unclip.models.entry import entry_point, routes_entry_points
from unclip.models.kernels import Linear, attention
from unclip.models.layers import KeyValue, sinusoidal_embedding, timestep_rows

BUCKETS, MAX_DISTANCE = 32, 128
"""Settings of the relative position bias, as in T5 (arXiv 1910.10683)."""
ROTARY_WIDTH, ROTARY_BASE = 32, 10_000.0
COSINE_SCALE = 16.0
EPS, HALF_EPS = 1e-5, 1e-3
Tokens = Annotated[int, Range(0, 65_536)]
Few = Annotated[int, Range(1, 64)]


@dataclass(frozen=True)
class Arithmetic:
    """What the network of a range of versions of DALLE2-pytorch computes.

    Attributes:
        is_cosine: attention by cosines times 16; else by dot products.
        bias_times: the relative position bias counts this many times.
        stable_norms: every norm first divides by the maximum; else only the last one ("final"), or none.
        learned_padding: padding of the text is replaced by learned tokens; else it is masked.
        nulls: what the null condition of guidance replaces: "mask" masks the text, "none" nothing, "encodings" the
            text's tokens, and "all" the text's tokens and its embedding. The last two have a null image embedding too.
    """

    is_cosine: bool
    bias_times: float
    stable_norms: Literal["none", "final", "all"]
    learned_padding: bool
    nulls: Literal["mask", "none", "encodings", "all"]


ARITHMETIC = {
    "0.15": Arithmetic(False, 1, "none", False, "mask"),
    "0.16.2": Arithmetic(False, 1024, "all", False, "mask"),
    "0.23.1": Arithmetic(False, 1024, "all", True, "none"),
    "0.23.3": Arithmetic(False, 128, "final", True, "none"),
    "1.4.3": Arithmetic(True, 1, "final", True, "none"),
    "1.9": Arithmetic(True, 1, "final", True, "encodings"),
    "1.10.5": Arithmetic(True, 1, "final", True, "all"),
}
"""The arithmetic by the first version of the package that has it."""


@dataclass(frozen=True, eq=False)
class EmbeddingPriorConfig(ModelConfig):
    """Settings of `EmbeddingPriorNetwork`. The defaults are those of new networks; converted files state all.

    Attributes:
        embedding_dim: width of the embeddings and of all tokens.
        num_tokens: tokens of a grid, the target; None: the target is one vector.
        condition_tokens, condition_dim: tokens and width of the condition of a grid; None: as the target.
        max_text_len: positions of the text's tokens, for vectors; 0 or any number where padding is masked.
        use_text_encodings: whether the text's tokens are given, besides its embedding.
        num_timesteps: rows of the table of timesteps; None: sinusoidal features with a small network.
        queries: how a grid is read out. "pos_emb": learned positions are added to the noised grid, whose outputs are
            the prediction. "all_pos_emb": they are added to all tokens. "token": learned queries follow the grid.
            "none": as "pos_emb", without positions. A vector always has one query.
        arithmetic: a key of `ARITHMETIC`.
        dropout: in the feed-forward layers.
        image_embed_scale: the network works on embeddings times this number; None: √embedding_dim.
        normalized: whether the embeddings have the norm 1, so that condition and target are normalised first.
        sampling_clamp_l2norm, sampling_final_clamp_l2norm: whether each prediction, or the last state, is scaled to
            the norm `image_embed_scale`.
        init_image_embed_l2norm: whether the noise at the start is.
    """

    embedding_dim: Width = 768
    num_layers: Depth = 6
    num_attention_heads: Width = 12
    attention_head_dim: Width = 64
    feed_forward_dim: WideWidth | None = None
    num_tokens: Width | None = None
    condition_tokens: Width | None = None
    condition_dim: WideWidth | None = None
    num_text_embeds: Few = 1
    num_time_embeds: Few = 1
    num_image_embeds: Few = 1
    max_text_len: Tokens = 0
    use_text_encodings: bool = False
    num_timesteps: Annotated[int, Range(1, 100_000)] | None = None
    queries: Literal["none", "token", "pos_emb", "all_pos_emb"] = "pos_emb"
    causal: bool = True
    norm_in: bool = False
    norm_out: bool = True
    final_proj: bool = True
    normformer: bool = False
    rotary_emb: bool = True
    arithmetic: str = "1.10.5"
    dropout: Share = 0.0
    image_embed_scale: Annotated[float, Range(0, 1e6, above=True)] | None = None
    normalized: bool = False
    sampling_clamp_l2norm: bool = False
    sampling_final_clamp_l2norm: bool = False
    init_image_embed_l2norm: bool = False

    @property
    def scale(self) -> float:
        """The number by which the network's embeddings are multiplied."""
        return self.image_embed_scale or self.embedding_dim**0.5

    @property
    def rules(self) -> Arithmetic:
        """The row of `arithmetic`."""
        return ARITHMETIC[self.arithmetic]

    @property
    def embedding_shape(self) -> tuple[int, ...]:
        """The shape of one target: [embedding_dim], or [num_tokens, embedding_dim]."""
        return (self.embedding_dim,) if self.num_tokens is None else (self.num_tokens, self.embedding_dim)

    @property
    def condition_shape(self) -> tuple[int, ...]:
        """The shape of one condition: a vector, or a grid of tokens."""
        if self.num_tokens is None:
            return (self.embedding_dim,)
        return (self.condition_tokens or self.num_tokens, self.condition_dim or self.embedding_dim)

    def check(self) -> None:
        known = ", ".join(ARITHMETIC)
        self.require(self.arithmetic in ARITHMETIC, f"arithmetic is {self.arithmetic!r}; it must be one of {known}")
        self.require(self.embedding_dim % 2 == 0, f"embedding_dim is {self.embedding_dim}; it must be even")
        is_odd = self.rotary_emb and self.attention_head_dim % 2 and self.attention_head_dim < ROTARY_WIDTH
        self.require(not is_odd, f"attention_head_dim is {self.attention_head_dim}; rotary positions need an even one")
        is_newest = self.arithmetic == "1.10.5"
        self.require(self.num_tokens is None or is_newest, "a grid of tokens has the arithmetic '1.10.5'")
        of_grid = self.condition_tokens or self.condition_dim
        self.require(self.num_tokens is not None or not of_grid, "condition_tokens and condition_dim need num_tokens")

    def approximate_parameters(self) -> int:
        dim, hidden = self.embedding_dim, self.feed_forward_dim or 4 * self.embedding_dim
        inner = self.num_attention_heads * self.attention_head_dim
        return self.num_layers * dim * (2 * inner + 3 * hidden) + self.max_text_len * dim


@dataclass(frozen=True)
class EmbeddingPrefix:
    """What the condition contributes to every step.

    `tokens` [batch, tokens, embedding_dim] are its tokens, and `seen` [batch, tokens] those that are not masked (None:
    all). In a causal network, `layers` are their keys and values in each layer.
    """

    tokens: Tensor
    seen: Tensor | None
    layers: tuple[KeyValue, ...] | None


class GainNorm(nn.Module):
    """Layer normalisation with a gain; with `is_stable` the tokens are first divided by their (signed) maximum."""

    def __init__(self, width: int, is_stable: bool = False) -> None:
        super().__init__()
        self.is_stable = is_stable
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.is_stable:
            tokens = tokens / tokens.amax(dim=-1, keepdim=True).detach()
        eps = EPS if tokens.dtype == torch.float32 else HALF_EPS
        return F.layer_norm(tokens, tokens.shape[-1:], self.g.to(tokens.dtype), None, eps)


class MultiQueryAttention(nn.Module):
    """Attention whose heads share one key and one value (arXiv 1911.02150), with a learned null key and value."""

    def __init__(self, config: EmbeddingPriorConfig) -> None:
        super().__init__()
        dim, width = config.embedding_dim, config.attention_head_dim
        inner = width * config.num_attention_heads
        is_stable = config.rules.stable_norms == "all"
        self.num_heads, self.is_cosine = config.num_attention_heads, config.rules.is_cosine
        self.rotary_width = min(ROTARY_WIDTH, width) if config.rotary_emb else 0
        self.null_kv = nn.Parameter(torch.zeros(2, width))
        self.norm = GainNorm(dim, is_stable)
        self.to_q = Linear(dim, inner, bias=False)
        self.to_kv = Linear(dim, 2 * width, bias=False)
        self.to_out = nn.Sequential(Linear(inner, dim, bias=False), GainNorm(dim, is_stable))

    def forward(self, tokens: Tensor, bias: Tensor, before: KeyValue | None, first: int) -> tuple[Tensor, KeyValue]:
        """The output for `tokens` [batch, tokens, dim] at the positions from `first` on, and all keys and values.

        `before` are the null key and value and those of earlier tokens. `bias` broadcasts to [batch, heads, tokens, all
        keys].
        """
        normed = self.norm(tokens)
        queries = self.to_q(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        keys, values = self.to_kv(normed).chunk(2, dim=-1)
        queries, keys = self._rotated(queries, first), self._rotated(keys, first)
        if before is None:
            null_key, null_value = self.null_kv.to(keys.dtype).expand(len(tokens), 2, -1).split(1, dim=1)
            before = KeyValue(null_key, null_value)
        memory = before.then(keys, values)
        keys = memory.key
        if self.is_cosine:
            width = queries.shape[-1]
            queries, keys = F.normalize(queries, dim=-1) * (COSINE_SCALE * width**0.5), F.normalize(keys, dim=-1)
        heads = (-1, self.num_heads, -1, -1)
        answers = attention(queries, keys[:, None].expand(heads), memory.value[:, None].expand(heads), bias)
        return self.to_out(answers.transpose(1, 2).flatten(2)), memory

    def _rotated(self, tokens: Tensor, first: int) -> Tensor:
        """Rotate the pairs (0, 1), (2, 3), … of the first dimensions by the position (arXiv 2104.09864)."""
        width = self.rotary_width
        if not width:
            return tokens
        rates = ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float32, device=tokens.device) / width)
        places = torch.arange(first, first + tokens.shape[-2], dtype=torch.float32, device=tokens.device)
        angles = (places[:, None] * rates).to(tokens.dtype)
        turned, kept = tokens[..., :width].unflatten(-1, (-1, 2)), tokens[..., width:]
        one, other = turned.unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.stack([one * cos - other * sin, other * cos + one * sin], dim=-1)
        return torch.cat([turned.flatten(-2), kept], dim=-1)


class GatedSiLU(nn.Module):
    """One half of the channels times the SiLU of the other (arXiv 2002.05202)."""

    def forward(self, tokens: Tensor) -> Tensor:
        values, gate = tokens.chunk(2, dim=-1)
        return values * F.silu(gate)


def _feed_forward(config: EmbeddingPriorConfig) -> nn.Sequential:
    dim, is_stable = config.embedding_dim, config.rules.stable_norms == "all"
    hidden = config.feed_forward_dim or 4 * dim
    return nn.Sequential(
        GainNorm(dim, is_stable),
        Linear(dim, 2 * hidden, bias=False),
        GatedSiLU(),
        GainNorm(hidden, is_stable) if config.normformer else nn.Identity(),
        nn.Dropout(config.dropout),
        Linear(hidden, dim, bias=False),
    )


class RelativeBias(nn.Module):
    """A learned bias of each head for the distance of a key before the query, in 32 buckets (arXiv 1910.10683)."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(BUCKETS, num_heads)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[heads, queries, keys] of the places of queries and keys; keys after the query are in bucket 0."""
        distance = (queries[:, None] - keys).clamp_min(0)
        exact = BUCKETS // 2
        far = torch.log(distance.clamp_min(1).float() / exact) / math.log(MAX_DISTANCE / exact) * (BUCKETS - exact)
        bucket = torch.where(distance < exact, distance, (exact + far.long()).clamp_max(BUCKETS - 1))
        return self.relative_attention_bias(bucket).permute(2, 0, 1)


class BiasedTransformer(nn.Module):
    """Transformer blocks with positions from rotary embeddings and from a relative bias that all blocks share."""

    def __init__(self, config: EmbeddingPriorConfig) -> None:
        super().__init__()
        dim, rules = config.embedding_dim, config.rules
        self.causal, self.bias_times = config.causal, rules.bias_times
        self.init_norm = GainNorm(dim, rules.stable_norms == "all") if config.norm_in else nn.Identity()
        self.rel_pos_bias = RelativeBias(config.num_attention_heads)
        self.layers = nn.ModuleList(
            [nn.ModuleList([MultiQueryAttention(config), _feed_forward(config)]) for _ in range(config.num_layers)]
        )
        self.norm = GainNorm(dim, rules.stable_norms != "none") if config.norm_out else nn.Identity()
        self.project_out = Linear(dim, dim, bias=False) if config.final_proj else nn.Identity()

    def forward(
        self, tokens: Tensor, seen: Tensor | None, before: tuple[KeyValue, ...] | None, first: int, num_read: int
    ) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """The last `num_read` outputs, and the keys and values of each layer.

        Args:
            tokens: [batch, tokens, dim], at the positions from `first` on.
            seen: [batch, all tokens], false for masked ones; None: all are seen.
            before: keys and values of the tokens before `first`, in a causal network.
        """
        bias = self._bias(tokens, seen, first)
        tokens = self.init_norm(tokens)
        memories = []
        for index, layer in enumerate(self.layers):
            attend, feed_forward = layer  # pyright: ignore[reportGeneralTypeIssues]
            answers, memory = attend(tokens, bias, None if before is None else before[index], first)
            memories.append(memory)
            if index == len(self.layers) - 1:
                tokens, answers = (x[:, x.shape[1] - num_read :] for x in (tokens, answers))
            tokens = tokens + answers
            tokens = tokens + feed_forward(tokens)
        return self.project_out(self.norm(tokens)), tuple(memories)

    def _bias(self, tokens: Tensor, seen: Tensor | None, first: int) -> Tensor:
        """[batch or 1, heads, tokens, 1 + all tokens]; the null key stands at place 0, so that keys are shifted."""
        end = first + tokens.shape[1]
        places = torch.arange(end + 1, device=tokens.device)
        queries = places[first:end]
        bias = self.bias_times * self.rel_pos_bias(queries, places)[None]
        masked = torch.zeros(1, 1, len(queries), end + 1, dtype=torch.bool, device=tokens.device)
        if self.causal:
            masked = masked | (places > queries[:, None] + 1)
        if seen is not None:
            masked = masked | ~F.pad(seen, (1, 0), value=True)[:, None, None]
        return bias.masked_fill(masked, -math.inf).to(tokens.dtype)


class TimeNetwork(nn.Module):
    """Sinusoidal features [batch, dim] → a time embedding, by three layers."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        hidden = 2 * out_width
        first, second = (nn.Sequential(Linear(start, hidden), nn.SiLU()) for start in (width, hidden))
        self.net = nn.Sequential(first, second, Linear(hidden, out_width))

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features.to(next(self.parameters()).dtype))


class EmbeddingPriorNetwork(Component[EmbeddingPriorConfig]):
    """A transformer over a condition, the timestep and the noised image embedding, a vector or a grid of tokens.

    It computes what the networks of DALLE2-pytorch (https://github.com/lucidrains/DALLE2-pytorch) and of MindEye (arXiv
    2305.18274, 2403.11207) compute, with the names of their weights. The tokens are, in order: for a vector, those of
    the text, the text embedding, the timestep, the noised embedding, and a query whose output is the prediction; for a
    grid, those of the condition, the timestep, the noised grid, and its queries (see `EmbeddingPriorConfig.queries`).
    """

    config_class: ClassVar = EmbeddingPriorConfig
    tables: ClassVar = ("rotary_emb.freqs",)

    def build(self, config: EmbeddingPriorConfig) -> None:
        dim, grid = config.embedding_dim, config.num_tokens
        time = dim * config.num_time_embeds
        if config.num_timesteps is None:
            self.to_time_embeds = nn.ModuleList([nn.Sequential(nn.Identity(), TimeNetwork(dim, time))])
        else:
            self.to_time_embeds = nn.ModuleList([nn.Embedding(config.num_timesteps, time)])
        self.causal_transformer = BiasedTransformer(config)
        if grid is not None:
            count, width = config.condition_shape
            self.condition_proj = Linear(width, dim) if width != dim else None
            rows = {"none": 0, "all_pos_emb": grid + count + config.num_time_embeds}.get(config.queries, grid)
            self.learned_query = nn.Parameter(torch.zeros(rows, dim)) if rows else None
            self.null_brain_embeds = nn.Parameter(torch.zeros(count, dim))
            self.null_image_embed = nn.Parameter(torch.zeros(grid, dim))
            return
        self.learned_query = nn.Parameter(torch.zeros(dim))
        for name, count in (("text", config.num_text_embeds), ("image", config.num_image_embeds)):
            layers = [Linear(dim, dim * count)] if count > 1 else []
            setattr(self, f"to_{name}_embeds", nn.ModuleList(layers))
        if config.rules.learned_padding:
            self.null_text_encodings = nn.Parameter(torch.zeros(1, config.max_text_len, dim))
        if config.rules.nulls in ("encodings", "all"):
            self.null_text_embeds = nn.Parameter(torch.zeros(1, config.num_text_embeds, dim))
            self.null_image_embed = nn.Parameter(torch.zeros(1, dim))

    def initialize_for_training(self, generator: torch.Generator | None = None) -> Self:
        """Initialize as `Component` does, with small random tokens."""
        super().initialize_for_training(generator)
        scale = self.config.embedding_dim**-0.5
        for name, parameter in self.named_parameters():
            if name.startswith(("null_", "learned_query", "to_time_embeds.0.weight")) or name.endswith("null_kv"):
                nn.init.normal_(parameter, std=scale, generator=generator)
            elif name.endswith("relative_attention_bias.weight"):
                nn.init.zeros_(parameter)
            elif name.endswith(".g"):
                nn.init.ones_(parameter)
        return self

    # The condition, prepared once

    def _read_condition(
        self,
        embedding: Tensor,
        encodings: Tensor | None = None,
        mask: Tensor | None = None,
        given: Tensor | None = None,
    ) -> EmbeddingPrefix:
        """What the condition contributes to every step; in a causal network it does not depend on later tokens.

        Args:
            embedding: the condition, [batch, *config.condition_shape].
            encodings: the text's tokens [batch, tokens, embedding_dim], for vectors; tokens of zeros are padding.
            mask: [batch, tokens], true for tokens that are not padding.
            given: bool [batch]; false: the condition is dropped, for guidance.

        Raises: InputError for a wrong shape.
        """
        config = self.config
        check_shape("the condition", embedding, "batch", *config.condition_shape)
        keep = torch.ones(len(embedding), dtype=torch.bool, device=embedding.device) if given is None else given
        if config.num_tokens is not None:
            tokens = embedding if self.condition_proj is None else self.condition_proj(embedding)
            tokens = torch.where(keep[:, None, None], tokens, self.null_brain_embeds.to(tokens.dtype))
            if config.queries == "all_pos_emb":
                tokens = tokens + self._queries(tokens)[: tokens.shape[1]]
            return self._prefix(tokens, None)
        if encodings is None:
            encodings = embedding.new_zeros(len(embedding), 0, config.embedding_dim)
        check_shape("encodings", encodings, "batch", "tokens", config.embedding_dim)
        own = torch.ones(encodings.shape[:2], dtype=torch.bool, device=encodings.device) if mask is None else mask
        check_shape("mask", own, *encodings.shape[:2])
        check_rows(condition=embedding, encodings=encodings)
        summary = self._spread("text", embedding, config.num_text_embeds)
        if not config.rules.learned_padding:
            seen = F.pad(own.bool(), (0, summary.shape[1]), value=True) & keep[:, None]
            return self._prefix(torch.cat([encodings, summary], dim=1), seen)
        own = own.bool() & (encodings != 0).any(dim=-1)
        lacking = config.max_text_len - encodings.shape[1]  # below 0, the end is cut off
        encodings, own = F.pad(encodings, (0, 0, 0, lacking)), F.pad(own, (0, lacking))
        nulls = config.rules.nulls
        own = own & keep[:, None] if nulls != "none" else own
        encodings = torch.where(own[..., None], encodings, self.null_text_encodings.to(encodings.dtype))
        if nulls == "all":
            summary = torch.where(keep[:, None, None], summary, self.null_text_embeds.to(summary.dtype))
        return self._prefix(torch.cat([encodings, summary], dim=1), None)

    prepare = entry_point(_read_condition)

    def _prefix(self, tokens: Tensor, seen: Tensor | None) -> EmbeddingPrefix:
        layers = None
        if self.config.causal:
            _, layers = self.causal_transformer(tokens, seen, None, 0, 0)
        return EmbeddingPrefix(tokens, seen, layers)

    def _queries(self, tokens: Tensor) -> Tensor:
        """`learned_query` [rows, dim] in the type of `tokens`."""
        assert self.learned_query is not None
        return self.learned_query.to(tokens.dtype).view(-1, self.config.embedding_dim)

    def _spread(self, name: str, embedding: Tensor, count: int) -> Tensor:
        """An embedding [batch, dim] as `count` tokens."""
        for layer in getattr(self, f"to_{name}_embeds"):
            embedding = layer(embedding)
        return embedding.unflatten(-1, (count, -1))

    # A step

    def _time(self, timestep: Tensor | float, x_t: Tensor) -> Tensor:
        rows, config = timestep_rows(timestep, x_t), self.config
        if config.num_timesteps is None:
            features = sinusoidal_embedding(rows, config.embedding_dim, flip_sin_to_cos=False, freq_shift=1)
            embedding = self.to_time_embeds[0](features)
        else:
            embedding = self.to_time_embeds[0](rows.long())
        return embedding.unflatten(-1, (config.num_time_embeds, -1)).expand(len(x_t), -1, -1).to(x_t.dtype)

    @routes_entry_points
    def forward(
        self, x_t: Tensor, timestep: Tensor | float, prefix: EmbeddingPrefix, x_given: Tensor | None = None
    ) -> Tensor:
        """The predicted embedding, of x_t's shape.

        Args:
            x_t: the noised embedding, [batch, *config.embedding_shape].
            timestep: a number, or a tensor [] or [batch].
            prefix: the result of `prepare` for the same batch.
            x_given: bool [batch]; where it is false, the null image embedding replaces x_t.

        Raises: InputError for a wrong shape.
        """
        config, batch = self.config, len(x_t)
        check_shape("x_t", x_t, "batch", *config.embedding_shape)
        check_rows(x_t=x_t, prefix=prefix.tokens)
        is_grid, start = config.num_tokens is not None, prefix.tokens.shape[1]
        image = x_t if is_grid else self._spread("image", x_t, config.num_image_embeds)
        if x_given is not None and hasattr(self, "null_image_embed"):
            image = torch.where(x_given[:, None, None], image, self.null_image_embed.to(image.dtype))
        if is_grid and config.queries == "pos_emb":
            image = image + self._queries(image)
        tokens = [self._time(timestep, x_t), image]
        if not is_grid or config.queries == "token":
            tokens.append(self._queries(image).expand(batch, -1, -1))
        step, count = torch.cat(tokens, dim=1), config.num_tokens or 1
        if is_grid and config.queries == "all_pos_emb":
            step = step + self._queries(step)[start:]
        seen = None if prefix.seen is None else F.pad(prefix.seen, (0, step.shape[1]), value=True)
        if prefix.layers is None:
            step, start = torch.cat([prefix.tokens, step], dim=1), 0
        output, _ = self.causal_transformer(step, seen, prefix.layers, start, count)
        return output if is_grid else output[:, 0]
