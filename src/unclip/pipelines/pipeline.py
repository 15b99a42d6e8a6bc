"""What every pipeline can do: hold components, be loaded, saved, moved and offloaded.

Knows components by name and kind; knows not what a call does. Base of the two pipelines.
"""

import inspect
import io
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Self, get_args

import torch
from torch import nn
from tqdm.auto import tqdm

from unclip.checkpoints.asked import asked_type, settled
from unclip.checkpoints.files import atomic_folder, read_json, safe_join, write_json
from unclip.checkpoints.hub import resolve
from unclip.checkpoints.layout import API_VERSION, CLASSES, FURTHER, ProbeFile
from unclip.checkpoints.recommended import Recommended, read_recommended, write_recommended
from unclip.checkpoints.weights import offload_hooks, original, state_of
from unclip.diffusion.loop import Progress
from unclip.diffusion.scheduler import Scheduler, converted, is_foreign
from unclip.errors import CheckpointError, ConfigError, InputError, UnsafeFileError
from unclip.numbers import whole
from unclip.pipelines.component import index_entry, parts_with_variant, read_component, write_component

STAGE_WORDS = {"prior": "prior", "decoder": "decoder", "super_res": "super-resolution"}


def stage_words(stage: str) -> str:
    """What a stage's progress bar is called: "super_res_2" is "super-resolution 2"."""
    further = stage.removeprefix("super_res_")
    return STAGE_WORDS.get(stage) or f"{STAGE_WORDS['super_res']} {further}"


class Pipeline:
    """A set of named components. Calls change nothing in it, so one loaded pipeline serves several threads.

    Subclasses name their components in `COMPONENTS`, in the order in which they work (offloading follows it), and
    annotate each with its class. Those in `OPTIONAL` may be missing: the attribute is None then, and `components`,
    loading and saving leave them out.

    Given components that another kind of pipeline has are passed over, so that `OtherPipeline(**pipe.components, …)`
    can be written; a name that none has is an InputError.
    """

    COMPONENTS: ClassVar[tuple[str, ...]] = ()
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    """Those that may be None: not every model has them, or not every kind of the others needs them."""

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
        self._recommended: dict[str, Recommended] = {}
        self._probe: ProbeFile | None = None
        self._source: Source | None = None
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        """Components can be exchanged (`pipe.decoder_scheduler = …`), for one of unclip's own kind.

        A scheduler of diffusers is converted (see `unclip.diffusion.scheduler.converted`). `torch.compile(network)` is
        accepted where the network is, and is saved as that network.

        Raises: ConfigError for a network that is not unclip's, such as diffusers' of that name, for a scheduler that
        cannot be converted, or for a part of CLIP's that cannot be one. Whether it fits the others is checked when the
        pipeline is next called.
        """
        kinds = self._kinds(name)
        if Scheduler in kinds and is_foreign(value):
            try:
                value = converted(value, getattr(self, name, None))
            except ConfigError as problem:
                raise ConfigError(
                    f"component {name!r}: {problem}; make one by from unclip import DDIMScheduler (or UnCLIPScheduler, "
                    f"DPMSolverMultistepScheduler), then DDIMScheduler.from_config(pipe.{name}.config)"
                ) from problem
        if value is None and kinds and name not in self.OPTIONAL:
            raise ConfigError(f"component {name!r} cannot be None: it must be a {_either(kinds)}")
        classes = tuple(kind for kind in kinds if isinstance(kind, type))
        if value is not None and classes and not isinstance(original(value), classes):
            found = f"{type(value).__module__}.{type(value).__name__}"
            raise ConfigError(
                f"component {name!r} is a {found}; it must be a {_either(kinds, in_full=True)} "
                "(its from_pretrained and from_config read what diffusers' class of that name saved)"
            )
        for kind in kinds:
            if value is not None and isinstance(kind, str) and not _serves_as(kind, value):
                found = f"{type(value).__module__}.{type(value).__name__}"
                raise ConfigError(
                    f"component {name!r} is a {found}; it must be a {kind} of transformers', or unclip's own"
                )
        super().__setattr__(name, value)

    @classmethod
    def component_names(cls) -> tuple[str, ...]:
        """Every component that there may be, in the order in which they work."""
        return (*cls.COMPONENTS, *(name for name in cls.OPTIONAL if name not in cls.COMPONENTS))

    @classmethod
    def _kinds(cls, name: str) -> tuple[type | str, ...]:
        """The classes that a component may be of, as it is annotated; none for another attribute."""
        kind = cls._annotation(name) if name in cls.component_names() else None
        return tuple(part for part in (get_args(kind) or (kind,)) if part not in (None, NoneType))

    @classmethod
    def _annotation(cls, name: str) -> Any:
        """The class, or classes, that a component is annotated with; a name where the class is not imported here."""
        found = (inspect.get_annotations(base).get(name) for base in cls.__mro__)
        return next((kind for kind in found if kind is not None), None)

    def check(self) -> None:
        """Raises: ConfigError when components do not fit one another."""

    @property
    def components(self) -> dict[str, Any]:
        """Name → component; `OtherPipeline(**pipe.components, …)` shares loaded parts."""
        parts = {name: getattr(self, name) for name in self.component_names()}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def recommended(self) -> dict[str, Recommended]:
        """The steps, guidance scales and candidates that its makers recommend: `pipe(prompt, **pipe.recommended)`.

        Only a call's own arguments are in it; it is empty for a model that comes without recommendations. A call's
        defaults stay those of the ecosystem.
        """
        arguments = inspect.signature(type(self).__call__).parameters
        return {name: value for name, value in self._recommended.items() if name in arguments}

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The components that have weights."""
        return {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type (the first network's)."""
        return next(iter(self.networks.values())).dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes: with offloading on, the device that networks are brought to."""
        for network in self.networks.values():
            for module in network.modules():
                device = getattr(vars(module).get("_hf_hook"), "execution_device", None)
                if device is not None:
                    return torch.device(device)
        return next(next(iter(self.networks.values())).parameters()).device

    @classmethod
    def _may_lack(cls, name: str, index: Mapping[str, Any]) -> bool:
        """Whether a folder whose model_index.json is `index` may do without a component, and does."""
        return name in cls.OPTIONAL and index.get(name) in (None, [None, None])

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
            torch_dtype: the type of all weights, or its name; float32 by default. "auto" keeps the type that each
                component has in its file. A mapping has a type by component, and "default" for the others.
            dtype: another name of `torch_dtype`.
            variant: "fp16", say, reads `diffusion_pytorch_model.fp16.safetensors` of the components that have it, and
                the plain weights of the others.
            revision, cache_dir, local_files_only, token: as the hub client has them.
            use_safetensors: nothing else is read, so None and True are the same and False is refused.
            device_map: the device to load to; several are not supported.
            own_clip: read CLIP's parts by unclip's own classes (`clip/networks.py`, `clip/tokenizer.py`,
                `clip/preprocessing.py`) instead of transformers', whose import takes seconds. They give the same
                numbers and only encode; a part that they do not implement is read by transformers' class after all.
            components: parts to use in place of the folder's (`prior=my_prior`). Further arguments of the ecosystem's
                method are ignored with one warning, or refused.

        Raises:
            InputError: `torch_dtype` is not a floating type, or an argument is unknown or refused.
            CheckpointError: something is missing, broken or unsafe; the message names the component.
            ConfigError: a component is of an unknown kind, or does not fit the others.
        """
        parts = settled(components, cls.from_pretrained, cls.component_names())
        types = _types(torch_dtype if dtype is None else dtype, use_safetensors)
        device = _one_device(device_map)
        folder = resolve(
            name_or_folder,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            variant=variant,
        )
        source = Source(folder, variant, own_clip)
        to_read = [name for name in cls.component_names() if name not in parts]
        pipeline = cls(**parts, **cls._read(source, to_read, types))
        pipeline._source = source
        pipeline._recommended = read_recommended(folder)
        pipeline._probe = ProbeFile.read(folder)
        return pipeline if device is None else pipeline.to(device)

    @classmethod
    def _read(
        cls, source: "Source", names: Iterable[str], types: Mapping[str, torch.dtype | str | None]
    ) -> dict[str, Any]:
        """Those components of a folder, but for optional ones that it lacks; `types` as of `_types`."""
        index = read_json(safe_join(source.folder, "model_index.json"))
        to_read = [name for name in names if not cls._may_lack(name, index)]
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
        """This kind of pipeline from another's loaded components.

        What that kind does not have is given by name, or else read from the folder that `pipeline` was loaded from, in
        its type and on its device.

        Bars, tiling, recommendations, principal components and offloading stay as they are there; offloading lies in
        the networks, so what one of the two changes in it holds for both, and a network that is new here takes part
        from the next enabling.

        Raises: InputError when `pipeline` is not one of unclip's, or lacks components and was not loaded from a folder;
        CheckpointError when that folder lacks them too.
        """
        if not isinstance(pipeline, Pipeline):
            raise InputError(f"from_pipe takes a pipeline of unclip's, not a {type(pipeline).__name__}")
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
                f"{cls.__name__} needs {', '.join(needed)}, and the {type(pipeline).__name__} was not loaded from a "
                f"folder that could have them: give them by name, as in from_pipe(pipe, {needed[0]}=…)"
            )
        made = cls(**shared | read | components)
        made._source = pipeline._source
        made._recommended = dict(pipeline._recommended)
        made._probe = pipeline._probe
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
        """Write a folder that this library and, component by component, the ecosystem load.

        It appears only when whole. What the folder that was loaded recommends goes along, and its principal components
        too, if the image encoder is still the one that they are of.

        Raises: OutputExistsError when it exists and `overwrite` is false, or when it is the current or home folder;
        OutputError when the disk is full or the folder cannot be written, and what was there stays as it was;
        UnsafeFileError for `safe_serialization=False`.
        """
        if not safe_serialization:
            raise UnsafeFileError("unclip writes no pickles: leave safe_serialization at True")
        with atomic_folder(folder, overwrite=overwrite) as draft:
            index: dict[str, Any] = {"_class_name": type(self).__name__, "_diffusers_version": API_VERSION}
            for name, part in self.components.items():
                if part is None:
                    continue
                write_component(part, draft / name, variant=variant)
                index[name] = index_entry(part)
            write_json(draft / "model_index.json", index)
            write_recommended(draft, self._recommended)
            encoder = self.networks.get("image_encoder")
            if self._probe is not None and encoder is not None and self._probe.may_be_of(state_of(encoder)):
                self._probe.write(draft)

    def to(self, *where: torch.device | torch.dtype | str | int, **named: Any) -> Self:
        """Move and/or cast all networks: `to("cuda")`, `to(torch.float16)`, `to("cuda", torch.float16)`."""
        if self._is_offloaded:
            raise InputError(
                "the pipeline is offloaded: its networks move by themselves; call remove_all_hooks() first"
            )
        for network in self.networks.values():
            network.to(*where, **named)  # type: ignore[call-overload]
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep one network at a time on the accelerator, the others in main memory (through accelerate's hooks)."""
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
        """Keep one layer at a time on the accelerator: least memory, slowest."""
        from accelerate import cpu_offload

        self.remove_all_hooks()
        target = _accelerator(gpu_id, device)
        self.to("cpu")
        for network in self._distinct_networks:
            cpu_offload(network, target, offload_buffers=bool(network._parameters))

    def remove_all_hooks(self) -> None:
        """Undo offloading, of other pipelines with the same networks too; the networks stay in main memory."""
        self.maybe_free_model_hooks()
        if self._is_offloaded:
            from accelerate.hooks import remove_hook_from_module

            for network in self._distinct_networks:
                remove_hook_from_module(network, recurse=True)

    def maybe_free_model_hooks(self) -> None:
        """With model offload on, bring every network back to main memory; called at the end of each call."""
        for network in self._distinct_networks:
            for hook in offload_hooks(network):
                from accelerate.hooks import CpuOffload, UserCpuOffloadHook

                if isinstance(hook, CpuOffload):
                    UserCpuOffloadHook(network, hook).offload()

    @property
    def _distinct_networks(self) -> list[nn.Module]:
        """Every network once, also where it is two components, and without the wrapper of `torch.compile`."""
        return list(dict.fromkeys(map(original, self.networks.values())))

    @property
    def _is_offloaded(self) -> bool:
        """Whether networks have offloading's hooks, whichever pipeline put them there."""
        return any(offload_hooks(module) for network in self._distinct_networks for module in network.modules())

    def enable_attention_slicing(self, slice_size: str | int = "auto") -> None:
        """Compute attention in slices, which needs less memory: "auto" halves it, "max" takes one head at a time."""
        for network in self.networks.values():
            if hasattr(network, "enable_attention_slicing"):
                network.enable_attention_slicing(slice_size)  # type: ignore[operator]

    def disable_attention_slicing(self) -> None:
        """Compute attention in one go again."""
        for network in self.networks.values():
            if hasattr(network, "disable_attention_slicing"):
                network.disable_attention_slicing()  # type: ignore[operator]

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm for the bars of later calls: `disable=True` for none.

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
    """Where a pipeline was loaded from, and how: its folder, the variant of weights, and by whose CLIP classes."""

    folder: Path
    variant: str | None
    own_clip: bool


CLIP_PARTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "CLIPTextModelWithProjection": (nn.Module, ("config.vocab_size", "config.hidden_size", "text_projection")),
    "CLIPVisionModelWithProjection": (nn.Module, ("config.image_size", "visual_projection")),
    "CLIPTokenizer": (Callable, ("__len__", "model_max_length")),
    "BaseImageProcessor": (Callable, ()),
}
"""What is asked of CLIP's parts, whose classes are not imported here: a base, and what they have."""


def _serves_as(kind: str, value: object) -> bool:
    """Whether a value can be the part of CLIP's of that class: that class itself, unclip's own, or one like it."""
    base, needed = CLIP_PARTS[kind]
    return isinstance(value, base) and not isinstance(value, type) and all(_has(value, path) for path in needed)


def _has(value: object, path: str) -> bool:
    try:
        attrgetter(path)(value)
    except AttributeError:
        return False
    return True


def _either(kinds: tuple[type | str, ...], *, in_full: bool = False) -> str:
    def word(kind: type | str) -> str:
        if isinstance(kind, str):
            return kind
        return f"{kind.__module__}.{kind.__name__}" if in_full else kind.__name__

    return " or a ".join(map(word, kinds))


def _class_name(index: Mapping[str, Any], name: str, pipeline: str, folder: Path) -> str:
    """The class of a component; which library an old folder says it came from does not matter, the class does."""
    entry = index.get(name)
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
        raise CheckpointError(
            f"{folder / 'model_index.json'} is of a {index.get('_class_name', 'pipeline without a name')} and names no "
            f"{name!r}, which {pipeline} needs; give it by name ({name}=…), or load a model that has it"
        )
    return entry[1]


def _types(asked: Any, use_safetensors: bool | None) -> dict[str, torch.dtype | str | None]:
    """The types of weights by component, and "default" for those that are not named."""
    given = asked if isinstance(asked, Mapping) else {"default": asked}
    for name in given:
        if name not in {"default", *CLASSES, *FURTHER}:
            raise InputError(f"torch_dtype has a type for {name!r}, which no pipeline has; the others' is 'default'")
    asked_type(None, use_safetensors)
    return {name: asked_type(one) for name, one in given.items()}


def _one_device(device_map: Any) -> torch.device | None:
    try:
        return None if device_map is None else torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"device_map is {device_map!r}; it must be one device, such as 'cuda'. For a model that does not fit it, "
            "load without device_map and call enable_model_cpu_offload()"
        ) from error


def _accelerator(gpu_id: int | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        raise InputError("offloading needs an accelerator and this machine has none; device='cpu' tries it out")
    return torch.device(found.type, 0 if gpu_id is None else whole(gpu_id, "gpu_id", 0))
