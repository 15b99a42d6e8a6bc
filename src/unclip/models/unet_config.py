"""The settings of the two UNets, with the keys and defaults of diffusers."""

from dataclasses import dataclass
from typing import Any, ClassVar

from unclip.errors import ConfigError
from unclip.models.component import ANYTHING, MAX_LAYERS, Anything, ModelConfig
from unclip.models.layers import ACTIVATIONS

PLAIN_DOWN, PLAIN_UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
CROSS_DOWN, CROSS_UP = "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"
CROSS_MID, PLAIN_MID = "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D"


@dataclass(frozen=True, eq=False)
class UNetConfig(ModelConfig):
    """What both UNets have in common.

    `sample_size`: height and width in pixels, an information only; any multiple of 2 ** (levels - 1) works.
    `block_out_channels`: the width of each level, each a multiple of `norm_num_groups`.
    `layers_per_block`: residual blocks a level on the way down; one more on the way up.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int | float = 0
    down_block_types: tuple[str, ...] = ()
    mid_block_type: str | None = None
    up_block_types: tuple[str, ...] = ()
    block_out_channels: tuple[int, ...] = ()
    layers_per_block: int | tuple[int, ...] = 2
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    attention_head_dim: int = 8
    class_embed_type: str | None = None
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...] | Anything]] = {
        "center_input_sample": (False,),
        "downsample_padding": ANYTHING,  # of a convolution that these blocks do not have
        "mid_block_scale_factor": (1,),
        "num_class_embeds": (None,),
        "time_embedding_type": ("positional",),
    }

    @property
    def num_levels(self) -> int:
        return len(self.block_out_channels)

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
        self.check_whole("sample_size", high=65_536, optional=True)
        self.check_whole("in_channels", "out_channels", "block_out_channels", "norm_num_groups")
        self.check_whole("layers_per_block", high=MAX_LAYERS)
        self.check_whole("time_embedding_dim", high=65_536, optional=True)
        self.check_real("dropout", low=0.0, high=1.0)
        self.check_real("norm_eps", low=0.0, high=1.0)
        self.check_real("freq_shift", low=0, high=2)
        self.check_one_of("flip_sin_to_cos", (True, False))
        self.check_one_of("act_fn", tuple(ACTIVATIONS))
        self.check_one_of("class_embed_type", (None, "identity"))
        self.check_one_of("resnet_time_scale_shift", ("default", "scale_shift"))
        if not isinstance(self.block_out_channels, tuple) or not 1 <= self.num_levels <= 16:
            raise self._refuse("block_out_channels", "a list of 1 to 16 widths", self.block_out_channels)
        lists = {"down_block_types": self.down_block_types, "up_block_types": self.up_block_types}
        for key, given in (lists | {"layers_per_block": self.layers}).items():
            if not isinstance(given, tuple) or len(given) != self.num_levels:
                raise self._refuse(key, f"a list of {self.num_levels}, one for each of block_out_channels", given)
        if sum(self.layers) > MAX_LAYERS:
            raise self._refuse("layers_per_block", f"at most {MAX_LAYERS} layers in all", self.layers_per_block)
        if isinstance(self.sample_size, tuple) and len(self.sample_size) != 2:
            raise self._refuse("sample_size", "one number, or height and width", self.sample_size)
        for channels in self.block_out_channels:
            self.check_divides(self.norm_num_groups, channels, "norm_num_groups must divide all block_out_channels")
        if self.block_out_channels[0] // 2 <= self.freq_shift:
            raise self._refuse("block_out_channels", "wider than twice freq_shift", self.block_out_channels)

    def approximate_parameters(self) -> int:
        return sum(
            (2 * layers + 1) * channels * (27 * channels + 2 * self.embedding_width)
            for layers, channels in zip(self.layers, self.block_out_channels, strict=True)
        )


@dataclass(frozen=True, eq=False)
class UNet2DConditionConfig(UNetConfig):
    """Settings of `UNet2DConditionModel`; attention heads are `attention_head_dim` wide.

    The ecosystem's default block types are not implemented, so the three `..._block_type(s)` must be given.
    """

    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    cross_attention_dim: int = 1280

    NEUTRAL = UNetConfig.NEUTRAL | {
        "only_cross_attention": (False,),
        "transformer_layers_per_block": ANYTHING,  # of blocks that are not implemented, as are the next two
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
        self.check_one_of("down_block_types", (PLAIN_DOWN, CROSS_DOWN))
        self.check_one_of("mid_block_type", (CROSS_MID,))
        self.check_one_of("up_block_types", (PLAIN_UP, CROSS_UP))
        super().check()
        for key in ("attention_head_dim", "cross_attention_dim"):
            if isinstance(getattr(self, key), tuple):
                raise ConfigError(f"{self._name}: a {key} for each level is not implemented; give one number")
        self.check_whole("attention_head_dim", "cross_attention_dim")
        widths = [self.block_out_channels[-1]]
        widths += [
            c for c, kind in zip(self.block_out_channels, self.down_block_types, strict=True) if kind == CROSS_DOWN
        ]
        widths += [
            c for c, kind in zip(self.block_out_channels[::-1], self.up_block_types, strict=True) if kind == CROSS_UP
        ]
        for channels in widths:
            self.check_divides(self.attention_head_dim, channels, "attention_head_dim must divide the channels")


@dataclass(frozen=True, eq=False)
class UNet2DConfig(UNetConfig):
    """Settings of `UNet2DModel`.

    The ecosystem's default block types, and its default `add_attention` true, are not implemented: they must be given.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + ("AttnDownBlock2D",) * 3
    mid_block_type: str | None = PLAIN_MID
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D",) * 3 + ("UpBlock2D",)
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int | tuple[int, ...] = 2
    attention_head_dim: int | None = 8  # pyright: ignore[reportIncompatibleVariableOverride]
    add_attention: bool = True

    NEUTRAL = UNetConfig.NEUTRAL | {
        "downsample_type": ANYTHING,  # of other kinds of blocks
        "upsample_type": ANYTHING,
        "attn_norm_num_groups": ANYTHING,  # of the attention that is not there
        "num_train_timesteps": ANYTHING,  # of learned time embeddings
    }

    def check(self) -> None:
        self.check_one_of("down_block_types", (PLAIN_DOWN,))
        self.check_one_of("mid_block_type", (PLAIN_MID,))
        self.check_one_of("up_block_types", (PLAIN_UP,))
        self.check_one_of("add_attention", (False,))
        if isinstance(self.layers_per_block, tuple):
            raise self._refuse("layers_per_block", "one whole number", self.layers_per_block)
        super().check()
