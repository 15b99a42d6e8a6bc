"""unclip: an open implementation of unCLIP (DALL·E 2, arXiv 2204.06125).

Names are imported on first use, so importing the package is fast.

    from unclip import UnCLIPPipeline
    pipe = UnCLIPPipeline.from_pretrained("unclip-emoji")
    pipe("a red apple", seed=1, **pipe.recommended).images[0].save("apple.png")
"""

# ruff: noqa: F401, F403
import importlib
from typing import TYPE_CHECKING, Any

from unclip.settings import SAMPLERS

if TYPE_CHECKING:  # what __getattr__ finds
    from unclip.clip.concepts import Concepts
    from unclip.clip.statistics import EmbeddingStatistics
    from unclip.data.embeddings import Embeddings, read_embeddings
    from unclip.diffusion.process import DiffusionProcess
    from unclip.diffusion.scheduler import *
    from unclip.errors import *
    from unclip.models.image_normalizer import StableUnCLIPImageNormalizer
    from unclip.models.movq import VQModel
    from unclip.models.pca import PrincipalComponents
    from unclip.models.prior import PriorTransformer
    from unclip.models.prior_autoregressive import AutoregressivePrior
    from unclip.models.prior_dalle2 import EmbeddingPriorNetwork
    from unclip.models.text_proj import UnCLIPTextProjModel
    from unclip.models.unet import UNet2DConditionModel, UNet2DModel
    from unclip.pipelines.arguments import ImagePipelineOutput
    from unclip.pipelines.embedding_prior import EmbeddingPrior
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
    from unclip.pipelines.inpaint import UnCLIPInpaintPipeline
    from unclip.pipelines.interpolation import UnCLIPImageInterpolationPipeline, UnCLIPTextInterpolationPipeline
    from unclip.pipelines.kandinsky import (
        KandinskyImg2ImgPipeline,
        KandinskyInpaintPipeline,
        KandinskyPipeline,
        KandinskyV22Img2ImgPipeline,
        KandinskyV22InpaintPipeline,
        KandinskyV22Pipeline,
    )
    from unclip.pipelines.kandinsky_combined import (
        KandinskyCombinedPipeline,
        KandinskyImg2ImgCombinedPipeline,
        KandinskyInpaintCombinedPipeline,
        KandinskyV22CombinedPipeline,
        KandinskyV22Img2ImgCombinedPipeline,
        KandinskyV22InpaintCombinedPipeline,
    )
    from unclip.pipelines.kandinsky_prior import (
        KandinskyPriorPipeline,
        KandinskyPriorPipelineOutput,
        KandinskyV22PriorPipeline,
    )
    from unclip.pipelines.manipulation import Manipulator
    from unclip.pipelines.model_files import recorded_settings
    from unclip.pipelines.stable_unclip import StableUnCLIPImg2ImgPipeline, StableUnCLIPPipeline
    from unclip.pipelines.text_to_image import UnCLIPPipeline
    from unclip.pipelines.translator import Translator
    from unclip.pipelines.vector_prior import VectorPrior
    from unclip.stages.manipulation import BipartiteLatent, edit, even_places, interpolate, path_at

__version__ = "0.1.0"

_NAMES = {
    "clip.concepts": "Concepts",
    "clip.statistics": "EmbeddingStatistics",
    "data.embeddings": "Embeddings read_embeddings",
    "diffusion.process": "DiffusionProcess",
    "diffusion.scheduler": "DDPMScheduler " + " ".join(row.scheduler for row in SAMPLERS.values()),
    "errors": "Cancelled CheckpointError ConfigError DataError EmbeddingScaleWarning ImageError InputError "
    "MissingDependencyError MissingFileError NonFiniteError OutputError OutputExistsError TrainingError UnclipError "
    "UnknownCaptionWarning UnsafeFileError WeightsError",
    "models.movq": "VQModel",
    "models.image_normalizer": "StableUnCLIPImageNormalizer",
    "models.pca": "PrincipalComponents",
    "models.prior": "PriorTransformer",
    "models.prior_autoregressive": "AutoregressivePrior",
    "models.prior_dalle2": "EmbeddingPriorNetwork",
    "models.text_proj": "UnCLIPTextProjModel",
    "models.unet": "UNet2DConditionModel UNet2DModel",
    "pipelines.arguments": "ImagePipelineOutput",
    "pipelines.embedding_prior": "EmbeddingPrior",
    "pipelines.image_variation": "UnCLIPImageVariationPipeline",
    "pipelines.inpaint": "UnCLIPInpaintPipeline",
    "pipelines.interpolation": "UnCLIPImageInterpolationPipeline UnCLIPTextInterpolationPipeline",
    "pipelines.kandinsky": "KandinskyImg2ImgPipeline KandinskyInpaintPipeline KandinskyPipeline "
    "KandinskyV22Img2ImgPipeline KandinskyV22InpaintPipeline KandinskyV22Pipeline",
    "pipelines.kandinsky_combined": "KandinskyCombinedPipeline KandinskyImg2ImgCombinedPipeline "
    "KandinskyInpaintCombinedPipeline KandinskyV22CombinedPipeline KandinskyV22Img2ImgCombinedPipeline "
    "KandinskyV22InpaintCombinedPipeline",
    "pipelines.kandinsky_prior": "KandinskyPriorPipeline KandinskyPriorPipelineOutput KandinskyV22PriorPipeline",
    "pipelines.manipulation": "Manipulator",
    "pipelines.model_files": "recorded_settings",
    "pipelines.stable_unclip": "StableUnCLIPImg2ImgPipeline StableUnCLIPPipeline",
    "pipelines.text_to_image": "UnCLIPPipeline",
    "pipelines.translator": "Translator",
    "pipelines.vector_prior": "VectorPrior",
    "stages.manipulation": "BipartiteLatent edit even_places interpolate path_at",
}
"""The public names by module."""
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unclip' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"unclip.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
