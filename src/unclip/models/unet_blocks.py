"""The levels of a UNet: residual blocks, with or without attention to added tokens, down, in the middle and up.

Knows neither timesteps nor which network it is part of. Called by the UNets.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unclip.models.attention import AddedKeyValueAttention, KeyValue
from unclip.models.entry import entry_point, routes_entry_points
from unclip.models.resnet import ResnetBlock

AddedTokens = Iterator[KeyValue]
"""The context's keys and values, handed out in the order in which a UNet's attention layers run."""


@dataclass(frozen=True)
class BlockMaker:
    """Makes a UNet's residual blocks and attentions, which differ in their channels only."""

    embedding_width: int
    num_groups: int
    eps: float
    act_fn: str
    dropout: float
    scale_shift: bool
    head_width: int = 64
    context_width: int = 0

    def resnet(self, in_channels: int, out_channels: int, resample=None) -> ResnetBlock:
        return ResnetBlock(
            in_channels,
            out_channels,
            embedding_width=self.embedding_width,
            num_groups=self.num_groups,
            eps=self.eps,
            act_fn=self.act_fn,
            dropout=self.dropout,
            scale_shift=self.scale_shift,
            resample=resample,
        )

    def attention(self, channels: int) -> AddedKeyValueAttention:
        return AddedKeyValueAttention(channels, self.head_width, self.context_width, self.num_groups)


def _list(make: Callable[[int], nn.Module], count: int) -> nn.ModuleList:
    return nn.ModuleList([make(i) for i in range(count)])


class Level(nn.Module):
    """One level of a UNet: has `resnets` and, if it looks at added tokens, `attentions`."""

    attentions: nn.ModuleList

    @entry_point
    def prepare(self, context: Tensor) -> list[KeyValue]:
        """Keys and values of the context [batch, tokens, width] for each of this level's attentions."""
        return [attention.prepare(context) for attention in self.attentions]  # pyright: ignore[reportCallIssue]


class DownBlock(Level):
    """`num_layers` residual blocks and then, unless it is the last level, a halving of height and width."""

    def __init__(
        self, maker: BlockMaker, in_channels: int, out_channels: int, num_layers: int, *, attend: bool, halve: bool
    ) -> None:
        super().__init__()
        self.resnets = _list(lambda i: maker.resnet(out_channels if i else in_channels, out_channels), num_layers)
        self.attentions = _list(lambda _: maker.attention(out_channels), num_layers if attend else 0)
        self.downsamplers = _list(lambda _: maker.resnet(out_channels, out_channels, "down"), int(halve))

    @routes_entry_points
    def forward(self, x: Tensor, embedding: Tensor, added: AddedTokens, bias: Tensor | None) -> list[Tensor]:
        """All that the way up will need, in order; the last is where the next level begins."""
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, embedding)
            if len(self.attentions):
                x = self.attentions[i](x, next(added), bias)
            outputs.append(x)
        for downsampler in self.downsamplers:
            outputs.append(downsampler(x, embedding))
        return outputs


class MidBlock(Level):
    """A residual block, attention if there are added tokens, a residual block."""

    def __init__(self, maker: BlockMaker, channels: int, *, attend: bool) -> None:
        super().__init__()
        self.resnets = _list(lambda _: maker.resnet(channels, channels), 2)
        self.attentions = _list(lambda _: maker.attention(channels), int(attend))

    @routes_entry_points
    def forward(self, x: Tensor, embedding: Tensor, added: AddedTokens, bias: Tensor | None) -> Tensor:
        x = self.resnets[0](x, embedding)
        for attention in self.attentions:
            x = attention(x, next(added), bias)
        return self.resnets[1](x, embedding)


class UpBlock(Level):
    """A residual block for each output of the way down and then, unless it is the last level, twice the size."""

    def __init__(
        self,
        maker: BlockMaker,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        *,
        attend: bool,
        double: bool,
    ) -> None:
        super().__init__()
        self.resnets = _list(
            lambda i: maker.resnet((out_channels if i else in_channels) + skip_channels[i], out_channels),
            len(skip_channels),
        )
        self.attentions = _list(lambda _: maker.attention(out_channels), len(skip_channels) if attend else 0)
        self.upsamplers = _list(lambda _: maker.resnet(out_channels, out_channels, "up"), int(double))

    @routes_entry_points
    def forward(
        self, x: Tensor, skips: list[Tensor], embedding: Tensor, added: AddedTokens, bias: Tensor | None
    ) -> Tensor:
        """`skips`: its own outputs of the way down, one for each of `resnets`, the newest last; they are used up."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), embedding)
            if len(self.attentions):
                x = self.attentions[i](x, next(added), bias)
        for upsampler in self.upsamplers:
            x = upsampler(x, embedding)
        return x
