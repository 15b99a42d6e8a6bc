"""The base class of pipelines: components, loading and saving, devices and offloading, progress bars."""

import inspect
import io
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from unclip.checkpoints.files import atomic_folder, read_json, safe_join, write_json
from unclip.checkpoints.hub import resolve
from unclip.checkpoints.layout import API_VERSION, CLASSES, CONCEPTS_FILE, FAMILIES, FURTHER, STATISTICS_FILE, ProbeFile
from unclip.checkpoints.loading_arguments import accepted_arguments, weights_type
from unclip.checkpoints.recommended import EXACT, SAMPLER, Preset, Recommended, read_presets, write_recommended
from unclip.checkpoints.weights import WeightsIndex, offload_hooks, open_weights, original, read_tensors, state_of
from unclip.clip.concepts import Concepts
from unclip.clip.statistics import EmbeddingStatistics
from unclip.diffusion.foreign import converted, is_foreign
from unclip.diffusion.loop import Progress
from unclip.diffusion.scheduler import Scheduler
from unclip.errors import CheckpointError, ConfigError, InputError, UnsafeFileError
from unclip.models import (
    AutoregressivePrior,
    EmbeddingPriorNetwork,
    PriorTransformer,
    UnCLIPTextProjModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from unclip.models.kernels import automatic_type
from unclip.numbers import whole
from unclip.pipelines.component import index_entry, parts_with_variant, read_component, write_component


def stage_words(stage: str) -> str:
    """The name of a stage in progress bars and messages: "super_res_2" is "super-resolution 2"."""
    return stage.replace("super_res_", "super-resolution ").replace("super_res", "super-resolution")


class Pipeline:
    """A set of named components. Calls do not change it, so several threads can use one loaded pipeline.

    Subclasses name their components in `COMPONENTS`, in the order in which they run (offloading follows it), and
    annotate each with its class. Those in `OPTIONAL` may be missing: the attribute is None then, and `components`,
    loading and saving leave them out.

    Components that only other pipelines have are ignored, so `OtherPipeline(**pipe.components, …)` works. A name that
    no pipeline has is an InputError.

    Attributes:
        concepts: what the model knows, from the file concepts.safetensors of its folder; None without it. Calls warn of
            captions that are not close to any concept (`UnknownCaptionWarning`). Set it to None to turn this off.
    """

    COMPONENTS: ClassVar[tuple[str, ...]] = ()
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    """The components that may be None."""
    DEFAULTS: ClassVar[Mapping[str, Recommended]] = {}
    """What is recommended for models without recommendations of their own."""

    def __init__(self, **components: Any):
        for name in components:
            if name not in {*self.component_names(), *CLASSES, *FURTHER}:
                known = ", ".join(self.component_names())
                raise InputError(f"no pipeline has a component {name!r}; {type(self).__name__} has {known}")
        for name in self.component_names():
            if components.get(name) is None and name not in self.OPTIONAL:
                raise InputError(f"{type(self).__name__} needs the component {name!r}")
            setattr(self, name, components.get(name))
        self._progress: dict[str, Any] = {}
        self._presets: dict[str, Preset] = {EXACT: {}}
        self._probe: ProbeFile | None = None
        self._source: Source | None = None
        self.concepts: Concepts | None = None
        self._statistics: EmbeddingStatistics | None = None
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        """Replace a component (`pipe.decoder_scheduler = …`) by another one of unclip's classes.

        A scheduler of diffusers is converted (see `unclip.diffusion.scheduler.converted`). `torch.compile(network)` is
        accepted wherever the network is, and is saved as that network. The next call checks whether the component fits
        the others.

        Raises: ConfigError for a network that is not unclip's, such as diffusers' of the same name, a scheduler that
        cannot be converted, or a CLIP component of another kind.
        """
        kind = self.kind(name) if name in self.component_names() else None
        if kind is SCHEDULER and is_foreign(value):
            try:
                value = converted(value, getattr(self, name, None))
            except ConfigError as problem:
                classes = f"from unclip import DDIMScheduler, and DDIMScheduler.from_config(pipe.{name}.config)"
                raise ConfigError(f"component {name!r}: {problem}; instead: {classes}") from problem
        may_be_any = value is None and name in self.OPTIONAL
        if kind is not None and not may_be_any and not kind.has(value):
            found = "None" if value is None else f"a {type(value).__module__}.{type(value).__name__}"
            raise ConfigError(f"component {name!r} is {found}; it must be {kind.words}")
        super().__setattr__(name, value)

    @classmethod
    def class_for(cls, index: Mapping[str, Any]) -> type[Self]:
        """The class that loads a folder with this model_index.json: this one, or one for another family."""
        module, _, name = FAMILIES.get(str(index.get("_class_name")), {}).get(cls.__name__, "").rpartition(".")
        return getattr(import_module(f"unclip.pipelines.{module}"), name) if module else cls

    @classmethod
    def kind(cls, component: str) -> "Kind":
        """What a component must be: further super-resolution stages as the first, `prior_…` as the part without it."""
        if component.endswith("scheduler"):
            return SCHEDULER
        return KINDS[re.sub(r"^super_res_\d_", "super_res_", component.removeprefix("prior_"))]

    @classmethod
    def component_names(cls) -> tuple[str, ...]:
        """The names of all components, optional ones too, in the order in which they run."""
        return (*cls.COMPONENTS, *(name for name in cls.OPTIONAL if name not in cls.COMPONENTS))

    def check(self) -> None:
        """Raises: ConfigError when the components do not fit each other."""

    @property
    def components(self) -> dict[str, Any]:
        """Name → component; `OtherPipeline(**pipe.components, …)` shares loaded parts."""
        parts = {name: getattr(self, name) for name in self.component_names()}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def folder_class(self) -> str:
        """The class that model_index.json names in the folders that it is loaded from and saved to."""
        return type(self).__name__

    @property
    def recommended(self) -> dict[str, Recommended]:
        """The settings that the model recommends: `pipe(prompt, **pipe.recommended)`.

        It has only arguments of this pipeline's call, and is empty for a model without recommendations. The defaults of
        a call do not depend on the model.
        """
        return cast("dict[str, Recommended]", self.presets[EXACT])

    @property
    def presets(self) -> dict[str, Preset]:
        """The settings of each preset of the model: `pipe(prompt, preset="fast")`.

        The preset "exact" is `recommended`. Besides arguments of this pipeline's call, a preset may have "sampler".
        """
        arguments = {SAMPLER, *inspect.signature(type(self).__call__).parameters}
        return {
            name: {key: value for key, value in {**self.DEFAULTS, **preset}.items() if key in arguments}
            for name, preset in self._presets.items()
        }

    @property
    def statistics(self) -> EmbeddingStatistics | None:
        """The distribution of the model's image embeddings; None if it is not known.

        It is read from the file embedding_statistics.safetensors of the model's folder. Without it, `clip_mean` and
        `clip_std` of the prior are used, or those of the folder's prior if the pipeline's has none.
        """
        if self._statistics is not None:
            return self._statistics
        names = ("clip_mean", "clip_std")
        found = [getattr(self.components.get("prior"), name, None) for name in names]
        if self._source is not None and any(each is None for each in found):
            found = self._source.tensors("prior", names)
        mean, std = found
        return None if mean is None or std is None else EmbeddingStatistics.of_prior(mean, std)

    @statistics.setter
    def statistics(self, value: EmbeddingStatistics | None) -> None:
        self._statistics = value

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The components with weights."""
        return {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights (of the first network)."""
        return next(iter(self.networks.values())).dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """The device that the pipeline computes on; with offloading, the one that networks are moved to."""
        for network in self.networks.values():
            for module in network.modules():
                device = getattr(vars(module).get("_hf_hook"), "execution_device", None)
                if device is not None:
                    return torch.device(device)
        return next(next(iter(self.networks.values())).parameters()).device

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path = "unclip-emoji",
        *,
        torch_dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = None,
        dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        use_safetensors: bool | None = None,
        device_map: torch.device | str | None = None,
        own_clip: bool = False,
        **components: Any,
    ) -> Self:
        """Load a pipeline.

        Args:
            name_or_folder: a folder, a hub repository (`owner/name`), or the built-in model's name.
            torch_dtype: the type of all weights, or its name; float32 by default. "auto" is the fastest type on
                the device: bfloat16 on a CPU that computes it, float16 on other devices, else float32. "stored" keeps
                the type of each component's file. A mapping has types by component, and "default" for the others.
            dtype: another name for `torch_dtype`.
            variant: "fp16" for example reads `diffusion_pytorch_model.fp16.safetensors` of the components that have
                this file, and the plain weights of the others.
            revision, cache_dir, local_files_only, token: as in the hub client.
            use_safetensors: True or None; other files are not read.
            device_map: the device to load to; only one is supported.
            own_clip: read CLIP by unclip's own classes (`clip/networks.py`, `clip/tokenizer.py`,
                `clip/preprocessing.py`) instead of transformers', whose import takes seconds. They give the same
                numbers and only encode. A component that they do not implement is read by transformers' class.
            components: components to use in place of the folder's (`prior=my_prior`). Further arguments of diffusers'
                method are ignored with one warning, or refused.

        Raises:
            InputError: `torch_dtype` is not a floating type, or an argument is unknown or refused.
            CheckpointError: something is missing, broken or unsafe; the message names the component.
            ConfigError: a component is of an unknown class, or does not fit the others.
        """
        parts = accepted_arguments(components, cls.from_pretrained, cls.component_names())
        device = _one_device(device_map)
        requested, where = torch_dtype if dtype is None else dtype, device or torch.device("cpu")
        types = _types(requested, where, use_safetensors, cls.component_names())
        folder = resolve(
            name_or_folder,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            variant=variant,
        )
        cls = cls.class_for(read_json(safe_join(folder, "model_index.json")))
        source = Source(folder, variant, own_clip)
        to_read = [name for name in cls.component_names() if name not in parts]
        pipeline = cls(**parts, **cls._read(source, to_read, types))
        pipeline._source = source
        pipeline._presets = read_presets(folder)
        pipeline._probe = ProbeFile.read(folder)
        if not {"text_encoder", "tokenizer"} & parts.keys():
            pipeline._set_concepts(Concepts.read(folder), folder)
        if "text_encoder" not in parts:
            pipeline._set_statistics(EmbeddingStatistics.read(folder), folder)
        return pipeline if device is None else pipeline.to(device)

    def _set_concepts(self, concepts: Concepts | None, folder: Path) -> None:
        """Raises: CheckpointError for concepts in another space than the text encoder's."""
        if concepts is not None:
            self._check_width(concepts.embeddings, folder / CONCEPTS_FILE)
        self.concepts = concepts

    def _set_statistics(self, statistics: EmbeddingStatistics | None, folder: Path) -> None:
        """Raises: CheckpointError for statistics of another space than the text encoder's."""
        if statistics is not None:
            self._check_width(statistics.mean, folder / STATISTICS_FILE)
        self._statistics = statistics

    def _check_width(self, embeddings: torch.Tensor, path: Path) -> None:
        encoder = self.components.get("prior_text_encoder") or self.components.get("text_encoder")
        width, own = embeddings.shape[-1], getattr(getattr(encoder, "config", None), "projection_dim", None)
        if own is not None and width != own:
            raise CheckpointError(
                f"{path} has embeddings of width {width}, but the text encoder has width {own}: remove the file, or "
                "write it again"
            )

    @classmethod
    def _read(
        cls, source: "Source", names: Iterable[str], types: Mapping[str, torch.dtype | str | None]
    ) -> dict[str, Any]:
        """The named components of a folder, without optional ones that it lacks; `types` as in `_types`."""
        index = read_json(safe_join(source.folder, "model_index.json"))
        missing = {name for name in cls.OPTIONAL if index.get(name) in (None, [None, None])}
        to_read = [name for name in names if name not in missing]
        classes = {name: _class_name(index, name, cls.__name__, source.folder) for name in to_read}
        every = cls.component_names()
        varied = set() if source.variant is None else parts_with_variant(source.folder, every, source.variant)
        return {
            name: read_component(
                source.folder,
                name,
                class_name,
                torch_dtype=types.get(name, types.get("default")),
                variant=source.variant if name in varied else None,
                own_clip=source.own_clip,
            )
            for name, class_name in classes.items()
        }

    @classmethod
    def from_pipe(cls, pipeline: "Pipeline", **components: Any) -> Self:
        """A pipeline of this class with the loaded components of another one.

        Components that the other pipeline lacks are given by name, or read from the folder that it was loaded from, in
        its type and onto its device.

        Progress bars, tiling, recommendations, principal components and offloading are kept. Offloading belongs to the
        networks, so a change in one of the two pipelines holds for both; networks that were read here take part when
        offloading is next enabled.

        Raises: InputError when `pipeline` is not a pipeline of unclip, or lacks components and was not loaded from a
        folder; CheckpointError when that folder lacks them too.
        """
        if not isinstance(pipeline, Pipeline):
            raise InputError(f"from_pipe takes a pipeline of unclip, not a {type(pipeline).__name__}")
        cls = cls.class_for({"_class_name": pipeline.folder_class})
        shared = {name: part for name, part in pipeline.components.items() if name in cls.component_names()}
        known = {*pipeline.component_names(), *components}
        lacking = [name for name in cls.component_names() if name not in known]
        read = {}
        if pipeline._source is not None and lacking:
            read = cls._read(pipeline._source, lacking, {"default": pipeline.dtype})
            for part in read.values():
                if isinstance(part, nn.Module):
                    part.to(pipeline.device)
        elif needed := [name for name in lacking if name not in cls.OPTIONAL]:
            raise InputError(
                f"{cls.__name__} needs {', '.join(needed)}, but the {type(pipeline).__name__} was not loaded from a "
                f"folder; give them by name, as in from_pipe(pipe, {needed[0]}=…)"
            )
        made = cls(**shared | read | components)
        made._source = pipeline._source
        made._presets = dict(pipeline._presets)
        made._probe = pipeline._probe
        if all(made.components.get(name) is shared.get(name) for name in ("text_encoder", "tokenizer")):
            made.concepts = pipeline.concepts
        if made.components.get("text_encoder") is shared.get("text_encoder"):
            made._statistics = pipeline._statistics
        made._progress = dict(pipeline._progress)
        return made

    def save_pretrained(
        self,
        folder: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Write a folder that unclip loads, and whose components diffusers and transformers load.

        The folder appears only when it is complete. It also gets the loaded folder's recommended settings and
        concepts, and its principal components if the image encoder is still the one that they belong to.

        Raises: OutputExistsError when it exists and `overwrite` is false, or when it is the current or home folder;
        OutputError when the disk is full or the folder cannot be written (an existing folder is kept);
        UnsafeFileError for `safe_serialization=False`.
        """
        if not safe_serialization:
            raise UnsafeFileError("unclip does not write pickles: leave safe_serialization at True")
        with atomic_folder(folder, overwrite=overwrite) as draft:
            index: dict[str, Any] = {"_class_name": self.folder_class, "_diffusers_version": API_VERSION}
            for name, part in self.components.items():
                write_component(part, draft / name, variant=variant)
                index[name] = index_entry(part)
            write_json(draft / "model_index.json", index)
            write_recommended(draft, cast("dict[str, Recommended]", self._presets[EXACT]), self._presets)
            if self.concepts is not None:
                self.concepts.write(draft)
            if self._statistics is not None:
                self._statistics.write(draft)
            encoder = self.networks.get("image_encoder")
            if self._probe is not None and encoder is not None and self._probe.may_be_of(state_of(encoder)):
                self._probe.write(draft)

    def to(self, *where: torch.device | torch.dtype | str | int, **named: Any) -> Self:
        """Move or cast all networks: `to("cuda")`, `to(torch.float16)`, `to("cuda", torch.float16)`."""
        if self._is_offloaded:
            raise InputError("the pipeline is offloaded: call remove_all_hooks() before moving its networks")
        for network in self.networks.values():
            network.to(*where, **named)  # type: ignore[call-overload]
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep one network at a time on the accelerator, and the others in main memory (with accelerate's hooks)."""
        from accelerate import cpu_offload_with_hook

        self.remove_all_hooks()
        target = _accelerator(gpu_id, device)
        self.to("cpu")
        previous = None
        for network in self._distinct_networks:
            _, previous = cpu_offload_with_hook(network, target, prev_module_hook=previous)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep one layer at a time on the accelerator. It needs the least memory and is the slowest."""
        from accelerate import cpu_offload

        self.remove_all_hooks()
        target = _accelerator(gpu_id, device)
        self.to("cpu")
        for network in self._distinct_networks:
            cpu_offload(network, target, offload_buffers=bool(network._parameters))

    def remove_all_hooks(self) -> None:
        """Turn off offloading, for other pipelines with the same networks too; the networks stay in main memory."""
        self.maybe_free_model_hooks()
        if self._is_offloaded:
            from accelerate.hooks import remove_hook_from_module

            for network in self._distinct_networks:
                remove_hook_from_module(network, recurse=True)

    def maybe_free_model_hooks(self) -> None:
        """Move all networks back to main memory if model offloading is on; calls do so at their end."""
        for network in self._distinct_networks:
            for hook in offload_hooks(network):
                from accelerate.hooks import CpuOffload, UserCpuOffloadHook

                if isinstance(hook, CpuOffload):
                    UserCpuOffloadHook(network, hook).offload()

    @property
    def _distinct_networks(self) -> list[nn.Module]:
        """Each network once, even if it is two components, and without the wrapper of `torch.compile`."""
        return list(dict.fromkeys(map(original, self.networks.values())))

    @property
    def _is_offloaded(self) -> bool:
        """Whether networks have offloading hooks, from any pipeline."""
        return any(offload_hooks(module) for network in self._distinct_networks for module in network.modules())

    def enable_attention_slicing(self, slice_size: str | int = "auto") -> None:
        """Compute attention in slices, which needs less memory: "auto" takes half at a time, "max" one head."""
        for network in self.networks.values():
            if hasattr(network, "enable_attention_slicing"):
                network.enable_attention_slicing(slice_size)  # type: ignore[operator]

    def disable_attention_slicing(self) -> None:
        """Compute attention without slices again."""
        for network in self.networks.values():
            if hasattr(network, "disable_attention_slicing"):
                network.disable_attention_slicing()  # type: ignore[operator]

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set tqdm's options for the progress bars of later calls; `disable=True` turns them off.

        Raises: InputError for an option that tqdm does not have.
        """
        try:
            tqdm([], **options | {"disable": False, "file": io.StringIO()}).close()
        except (TypeError, KeyError) as error:
            raise InputError(f"tqdm refuses these options: {error}") from error
        self._progress = options

    def progress(self, stage: str) -> Progress:
        """The progress bar of one stage."""
        options = {"desc": stage_words(stage), "unit": "step", "file": sys.stderr} | self._progress
        wrap: Callable[..., Any] = tqdm
        return lambda steps: wrap(steps, **options)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={type(part).__name__}" for name, part in self.components.items())
        return f"{type(self).__name__}({parts})"


@dataclass(frozen=True)
class Source:
    """How a pipeline was loaded: the folder, the variant of the weights, and whether by unclip's own CLIP classes."""

    folder: Path
    variant: str | None
    own_clip: bool

    def tensors(self, component: str, names: Sequence[str]) -> list[torch.Tensor | None]:
        """Tensors of a component that is not loaded; None for those that the folder lacks."""
        folder, variant = safe_join(self.folder, component), self.variant
        if not folder.is_dir():
            return [None] * len(names)
        if variant is not None and not parts_with_variant(self.folder, [component], variant):
            variant = None
        index = open_weights(folder, variant=variant)
        found = dict(read_tensors(WeightsIndex((name, index[name]) for name in names if name in index)))
        return [found.get(name) for name in names]


@dataclass(frozen=True)
class Kind:
    """What a component must be.

    Attributes:
        classes: one of these classes (of a class of transformers: a base class, as it is not imported here).
        needed: attributes that it must have.
        words: the classes in messages.
    """

    classes: tuple[Any, ...]
    needed: tuple[str, ...]
    words: str

    def has(self, value: object) -> bool:
        """Whether a value is of this kind; `torch.compile(network)` is if the network is."""
        try:
            is_complete = all(attrgetter(path)(value) is not None for path in self.needed)
        except AttributeError:
            return False
        return is_complete and isinstance(original(value), self.classes) and not isinstance(value, type)


def _own(*classes: type) -> Kind:
    names = " or ".join(f"unclip's {one.__name__}" for one in classes)
    return Kind(classes, (), f"{names}, whose from_pretrained reads what diffusers' class of the same name saved")


def _clip(name: str, base: Any, *needed: str) -> Kind:
    return Kind((base,), needed, f"transformers' {name}, or unclip's own class")


SCHEDULER = _own(Scheduler)
KINDS = {
    "prior": _own(PriorTransformer, AutoregressivePrior, EmbeddingPriorNetwork),
    "text_proj": _own(UnCLIPTextProjModel),
    "decoder": _own(UNet2DConditionModel),
    "super_res_first": _own(UNet2DModel),
    "super_res_last": _own(UNet2DModel),
    "text_encoder": _clip("CLIPTextModelWithProjection", nn.Module, "config.vocab_size", "text_projection"),
    "image_encoder": _clip("CLIPVisionModelWithProjection", nn.Module, "config.image_size", "visual_projection"),
    "tokenizer": _clip("CLIPTokenizer", Callable, "__len__", "model_max_length"),
    "feature_extractor": _clip("BaseImageProcessor", Callable),
    "image_processor": _clip("BaseImageProcessor", Callable),
    "unet": _own(UNet2DConditionModel),
    "movq": _own(VQModel),
}


def _class_name(index: Mapping[str, Any], name: str, pipeline: str, folder: Path) -> str:
    """The name of a component's class; the library that model_index.json names is ignored."""
    entry = index.get(name)
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
        raise CheckpointError(
            f"{folder / 'model_index.json'} describes a {index.get('_class_name', 'pipeline without a name')} without "
            f"{name!r}, which {pipeline} needs; give it by name ({name}=…), or load a model that has it"
        )
    return entry[1]


def _types(
    torch_dtype: Any, device: torch.device, use_safetensors: bool | None, own: Sequence[str]
) -> dict[str, torch.dtype | str | None]:
    """The types of the weights by component, and "default" for all others."""
    given = torch_dtype if isinstance(torch_dtype, Mapping) else {"default": torch_dtype}
    for name in given:
        if name not in {"default", *own, *CLASSES, *FURTHER}:
            raise InputError(
                f"torch_dtype has a type for {name!r}, but no pipeline has this component; use 'default' for all others"
            )
    weights_type(None, use_safetensors)
    types = {name: weights_type(one) for name, one in given.items()}
    return {name: automatic_type(device) if one == "auto" else one for name, one in types.items()}


def _one_device(device_map: Any) -> torch.device | None:
    return None if device_map is None else _usable(device_map, "device_map")


def _accelerator(gpu_id: int | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return _usable(device, "device")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        raise InputError("offloading needs an accelerator, but this machine has none; use device='cpu' to test it")
    return torch.device(found.type, 0 if gpu_id is None else whole(gpu_id, "gpu_id", 0))


def _usable(device: Any, name: str) -> torch.device:
    wanted = f"{name} is {device!r:.200}; it must be one device, which this machine has"
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, TypeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise InputError(f"{wanted}; or see enable_model_cpu_offload()") from error
    if found.type == "meta":
        raise InputError(f"{wanted}; the meta device holds no weights")
    return found
