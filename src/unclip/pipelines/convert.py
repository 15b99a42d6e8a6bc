"""Convert original Karlo files, text-to-image folders and folders of pickles to pipeline folders.

No other module reads pickles.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.checkpoints import karlo, layout
from unclip.checkpoints.files import atomic_folder, file_size, read_json, safe_join, write_json
from unclip.checkpoints.hub import resolve
from unclip.checkpoints.layout import ProbeFile
from unclip.checkpoints.recommended import OF_VARIATIONS, SAMPLER, read_presets, read_recommended, write_recommended
from unclip.checkpoints.weights import (
    DEFAULT_STEM,
    TRANSFORMERS_STEM,
    checked_cast,
    file_name,
    open_weights,
    read_header,
    read_tensors,
    save_weights,
)
from unclip.clip.config import check_clip_settings, read_image_processor_settings
from unclip.errors import CheckpointError, InputError, MissingFileError, UnsafeFileError, WeightsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

StrPath = str | os.PathLike[str]

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
PAD_TOKEN = "!"
"""Karlo pads prompts with this token, whose id is 0."""
CLIP_IMAGE_SIZE_PX = 224
"""The default picture size of transformers' CLIP."""

_PICKLE = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model)(?:\.(?P<variant>[A-Za-z0-9_]+))?(?:-\d{5}-of-\d{5})?\.bin"
)


# -- Karlo ---------------------------------------------------------------------------------------------------------


def convert_karlo(
    *,
    prior: StrPath,
    decoder: StrPath,
    super_res: StrPath,
    stats: StrPath,
    clip: StrPath,
    out: StrPath,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    prior_clip_range: float = layout.PRIOR_CLIP_RANGE,
    head_dim: int = karlo.HEAD_DIM,
) -> Path:
    """Write the `UnCLIPPipeline` folder `out` from the original files (.ckpt and .th, or .safetensors), and return it.

    Args:
        prior, decoder, super_res: the original checkpoints; pickles are read with weights_only.
        stats: (mean, std) of the image embeddings, Karlo's `ViT-L-14_stats.th`.
        clip: folder or hub id of the CLIP model in transformers' layout (`openai/clip-vit-large-patch14`).
        variant: part of the weights' file names, for example "fp16" together with `dtype`.
        dtype: type of the floating-point weights; None keeps the type of each file.
        overwrite: replace an existing `out`.
        prior_clip_range: limit of the prior's prediction: 10 in Karlo's code, 5 in the published folders.
        head_dim: width of an attention head, 64 in Karlo.

    Raises MissingFileError, UnsafeFileError (a pickle with more than tensors), WeightsError (names, shapes or
    widths that are not Karlo's), InputError (`prior_clip_range`) or OutputExistsError; `out` is then unchanged.
    """
    if not 0 < prior_clip_range < float("inf"):
        raise InputError(f"prior_clip_range is {prior_clip_range}; it must be a number above 0")
    clip_folder = resolve(clip)
    with atomic_folder(out, overwrite=overwrite) as draft:

        def save(component: str, state: Mapping[str, Tensor], stem: str = DEFAULT_STEM) -> None:
            save_weights(draft / component, _cast(state, dtype, component), stem=stem, variant=variant)

        def save_network(component: str, state: Mapping[str, Tensor], config: dict[str, Any]) -> None:
            save(component, state)
            write_json(draft / component / "config.json", config)

        text_config = _write_text_encoder(clip_folder, draft, save)
        state = karlo.convert_prior(_under(prior, "model."), *_read_stats(stats), head_dim=head_dim)
        prior_config = layout.prior_config(state, head_dim)
        save_network("prior", state, prior_config)

        source = _under(decoder, "model.")
        state = karlo.convert_text_projection(source)
        text_proj_config = layout.text_proj_config(state)
        save_network("text_proj", state, text_proj_config)
        state = karlo.convert_unet(source, kind="decoder", head_dim=head_dim)
        decoder_config = layout.decoder_config(state, head_dim)
        time_embed_dim = state["time_embedding.linear_2.weight"].shape[0]
        layout.check_widths(prior_config, text_proj_config, decoder_config, text_config, time_embed_dim)
        save_network("decoder", state, decoder_config)

        prefixes = {"super_res_first": "model_first_steps.", "super_res_last": "model_last_step."}
        groups = karlo.split_by_prefix(_read(super_res), prefixes.values())
        for component, prefix in prefixes.items():
            state = karlo.convert_unet(groups[prefix], kind="super_res", prefix=prefix, head_dim=head_dim)
            save_network(component, state, layout.super_res_config(state, component))

        for component, config in layout.scheduler_configs(prior_clip_range).items():
            write_json(_made(draft / component) / "scheduler_config.json", config)
        write_json(draft / "model_index.json", layout.model_index("UnCLIPPipeline", layout.TEXT_TO_IMAGE))
    return Path(out)


def _write_text_encoder(clip: Path, draft: Path, save: Any) -> dict[str, Any]:
    """Write the text model of a CLIP folder and its tokenizer, with Karlo's padding; return the configuration."""
    folder = clip / "text_encoder" if (clip / "text_encoder").is_dir() else clip
    config = _half_config(folder, "text", "CLIPTextModelWithProjection")
    save("text_encoder", _half_weights(folder, ("text_model.", "text_projection.")), TRANSFORMERS_STEM)
    write_json(draft / "text_encoder" / "config.json", config)
    folder = clip / "tokenizer" if (clip / "tokenizer").is_dir() else clip
    made = _made(draft / "tokenizer")
    for name in TOKENIZER_FILES:
        source = safe_join(folder, name)
        if source.is_file():
            shutil.copyfile(source, made / name)
    if not (made / "tokenizer.json").exists() and not (
        (made / "vocab.json").exists() and (made / "merges.txt").exists()
    ):
        raise MissingFileError(f"{folder} has no tokenizer: vocab.json and merges.txt, or tokenizer.json")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = read_json(made / name) if (made / name).exists() else {}
        write_json(made / name, {**settings, "pad_token": PAD_TOKEN})
    return config


def _half_config(folder: Path, half: str, class_name: str) -> dict[str, Any]:
    """The config.json of the text or vision model, taken from that of a whole CLIP if needed."""
    config = read_json(safe_join(folder, "config.json"))
    check_clip_settings(config, str(folder / "config.json"))
    inner = config.get(f"{half}_config")
    if isinstance(inner, dict):
        width = config.get("projection_dim", 512)
        config = {**inner, "projection_dim": width, "model_type": f"clip_{half}_model", "architectures": [class_name]}
    lacking = [key for key in ("hidden_size", "projection_dim") if not isinstance(config.get(key), int)]
    if lacking or config.get("model_type") != f"clip_{half}_model":
        raise CheckpointError(f"{folder / 'config.json'} does not describe a CLIP {half} model with projection")
    return {"max_position_embeddings": 77, **config} if half == "text" else config


def _half_weights(folder: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    index = open_weights(folder, stem=TRANSFORMERS_STEM)
    state = {
        name: tensor
        for name, tensor in read_tensors(index)
        if name.startswith(prefixes) and not name.endswith("position_ids")
    }
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in state):
            raise WeightsError(f"{folder} has no weights {prefix}…; a CLIP model with projections is needed")
    return state


# -- image variations ----------------------------------------------------------------------------------------------


def convert_text_to_image_to_variation(
    folder: StrPath, out: StrPath, *, clip: StrPath, crop: bool = False, overwrite: bool = False
) -> Path:
    """Write the `UnCLIPImageVariationPipeline` folder `out` and return it.

    It consists of the components of the text-to-image `folder` except the prior, and of the image encoder and
    preprocessor of `clip` (a folder or hub id in transformers' layout). Weights are hard-linked where the file system
    supports it. Pictures that are not square are squashed, as in Karlo's own code; with `crop` the preprocessor of CLIP
    is kept, which crops the centre. Recommended settings are copied, and so are principal components that belong to
    this image encoder. Raises what `convert_karlo` raises, and ConfigError for invalid recommended settings.
    """
    source, clip_folder = resolve(folder), resolve(clip)
    index = read_json(safe_join(source, "model_index.json"))
    lacking = [name for name in layout.SHARED if name not in index]
    if lacking:
        raise CheckpointError(f"{source} lacks {', '.join(lacking)}; is it a text-to-image folder?")
    shared = (*layout.SHARED, *(name for name in layout.FURTHER if name in index))
    with atomic_folder(out, overwrite=overwrite) as draft:
        for component in shared:
            _link_files(safe_join(source, component), _made(draft / component))
        sub = clip_folder / "image_encoder"
        encoder = sub if sub.is_dir() else clip_folder
        config = _half_config(encoder, "vision", "CLIPVisionModelWithProjection")
        width = read_json(safe_join(source / "text_proj", "config.json")).get("clip_embeddings_dim", 768)
        if config["projection_dim"] != width:
            raise WeightsError(
                f"{encoder} gives embeddings of width {config['projection_dim']}; the decoder needs {width}"
            )
        state = _half_weights(encoder, ("vision_model.", "visual_projection."))
        save_weights(draft / "image_encoder", state, stem=TRANSFORMERS_STEM)
        write_json(draft / "image_encoder" / "config.json", config)
        probe = ProbeFile.read(source)
        if probe is not None and probe.image_encoder and probe.may_be_of(state):
            probe.write(draft)
        kept = {SAMPLER, *OF_VARIATIONS}
        presets = {
            name: {key: value for key, value in preset.items() if key in kept}
            for name, preset in read_presets(source).items()
        }
        recommended = {key: value for key, value in read_recommended(source).items() if key in kept}
        write_recommended(draft, recommended, presets)
        sub = clip_folder / "feature_extractor"
        settings = read_image_processor_settings(sub if sub.is_dir() else clip_folder)
        settings = {**settings, "image_processor_type": "CLIPImageProcessor"}
        settings.pop("feature_extractor_type", None)
        if not crop:
            size_px = config.get("image_size", CLIP_IMAGE_SIZE_PX)
            settings |= {"do_resize": True, "do_center_crop": False, "size": {"height": size_px, "width": size_px}}
        write_json(_made(draft / "feature_extractor") / "preprocessor_config.json", settings)
        parts = layout.model_index("UnCLIPImageVariationPipeline", layout.VARIATION)
        write_json(draft / "model_index.json", {**parts, **{name: index[name] for name in shared}})
    return Path(out)


def convert_kandinsky(prior: StrPath, decoder: StrPath, out: StrPath, *, overwrite: bool = False) -> Path:
    """Write the folder `out` of a combined Kandinsky pipeline from the folders of a prior and a decoder, and return it.

    Args:
        prior: folder or hub id of a `KandinskyV22PriorPipeline` or a `KandinskyPriorPipeline`.
        decoder: folder or hub id of a decoder of the same version.
        overwrite: replace an existing `out`.

    Weights are hard-linked where the file system supports it. Raises: CheckpointError for other folders, or versions
        that differ; WeightsError when the widths of the embeddings differ; OutputExistsError.
    """
    folders = [resolve(prior), resolve(decoder)]
    indexes = [read_json(safe_join(folder, "model_index.json")) for folder in folders]
    names = [str(index.get("_class_name")) for index in indexes]
    version = names[0].removesuffix("PriorPipeline")
    if version not in ("Kandinsky", "KandinskyV22") or names[0] == version:
        raise CheckpointError(f"{folders[0]} contains a {names[0]}, not a prior of Kandinsky")
    tasks = {f"{version}{task}Pipeline": f"{version}{task}CombinedPipeline" for task in ("", "Img2Img", "Inpaint")}
    if names[1] not in tasks:
        wanted = ", ".join(tasks)
        raise CheckpointError(f"{folders[1]} contains a {names[1]}; with this prior it must be one of {wanted}")
    unet = read_json(safe_join(folders[1] / "unet", "config.json"))
    width = unet.get("encoder_hid_dim" if version == "KandinskyV22" else "cross_attention_dim")
    made = read_json(safe_join(folders[0] / "prior", "config.json")).get("embedding_dim", 768)
    if width != made:
        raise WeightsError(f"the prior makes embeddings of width {made}; the decoder needs {width}")
    parts: dict[str, Any] = {"_class_name": tasks[names[1]], "_diffusers_version": layout.API_VERSION}
    with atomic_folder(out, overwrite=overwrite) as draft:
        for folder, index, prefix in zip(folders, indexes, ("prior_", ""), strict=True):
            for name, entry in index.items():
                if isinstance(entry, list) and entry != [None, None]:
                    suffixes = (".json", ".txt", ".safetensors", ".bpe.model")
                    _link_files(safe_join(folder, name), _made(draft / f"{prefix}{name}"), suffixes)
                    parts[f"{prefix}{name}"] = entry
        write_json(draft / "model_index.json", parts)
    return Path(out)


def _link_files(source: Path, target: Path, suffixes: tuple[str, ...] = (".json", ".txt", ".safetensors")) -> None:
    """Link weights and copy text files from one folder to another; other files and subfolders are skipped."""
    if not source.is_dir():
        raise MissingFileError(f"{source} is not a folder; the model is not complete")
    for entry in sorted(source.iterdir()):
        if not entry.name.endswith(suffixes) or entry.is_dir():
            continue
        file = Path(os.path.realpath(safe_join(source, entry.name)))
        if entry.name.endswith(".safetensors"):
            read_header(file)
            try:
                os.link(file, target / entry.name)
                continue
            except OSError:
                pass  # another file system, or one without hard links
        shutil.copyfile(file, target / entry.name)


# -- pickles -------------------------------------------------------------------------------------------------------


def convert_pickle(folder: StrPath, out: StrPath, *, overwrite: bool = False) -> Path:
    """Copy the pipeline or component `folder` to `out` with every .bin converted to .safetensors, and return `out`.

    Pickles are read with weights_only. Raises MissingFileError when there are none, UnsafeFileError for one that has
    more than tensors, WeightsError for a broken one, OutputExistsError.
    """
    source = Path(folder)
    if not source.is_dir():
        raise MissingFileError(f"{source} is not a folder")
    with atomic_folder(out, overwrite=overwrite) as draft:
        converted = _convert_folder(source, draft)
        for entry in sorted(source.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                converted += _convert_folder(safe_join(source, entry.name), _made(draft / entry.name))
        if not converted:
            raise MissingFileError(f"{source} has no diffusion_pytorch_model.bin or pytorch_model.bin to convert")
    return Path(out)


def _convert_folder(source: Path, target: Path) -> int:
    """Convert the folder of one component; return the number of converted sets of weights."""
    _link_files(source, target)
    sets: dict[tuple[str, str | None], dict[str, Tensor]] = {}
    for entry in sorted(source.iterdir()):
        if entry.name.endswith(".bin.index.json") or re.fullmatch(r".+\.bin\.index\.\w+\.json", entry.name):
            (target / entry.name).unlink()
        found = _PICKLE.fullmatch(entry.name)
        if found is None:
            continue
        stem = TRANSFORMERS_STEM if found["stem"] == "pytorch_model" else found["stem"]
        if (source / file_name(stem, found["variant"])).exists():
            continue  # the weights also exist as safetensors
        state = sets.setdefault((stem, found["variant"]), {})
        more = _read(safe_join(source, entry.name))
        twice = state.keys() & more.keys()
        if twice:
            raise WeightsError(f"{entry} has {min(twice)}, which another shard has too")
        state.update(more)
    for (stem, variant), state in sets.items():
        save_weights(target, state, stem=stem, variant=variant)
    return len(sets)


# -- reading originals ---------------------------------------------------------------------------------------------


def _read(path: StrPath) -> dict[str, Tensor]:
    """The tensors of an original checkpoint by name, from its "state_dict" if it has one."""
    import torch

    path = Path(path)
    if path.suffix == ".safetensors":
        return dict(read_tensors(read_header(path)))
    state = _read_pickle(path)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise WeightsError(f"{path} is not a state dict, and has none under 'state_dict'")
    return dict(state)


def _read_pickle(path: Path) -> Any:
    """The object that torch saved in `path`, restricted to tensors and plain containers."""
    import torch

    file_size(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickle protocols, which users cannot change
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as problem:
        raise UnsafeFileError(
            f"{path} is refused: it contains more than tensors, or is not a checkpoint: {str(problem)[:200]}"
        ) from problem
    except Exception as problem:  # the unpickler raises many kinds of errors on damaged files
        raise WeightsError(
            f"{path} is truncated or not a checkpoint: {str(problem)[:200]}. Download it again"
        ) from problem


def _read_stats(path: StrPath) -> tuple[Tensor, Tensor]:
    """(mean, std) of the image embeddings, each [embedding_dim], from a saved pair or a .safetensors file."""
    import torch

    path = Path(path)
    if path.suffix == ".safetensors":
        state = _read(path)
        pair: Any = tuple(state.get(name) for name in ("mean", "std"))
    else:
        pair = _read_pickle(path)
    if (
        not isinstance(pair, tuple | list)
        or len(pair) != 2
        or not all(isinstance(part, torch.Tensor) and part.is_floating_point() for part in pair)
    ):
        raise WeightsError(f"{path} must contain the pair (mean, std) of the image embeddings")
    return pair[0].reshape(-1), pair[1].reshape(-1)


def _under(path: StrPath, prefix: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint in which all names start with `prefix`."""
    return karlo.split_by_prefix(_read(path), [prefix])[prefix]


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype | None, where: str) -> dict[str, Tensor]:
    if dtype is None:
        return dict(state)
    return {
        name: checked_cast(tensor, dtype, name, where) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
