"""A model made ready for a command: found, read, put on its device, with its settings.

Knows pipelines' folders and devices; knows not what is drawn. Called by the commands that draw.
"""

import ctypes
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from unclip.checkpoints.files import read_json, safe_join
from unclip.checkpoints.hub import resolve
from unclip.checkpoints.layout import FURTHER_SUPER_RES
from unclip.checkpoints.recommended import SCALES, Recommended, read_recommended
from unclip.checkpoints.tensor_file import TILE
from unclip.cli.messages import detail
from unclip.errors import InputError

if TYPE_CHECKING:
    import torch

    from unclip.diffusion.scheduler import Scheduler
    from unclip.pipelines.generation import GenerationPipeline
    from unclip.pipelines.pipeline import Pipeline


class Dtype(StrEnum):
    """The weights' type."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class SamplerName(StrEnum):
    """The ways to take the denoising steps."""

    ancestral = "ancestral"
    ddim = "ddim"
    dpm = "dpm"


DRAWING_OPTIONS = {
    "num_prior_candidates": "--candidates",
    "prior_temperature": "--prior-temperature",
    "prior_top_p": "--prior-top-p",
}
STAGES = ("prior", "decoder", "super_res", *FURTHER_SUPER_RES)

P = TypeVar("P", bound="GenerationPipeline")


@dataclass(frozen=True)
class Machine:
    """How a model is loaded, and where it computes."""

    dtype: Dtype
    device: str
    cpu_offload: bool
    quiet: bool
    tile: int | None = None

    @property
    def tile_fact(self) -> dict[str, int]:
        """What pictures and latents say of the tile."""
        return {} if self.tile is None else {TILE: self.tile}

    @property
    def facts(self) -> dict[str, Any]:
        """What pictures say of how they were computed."""
        return {**self.tile_fact, "dtype": self.dtype.value}


def find_model(name: str, *, quiet: bool) -> tuple[Path, dict[str, Any]]:
    """A pipeline's folder, fetched from the hub if need be, and its model_index.json."""
    silence_later(downloads=quiet)
    folder = resolve(name)
    detail(f"model: {folder}")
    return folder, read_json(safe_join(folder, "model_index.json"))


def model_name(name: str) -> str:
    """The model as pictures name it: of a folder its own name alone, for where it lies is nobody's business."""
    return Path(name).resolve().name if os.path.isdir(name) else name


def decoder_settings(
    decoder_steps: int | None, super_res_steps: Any, decoder_guidance: float | None
) -> dict[str, Recommended | None]:
    """The options of decoder and super-resolution under the names of a call's arguments, None where not given."""
    return {
        "decoder_num_inference_steps": decoder_steps,
        "super_res_num_inference_steps": super_res_steps,
        "decoder_guidance_scale": decoder_guidance,
    }


def stage_settings(
    prior_steps: int | None,
    decoder_steps: int | None,
    super_res_steps: Any,
    prior_guidance: float | None,
    decoder_guidance: float | None,
) -> dict[str, Recommended | None]:
    """As `decoder_settings`, with the prior's."""
    return {
        "prior_num_inference_steps": prior_steps,
        "decoder_num_inference_steps": decoder_steps,
        "super_res_num_inference_steps": super_res_steps,
        "prior_guidance_scale": prior_guidance,
        "decoder_guidance_scale": decoder_guidance,
    }


def drawing_settings(
    candidates: int | None = None, prior_temperature: float | None = None, prior_top_p: float | None = None
) -> dict[str, Recommended | None]:
    """How the prior draws, by its arguments' names; None for the model's own way."""
    return {
        "num_prior_candidates": candidates,
        "prior_temperature": prior_temperature,
        "prior_top_p": prior_top_p,
    }


def refuse_drawing(drawing: Mapping[str, Recommended | None]) -> None:
    """For a command whose prior does not run. Raises: InputError when any of `drawing_settings` is given."""
    given = [DRAWING_OPTIONS[name] for name, value in drawing.items() if value is not None]
    if given:
        raise InputError(f"the prior does not run here, as no caption is turned into an idea: leave out {given[0]}")


def call_settings(
    pipeline_class: type,
    folder: Path,
    given: Mapping[str, Recommended | None],
    optional: Mapping[str, Recommended | None] | None = None,
) -> dict[str, Recommended]:
    """The arguments of a call, each as given, else as the model recommends, else the pipeline's own default.

    Those of `optional` are left out where they are neither given nor recommended.

    Raises: InputError for a guidance scale out of limits, before a weight is read.
    """
    from unclip.diffusion.guidance import check_scale

    defaults = inspect.signature(pipeline_class.__call__).parameters
    recommended = read_recommended(folder)
    settings: dict[str, Recommended] = {}
    for name, value in given.items():
        own: Recommended = defaults[name].default
        settings[name] = recommended.get(name, own) if value is None else value
    for name, value in (optional or {}).items():
        if value is not None or name in recommended:
            settings[name] = recommended[name] if value is None else value
    for name in SCALES:
        if name in settings:
            check_scale(settings[name], name)
    return settings


def load(pipeline_class: type[P], folder: Path, machine: Machine, sampler: SamplerName | None) -> P:
    """The pipeline on its device, sampling as asked for, showing bars as asked for."""
    import torch

    where = pick_device(machine.device)
    keep_freed_memory()
    pipe = pipeline_class.from_pretrained(folder, torch_dtype=getattr(torch, machine.dtype), own_clip=True)
    if sampler is not None:
        sampler_switch(pipe)(sampler)
    if machine.tile is not None:
        pipe.enable_super_res_tiling(machine.tile, max(1, machine.tile // 8))
    if machine.cpu_offload:
        pipe.enable_model_cpu_offload(device=None if machine.device == "auto" else where)
    else:
        pipe.to(where)
    detail(f"device: {pipe.device}, weights: {machine.dtype.value}, sampler: {sampler_name(pipe)}")
    pipe.set_progress_bar_config(disable=machine.quiet or None, leave=False)  # None: only on a terminal
    return pipe


def sampler_switch(pipe: "Pipeline") -> Callable[[str], None]:
    """What brings all stages of a pipeline to the sampler of a name, or back to its own (`sampler_name`)."""
    own_name, own = sampler_name(pipe), _schedulers(pipe)

    def use(name: str) -> None:
        for component, scheduler in own.items():
            other = scheduler if name == own_name else _sampler_class(SamplerName(name)).from_config(scheduler.config)
            setattr(pipe, component, other)

    return use


def pick_device(name: str) -> "torch.device":
    """The device called `name`; "auto" is the accelerator if there is one.

    Raises: InputError when the machine has no such device.
    """
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return found or torch.device("cpu")
    has = ["cpu"]
    if found is not None:
        has += [found.type, *(f"{found.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in has:
        raise InputError(f"--device is {name!r}; this machine has {', '.join(has)}")
    return torch.device(name)


def sampler_name(pipe: "Pipeline") -> str:
    """How the pipeline's stages sample: one name where they agree, else one a stage."""
    names = [_short_name(scheduler) for scheduler in _schedulers(pipe).values()]
    return names[0] if len(set(names)) == 1 else ", ".join(names)


def silence(*, downloads: bool) -> None:
    """Keep transformers' own bars and advice off the terminal, and the hub's bars too if asked."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if downloads:
        disable_progress_bars()


def silence_later(*, downloads: bool) -> None:
    """As `silence`, without importing what may never be needed: what is not there yet finds the wish when it comes."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if downloads:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules or (downloads and "huggingface_hub" in sys.modules):
        silence(downloads=downloads)


def _schedulers(pipe: "Pipeline") -> dict[str, "Scheduler"]:
    return {name: part for stage in STAGES if (part := pipe.components.get(name := f"{stage}_scheduler")) is not None}


def _sampler_class(name: SamplerName) -> "type[Scheduler]":
    from unclip.diffusion import scheduler

    kinds: dict[SamplerName, type[Scheduler]] = {
        SamplerName.ancestral: scheduler.UnCLIPScheduler,
        SamplerName.ddim: scheduler.DDIMScheduler,
        SamplerName.dpm: scheduler.DPMSolverMultistepScheduler,
    }
    return kinds[name]


def _short_name(scheduler: "Scheduler") -> str:
    for name in SamplerName:
        if isinstance(scheduler, _sampler_class(name)):
            return name.value
    return type(scheduler).__name__


# <malloc.h> of the GNU C library.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
MAX_INT = 2**31 - 1
GROW_BY = 64 * 2**20
"""Bytes by which the heap grows at a time."""


def keep_freed_memory() -> bool:
    """Have the GNU C library keep large freed blocks, where it would give each back to the kernel and fetch it anew.

    A tensor of 32 MiB and more is otherwise mapped afresh at every step, and the kernel fills its pages with zeros
    first: a fifth of a training step on two cores. The process's memory stays at its peak until it ends.

    Returns: whether it took; elsewhere than under that library nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, MAX_INT), (M_TOP_PAD, GROW_BY))
    return all(mallopt(name, value) for name, value in settings)
