"""The networks: prior, decoder, super-resolution, and the projection between CLIP and the decoder."""

# ruff: noqa: F401
from unclip.models.component import Component, ModelConfig
from unclip.models.image_normalizer import ImageNormalizerConfig, StableUnCLIPImageNormalizer
from unclip.models.kandinsky import KandinskyUNet, KandinskyUNetConfig
from unclip.models.movq import VQConfig, VQModel
from unclip.models.prior import PriorConfig, PriorPrefix, PriorTransformer, PriorTransformerOutput
from unclip.models.prior_autoregressive import AutoregressivePrior, AutoregressivePriorConfig, CodeMemory
from unclip.models.prior_dalle2 import EmbeddingPriorConfig, EmbeddingPriorNetwork
from unclip.models.text_proj import UnCLIPTextProjConfig, UnCLIPTextProjModel
from unclip.models.unet import UNet2DConditionModel, UNet2DConditionOutput, UNet2DModel, UNet2DOutput, UNetContext
from unclip.models.unet_config import UNet2DConditionConfig, UNet2DConfig
