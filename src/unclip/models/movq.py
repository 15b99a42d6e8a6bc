"""MoVQ, the autoencoder of Kandinsky's latents, with the names of diffusers' VQModel.

Sources: Zheng et al. 2209.09002 (spatially modulated normalisation); Esser et al. 2012.09841 (the convolutional
autoencoder). Latent diffusion uses the latents before quantisation, so the codebook is stored but not used.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.errors import InputError
from unclip.limits import Range
from unclip.models.component import ANYTHING, Component, Depth, ModelConfig, WideWidth, Width, check_shape
from unclip.models.entry import entry_point, routes_entry_points
from unclip.models.kernels import Conv2d, Embedding, GroupNorm
from unclip.models.layers import Activation, HeadedAttention, KeyValue, activation, may_overwrite

PLAIN_DOWN, ATTENTION_DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
PLAIN_UP, ATTENTION_UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"
EPS = 1e-6
SPATIAL_GROUPS = 32


@dataclass(frozen=True, eq=False)
class VQConfig(ModelConfig):
    """Settings of `VQModel`, with the keys and defaults of diffusers; `norm_type` must be "spatial", as in MoVQ.

    `sample_size` and `scaling_factor` have no effect: Kandinsky's latents are not scaled.
    """

    in_channels: Width = 3
    out_channels: Width = 3
    down_block_types: tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...] = (PLAIN_DOWN,)
    up_block_types: tuple[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], ...] = (PLAIN_UP,)
    block_out_channels: tuple[Width, ...] = (64,)
    layers_per_block: Depth = 1
    act_fn: Activation = "silu"
    latent_channels: Width = 3
    sample_size: WideWidth = 32
    num_vq_embeddings: Annotated[int, Range(1, 1_000_000)] = 256
    norm_num_groups: Width = 32
    vq_embed_dim: Width | None = None
    scaling_factor: float = 0.18215
    norm_type: Literal["spatial"] = "group"  # pyright: ignore[reportAssignmentType]

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "mid_block_add_attention": (True,),
        "lookup_from_codebook": (False,),
        "force_upcast": ANYTHING,
    }

    @property
    def code_width(self) -> int:
        """Channels of the latents that are diffused."""
        return self.vq_embed_dim or self.latent_channels

    @property
    def factor(self) -> int:
        """Pixels for each cell of the latents, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def check(self) -> None:
        levels, channels = len(self.block_out_channels), self.block_out_channels
        self.require(levels <= 16, f"block_out_channels has {levels} levels; there may be 16")
        for key in ("down_block_types", "up_block_types"):
            count = len(getattr(self, key))
            self.require(count == levels, f"{key} has {count} entries; block_out_channels has {levels}")
        for groups, whose in ((self.norm_num_groups, "norm_num_groups"), (SPATIAL_GROUPS, "the spatial norm's groups")):
            fits = not any(width % groups for width in channels)
            self.require(fits, f"{whose}, {groups}, must divide all block_out_channels, {channels}")

    def approximate_parameters(self) -> int:
        return sum((2 * self.layers_per_block + 3) * 18 * width**2 for width in self.block_out_channels)


class SpatialNorm(nn.Module):
    """Group normalisation, then a scale and a shift that are linear in the latents (2209.09002, section 3.2)."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(SPATIAL_GROUPS, channels, eps=EPS)
        self.conv_y = Conv2d(latent_channels, channels, 1)
        self.conv_b = Conv2d(latent_channels, channels, 1)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """`latents` have one cell for each square block of pixels of `x`."""
        normed = self.norm_layer(x)
        # Convolutions of single pixels commute with enlarging by nearest neighbour, so they run on the small latents.
        scale, shift = (conv(latents)[:, :, :, None, :, None] for conv in (self.conv_y, self.conv_b))
        height, width = latents.shape[2:]
        blocks = normed.unflatten(3, (width, -1)).unflatten(2, (height, -1))
        if may_overwrite(self.norm_layer, self):
            torch.addcmul(shift, blocks, scale, out=blocks)
            return normed
        return torch.addcmul(shift, blocks, scale).flatten(4).flatten(2, 3)


MakeNorm = Callable[[int], nn.Module]
"""Makes a normalisation from the number of channels: `GroupNorm` in the encoder, `SpatialNorm` in the decoder."""


def _normed(norm: nn.Module, x: Tensor, latents: Tensor | None) -> Tensor:
    return norm(x) if latents is None else norm(x, latents)


class _Resnet(nn.Module):
    def __init__(self, norm: MakeNorm, in_channels: int, out_channels: int, act_fn: Activation) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.act = activation(act_fn)

    def forward(self, x: Tensor, latents: Tensor | None) -> Tensor:
        h = self.conv1(self._activated(self.norm1, x, latents))
        h = self.conv2(self._activated(self.norm2, h, latents))
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h.add_(x) if may_overwrite(self.conv2) else x + h

    def _activated(self, norm: nn.Module, x: Tensor, latents: Tensor | None) -> Tensor:
        normed = _normed(norm, x, latents)
        return F.silu(normed, inplace=may_overwrite(norm)) if type(self.act) is nn.SiLU else self.act(normed)


class _Attention(HeadedAttention):
    """Each pixel attends to all pixels, with one head; the result is added to the input."""

    def __init__(self, norm: MakeNorm, channels: int, *, spatial: bool) -> None:
        super().__init__(channels, channels)
        self.norm_name = "spatial_norm" if spatial else "group_norm"
        self.add_module(self.norm_name, norm(channels))

    def forward(self, x: Tensor, latents: Tensor | None) -> Tensor:
        tokens = _normed(getattr(self, self.norm_name), x, latents).flatten(2).transpose(1, 2)
        answers = self.attend(self.to_q(tokens), KeyValue(self.to_k(tokens), self.to_v(tokens)), None)
        return x + answers.transpose(1, 2).unflatten(2, x.shape[2:])


class _Resampler(nn.Module):
    """Halves or doubles height and width."""

    def __init__(self, channels: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = Conv2d(channels, channels, 3, stride=2) if down else Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1))) if self.down else self.conv(x, doubled=True)


class _Level(nn.Module):
    """Residual blocks, each followed by attention if the level has any, and the change of size."""

    def __init__(
        self,
        resnet: Callable[[int, int], _Resnet],
        attention: Callable[[int], _Attention] | None,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        resample: Literal["up", "down"] | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [resnet(out_channels if i else in_channels, out_channels) for i in range(num_layers)]
        )
        if attention is not None:
            self.attentions = nn.ModuleList([attention(out_channels) for _ in range(num_layers)])
        if resample is not None:
            sampler = _Resampler(out_channels, down=resample == "down")
            self.add_module(f"{resample}samplers", nn.ModuleList([sampler]))
        self.resample = resample

    def forward(self, x: Tensor, latents: Tensor | None) -> Tensor:
        attentions = getattr(self, "attentions", [None] * len(self.resnets))
        for resnet, attention in zip(self.resnets, attentions, strict=True):
            x = resnet(x, latents)
            x = x if attention is None else attention(x, latents)
        return x if self.resample is None else getattr(self, f"{self.resample}samplers")[0](x)


class _MidBlock(nn.Module):
    def __init__(
        self, resnet: Callable[[int, int], _Resnet], attention: Callable[[int], _Attention], channels: int
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([resnet(channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([attention(channels)])

    def forward(self, x: Tensor, latents: Tensor | None) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, latents), latents), latents)


class _Half(nn.Module):
    """What the encoder and the decoder share: the factories of layers, and the output."""

    def __init__(self, config: VQConfig, *, spatial: bool) -> None:
        super().__init__()
        self.spatial = spatial
        self.norm: MakeNorm = (
            functools.partial(SpatialNorm, latent_channels=config.latent_channels)
            if spatial
            else lambda channels: GroupNorm(config.norm_num_groups, channels, eps=EPS)
        )
        self.resnet = lambda before, after: _Resnet(self.norm, before, after, config.act_fn)
        self.attention = lambda channels: _Attention(self.norm, channels, spatial=spatial)

    def _end(self, channels: int, out_channels: int) -> None:
        self.conv_norm_out = self.norm(channels)
        self.conv_out = Conv2d(channels, out_channels, 3, padding=1)

    def _output(self, x: Tensor, latents: Tensor | None) -> Tensor:
        return self.conv_out(F.silu(_normed(self.conv_norm_out, x, latents)))


class _Encoder(_Half):
    def __init__(self, config: VQConfig) -> None:
        super().__init__(config, spatial=False)
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            attention = self.attention if kind == ATTENTION_DOWN else None
            resample = "down" if i < last else None
            before = channels[max(0, i - 1)]
            self.down_blocks.append(
                _Level(self.resnet, attention, before, channels[i], config.layers_per_block, resample)
            )
        self.mid_block = _MidBlock(self.resnet, self.attention, channels[-1])
        self._end(channels[-1], config.latent_channels)

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.conv_in(pictures)
        for block in self.down_blocks:
            x = block(x, None)
        return self._output(self.mid_block(x, None), None)


class _Decoder(_Half):
    def __init__(self, config: VQConfig) -> None:
        super().__init__(config, spatial=True)
        channels = config.block_out_channels[::-1]
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = _MidBlock(self.resnet, self.attention, channels[0])
        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(config.up_block_types):
            attention = self.attention if kind == ATTENTION_UP else None
            resample = "up" if i < len(channels) - 1 else None
            before = channels[max(0, i - 1)]
            layers = config.layers_per_block + 1
            self.up_blocks.append(_Level(self.resnet, attention, before, channels[i], layers, resample))
        self._end(channels[-1], config.out_channels)

    def forward(self, hidden: Tensor, latents: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(hidden), latents)
        for block in self.up_blocks:
            x = block(x, latents)
        return self._output(x, latents)


class _Codebook(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.embedding = Embedding(config.num_vq_embeddings, config.code_width)


class VQEncoderOutput(NamedTuple):
    """Output of `VQModel.encode`: `latents` [batch, vq_embed_dim, h, w]."""

    latents: Tensor


class DecoderOutput(NamedTuple):
    """Output of `VQModel.decode`: `sample`, pictures [batch, out_channels, height, width]."""

    sample: Tensor


class VQModel(Component[VQConfig]):
    """MoVQ: pictures in [-1, 1] to latents, and latents to pictures, without quantisation.

    Its keys and shapes are those of diffusers' VQModel with norm_type "spatial". It is an `Autoencoder` of
    `unclip.stages.latent`.
    """

    config_class: ClassVar = VQConfig

    def build(self, config: VQConfig) -> None:
        self.encoder = _Encoder(config)
        self.quant_conv = Conv2d(config.latent_channels, config.code_width, 1)
        self.quantize = _Codebook(config)
        self.post_quant_conv = Conv2d(config.code_width, config.latent_channels, 1)
        self.decoder = _Decoder(config)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @property
    def factor(self) -> int:
        """Pixels for each cell of the latents, along one side."""
        return self.config.factor

    @property
    def scale(self) -> float:
        """1: Kandinsky's latents are not scaled."""
        return 1.0

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.config.code_width

    def _encode(self, x: Tensor) -> VQEncoderOutput:
        """Latents of pictures [batch, in_channels, height, width], whose sides are multiples of `factor`.

        Raises:
            InputError: a shape is wrong.
        """
        check_shape("the pictures", x, "batch", self.config.in_channels, "height", "width")
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise InputError(f"the pictures are {tuple(x.shape)}; their sides must be multiples of {self.factor}")
        return VQEncoderOutput(self.quant_conv(self.encoder(x)))

    def _decode(self, h: Tensor, force_not_quantize: bool = True) -> DecoderOutput:
        """Pictures of latents [batch, vq_embed_dim, h, w].

        Args:
            h: the latents.
            force_not_quantize: must be True; quantising the latents of a diffusion model changes the pictures.

        Raises:
            InputError: a shape is wrong, or the latents should be quantised.
        """
        if not force_not_quantize:
            raise InputError("VQModel does not quantise latents: leave force_not_quantize at True")
        check_shape("the latents", h, "batch", self.config.code_width, "height", "width")
        return DecoderOutput(self.decoder(self.post_quant_conv(h), h))

    encode = entry_point(_encode)
    decode = entry_point(_decode)

    @routes_entry_points
    def forward(self, sample: Tensor) -> DecoderOutput:
        """Pictures encoded and decoded again, without quantisation."""
        return self._decode(self._encode(sample).latents)

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Pictures [batch, 3, height, width] in [-1, 1] → latents, float32."""
        return self.encode(pictures.to(self.dtype)).latents.float()

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents → pictures, float32, about in [-1, 1]."""
        return self.decode(latents.to(self.dtype)).sample.float()
