"""The mean and the standard deviation of image embeddings, as a component of Stable unCLIP's folders."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from unclip.models.component import Component, ModelConfig, WideWidth


@dataclass(frozen=True, eq=False)
class ImageNormalizerConfig(ModelConfig):
    """Settings of `StableUnCLIPImageNormalizer`."""

    embedding_dim: WideWidth = 768


class StableUnCLIPImageNormalizer(Component[ImageNormalizerConfig]):
    """The mean and the standard deviation of image embeddings, with the names of diffusers' class."""

    config_class: ClassVar = ImageNormalizerConfig

    def build(self, config: ImageNormalizerConfig) -> None:
        self.mean = nn.Parameter(torch.zeros(1, config.embedding_dim))
        self.std = nn.Parameter(torch.ones(1, config.embedding_dim))
