"""Reads the components of a pipeline from a folder, and writes them to one."""

import importlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
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
from unclip.clip.config import HALVES, SIZES, check_clip_settings, max_length_of, read_image_processor_settings
from unclip.clip.networks import CLIPImageEncoder, CLIPTextEncoder
from unclip.errors import CheckpointError, ConfigError, MissingFileError, UnclipError, WeightsError
from unclip.settings import SAMPLERS


@dataclass(frozen=True)
class ComponentRow:
    """One class that a model_index.json may name.

    Attributes:
        name: the class name that is written.
        library: the library that is written: "diffusers", "transformers" or "unclip" (a class that diffusers does not
            have, or does not find by itself).
        own: unclip's own class, as "module:class". It implements the component, or, for a class of transformers, reads
            the same folder and computes the same. Empty if there is none.
        reader: the class of transformers that reads it; empty for a class that unclip implements.
        aliases: further class names in existing folders.
        has_weights: whether it is read with a dtype and a variant.
    """

    name: str
    library: str
    own: str = ""
    reader: str = ""
    aliases: tuple[str, ...] = ()
    has_weights: bool = True

    def own_class(self) -> Any:
        """The class that `own` names."""
        module, _, name = self.own.partition(":")
        return getattr(importlib.import_module(module), name)


def _clip(name: str, own: str = "", reader: str = "", aliases: tuple[str, ...] = ()) -> ComponentRow:
    return ComponentRow(name, "transformers", own, reader or name, aliases)


ROWS = (
    ComponentRow("AutoregressivePrior", "unclip", "unclip.models.prior_autoregressive:AutoregressivePrior"),
    ComponentRow("PriorTransformer", "diffusers", "unclip.models.prior:PriorTransformer"),
    ComponentRow("UNet2DConditionModel", "diffusers", "unclip.models.unet:UNet2DConditionModel"),
    ComponentRow("UNet2DModel", "diffusers", "unclip.models.unet:UNet2DModel"),
    ComponentRow("UnCLIPTextProjModel", "unclip", "unclip.models.text_proj:UnCLIPTextProjModel"),
    *(
        ComponentRow(name, "diffusers", f"unclip.diffusion.scheduler:{name}", has_weights=False)
        for name in (row.scheduler for row in SAMPLERS.values())
    ),
    _clip("CLIPTextModelWithProjection", "unclip.clip.networks:CLIPTextEncoder"),
    _clip("CLIPVisionModelWithProjection", "unclip.clip.networks:CLIPImageEncoder"),
    _clip("CLIPModel"),
    _clip("CLIPTokenizer", "unclip.clip.tokenizer:CaptionTokenizer", aliases=("CLIPTokenizerFast",)),
    _clip(
        "CLIPImageProcessor",
        "unclip.clip.preprocessing:PicturePreprocessor",
        "CLIPImageProcessorPil",
        ("CLIPFeatureExtractor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
    ),
)
_BY_NAME = {name: row for row in ROWS for name in (row.name, *row.aliases)}
_BY_OWN = {row.own.partition(":")[2]: row for row in ROWS if row.own}

TOKENIZER_JSON = ("tokenizer*.json", "vocab.json", "special_tokens_map.json", "added_tokens.json")
"""The files that the tokenizers of transformers read; tokenizer.json may have a version in its name."""

MORE_FILES = ("adapter_config.json", "processor_config.json")
"""Further files that transformers reads, and unclip's own classes do not."""

# Constant tables (0, 1, 2, …) among the weights of old files.
NO_WEIGHTS = ("position_ids",)

# The setting of transformers is global, so only one thread at a time may change it.
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
    """Read one component from `folder/name`.

    Args:
        folder, name: the model's folder, and the component's folder inside it.
        class_name: the class, as model_index.json names it.
        torch_dtype: dtype of the weights; None for float32, "auto" for the dtype in the file.
        variant: the variant of the weights, for example "fp16".
        own_clip: read a part of CLIP by unclip's own class where that implements it; its import is faster.

    Raises: CheckpointError or ConfigError, which names the component.
    """
    try:
        place = safe_join(folder, name)
        if not place.is_dir():
            raise MissingFileError(f"{place} is not there")
        row = _row(class_name)
        dtype = _stored_type(row, place, variant) if isinstance(torch_dtype, str) else torch_dtype
        if own_clip and (part := _read_own_clip(row, place, dtype, variant)) is not None:
            return part
        if row.reader:
            return _read_transformers(row.reader, place, dtype, variant)
        if row.has_weights:
            return row.own_class().from_pretrained(place, torch_dtype=dtype, variant=variant)
        return row.own_class().from_pretrained(place)
    except UnclipError as error:
        raise type(error)(f"component {name!r} ({class_name}) cannot be loaded: {error}") from error
    except Exception as error:  # transformers raises errors of any kind for a broken file
        raise CheckpointError(f"component {name!r} ({class_name}) cannot be loaded from {folder}: {error}") from error


def parts_with_variant(folder: Path, names: Iterable[str], variant: str) -> set[str]:
    """The components in `folder` that have weights of that variant; the others are read without a variant.

    Raises: MissingFileError if no component has them; CheckpointError for a variant that is not a plain word.
    """
    wanted = [name(stem, variant) for stem in (DEFAULT_STEM, TRANSFORMERS_STEM) for name in (file_name, index_name)]
    found = {name for name in names if any((safe_join(folder, name) / file).exists() for file in wanted)}
    if not found:
        raise MissingFileError(
            f"{folder} has no {variant} weights; leave variant out, or list the weights with: unclip info"
        )
    return found


def write_component(component: Any, folder: Path, *, variant: str | None) -> None:
    """Write one component into its own folder, without the wrappers of offloading and compilation."""
    component = original(component)
    with _no_bars() if _is_foreign(component) else nullcontext():
        if isinstance(component, nn.Module):
            # Only for classes of transformers: unclip's own classes find offloaded weights themselves.
            given = {"state_dict": state_of(component)} if _is_foreign(component) else {}
            component.save_pretrained(folder, variant=variant, **given)  # type: ignore[operator]
        else:
            component.save_pretrained(folder)


def index_entry(component: Any) -> list[str]:
    """[library, class] of a component, as model_index.json names it."""
    name = type(original(component)).__name__
    row = _BY_OWN.get(name) or _BY_NAME.get(name)
    return ["transformers", name] if row is None else [row.library, row.name]


def _stored_type(row: ComponentRow, place: Path, variant: str | None) -> torch.dtype | None:
    """The dtype of a component's weights in its file; None if it has no weights."""
    if not (place / "config.json").exists():  # only networks have one
        return None
    stem = TRANSFORMERS_STEM if row.reader else DEFAULT_STEM
    return stored_type(open_weights(place, stem=stem, variant=variant))


def _is_foreign(component: Any) -> bool:
    """Whether its class is not unclip's own."""
    return type(component).__module__.partition(".")[0] != "unclip"


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hide the progress bars of transformers, and restore its setting afterwards."""
    from transformers.utils import logging

    # `disable_progress_bar()` would also change the setting of the hub client, which could not be restored.
    with _bars:
        shown = logging.is_progress_bar_enabled()
        logging._tqdm_active = False
        try:
            yield
        finally:
            logging._tqdm_active = shown


def _row(class_name: str) -> ComponentRow:
    if class_name not in _BY_NAME:
        raise ConfigError(f"unclip has no class {class_name!r}; it reads {', '.join(sorted(_BY_NAME))}")
    return _BY_NAME[class_name]


def _read_transformers(name: str, folder: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    """Read a component by the class `name` of transformers."""
    with _no_bars():
        cls = getattr(importlib.import_module("transformers"), name)
        if "Model" in name:
            return _read_clip(cls, folder, dtype, variant)
        if "Tokenizer" in name:
            return _read_tokenizer(cls, folder)
        return _read_image_processor(cls, folder)


def _read_own_clip(row: ComponentRow, folder: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    """Read a part of CLIP by unclip's own class; None if there is none, or it cannot read the folder.

    The class of transformers is used then: it may read the layout of older files, or explains what is wrong.
    """
    if not (row.own and row.reader) or any((folder / file).exists() for file in MORE_FILES):
        return None
    cls = row.own_class()
    try:
        if issubclass(cls, nn.Module):
            _check_clip_config(folder)
            return cls.from_pretrained(folder, torch_dtype=dtype, variant=variant)  # type: ignore[attr-defined]
        return cls.from_pretrained(folder)
    except (ConfigError, CheckpointError):
        return None


def _read_tokenizer(cls: Any, folder: Path) -> Any:
    """A tokenizer with the folder's vocabulary; without vocabulary files, transformers would build an empty one.

    The files are checked first, because transformers accepts duplicate keys.
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
    tried = tokenizer("a", padding="max_length", max_length=8, truncation=True)  # raises if it has no padding token
    if "attention_mask" not in tried:
        raise ConfigError(f"the tokenizer in {folder} gives no attention_mask; its model_input_names must contain it")
    return tokenizer


def _read_image_processor(cls: Any, folder: Path) -> Any:
    """An image processor, after a check that all its settings are implemented."""
    read_image_processor_settings(folder)
    return cls.from_pretrained(folder, local_files_only=True)


def _read_clip(cls: Any, folder: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    """A CLIP model of transformers; its configuration and the header of its weights are checked first."""
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
    if missing := sorted(map(str, about["missing_keys"])):  # transformers would initialize them randomly
        raise WeightsError(f"{len(missing)} weights are missing in {folder} ({', '.join(missing[:3])}…)")
    return model.eval()


def _check_clip_config(folder: Path) -> None:
    path = safe_join(folder, "config.json")
    check_clip_settings(read_json(path), str(path))


def _clip_shapes(cls: Any, folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of transformers' CLIP class `cls`, for the configuration in `folder`.

    They are taken from unclip's own classes, built on the meta device.
    """
    config = cls.config_class.from_pretrained(folder, local_files_only=True)
    halves = [getattr(config, name) for name in HALVES] if cls.__name__ == "CLIPModel" else [config]
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()} if len(halves) > 1 else {}
    for half in halves:
        encoder = CLIPTextEncoder if hasattr(half, "vocab_size") else CLIPImageEncoder
        known = {field.name for field in fields(encoder.config_class)}
        sizes = {name: getattr(half, name) for name in (*SIZES, "eos_token_id") if name in known}
        with torch.device("meta"):
            built = encoder(sizes | {"projection_dim": config.projection_dim})
        shapes |= {name: tuple(weight.shape) for name, weight in built.state_dict().items()}
    return shapes
