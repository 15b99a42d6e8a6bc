"""How each kind of component is read from a folder and written to one.

Knows the classes that a model_index.json may name and what they need; knows no pipeline. Called by `pipeline.py`.
"""

import importlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unclip.checkpoints.files import read_json, safe_join
from unclip.checkpoints.weights import (
    DEFAULT_STEM,
    TRANSFORMERS_STEM,
    check_finite,
    check_fit,
    file_name,
    index_name,
    open_weights,
    original,
    read_tensors,
    state_of,
    stored_type,
)
from unclip.clip.config import HALVES, SIZE_LIMITS, check_clip_settings, max_length_of, read_image_processor_settings
from unclip.clip.networks import CLIPImageEncoder, CLIPTextEncoder
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
    "CLIPModel": "CLIPModel",
    "CLIPTokenizer": "CLIPTokenizer",
    "CLIPTokenizerFast": "CLIPTokenizer",
    "CLIPFeatureExtractor": "CLIPImageProcessorPil",
    "CLIPImageProcessor": "CLIPImageProcessorPil",
    "CLIPImageProcessorFast": "CLIPImageProcessorPil",
    "CLIPImageProcessorPil": "CLIPImageProcessorPil",
}

OWN_CLIP = {
    "CLIPTextModelWithProjection": ("unclip.clip.networks", "CLIPTextEncoder"),
    "CLIPVisionModelWithProjection": ("unclip.clip.networks", "CLIPImageEncoder"),
    "CLIPTokenizer": ("unclip.clip.tokenizer", "CaptionTokenizer"),
    "CLIPImageProcessorPil": ("unclip.clip.preprocessing", "PicturePreprocessor"),
}
"""Transformers' class → unclip's own, by module and name, which reads the same folder and gives the same."""

TOKENIZER_JSON = ("tokenizer*.json", "vocab.json", "special_tokens_map.json", "added_tokens.json")
"""What transformers' tokenizers read; tokenizer.json may have a version in its name."""

MORE_FILES = ("adapter_config.json", "processor_config.json")
"""What transformers reads besides a part's own files; unclip's classes do not."""

# Tables of 0, 1, 2, … that old files hold among the weights.
NO_WEIGHTS = ("position_ids",)

# transformers' setting is one for the process: two threads would put back each other's.
_bars = threading.Lock()


def read_component(
    folder: Path,
    name: str,
    class_name: str,
    *,
    torch_dtype: torch.dtype | str | None,
    variant: str | None,
    own_clip: bool = False,
) -> Any:
    """Read one component from `folder/name`; with `own_clip` by a class of `OWN_CLIP`, where that implements it.

    Weights have the type `torch_dtype`, float32 for None, or that in the file for a text, "auto".

    Raises: CheckpointError (or ConfigError) that says which component failed, and why.
    """
    try:
        place = safe_join(folder, name)
        if not place.is_dir():
            raise MissingFileError(f"{place} is not there")
        dtype = _stored_type(class_name, place, variant) if isinstance(torch_dtype, str) else torch_dtype
        if own_clip and (part := _read_own_clip(class_name, place, dtype, variant)) is not None:
            return part
        return _reader(class_name)(place, dtype, variant)
    except UnclipError as error:
        raise type(error)(f"component {name!r} ({class_name}) cannot be loaded: {error}") from error
    except Exception as error:  # transformers meets a broken file with errors of any kind
        raise CheckpointError(f"component {name!r} ({class_name}) cannot be loaded from {folder}: {error}") from error


def parts_with_variant(folder: Path, names: Iterable[str], variant: str) -> set[str]:
    """Those of the components in `folder` that have weights of that variant; the others are read as they are.

    Raises: MissingFileError when none has; CheckpointError for a variant that is no plain word.
    """
    wanted = [name(stem, variant) for stem in (DEFAULT_STEM, TRANSFORMERS_STEM) for name in (file_name, index_name)]
    found = {name for name in names if any((safe_join(folder, name) / file).exists() for file in wanted)}
    if not found:
        raise MissingFileError(
            f"{folder} has no {variant} weights; leave variant out, or look what it has: unclip info"
        )
    return found


def write_component(component: Any, folder: Path, *, variant: str | None) -> None:
    """Write one component into a folder of its own, as it was before it was offloaded or compiled."""
    component = original(component)
    with _no_bars() if _is_foreign(component) else nullcontext():
        if isinstance(component, nn.Module):
            # Only of transformers' class: unclip's own classes look up what offloading keeps.
            given = {"state_dict": state_of(component)} if _is_foreign(component) else {}
            component.save_pretrained(folder, variant=variant, **given)  # type: ignore[operator]
        else:
            component.save_pretrained(folder)


def index_entry(component: Any) -> list[str]:
    """[library, class] as model_index.json names a component; the ecosystem's loaders know most of them."""
    name = type(original(component)).__name__
    if name in OURS:
        return ["unclip" if name in OURS_ALONE else "diffusers", name]
    name = {own: theirs for theirs, (_, own) in OWN_CLIP.items()}.get(name, name)
    aliases = {"CLIPImageProcessorPil": "CLIPImageProcessor", "CLIPTokenizerFast": "CLIPTokenizer"}
    return ["transformers", aliases.get(name, name)]


def _stored_type(class_name: str, place: Path, variant: str | None) -> torch.dtype | None:
    """The type of a component's weights in its file; None where it has none."""
    if not (place / "config.json").exists():  # of a network, and of nothing else
        return None
    stem = TRANSFORMERS_STEM if class_name in TRANSFORMERS else DEFAULT_STEM
    return stored_type(open_weights(place, stem=stem, variant=variant))


def _is_foreign(component: Any) -> bool:
    """Whether it is none of unclip's own."""
    return type(component).__module__.partition(".")[0] != "unclip"


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
        return lambda folder, dtype, variant: _read_transformers(TRANSFORMERS[class_name], folder, dtype, variant)
    raise ConfigError(f"unclip has no class {class_name!r}; it reads {', '.join(sorted([*OURS, *TRANSFORMERS]))}")


def _read_transformers(name: str, folder: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    """What transformers' class `name` reads."""
    with _no_bars():
        cls = getattr(importlib.import_module("transformers"), name)
        if "Model" in name:
            return _read_clip(cls, folder, dtype, variant)
        if "Tokenizer" in name:
            return _read_tokenizer(cls, folder)
        return _read_image_processor(cls, folder)


def _read_own_clip(class_name: str, folder: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    """What unclip's own class reads; None where there is none, or it cannot read the folder.

    Transformers' class has the last word then: it may know a layout of older files, or else says what is wrong.
    """
    module, name = OWN_CLIP.get(TRANSFORMERS.get(class_name, ""), (None, ""))
    if module is None or any((folder / file).exists() for file in MORE_FILES):
        return None
    cls = getattr(importlib.import_module(module), name)
    try:
        if issubclass(cls, nn.Module):
            _check_clip_config(folder)
            return cls.from_pretrained(folder, torch_dtype=dtype, variant=variant)  # type: ignore[attr-defined]
        return cls.from_pretrained(folder)
    except (ConfigError, CheckpointError):
        return None


def _read_tokenizer(cls: Any, folder: Path) -> Any:
    """A tokenizer with the folder's vocabulary; without one, transformers would make up an empty one.

    What transformers reads is judged first, for of two equal keys it takes the last.
    """
    for pattern in TOKENIZER_JSON:
        for path in sorted(folder.glob(pattern)):
            settings = read_json(safe_join(folder, path.name))
            if path.name == "tokenizer_config.json":
                max_length_of(settings, str(path))
    safe_join(folder, "merges.txt")
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise MissingFileError(f"{folder} has neither tokenizer.json nor {name}; download the model again")
    tokenizer = cls.from_pretrained(folder, local_files_only=True)
    tried = tokenizer("a", padding="max_length", max_length=8, truncation=True)  # raises where it has no padding token
    if "attention_mask" not in tried:
        raise ConfigError(f"the tokenizer in {folder} makes no attention_mask; its model_input_names must have it")
    return tokenizer


def _read_image_processor(cls: Any, folder: Path) -> Any:
    """An image processor whose settings are all honoured."""
    read_image_processor_settings(folder)
    return cls.from_pretrained(folder, local_files_only=True)


def _read_clip(cls: Any, folder: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    """A transformers CLIP model, its configuration and the header of its weights checked before anything is built."""
    _check_clip_config(folder)
    index = open_weights(folder, stem="model", variant=variant)
    check_fit(_clip_shapes(cls, folder), index.without(NO_WEIGHTS), folder)
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
    if missing := sorted(map(str, about["missing_keys"])):  # their values would be random
        raise WeightsError(f"{len(missing)} weights are missing in {folder} ({', '.join(missing[:3])}…)")
    return model.eval()


def _check_clip_config(folder: Path) -> None:
    path = safe_join(folder, "config.json")
    check_clip_settings(read_json(path), str(path))


def _clip_shapes(cls: Any, folder: Path) -> dict[str, tuple[int, ...]]:
    """The weights of transformers' CLIP class `cls` by name, as the configuration in `folder` describes them.

    They are those of unclip's own classes, which are built without memory.
    """
    config = cls.config_class.from_pretrained(folder, local_files_only=True)
    halves = [getattr(config, name) for name in HALVES] if cls.__name__ == "CLIPModel" else [config]
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()} if len(halves) > 1 else {}
    for half in halves:
        encoder = CLIPTextEncoder if hasattr(half, "vocab_size") else CLIPImageEncoder
        known = {field.name for field in fields(encoder.config_class)}
        sizes = {name: getattr(half, name) for name in (*SIZE_LIMITS, "eos_token_id") if name in known}
        with torch.device("meta"):
            built = encoder(sizes | {"projection_dim": config.projection_dim})
        shapes |= {name: tuple(weight.shape) for name, weight in built.state_dict().items()}
    return shapes
