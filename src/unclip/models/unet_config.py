"""The settings of the two UNets, with the keys and defaults of diffusers."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from unclip.limits import Range, Share
from unclip.models.component import ANYTHING, ModelConfig, WideWidth, Width
from unclip.models.layers import Activation

CROSS_DOWN, CROSS_UP = "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"
MAX_RESNETS = 64
"""Residual blocks on the way down, at all levels together."""


@dataclass(frozen=True, eq=False)
class UNetConfig(ModelConfig):
    """Settings of both U-Nets.

    `sample_size`: height and width in pixels. It is only informative; any multiple of 2 ** (levels - 1) works.
    `block_out_channels`: the width of each level, each a multiple of `norm_num_groups`.
    `layers_per_block`: residual blocks of each level on the downward path; the upward path has one more.
    """

    sample_size: WideWidth | tuple[WideWidth, WideWidth] | None = None
    in_channels: Width = 4
    out_channels: Width = 4
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[float, Range(0, 2, below=True)] = 0
    down_block_types: tuple[str, ...] = ()
    mid_block_type: str | None = None
    up_block_types: tuple[str, ...] = ()
    block_out_channels: tuple[Width, ...] = ()
    layers_per_block: Width | tuple[Width, ...] = 2
    dropout: Share = 0.0
    act_fn: Activation = "silu"
    norm_num_groups: Width = 32
    norm_eps: Share = 1e-5
    attention_head_dim: int | None = 8
    class_embed_type: Literal["identity"] | None = None
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    time_embedding_dim: WideWidth | None = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        "center_input_sample": (False,),
        "downsample_padding": ANYTHING,  # of a convolution that these blocks do not have
        "mid_block_scale_factor": (1,),
        "num_class_embeds": (None,),
        "time_embedding_type": ("positional",),
    }

    @property
    def adds_class_labels(self) -> bool:
        """Whether `class_labels` are added to the time embedding."""
        return self.class_embed_type == "identity"

    @property
    def num_levels(self) -> int:
        return len(self.block_out_channels)

    @property
    def multiple(self) -> int:
        """The number that must divide the sides of pictures, since each level except the last halves them."""
        return 2 ** (self.num_levels - 1)

    @property
    def layers(self) -> tuple[int, ...]:
        """`layers_per_block` of each level."""
        layers = self.layers_per_block
        return layers if isinstance(layers, tuple) else (layers,) * self.num_levels

    @property
    def embedding_width(self) -> int:
        """Width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def check(self) -> None:
        levels, channels = self.num_levels, self.block_out_channels
        self.require(levels <= 16, f"block_out_channels has {levels} levels; there may be 16")
        lists = {"down_block_types": self.down_block_types, "up_block_types": self.up_block_types}
        for key, given in (lists | {"layers_per_block": self.layers}).items():
            self.require(len(given) == levels, f"{key} has {len(given)} entries; block_out_channels has {levels}")
        resnets = f"layers_per_block is {self.layers_per_block}; it must be at most {MAX_RESNETS} layers in all"
        self.require(sum(self.layers) <= MAX_RESNETS, resnets)
        groups = f"norm_num_groups is {self.norm_num_groups}; it must divide all block_out_channels, {channels}"
        self.require(not any(width % self.norm_num_groups for width in channels), groups)
        self.require(channels[0] // 2 > self.freq_shift, f"block_out_channels is {channels}; the first is too narrow")

    def approximate_parameters(self) -> int:
        return sum(
            (2 * layers + 1) * channels * (27 * channels + 2 * self.embedding_width)
            for layers, channels in zip(self.layers, self.block_out_channels, strict=True)
        )


@dataclass(frozen=True, eq=False)
class UNet2DConditionConfig(UNetConfig):
    """Settings of `UNet2DConditionModel`. Attention heads are `attention_head_dim` wide.

    The default blocks of diffusers are not implemented, so `down_block_types`, `mid_block_type` and `up_block_types`
    are required.
    """

    down_block_types: tuple[Literal["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"], ...] = ()
    mid_block_type: Literal["UNetMidBlock2DSimpleCrossAttn"] = None  # pyright: ignore
    up_block_types: tuple[Literal["ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"], ...] = ()
    block_out_channels: tuple[Width, ...] = (320, 640, 1280, 1280)
    attention_head_dim: Width = 8  # pyright: ignore[reportIncompatibleVariableOverride]
    cross_attention_dim: Width = 1280

    NEUTRAL = UNetConfig.NEUTRAL | {
        "only_cross_attention": (False,),
        "transformer_layers_per_block": ANYTHING,  # this and the next two are of blocks that are not implemented
        "reverse_transformer_layers_per_block": ANYTHING,
        "use_linear_projection": ANYTHING,
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "num_attention_heads": (None,),
        "dual_cross_attention": (False,),
        "addition_embed_type": (None,),
        "addition_time_embed_dim": (None,),
        "upcast_attention": (False,),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "time_cond_proj_dim": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "projection_class_embeddings_input_dim": (None,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,),
        "addition_embed_type_num_heads": ANYTHING,
    }

    def check(self) -> None:
        super().check()
        widths = [self.block_out_channels[-1]]
        widths += [
            c for c, kind in zip(self.block_out_channels, self.down_block_types, strict=True) if kind == CROSS_DOWN
        ]
        widths += [
            c for c, kind in zip(self.block_out_channels[::-1], self.up_block_types, strict=True) if kind == CROSS_UP
        ]
        for width in widths:
            is_multiple = width % self.attention_head_dim == 0
            self.require(
                is_multiple, f"attention_head_dim is {self.attention_head_dim}; it must divide {width} channels"
            )


@dataclass(frozen=True, eq=False)
class UNet2DConfig(UNetConfig):
    """Settings of `UNet2DModel`.

    The default block types and `add_attention` of diffusers are not implemented, so these settings are required.
    """

    in_channels: Width = 3
    out_channels: Width = 3
    down_block_types: tuple[Literal["ResnetDownsampleBlock2D"], ...] = ()
    mid_block_type: Literal["UNetMidBlock2D"] = "UNetMidBlock2D"  # pyright: ignore[reportIncompatibleVariableOverride]
    up_block_types: tuple[Literal["ResnetUpsampleBlock2D"], ...] = ()
    block_out_channels: tuple[Width, ...] = (224, 448, 672, 896)
    layers_per_block: Width = 2  # pyright: ignore[reportIncompatibleVariableOverride]
    add_attention: Literal[False] = True  # pyright: ignore[reportAssignmentType]

    NEUTRAL = UNetConfig.NEUTRAL | {
        "downsample_type": ANYTHING,  # of other kinds of blocks
        "upsample_type": ANYTHING,
        "attn_norm_num_groups": ANYTHING,  # of attention, which these blocks do not have
        "num_train_timesteps": ANYTHING,  # of learned time embeddings
    }
