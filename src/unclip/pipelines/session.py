"""Sessions: a model's folder, settings, device and sampler, pipelines that share its parts, and picture metadata.

A session prints nothing and does not depend on the command line, so other programs can use it too.
"""

import ctypes
import inspect
import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

from unclip import __version__
from unclip.checkpoints.files import read_json, safe_join
from unclip.checkpoints.hub import resolve
from unclip.checkpoints.recommended import EXACT, SAMPLER, Preset, chosen_preset, read_presets
from unclip.checkpoints.tensor_file import TILE
from unclip.errors import InputError
from unclip.pipelines.samplers import sampler_name, sampler_switch
from unclip.settings import SETTINGS

if TYPE_CHECKING:
    import torch
    from PIL.PngImagePlugin import PngInfo

    from unclip.pipelines.generation import GenerationPipeline
    from unclip.pipelines.manipulation import Manipulator
    from unclip.pipelines.pipeline import Pipeline

log = logging.getLogger(__name__)

PRIOR_SAMPLING = ("num_prior_candidates", "prior_temperature", "prior_top_p")
"""Settings of how the prior chooses among its samples."""
FASTER = ("decoder_guidance_low", "decoder_guidance_high", "decoder_reuse", "super_res_reuse")
"""Settings that leave out a part of the computation."""
RARE = (*PRIOR_SAMPLING, "noise_level", *FASTER)
"""Settings that a call receives only if they are given or recommended, since most models do not use them."""
MADE_WITH = "made_with"
"""The PNG text that records the software, the device and the weights."""

P = TypeVar("P", bound="GenerationPipeline")


@dataclass(frozen=True)
class Compute:
    """The device and the precision of the computation.

    Attributes:
        dtype: type of the weights: "float32", "bfloat16", "float16" or "auto", the fastest one on the device.
        device: "cpu", "cuda", "cuda:1", "mps" or "xpu"; "auto" is the accelerator if there is one.
        cpu_offload: whether only the active network is on the accelerator.
        tile: side of super-resolution's tiles, in pixels; None: no tiles.
    """

    dtype: str = "float32"
    device: str = "auto"
    cpu_offload: bool = False
    tile: int | None = None

    @property
    def tile_fact(self) -> dict[str, int]:
        """The tile in the metadata of pictures and latents."""
        return {} if self.tile is None else {TILE: self.tile}

    @property
    def facts(self) -> dict[str, Any]:
        """The device and the precision in the metadata of pictures."""
        return {**self.tile_fact, "dtype": self.weights_type}

    @property
    def weights_type(self) -> str:
        """The type of the weights; for "auto" that of this machine. Raises: InputError as `pick_device`."""
        if self.dtype != "auto":
            return str(self.dtype)
        from unclip.models.kernels import automatic_type

        return str(automatic_type(pick_device(self.device))).removeprefix("torch.")


class Session:
    """One model with its settings, and the pipelines that are loaded from it.

    Opening a session reads no weights. Each kind of pipeline is loaded when it is first needed, and shares the parts
    that were loaded before. Several threads may use one session: loading is serialized, and calls of a pipeline change
    nothing in it. `sampler_switch` does change the pipeline, for all threads.

    Args:
        model: a folder, a hub id, or a built-in name.
        compute: device and precision.
        sampler: a name in `unclip.settings.SAMPLERS`; None: the preset's, or each stage's own sampler.
        preset: the name of a preset of the model; None: the recommended settings.
        progress: whether to show progress bars (only on a terminal).

    Attributes:
        name: of the model, as the metadata of pictures records it.
        folder: of the model.
        index: the content of its model_index.json.
        parts: the names of its components, as unCLIP's pipelines name them.

    Raises: MissingFileError or another CheckpointError as `resolve` and `read_json`; InputError for a preset that the
        model does not have.
    """

    def __init__(
        self,
        model: str = "unclip-emoji",
        compute: Compute | None = None,
        *,
        sampler: str | None = None,
        preset: str | None = None,
        progress: bool = True,
    ) -> None:
        silence_later(downloads=not progress)
        self.name = model_name(model)
        self.folder = resolve(model)
        log.info("model: %s", self.folder)
        self.index: dict[str, Any] = read_json(safe_join(self.folder, "model_index.json"))
        self.parts = _parts(self.index)
        self.compute, self.preset, self.progress = compute or Compute(), preset, progress
        self.sampler = sampler or self.sampler_of(preset)
        self._pipelines: dict[type, GenerationPipeline] = {}
        self._lock = threading.Lock()

    def pipeline(self, kind: type[P]) -> P:
        """The pipeline of a class, on its device, with the session's sampler.

        Raises: InputError for a device that does not exist here; CheckpointError and ConfigError as `from_pretrained`.
        """
        with self._lock:
            if kind not in self._pipelines:
                self._pipelines[kind] = self._load(kind)
            return cast(P, self._pipelines[kind])

    def manipulator(self, *, captions: bool = False) -> "Manipulator":
        """Inversion and manipulation with the session's model.

        Args:
            captions: whether captions are needed too, for which the prior is loaded.
        """
        from unclip.pipelines.image_variation import UnCLIPImageVariationPipeline
        from unclip.pipelines.manipulation import Manipulator
        from unclip.pipelines.text_to_image import UnCLIPPipeline

        variation = self.pipeline(UnCLIPImageVariationPipeline)
        return Manipulator(variation, self.pipeline(UnCLIPPipeline) if captions else None)

    def sampler_of(self, preset: str | None) -> str | None:
        """The sampler of a preset; None if it has none. Raises: InputError for an unknown preset."""
        return cast("str | None", self._recommended(preset).get(SAMPLER))

    def _recommended(self, preset: str | None) -> Preset:
        return chosen_preset(read_presets(self.folder), preset or EXACT)

    def settings(self, kind: "type[Pipeline]", given: Mapping[str, Any], preset: str | None = None) -> dict[str, Any]:
        """The arguments of a pipeline's call: given values, else recommended ones, else the call's defaults.

        Args:
            kind: the pipeline's class.
            given: by the names of the call's arguments; None: not given. Those in `RARE` are left out when
                they are neither given nor recommended.
            preset: the name of a preset in place of the session's.

        Raises: InputError for a value that is outside the limits in `unclip.settings.SETTINGS`, or an unknown preset.
        """
        defaults = inspect.signature(kind.__call__).parameters
        recommended = {**kind.class_for(self.index).DEFAULTS, **self._recommended(preset or self.preset)}
        own = {name: recommended.get(name) for name in RARE}
        own |= {name: recommended.get(name, one.default) for name, one in defaults.items() if name not in own}
        settings = {name: own[name] if value is None else value for name, value in given.items()}
        settings = {name: value for name, value in settings.items() if value is not None or name not in RARE}
        supported = inspect.signature(kind.class_for(self.index).__call__).parameters
        if lacking := [name for name in FASTER if name in settings and name not in supported]:
            raise InputError(f"the pipelines of {self.name} do not have {', '.join(lacking)}: leave them out")
        for name, value in settings.items():
            for number in value if isinstance(value, list | tuple) else [value]:
                if name in SETTINGS:
                    SETTINGS[name].check(number)
        return settings

    def metadata(
        self, pipe: "Pipeline", settings: Mapping[str, Any], call: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The metadata of all pictures of a call: the model, the settings, the software and the device.

        Args:
            pipe: the pipeline that makes the pictures.
            settings: the arguments of the call.
            call: what else to record under `MADE_WITH`, such as a command and its options.
        """
        made_with = {**(call or {}), **environment(pipe)}
        return {"model": self.name, "settings": {**settings, **self.compute.facts}, MADE_WITH: made_with}

    def _load(self, kind: type[P]) -> P:
        kind = kind.class_for(self.index)
        where = pick_device(self.compute.device)
        keep_freed_memory()
        if others := list(self._pipelines.values()):
            parts = {name: part for pipe in others for name, part in pipe.components.items()}
            pipe = kind.from_pipe(others[0], **{name: parts[name] for name in kind.component_names() if name in parts})
        else:
            pipe = kind.from_pretrained(self.folder, torch_dtype=self.compute.weights_type, own_clip=True)
        if self.sampler is not None:
            sampler_switch(pipe)(self.sampler)
        if self.compute.tile is not None:
            pipe.enable_super_res_tiling(self.compute.tile, max(1, self.compute.tile // 8))
        if self.compute.cpu_offload:
            pipe.enable_model_cpu_offload(device=None if self.compute.device == "auto" else where)
        else:
            pipe.to(where)
        pipe.set_progress_bar_config(disable=None if self.progress else True, leave=False)  # None: only on a terminal
        log.info("device: %s, weights: %s, sampler: %s", pipe.device, self.compute.weights_type, sampler_name(pipe))
        return pipe


def _parts(index: Mapping[str, Any]) -> frozenset[str]:
    names = {name for name, entry in index.items() if isinstance(entry, list) and entry != [None, None]}
    if str(index.get("_class_name")).startswith("Kandinsky"):
        from unclip.pipelines.kandinsky_generation import COMBINED, NAMES

        if index["_class_name"] in COMBINED:
            names |= {ours for ours, theirs in NAMES.items() if theirs in names}
    return frozenset(names)


def model_name(name: str) -> str:
    """The model's name in metadata: for a folder, its own name without the path."""
    return Path(name).resolve().name if os.path.isdir(name) else name


def pick_device(name: str) -> "torch.device":
    """The device called `name`; "auto" is the accelerator if there is one.

    Raises: InputError when the machine does not have the device.
    """
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return found or torch.device("cpu")
    has = ["cpu"]
    if found is not None:
        has += [found.type, *(f"{found.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if name not in has:
        raise InputError(f"the device is {name!r}; available devices: {', '.join(has)}")
    return torch.device(name)


def environment(pipe: "Pipeline") -> dict[str, str]:
    """What a picture depends on besides its settings: software, device, and a fingerprint of the networks."""
    import torch
    from torch import nn

    from unclip.checkpoints.tensor_file import fingerprint

    names = sorted(name for name in pipe.components if "encoder" not in name)
    parts = [pipe.components[name] for name in names]
    return {
        "unclip": __version__,
        "torch": torch.__version__,
        "device": _device_words(pipe.device),
        "model_fingerprint": fingerprint(part.state_dict() for part in parts if isinstance(part, nn.Module)),
    }


def _device_words(device: "torch.device") -> str:
    import torch

    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else device.type


def png_texts(facts: Mapping[str, Any]) -> "PngInfo":
    """The metadata of a picture as PNG texts: one for each fact but None (mappings as JSON), and the software."""
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    for name, value in facts.items():
        if value is not None:
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else str(value)
            text = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
            (texts.add_text if text.isascii() else texts.add_itxt)(name, text)
    texts.add_text("Software", f"unclip {__version__}")
    return texts


def read_texts(file: Path | IO[bytes]) -> dict[str, Any]:
    """The texts of a picture's file, as `png_texts` made them; settings that are not JSON are left out.

    Raises: ImageError as `open_image`.
    """
    from PIL import Image

    from unclip.images import open_image

    open_image(file)
    with Image.open(file) as image:
        texts: dict[str, Any] = {str(name): text for name, text in image.info.items() if isinstance(text, str)}
    for name in ("settings", MADE_WITH):
        if name in texts:
            try:
                texts[name] = json.loads(texts[name])
            except (ValueError, RecursionError):
                del texts[name]
    return texts


def silence(*, downloads: bool) -> None:
    """Turn off progress bars and advice of transformers, and the download bars of the hub client if requested."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if downloads:
        disable_progress_bars()


def silence_later(*, downloads: bool) -> None:
    """As `silence`, without imports: a library that is imported later reads the environment variables set here."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if downloads:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules or (downloads and "huggingface_hub" in sys.modules):
        silence(downloads=downloads)


# <malloc.h> of the GNU C library.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
MAX_INT = 2**31 - 1
GROW_BY = 64 * 2**20
"""Bytes by which the heap grows at a time."""


def keep_freed_memory() -> bool:
    """Make the GNU C library keep large freed blocks instead of returning them to the kernel.

    Otherwise each tensor of 32 MiB or more is mapped again at every step, and the kernel fills its pages with zeros
    first. That took a fifth of a training step on two cores. The process's memory stays at its peak until it ends.

    Returns: whether the setting was made. With another C library nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, MAX_INT), (M_TOP_PAD, GROW_BY))
    return all(mallopt(name, value) for name, value in settings)
