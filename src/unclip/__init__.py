"""unclip: an open implementation of unCLIP (DALL·E 2, arXiv 2204.06125).

Names are imported on first use, so importing the package is fast.

    from unclip import UnCLIPPipeline
    pipe = UnCLIPPipeline.from_pretrained("unclip-emoji")
    pipe("a red apple", seed=1, **pipe.recommended).images[0].save("apple.png")
"""

import importlib
from typing import TYPE_CHECKING, Any

from unclip.settings import SAMPLERS

if TYPE_CHECKING:
    from unclip.clip.concepts import Concepts
    from unclip.diffusion.process import DiffusionProcess
    from unclip.diffusion.scheduler import *  # noqa: F403 (its __all__ is read by type checkers)
    from unclip.errors import (
        Cancelled,
        CheckpointError,
        ConfigError,
        DataError,
        ImageError,
        InputError,
        MissingDependencyError,
        MissingFileError,
        NonFiniteError,
        OutputError,
        OutputExistsError,
        TrainingError,
        UnclipError,
        UnknownCaptionWarning,
        UnsafeFileError,
        WeightsError,
    )
    from unclip.models.pca import PrincipalComponents
    from unclip.models.prior import PriorTransformer
    from unclip.models.prior_autoregressive import AutoregressivePrior
    from unclip.models.text_proj import UnCLIPTextProjModel
    from unclip.models.unet import UNet2DConditionModel, UNet2DModel
    from unclip.pipelines.arguments import ImagePipelineOutput
    from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
    from unclip.pipelines.inpaint import UnCLIPInpaintPipeline
    from unclip.pipelines.interpolation import UnCLIPImageInterpolationPipeline, UnCLIPTextInterpolationPipeline
    from unclip.pipelines.manipulation import Manipulator
    from unclip.pipelines.model_files import recorded_settings
    from unclip.pipelines.text_to_image import UnCLIPPipeline
    from unclip.stages.manipulation import BipartiteLatent, edit, even_places, interpolate, path_at

__version__ = "0.1.0"

_HOMES = {
    "AutoregressivePrior": "models.prior_autoregressive",
    "BipartiteLatent": "stages.manipulation",
    "Cancelled": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "DiffusionProcess": "diffusion.process",
    "ImageError": "errors",
    "ImagePipelineOutput": "pipelines.arguments",
    "InputError": "errors",
    "Manipulator": "pipelines.manipulation",
    "MissingDependencyError": "errors",
    "MissingFileError": "errors",
    "NonFiniteError": "errors",
    "OutputError": "errors",
    "OutputExistsError": "errors",
    "PrincipalComponents": "models.pca",
    "PriorTransformer": "models.prior",
    "TrainingError": "errors",
    "UNet2DConditionModel": "models.unet",
    "UNet2DModel": "models.unet",
    "UnCLIPImageInterpolationPipeline": "pipelines.interpolation",
    "UnCLIPImageVariationPipeline": "pipelines.image_variation",
    "UnCLIPInpaintPipeline": "pipelines.inpaint",
    "UnCLIPPipeline": "pipelines.text_to_image",
    "UnCLIPTextInterpolationPipeline": "pipelines.interpolation",
    "UnCLIPTextProjModel": "models.text_proj",
    "UnclipError": "errors",
    "UnknownCaptionWarning": "errors",
    "Concepts": "clip.concepts",
    "UnsafeFileError": "errors",
    "WeightsError": "errors",
    "edit": "stages.manipulation",
    "even_places": "stages.manipulation",
    "interpolate": "stages.manipulation",
    "path_at": "stages.manipulation",
    "recorded_settings": "pipelines.model_files",
    **{row.scheduler: "diffusion.scheduler" for row in SAMPLERS.values()},
}
"""The module of each public name."""

__all__ = [
    "AutoregressivePrior",
    "BipartiteLatent",
    "Cancelled",
    "CheckpointError",
    "Concepts",
    "ConfigError",
    "DataError",
    "DiffusionProcess",
    "ImageError",
    "ImagePipelineOutput",
    "InputError",
    "Manipulator",
    "MissingDependencyError",
    "MissingFileError",
    "NonFiniteError",
    "OutputError",
    "OutputExistsError",
    "PrincipalComponents",
    "PriorTransformer",
    "TrainingError",
    "UNet2DConditionModel",
    "UNet2DModel",
    "UnCLIPImageInterpolationPipeline",
    "UnCLIPImageVariationPipeline",
    "UnCLIPInpaintPipeline",
    "UnCLIPPipeline",
    "UnCLIPTextInterpolationPipeline",
    "UnCLIPTextProjModel",
    "UnclipError",
    "UnknownCaptionWarning",
    "UnsafeFileError",
    "WeightsError",
    "__version__",
    "edit",
    "even_places",
    "interpolate",
    "path_at",
    "recorded_settings",
]
__all__ += [row.scheduler for row in SAMPLERS.values()]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unclip' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"unclip.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
