"""The U-Nets of the decoder and of super-resolution: residual blocks, with or without attention to context tokens."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from unclip.errors import InputError
from unclip.models.component import Component, ModelConfig, check_shape, zero
from unclip.models.entry import entry_point, routes_entry_points
from unclip.models.kernels import Conv2d, GroupNorm
from unclip.models.layers import (
    AddedKeyValueAttention,
    KeyValue,
    ResnetBlock,
    TimestepEmbedding,
    activation,
    mask_bias,
    sinusoidal_embedding,
    timestep_rows,
)
from unclip.models.unet_config import CROSS_DOWN, CROSS_UP, UNet2DConditionConfig, UNet2DConfig, UNetConfig

AddedTokens = Iterator[KeyValue]
"""The context's keys and values, in the order in which the attention layers run."""


MakeResnet = Callable[..., ResnetBlock]
"""Makes a residual block from the numbers of channels in and out, and "up" or "down"."""
MakeAttention = Callable[[int], AddedKeyValueAttention] | None
"""Makes an attention layer from the number of channels; None for a level without attention."""


def _list(make: Callable[[int], nn.Module], count: int) -> nn.ModuleList:
    return nn.ModuleList([make(i) for i in range(count)])


def _attentions(attention: MakeAttention, channels: int, count: int) -> nn.ModuleList:
    return _list(lambda _: attention(channels), count) if attention else nn.ModuleList()


class Level(nn.Module):
    """One level of a U-Net, with `resnets` and, if it attends to context tokens, `attentions`."""

    attentions: nn.ModuleList

    @entry_point
    def prepare(self, context: Tensor) -> list[KeyValue]:
        """Keys and values of the context [batch, tokens, width] for each of this level's attentions."""
        return [attention.prepare(context) for attention in self.attentions]  # pyright: ignore[reportCallIssue]


class DownBlock(Level):
    """`num_layers` residual blocks. All levels except the last then halve height and width."""

    def __init__(
        self,
        resnet: MakeResnet,
        attention: MakeAttention,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        *,
        halve: bool,
    ) -> None:
        super().__init__()
        self.resnets = _list(lambda i: resnet(out_channels if i else in_channels, out_channels), num_layers)
        self.attentions = _attentions(attention, out_channels, num_layers)
        self.downsamplers = _list(lambda _: resnet(out_channels, out_channels, "down"), int(halve))

    @routes_entry_points
    def forward(
        self, x: Tensor, embedding: Tensor, added: AddedTokens, bias: Tensor | None, *, halve: bool = True
    ) -> list[Tensor]:
        """The outputs for the skip connections, in order; the last one is the input of the next level.

        Without `halve`, the level below is not needed, and its input is not computed.
        """
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, embedding)
            if len(self.attentions):
                x = self.attentions[i](x, next(added), bias)
            outputs.append(x)
        for downsampler in self.downsamplers if halve else ():
            outputs.append(downsampler(x, embedding))
        return outputs


class MidBlock(Level):
    """A residual block, attention if there are context tokens, and a residual block."""

    def __init__(self, resnet: MakeResnet, attention: MakeAttention, channels: int) -> None:
        super().__init__()
        self.resnets = _list(lambda _: resnet(channels, channels), 2)
        self.attentions = _attentions(attention, channels, 1)

    @routes_entry_points
    def forward(self, x: Tensor, embedding: Tensor, added: AddedTokens, bias: Tensor | None) -> Tensor:
        x = self.resnets[0](x, embedding)
        for attention in self.attentions:
            x = attention(x, next(added), bias)
        return self.resnets[1](x, embedding)


class UpBlock(Level):
    """A residual block for each skip connection. All levels except the last then double height and width."""

    def __init__(
        self,
        resnet: MakeResnet,
        attention: MakeAttention,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        *,
        double: bool,
    ) -> None:
        super().__init__()
        widths = [(out_channels if i else in_channels) + skip for i, skip in enumerate(skip_channels)]
        self.resnets = _list(lambda i: resnet(widths[i], out_channels), len(widths))
        self.attentions = _attentions(attention, out_channels, len(widths))
        self.upsamplers = _list(lambda _: resnet(out_channels, out_channels, "up"), int(double))

    @routes_entry_points
    def forward(
        self, x: Tensor, skips: list[Tensor], embedding: Tensor, added: AddedTokens, bias: Tensor | None
    ) -> Tensor:
        """`skips` are the skip connections, one for each of `resnets`, the newest last. The list is emptied."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), embedding)
            if len(self.attentions):
                x = self.attentions[i](x, next(added), bias)
        for upsampler in self.upsamplers:
            x = upsampler(x, embedding)
        return x


C = TypeVar("C", bound=UNetConfig)


class UNet2DOutput(NamedTuple):
    """Output of the U-Nets: `sample` [batch, out_channels, height, width]."""

    sample: Tensor


class DeepOutput(NamedTuple):
    """Output of the U-Nets with `keep_deep`.

    Attributes:
        sample: [batch, out_channels, height, width].
        deep: what the deep levels computed, [batch, channels, height, width].
    """

    sample: Tensor
    deep: Tensor


UNet2DConditionOutput = UNet2DOutput


def _result(output: DeepOutput, *, keep_deep: bool, return_dict: bool) -> UNet2DOutput | DeepOutput | tuple[Tensor]:
    if keep_deep:
        return output
    return UNet2DOutput(output.sample) if return_dict else (output.sample,)


@dataclass(frozen=True)
class UNetContext:
    """The context tokens prepared for every step: their keys and values in each attention layer, and the mask.

    `layers` are in the order in which the attention layers run; `bias` is [batch, 1, 1, tokens] or None.
    """

    layers: tuple[KeyValue, ...]
    bias: Tensor | None


NO_CONTEXT = UNetContext((), None)


class _UNet(Component[C]):
    """Base of the two U-Nets: a downward path, a middle, an upward path, and skip connections."""

    def build(self, config: C) -> None:
        channels, last = config.block_out_channels, config.num_levels - 1
        # diffusers' UNet2DModel has silu here, whatever the act_fn of its blocks.
        outer_act = config.act_fn if isinstance(config, UNet2DConditionConfig) else "silu"
        resnet = functools.partial(
            ResnetBlock,
            embedding_width=config.embedding_width,
            num_groups=config.norm_num_groups,
            eps=config.norm_eps,
            act_fn=config.act_fn,
            dropout=config.dropout,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
        )
        attention: MakeAttention = None
        if isinstance(config, UNet2DConditionConfig):
            sizes = (config.attention_head_dim, config.cross_attention_dim, config.norm_num_groups)
            attention = lambda channels: AddedKeyValueAttention(channels, *sizes)  # noqa: E731
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], config.embedding_width, act_fn=outer_act)
        self.embedding_act = activation(config.act_fn)

        self.down_blocks = nn.ModuleList()
        width, skips = channels[0], [channels[0]]
        for i, kind in enumerate(config.down_block_types):
            own, halve = attention if kind == CROSS_DOWN else None, i < last
            self.down_blocks.append(DownBlock(resnet, own, width, channels[i], config.layers[i], halve=halve))
            width = channels[i]
            skips += [width] * (config.layers[i] + int(halve))
        self.mid_block = MidBlock(resnet, attention, width)
        self.up_blocks = nn.ModuleList()
        for i, kind in zip(range(last, -1, -1), config.up_block_types, strict=True):
            taken = [skips.pop() for _ in range(config.layers[i] + 1)]
            own = attention if kind == CROSS_UP else None
            self.up_blocks.append(UpBlock(resnet, own, width, taken, channels[i], double=i > 0))
            width = channels[i]

        self.conv_norm_out = GroupNorm(config.norm_num_groups, width, eps=config.norm_eps)
        self.conv_act = activation(outer_act)
        self.conv_out = Conv2d(width, config.out_channels, 3, padding=1)
        # Convolutions are faster in this layout, and their outputs keep it: 1.1 to 1.2 times (CPU, AVX2, float32).
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def initialize_for_training(self, generator: torch.Generator | None = None) -> Self:
        """Initialize as `Component` does, with every residual branch and the output at zero."""
        super().initialize_for_training(generator)
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                zero(module.conv2)
            elif isinstance(module, AddedKeyValueAttention):
                zero(module.to_out)
        zero(self.conv_out)
        return self

    def _levels(self) -> Sequence[Level]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]  # pyright: ignore[reportReturnType]

    def _embed(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None) -> Tensor:
        """The time embedding after its activation: [batch or 1, embedding_width]."""
        config = self.config
        rows = timestep_rows(timestep, sample)
        features = sinusoidal_embedding(
            rows, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        embedding = self.time_embedding(features.to(self.dtype))
        if config.adds_class_labels:
            if class_labels is None:
                raise InputError("this network needs class_labels, [batch, time embedding width]")
            embedding = embedding + class_labels.to(embedding.dtype)
        return self.embedding_act(embedding)

    def _run(self, sample: Tensor, embedding: Tensor, context: UNetContext, deep: Tensor | None) -> DeepOutput:
        """Run the network, or with `deep` only its first level; `embedding` is after its activation.

        Returns: the output, and the input of the last level on the upward path.
        """
        config = self.config
        check_shape("the sample", sample, "batch", config.in_channels, "height", "width")
        if sample.shape[2] % config.multiple or sample.shape[3] % config.multiple:
            raise InputError(f"the sample is {tuple(sample.shape)}; its sides must be a multiple of {config.multiple}")
        bias = context.bias
        x = self.conv_in(sample)
        skips = [x]
        first, last = self.down_blocks[0], self.up_blocks[-1]
        if deep is not None:
            layers, num_last = context.layers, len(last.attentions)  # pyright: ignore[reportArgumentType]
            skips += first(x, embedding, iter(layers), bias, halve=False)
            x, added = deep, iter(layers[len(layers) - num_last :])
        else:
            added = iter(context.layers)
            for down_block in self.down_blocks:
                skips += down_block(skips[-1], embedding, added, bias)
            x = self.mid_block(skips[-1], embedding, added, bias)
            for up_block in self.up_blocks[:-1]:
                # The block gets only its own part: a hook may pass it a copy, which it would empty instead of ours.
                count = len(up_block.resnets)  # pyright: ignore[reportArgumentType]
                skips, taken = skips[:-count], skips[-count:]
                x = up_block(x, taken, embedding, added, bias)
        output = last(x, skips, embedding, added, bias)
        return DeepOutput(self.conv_out(self.conv_act(self.conv_norm_out(output))), x)


class UNet2DConditionModel(_UNet[UNet2DConditionConfig]):
    """The decoder's network: pictures conditioned on context tokens and on a class embedding.

    Source: arXiv 2204.06125 §2.1 (a modified GLIDE, Nichol et al. 2021).
    """

    config_class: ClassVar = UNet2DConditionConfig
    projections: ClassVar[tuple[str, ...]] = ()
    """The values of `encoder_hid_dim_type` for which `from_config` gives a subclass."""

    @classmethod
    def from_config(cls, config: ModelConfig | Mapping[str, Any], /) -> Self:
        """As `Component.from_config`; settings of a Kandinsky decoder give a `KandinskyUNet`."""
        own = [kind for kind in cls.__subclasses__() if config.get("encoder_hid_dim_type") in kind.projections]
        return own[0](config) if own else super().from_config(config)

    def _read_context(self, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None) -> UNetContext:
        """What the context contributes to every step.

        Args:
            encoder_hidden_states: the context tokens [batch, tokens, cross_attention_dim].
            attention_mask: [batch, tokens], true or 1 for tokens that are not masked; None masks none.

        Raises:
            InputError: a shape is wrong.
        """
        tokens, width = encoder_hidden_states, self.config.cross_attention_dim
        check_shape("encoder_hidden_states", tokens, "batch", "tokens", width)
        if attention_mask is not None:
            check_shape("attention_mask", attention_mask, *tokens.shape[:2])
        layers = tuple(layer for level in self._levels() for layer in level.prepare(tokens))
        return UNetContext(layers, None if attention_mask is None else mask_bias(attention_mask, tokens.dtype))

    prepare = entry_point(_read_context)

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
    ) -> UNet2DConditionOutput | DeepOutput | tuple[Tensor]:
        """One step's raw output [batch, out_channels, height, width].

        Args:
            sample: [batch, in_channels, height, width], sizes multiples of 2 ** (levels - 1).
            timestep: a number, or a tensor [] or [batch].
            encoder_hidden_states: the context tokens, as for `prepare`.
            class_labels: [batch, time embedding width], added to the time embedding.
            attention_mask, encoder_attention_mask: [batch, tokens] over the context; the first one given is used.
            return_dict: whether the result is a `UNet2DConditionOutput` or a plain tuple.
            context: the result of `prepare` for the same batch, instead of the tokens and their mask.
            deep: what the deep levels computed for the same batch at a neighbouring timestep. Only the first level is
                then computed (DeepCache, Ma et al. 2312.00858).
            keep_deep: the output also has `deep`: it is a `DeepOutput`.

        Raises:
            InputError: a shape is wrong, class_labels are missing, or not exactly one of tokens and context is given.
        """
        if (context is None) == (encoder_hidden_states is None):
            raise InputError("give either encoder_hidden_states, or the context from prepare()")
        if encoder_hidden_states is not None:
            mask = encoder_attention_mask if attention_mask is None else attention_mask
            context = self._read_context(encoder_hidden_states, mask)
        assert context is not None
        output = self._run(sample, self._embed(sample, timestep, class_labels), context, deep)
        return _result(output, keep_deep=keep_deep, return_dict=return_dict)


class UNet2DModel(_UNet[UNet2DConfig]):
    """The network of super-resolution: pictures conditioned on the timestep and on further input channels.

    Source: arXiv 2204.06125 §2.1, "upsamplers": no attention, no text.
    """

    config_class: ClassVar = UNet2DConfig

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        *,
        deep: Tensor | None = None,
        keep_deep: bool = False,
    ) -> UNet2DOutput | DeepOutput | tuple[Tensor]:
        """One step's raw output [batch, out_channels, height, width].

        Args:
            sample: [batch, in_channels, height, width], sizes multiples of 2 ** (levels - 1).
            timestep: a number, or a tensor [] or [batch].
            class_labels: only with class_embed_type "identity": [batch, time embedding width].
            deep, keep_deep: as in `UNet2DConditionModel`.

        Raises:
            InputError: a shape is wrong, or class_labels are missing or not supported.
        """
        if class_labels is not None and self.config.class_embed_type is None:
            raise InputError("class_labels are given to a network without class_embed_type; leave them out")
        output = self._run(sample, self._embed(sample, timestep, class_labels), NO_CONTEXT, deep)
        return _result(output, keep_deep=keep_deep, return_dict=return_dict)
