"""Assembles trained stages into a model folder."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unclip.checkpoints.files import atomic_folder, read_json, write_json
from unclip.checkpoints.hub import is_name, resolve
from unclip.checkpoints.layout import API_VERSION, FURTHER_SUPER_RES
from unclip.checkpoints.recommended import write_recommended
from unclip.clip.pretrained import fingerprint_of, is_whole_clip, read_clip
from unclip.errors import InputError, MissingFileError
from unclip.pipelines.component import index_entry, read_component, write_component
from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
from unclip.pipelines.text_to_image import UnCLIPPipeline
from unclip.training.sections import refuse
from unclip.training.state import clip_of_run
from unclip.training.task import KEYS, process_in

# Component → (its run, its class).
PARTS = {
    "text_encoder": ("clip", "CLIPTextModelWithProjection"),
    "tokenizer": ("clip", "CLIPTokenizer"),
    "image_encoder": ("clip", "CLIPVisionModelWithProjection"),
    "feature_extractor": ("clip", "CLIPImageProcessor"),
    "prior": ("prior", "PriorTransformer"),
    "prior_scheduler": ("prior", "UnCLIPScheduler"),
    "text_proj": ("decoder", "UnCLIPTextProjModel"),
    "decoder": ("decoder", "UNet2DConditionModel"),
    "decoder_scheduler": ("decoder", "UnCLIPScheduler"),
    "super_res_first": ("super_res_first", "UNet2DModel"),
    "super_res_last": ("super_res_last", "UNet2DModel"),
    "super_res_scheduler": ("super_res_first", "UnCLIPScheduler"),
}

SAMPLING_KEYS = ("variance_type", "clip_range")
"""The settings of a process that concern sampling, and not the meaning of a network's output."""


def assemble(
    *,
    clip: Path,
    prior: Path,
    decoder: Path,
    super_res_first: Path,
    super_res_last: Path | None = None,
    super_res_more: Sequence[Path | tuple[Path, int]] = (),
    out: Path,
    dtype: torch.dtype | None = None,
    defaults: Mapping[str, Any] | None = None,
    files: Mapping[str, Path] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model folder for both pipelines from the runs of the stages.

    Args:
        clip, prior, decoder, super_res_first: the folder of a run (which contains `model/`), or a model with the stage,
            by its folder or its name. The CLIP may be a `CLIPModel` of transformers.
        super_res_last: another network for the last step. By default, the first network does all steps.
        super_res_more: a run for each further super-resolution stage, in order. With a number, the stage's output has
            this side in pixels, whatever its training size.
        out: the folder to create.
        dtype: of the saved weights; by default unchanged.
        defaults: recommended settings (`decoder_guidance_scale`, …).
        files: further files: name → source.
        overwrite: replace `out` atomically.

    Raises:
        MissingFileError: a run has no model yet, or a model does not have the stage.
        OutputExistsError: `out` exists.
        ConfigError: the stages do not fit together: their sizes, the process that both networks of super-resolution
            share, or the CLIP with which they were trained.
    """
    runs = {"clip": clip, "prior": prior, "decoder": decoder, "super_res_first": super_res_first}
    runs["super_res_last"] = super_res_last or super_res_first
    with atomic_folder(out, overwrite=overwrite) as draft:
        components = read_clip(_model(clip)).components() if is_whole_clip(_model(clip)) else {}
        for name, (run, class_name) in _parts(_model(prior)).items():
            folder = "super_res_first" if name == "super_res_last" and super_res_last is None else name
            if name not in components:
                components[name] = _read(runs[run], run, folder, class_name)
        components |= _further(super_res_more)
        _check_shared_scheduler(super_res_first, runs["super_res_last"])
        _check_clip(clip, {"prior": prior, "decoder": decoder})
        for pipeline in (UnCLIPPipeline, UnCLIPImageVariationPipeline):  # they check that the components fit together
            pipeline(**{name: part for name, part in components.items() if name in pipeline.component_names()})
        index: dict[str, Any] = {"_class_name": "UnCLIPPipeline", "_diffusers_version": API_VERSION}
        for name, component in components.items():
            if isinstance(component, nn.Module) and dtype is not None:
                component.to(dtype)
            write_component(component, draft / name, variant=None)
            index[name] = index_entry(component)
        write_json(draft / "model_index.json", index)
        if defaults:
            write_recommended(draft, defaults)
        for name, file in (files or {}).items():
            (draft / name).write_bytes(file.read_bytes())


def _parts(prior: Path) -> dict[str, tuple[str, str]]:
    """`PARTS` for the prior in this folder: an autoregressive prior has no scheduler."""
    config = prior / "prior" / "config.json"
    if not config.is_file() or read_json(config).get("_class_name") != "AutoregressivePrior":
        return PARTS
    parts = PARTS | {"prior": ("prior", "AutoregressivePrior")}
    return {name: part for name, part in parts.items() if name != "prior_scheduler"}


def _further(runs: Sequence[Path | tuple[Path, int]]) -> dict[str, Any]:
    """The components of the further super-resolution stages, from runs or from the stages of models.

    Raises: InputError for too many stages.
    """
    if len(runs) > len(FURTHER_SUPER_RES):
        raise InputError(f"there are {len(runs)} further super-resolution stages; at most {len(FURTHER_SUPER_RES)}")
    components: dict[str, Any] = {}
    for stage, given in zip(FURTHER_SUPER_RES, runs, strict=False):
        run, size_px = given if isinstance(given, tuple) else (given, None)
        there = stage if (_model(run) / f"{stage}_first").is_dir() else "super_res"
        components[f"{stage}_scheduler"] = _read(run, stage, f"{there}_scheduler", "UnCLIPScheduler")
        for part in ["first"] + ["last"] * (_model(run) / f"{there}_last").is_dir():
            network = components[f"{stage}_{part}"] = _read(run, stage, f"{there}_{part}", "UNet2DModel")
            if size_px is not None:
                network.config = dataclasses.replace(network.config, sample_size=size_px)
    return components


def _check_shared_scheduler(first: Path, last: Path) -> None:
    """Raises: ConfigError when the network of the last step was trained with another process."""
    name = "super_res_scheduler"
    one, other = (process_in(_model(run), name) for run in (first, last))
    shared = [key for key in KEYS if key not in SAMPLING_KEYS]
    values = [(key, getattr(one, key), getattr(other, key)) for key in shared if one and other]
    apart = [f"{key} is {a!r} and {b!r}" for key, a, b in values if a != b]
    refuse(
        apart,
        f"super_res_first ({first}) and super_res_last ({last}) share a scheduler, but were trained with different "
        f"processes: {'; '.join(apart)}. Train one with the process of the other, or remove super_res_last",
    )


def _check_clip(clip: Path, runs: Mapping[str, Path]) -> None:
    """Raises: ConfigError when a run was trained with another CLIP. For a model, this is not known."""
    found = {stage: clip_of_run(run) for stage, run in runs.items()}
    own = fingerprint_of(_model(clip)) if any(found.values()) else ""
    for stage, other in found.items():
        what = f"{stage} ({runs[stage]}) was trained with another CLIP ({other or '':.12}…) than the one in {clip}"
        how = f"Use that CLIP, or give {runs[stage] / 'model'} to use it anyway"
        refuse(other not in (None, own), f"{what} ({own:.12}…), or with the same one saved differently. {how}")


def _model(run: Path) -> Path:
    if not run.is_dir() and is_name(str(run)):
        return resolve(str(run))
    return run / "model" if (run / "model").is_dir() else run


def _read(run: Path, stage: str, name: str, class_name: str) -> Any:
    model = _model(run)
    if not (model / name).is_dir():
        raise MissingFileError(f"{run} has neither model/{name} nor {name}: train the stage {stage} first")
    return read_component(model, name, class_name, torch_dtype=None, variant=None)
