"""Reads the components of a pipeline from a folder, and writes them to one."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unclip.checkpoints.files import read_json, safe_join
from unclip.checkpoints.weights import (
    DEFAULT_STEM,
    TRANSFORMERS_STEM,
    file_name,
    index_name,
    open_weights,
    original,
    state_of,
    stored_type,
)
from unclip.clip.pretrained import ALIASES, OWN, naming, no_bars, read_part
from unclip.diffusion.foreign import READABLE, of_settings
from unclip.diffusion.scheduler import CONFIG_NAME, SCHEDULERS
from unclip.errors import ConfigError, MissingFileError
from unclip.models import (
    AutoregressivePrior,
    Component,
    EmbeddingPriorNetwork,
    PriorTransformer,
    StableUnCLIPImageNormalizer,
    UnCLIPTextProjModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from unclip.stages.stable_diffusion import BORROWED, is_borrowed, read_borrowed, write_borrowed

NETWORKS = {
    cls.__name__: cls
    for cls in (
        AutoregressivePrior,
        EmbeddingPriorNetwork,
        PriorTransformer,
        StableUnCLIPImageNormalizer,
        UnCLIPTextProjModel,
        UNet2DConditionModel,
        UNet2DModel,
        VQModel,
    )
}
ONLY_HERE = ("AutoregressivePrior", "EmbeddingPriorNetwork", "UnCLIPTextProjModel")
"""Networks that diffusers does not have, or does not load by name."""
MULTILINGUAL = ("MultilingualCLIP", "XLMRobertaTokenizer", "XLMRobertaTokenizerFast")
"""The classes of Kandinsky 2.1's text encoder and tokenizer."""


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
        torch_dtype: dtype of the weights; None for float32, "stored" for the dtype in the file.
        variant: the variant of the weights, for example "fp16".
        own_clip: read a part of CLIP by unclip's own class where that implements it; its import is faster.

    Raises: CheckpointError or ConfigError, which names the component.
    """
    is_clip = class_name in {*OWN, *ALIASES, *MULTILINGUAL}
    with naming(folder, name, class_name):
        place = safe_join(folder, name)
        if not place.is_dir():
            raise MissingFileError(f"{place} does not exist")
        if class_name in SCHEDULERS:
            return SCHEDULERS[class_name].from_pretrained(place)
        if class_name in READABLE:
            return of_settings(class_name, read_json(safe_join(place, CONFIG_NAME), allow_infinity=True))
        dtype = torch_dtype
        if isinstance(dtype, str):  # only networks have a config.json
            stem, has_weights = TRANSFORMERS_STEM if is_clip else DEFAULT_STEM, (place / "config.json").exists()
            dtype = stored_type(open_weights(place, stem=stem, variant=variant)) if has_weights else None
        if is_borrowed(class_name, place):
            return read_borrowed(class_name, place, dtype, variant)
        if class_name in NETWORKS:
            return NETWORKS[class_name].from_pretrained(place, torch_dtype=dtype, variant=variant)
        if class_name in MULTILINGUAL:
            from unclip.clip import multilingual  # imports transformers

            with no_bars():
                if class_name == MULTILINGUAL[0]:
                    return multilingual.read_multilingual(place, dtype, variant)
                return multilingual.read_multilingual_tokenizer(place)
        if not is_clip:
            known = ", ".join(sorted({*NETWORKS, *READABLE, *OWN, *ALIASES, *MULTILINGUAL}))
            raise ConfigError(f"unclip has no class {class_name!r}; supported: {known}")
    return read_part(folder, name, class_name, dtype=dtype, variant=variant, own_clip=own_clip)


def parts_with_variant(folder: Path, names: Iterable[str], variant: str) -> set[str]:
    """The components in `folder` that have weights of that variant; the others are read without a variant.

    Raises: MissingFileError if no component has them; CheckpointError for a variant that is not a plain word.
    """
    wanted = [name(stem, variant) for stem in (DEFAULT_STEM, TRANSFORMERS_STEM) for name in (file_name, index_name)]
    found = {name for name in names if any((safe_join(folder, name) / file).exists() for file in wanted)}
    if not found:
        raise MissingFileError(f"{folder} has no {variant} weights; leave variant out, or see: unclip info")
    return found


def write_component(component: Any, folder: Path, *, variant: str | None) -> None:
    """Write one component into its own folder, without the wrappers of offloading and compilation."""
    component = original(component)
    library = type(component).__module__.partition(".")[0]
    if library == "diffusers":
        write_borrowed(component, folder, variant)
        return
    is_foreign = library != "unclip"
    with no_bars() if is_foreign else nullcontext():
        if isinstance(component, nn.Module):
            # Only for classes of transformers: unclip's own classes find offloaded weights themselves.
            given = {"state_dict": state_of(component)} if is_foreign else {}
            component.save_pretrained(folder, variant=variant, **given)  # type: ignore[operator]
        else:
            component.save_pretrained(folder)


def index_entry(component: Any) -> list[str]:
    """[library, class] of a component, as model_index.json names it."""
    cls = type(original(component))
    name = cls.file_class() if issubclass(cls, Component) else cls.__name__
    if name == MULTILINGUAL[0]:
        return ["kandinsky", name]
    if name == StableUnCLIPImageNormalizer.__name__:
        return ["stable_diffusion", name]
    if name in {*NETWORKS, *SCHEDULERS, *BORROWED}:
        return ["unclip" if name in ONLY_HERE else "diffusers", name]
    theirs = {cls.__name__: kind for kind, cls in OWN.items() if cls is not None}
    return ["transformers", theirs.get(name) or ALIASES.get(name, name)]
