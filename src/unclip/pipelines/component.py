"""How each kind of component is read from a folder and written to one.

Knows the classes that a model_index.json may name and what they need; knows no pipeline. Called by `pipeline.py`.
"""

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unclip.checkpoints.files import safe_join
from unclip.checkpoints.weights import check_finite, open_weights, read_tensors
from unclip.errors import CheckpointError, ConfigError, MissingFileError, UnclipError, WeightsError

OURS = {
    "AutoregressivePrior": "unclip.models.prior_autoregressive",
    "PriorTransformer": "unclip.models.prior",
    "UNet2DConditionModel": "unclip.models.unet",
    "UNet2DModel": "unclip.models.unet",
    "UnCLIPTextProjModel": "unclip.models.text_proj",
    "UnCLIPScheduler": "unclip.diffusion.scheduler",
    "DDIMScheduler": "unclip.diffusion.scheduler",
    "DPMSolverMultistepScheduler": "unclip.diffusion.scheduler",
}
OURS_ALONE = ("AutoregressivePrior", "UnCLIPTextProjModel")
"""What the ecosystem has no class for, or none that its loaders find by itself."""
# Names in old folders → the class that reads them now.
TRANSFORMERS = {
    "CLIPTextModelWithProjection": "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection": "CLIPVisionModelWithProjection",
    "CLIPTokenizer": "CLIPTokenizer",
    "CLIPTokenizerFast": "CLIPTokenizer",
    "CLIPFeatureExtractor": "CLIPImageProcessorPil",
    "CLIPImageProcessor": "CLIPImageProcessorPil",
    "CLIPImageProcessorFast": "CLIPImageProcessorPil",
    "CLIPImageProcessorPil": "CLIPImageProcessorPil",
}

# transformers' setting is one for the process: two threads would put back each other's.
_bars = threading.Lock()


def read_component(
    folder: Path, name: str, class_name: str, *, torch_dtype: torch.dtype | None, variant: str | None
) -> Any:
    """Read one component from `folder/name`.

    Raises: CheckpointError (or ConfigError) that says which component failed, and why.
    """
    try:
        place = safe_join(folder, name)
        if not place.is_dir():
            raise MissingFileError(f"{place} is not there")
        with _no_bars():
            return _reader(class_name)(place, torch_dtype, variant)
    except UnclipError as error:
        raise type(error)(f"component {name!r} ({class_name}) cannot be loaded: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"component {name!r} ({class_name}) cannot be loaded from {folder}: {error}") from error


def write_component(component: Any, folder: Path, *, variant: str | None) -> None:
    """Write one component into a folder of its own."""
    with _no_bars():
        if isinstance(component, nn.Module):
            component.save_pretrained(folder, variant=variant)  # type: ignore[operator]
        else:
            component.save_pretrained(folder)


def index_entry(component: Any) -> list[str]:
    """[library, class] as model_index.json names a component; the ecosystem's loaders know most of them."""
    name = type(component).__name__
    if name in OURS:
        return ["unclip" if name in OURS_ALONE else "diffusers", name]
    aliases = {"CLIPImageProcessorPil": "CLIPImageProcessor", "CLIPTokenizerFast": "CLIPTokenizer"}
    return ["transformers", aliases.get(name, name)]


@contextmanager
def _no_bars() -> Iterator[None]:
    """No bars of transformers' own on stderr, one for every part; afterwards its setting is what it was."""
    from transformers.utils import logging

    # Not by `disable_progress_bar()`: that one changes the hub client's setting too, which could not be put back.
    with _bars:
        shown = logging.is_progress_bar_enabled()
        logging._tqdm_active = False
        try:
            yield
        finally:
            logging._tqdm_active = shown


def _reader(class_name: str) -> Callable[[Path, torch.dtype | None, str | None], Any]:
    if class_name in OURS:
        cls = getattr(importlib.import_module(OURS[class_name]), class_name)
        if class_name.endswith("Scheduler"):
            return lambda folder, dtype, variant: cls.from_pretrained(folder)
        return lambda folder, dtype, variant: cls.from_pretrained(folder, torch_dtype=dtype, variant=variant)
    if class_name in TRANSFORMERS:
        cls = getattr(importlib.import_module("transformers"), TRANSFORMERS[class_name])
        if "Model" in class_name:
            return lambda folder, dtype, variant: _read_clip(cls, folder, dtype, variant)
        if "Tokenizer" in class_name:
            return lambda folder, dtype, variant: _read_tokenizer(cls, folder)
        return lambda folder, dtype, variant: cls.from_pretrained(folder, local_files_only=True)
    raise ConfigError(f"unclip has no class {class_name!r}; it reads {', '.join(sorted([*OURS, *TRANSFORMERS]))}")


def _read_tokenizer(cls: Any, folder: Path) -> Any:
    """A tokenizer with the folder's vocabulary; without one, transformers would make up an empty one."""
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise MissingFileError(f"{folder} has neither tokenizer.json nor {name}; download the model again")
    return cls.from_pretrained(folder, local_files_only=True)


def _read_clip(cls: Any, folder: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    """A transformers CLIP model, its file checked first; what the file lacks is an error, not a random weight."""
    index = open_weights(folder, stem="model", variant=variant)
    for name, tensor in read_tensors(index):
        check_finite(tensor, name, str(folder))
    model, about = cls.from_pretrained(
        folder,
        dtype=dtype or torch.float32,
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    wrong = sorted(map(str, [*about["missing_keys"], *about.get("mismatched_keys", [])]))
    if wrong:
        some = ", ".join(wrong[:3])
        raise WeightsError(f"{len(wrong)} weights are missing in {folder} or of another shape ({some}…)")
    return model.eval()
