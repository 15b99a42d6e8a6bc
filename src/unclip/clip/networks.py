"""CLIP's text encoder and image encoder, each with its projection into the shared space.

They have the weights and outputs of transformers' classes, but import much faster.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.errors import InputError
from unclip.limits import Range, Share
from unclip.models.component import ANYTHING, Component, Depth, ModelConfig, WideWidth, Width, check_shape
from unclip.models.kernels import Conv2d, Embedding, Linear, attention

OLD_END_OF_TEXT = 2
"""The eos_token_id in configurations from before 2023. The end of text is then the largest token number."""


def quick_gelu(x: Tensor) -> Tensor:
    """x · σ(1.702 x), an approximation of GELU.

    Source: Hendrycks and Gimpel, arXiv 1606.08415 §2; CLIP's published weights were trained with it.
    """
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}

C = TypeVar("C", bound=ModelConfig)

_NEUTRAL: dict[str, Any] = {
    "architectures": ANYTHING,
    "attention_dropout": (0, 0.0, None),
    "dropout": ANYTHING,  # of old files, never read
    "dtype": ANYTHING,
    "initializer_factor": ANYTHING,
    "initializer_range": ANYTHING,
    "torch_dtype": ANYTHING,
    "transformers_version": ANYTHING,
}


@dataclass(frozen=True, eq=False, kw_only=True)
class _EncoderConfig(ModelConfig):
    """Settings of both encoders."""

    hidden_size: Width
    intermediate_size: WideWidth
    projection_dim: Width = 512
    num_hidden_layers: Depth = 12
    num_attention_heads: Annotated[int, Range(1, 1024)]
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Share = 1e-5

    def check(self) -> None:
        heads = f"num_attention_heads is {self.num_attention_heads}; it must divide hidden_size, {self.hidden_size}"
        self.require(self.hidden_size % self.num_attention_heads == 0, heads)

    def approximate_parameters(self) -> int:
        layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * layer + self.hidden_size * self.projection_dim


@dataclass(frozen=True, eq=False, kw_only=True)
class CLIPTextEncoderConfig(_EncoderConfig):
    """Settings of `CLIPTextEncoder`, with the keys and defaults of transformers' `CLIPTextConfig`."""

    NEUTRAL: ClassVar = {**_NEUTRAL, "bos_token_id": ANYTHING, "pad_token_id": ANYTHING}

    hidden_size: Width = 512
    intermediate_size: WideWidth = 2048
    num_attention_heads: Annotated[int, Range(1, 1024)] = 8
    vocab_size: Annotated[int, Range(1, 1_000_000)] = 49_408
    max_position_embeddings: WideWidth = 77
    eos_token_id: Annotated[int, Range(0, 1_000_000)] = 49_407
    model_type: Literal["clip_text_model"] = "clip_text_model"

    def approximate_parameters(self) -> int:
        tables = (self.vocab_size + self.max_position_embeddings) * self.hidden_size
        return super().approximate_parameters() + tables


@dataclass(frozen=True, eq=False, kw_only=True)
class CLIPImageEncoderConfig(_EncoderConfig):
    """Settings of `CLIPImageEncoder`, with the keys and defaults of transformers' `CLIPVisionConfig`."""

    NEUTRAL: ClassVar = _NEUTRAL

    hidden_size: Width = 768
    intermediate_size: WideWidth = 3072
    num_attention_heads: Annotated[int, Range(1, 1024)] = 12
    num_channels: Annotated[int, Range(1, 16)] = 3
    image_size: Annotated[int, Range(1, 4096)] = 224
    patch_size: Annotated[int, Range(1, 4096)] = 32
    model_type: Literal["clip_vision_model"] = "clip_vision_model"

    def check(self) -> None:
        super().check()
        patch = f"patch_size is {self.patch_size}; it must be at most image_size, {self.image_size}"
        self.require(self.patch_size <= self.image_size, patch)

    @property
    def num_patches(self) -> int:
        """Number of patches of a picture; incomplete patches at the border are left out."""
        return (self.image_size // self.patch_size) ** 2

    def approximate_parameters(self) -> int:
        patch = self.num_channels * self.patch_size**2
        tables = (self.num_patches + 1 + patch) * self.hidden_size
        return super().approximate_parameters() + tables


class CLIPTextEncoderOutput(NamedTuple):
    """Output of `CLIPTextEncoder`.

    Attributes:
        text_embeds: [batch, projection_dim], not normalised.
        last_hidden_state: every token after the final norm, [batch, tokens, hidden_size].
    """

    text_embeds: Tensor
    last_hidden_state: Tensor


class CLIPImageEncoderOutput(NamedTuple):
    """Output of `CLIPImageEncoder`.

    Attributes:
        image_embeds: [batch, projection_dim], not normalised.
        last_hidden_state: class token and patches before the final norm, [batch, 1 + patches, hidden_size].
    """

    image_embeds: Tensor
    last_hidden_state: Tensor


class _SelfAttention(nn.Module):
    def __init__(self, config: _EncoderConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.q_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, tokens: Tensor, bias: Tensor | None) -> Tensor:
        queries, keys, values = (self._heads(part(tokens)) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(queries, keys, values, bias).transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, config: _EncoderConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(tokens)))


class _Layer(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: _EncoderConfig) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _FeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, tokens: Tensor, bias: Tensor | None) -> Tensor:
        tokens = tokens + self.self_attn(self.layer_norm1(tokens), bias)
        return tokens + self.mlp(self.layer_norm2(tokens))


class _Layers(nn.Module):
    def __init__(self, config: _EncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, tokens: Tensor, bias: Tensor | None) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens, bias)
        return tokens


class _TextEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.token_embedding(input_ids) + self.position_embedding(positions)


class _TextTransformer(nn.Module):
    def __init__(self, config: CLIPTextEncoderConfig) -> None:
        super().__init__()
        self.embeddings = _TextEmbeddings(config)
        self.encoder = _Layers(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        tokens = self.embeddings(input_ids)
        return self.final_layer_norm(self.encoder(tokens, _causal_bias(tokens, mask)))


class _PatchEmbeddings(nn.Module):
    def __init__(self, config: CLIPImageEncoderConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = Conv2d(config.num_channels, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = Embedding(config.num_patches + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels.to(self.class_embedding.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], dim=1)
        return tokens + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))


class _ImageTransformer(nn.Module):
    def __init__(self, config: CLIPImageEncoderConfig) -> None:
        super().__init__()
        self.embeddings = _PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # the published files' spelling
        self.encoder = _Layers(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The class token after the final norm [batch, hidden_size], and all tokens before it."""
        tokens = self.encoder(self.pre_layrnorm(self.embeddings(pixels)), None)
        return self.post_layernorm(tokens[:, 0]), tokens


class _Encoder(Component[C]):
    """Base of both encoders. Their folders have the format of transformers, so its classes can read them."""

    ecosystem_class: ClassVar[str]
    """The class of transformers with the same output."""
    weights_stem: ClassVar = "model"
    tables: ClassVar = ("position_ids",)

    def _header(self) -> dict[str, Any]:
        return {"architectures": [self.ecosystem_class]}


class CLIPTextEncoder(_Encoder[CLIPTextEncoderConfig]):
    """CLIP's causal text transformer, whose token at the end of the text is projected into the shared space.

    Its config.json and weights are those of transformers' `CLIPTextModelWithProjection`, and so are its outputs, up to
    rounding; transformers is not imported. It is for inference only and has no dropout.

    Source: Radford et al., arXiv 2103.00020 §2.4.
    """

    config_class: ClassVar = CLIPTextEncoderConfig
    ecosystem_class: ClassVar = "CLIPTextModelWithProjection"

    def build(self, config: CLIPTextEncoderConfig) -> None:
        self.text_model = _TextTransformer(config)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CLIPTextEncoderOutput:
        """Encode captions.

        Args:
            input_ids: token numbers, integer [batch, tokens].
            attention_mask: [batch, tokens], 0 or false for masked tokens; None: no token is masked.

        Raises: InputError for other shapes, or more tokens than there are positions.
        """
        limit = self.config.max_position_embeddings
        if input_ids.dim() != 2 or not 1 <= input_ids.shape[1] <= limit:
            raise InputError(f"input_ids is {tuple(input_ids.shape)}; it must be [batch, tokens], of 1 to {limit}")
        if attention_mask is not None:
            check_shape("attention_mask", attention_mask, *input_ids.shape)
        tokens = self.text_model(input_ids, attention_mask)
        rows = torch.arange(len(tokens), device=tokens.device)
        pooled = tokens[rows, self._end_of_text(input_ids).to(tokens.device)]
        return CLIPTextEncoderOutput(self.text_projection(pooled), tokens)

    def _end_of_text(self, input_ids: Tensor) -> Tensor:
        """The index of the first end-of-text token in each row [batch]; 0 if there is none."""
        if self.config.eos_token_id == OLD_END_OF_TEXT:
            return input_ids.argmax(dim=1)
        return (input_ids == self.config.eos_token_id).int().argmax(dim=1)


class CLIPImageEncoder(_Encoder[CLIPImageEncoderConfig]):
    """CLIP's vision transformer, whose class token is projected into the shared space.

    Its config.json and weights are those of transformers' `CLIPVisionModelWithProjection`, and so are its outputs, up
    to rounding; transformers is not imported. It is for inference only and has no dropout.

    Source: Radford et al., arXiv 2103.00020 §2.4.
    """

    config_class: ClassVar = CLIPImageEncoderConfig
    ecosystem_class: ClassVar = "CLIPVisionModelWithProjection"

    def build(self, config: CLIPImageEncoderConfig) -> None:
        self.vision_model = _ImageTransformer(config)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixel_values: Tensor) -> CLIPImageEncoderOutput:
        """Encode pictures.

        Args:
            pixel_values: [batch, num_channels, image_size, image_size], normalised as the model expects.

        Raises: InputError for another shape.
        """
        config = self.config
        check_shape("pixel_values", pixel_values, "batch", config.num_channels, config.image_size, config.image_size)
        pooled, tokens = self.vision_model(pixel_values)
        return CLIPImageEncoderOutput(self.visual_projection(pooled), tokens)


def _causal_bias(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The attention bias [1 or batch, 1, tokens, tokens] that hides later tokens and masked ones.

    It is the lowest finite number, not minus infinity, so that a fully masked row does not become NaN.
    """
    count = tokens.shape[1]
    seen = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()[None, None]
    if mask is not None:
        seen = seen & mask.to(device=tokens.device, dtype=torch.bool)[:, None, None, :]
    bias = torch.zeros(seen.shape, dtype=tokens.dtype, device=tokens.device)
    return bias.masked_fill(~seen, torch.finfo(tokens.dtype).min)
