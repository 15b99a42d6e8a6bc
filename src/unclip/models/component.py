"""Base classes of the networks and of their configurations: checks, initialization, reading and writing."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from unclip.checkpoints.files import atomic_file, json_bytes, output_folder, read_json, safe_join, sync
from unclip.checkpoints.hub import resolve
from unclip.checkpoints.layout import API_VERSION
from unclip.checkpoints.loading_arguments import accepted_arguments, weights_type
from unclip.checkpoints.weights import load_into, open_weights, save_weights, state_of, stored_type
from unclip.errors import CheckpointError, ConfigError, InputError, UnsafeFileError
from unclip.limits import Range, check_fields
from unclip.models.kernels import automatic_type
from unclip.models.layers import set_slicing

MAX_CHANNELS = 16_384
MAX_LAYERS = 256
MAX_PARAMETERS = 50_000_000_000


ANYTHING = ()
"""Marks a key that does not change what the network computes, so any value is accepted."""

Width = Annotated[int, Range(1, MAX_CHANNELS)]
WideWidth = Annotated[int, Range(1, 65_536)]
Depth = Annotated[int, Range(1, MAX_LAYERS)]


@dataclass(frozen=True, eq=False)
class ModelConfig(Mapping[str, Any]):
    """Base of the networks' configurations: `config.key`, `config["key"]`, `dict(config)`.

    The annotations of the fields contain their limits; see `unclip.limits`. `NEUTRAL` lists the keys that only
    diffusers' class of the same name has. Each key has the values that have no effect; other values are refused.

    Raises: ConfigError for a value of a wrong type, outside its limits, or not implemented.
    """

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __post_init__(self) -> None:
        check_fields(self)
        self.check()
        count = self.approximate_parameters()
        self.require(count <= MAX_PARAMETERS, f"it has about {count:.1e} parameters; the limit is {MAX_PARAMETERS:.0e}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The configuration from `settings`, such as a parsed config.json. Keys with a leading _ are skipped.

        Raises:
            ConfigError: an unknown or missing key, a value outside its limits, or a setting that is not implemented.
        """
        known = {field.name: field for field in fields(cls)}
        kept = {}
        for key, value in settings.items():
            if key.startswith("_"):
                continue
            if key in known:
                kept[key] = value
            elif key not in cls.NEUTRAL:
                raise ConfigError(f"{cls.__name__} has no setting {key!r:.80} (its value is {value!r:.200}); remove it")
            elif (neutral := cls.NEUTRAL[key]) is not ANYTHING and value not in neutral:
                supported = ", ".join(map(repr, neutral))
                raise ConfigError(f"{cls.__name__}: {key} = {value!r:.200} is not implemented; supported: {supported}")
        needed = [name for name, field in known.items() if field.default is MISSING and name not in kept]
        if needed:
            raise ConfigError(f"{cls.__name__} needs a value for {', '.join(needed)}")
        return cls(**kept)

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be used."""

    def approximate_parameters(self) -> int:
        """The approximate number of parameters of the network, to refuse absurd sizes."""
        return 0

    def __getitem__(self, key: str) -> Any:
        if key not in tuple(self):
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    def require(self, is_met: bool, problem: str) -> None:
        """Raise ConfigError with the `problem` unless a condition is met."""
        if not is_met:
            raise ConfigError(f"{type(self).__name__}: {problem}")


C = TypeVar("C", bound=ModelConfig)


class Component(nn.Module, Generic[C]):
    """Base of the networks. A subclass names its `config_class` and builds its layers in `build(config)`.

    Args:
        config: a configuration, or a mapping with its keys.
        settings: single settings, which override those of `config`.

    Raises:
        ConfigError: see `ModelConfig`. It is raised before memory is allocated.
    """

    config_class: ClassVar[type[ModelConfig]]
    weights_stem: ClassVar[str] = "diffusion_pytorch_model"
    """The name of the weights file without its extension."""
    saved_as: ClassVar[str] = ""
    """The name of the class in files, if it is not its own."""
    tables: ClassVar[tuple[str, ...]] = ()
    """Endings of the names of tensors in files that are not weights and are skipped."""
    config: C

    def __init__(self, config: ModelConfig | Mapping[str, Any] | None = None, /, **settings: Any) -> None:
        super().__init__()
        if settings or not isinstance(config, self.config_class):
            config = self.config_class.from_dict({**(config or {}), **settings})
        self.config = config  # pyright: ignore[reportAttributeAccessIssue]
        self.build(self.config)

    def build(self, config: C) -> None:
        """Create the layers that `config` describes."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: ModelConfig | Mapping[str, Any], /) -> Self:
        """A network with PyTorch's default random weights; `initialize_for_training` gives better ones."""
        return cls(config)

    def initialize_for_training(self, generator: torch.Generator | None = None) -> Self:
        """Initialize every weight for training from scratch, with `generator` if given."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
                if module.bias is not None:
                    bound = module.weight[0].numel() ** -0.5
                    nn.init.uniform_(module.bias, -bound, bound, generator=generator)
            elif isinstance(module, nn.GroupNorm | nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device that the network computes on: that of its offloading hook, if any, or else that of its weights."""
        for module in self.modules():
            hook = vars(module).get("_hf_hook")
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
        return next(self.parameters()).device

    def enable_attention_slicing(self, slice_size: str | int = "auto") -> None:
        """Compute attention in slices to save memory: half of the heads ("auto"), one ("max"), or a number of maps."""
        set_slicing(self, slice_size)

    def disable_attention_slicing(self) -> None:
        """Compute all heads of an attention at once again."""
        set_slicing(self, None)

    def save_pretrained(
        self,
        folder: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write config.json and the weights, as safetensors, into `folder`, which is created if it does not exist.

        An existing model stays complete until the new weights are on the disk. If its configuration differs, its
        config.json is removed before its weights are replaced. A killed process therefore leaves the old model, the
        new one, or a folder without config.json, which does not load.

        Raises:
            UnsafeFileError: `safe_serialization` is False. Pickles are not written, since reading one can run code.
            InputError, OutputExistsError: `folder` is not a valid path, or is a file.
            OutputError: the disk is full, or the folder cannot be written. Existing files are unchanged.
            InputError: the weights are on the meta device and have no values.
        """
        if not safe_serialization:
            raise UnsafeFileError("unclip does not write pickles: leave safe_serialization at True")
        state = state_of(self)
        folder = output_folder(folder)
        path, config = folder / "config.json", self._header() | dict(self.config)

        def forget() -> None:
            if path.exists() and not _has_same_settings(path, config):
                path.unlink()
                sync(folder)

        with atomic_file(path) as draft:  # on the disk before any weight is replaced, and renamed after them
            draft.write_bytes(json_bytes(config, path))
            sync(draft)
            save_weights(
                folder,
                state,
                stem=self.weights_stem,
                variant=variant,
                max_shard_size=max_shard_size,
                before_replacing=forget,
            )

    @classmethod
    def file_class(cls) -> str:
        """The name of the class in config.json and model_index.json."""
        return cls.saved_as or cls.__name__

    def _header(self) -> dict[str, Any]:
        """The entries of config.json that are not settings."""
        return {"_class_name": self.file_class(), "_diffusers_version": API_VERSION, "_unclip_version": _version()}

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        use_safetensors: bool | None = None,
        **others: Any,
    ) -> Self:
        """Read a network from a folder or a hub repository, in evaluation mode; float32 unless `torch_dtype` is given.

        The layers are built on the meta device, and the weights of the file are then assigned to them.

        Only safetensors are read, whether `use_safetensors` is None or True. `torch_dtype` may be a type's name,
        "auto" for the CPU's fastest type, or "stored" for the type in the file; `dtype` is another name for it.
        `others` are arguments of diffusers' method: they are ignored with one warning, or refused.

        Raises:
            InputError: `torch_dtype` is not a floating type, or an argument is unknown or refused.
            UnsafeFileError: `use_safetensors` is False.
            ConfigError: config.json describes another class, or something that is not implemented.
            CheckpointError: a file is missing, unsafe or broken, or its weights do not fit the configuration.
        """
        accepted_arguments(others, cls.from_pretrained)
        requested = weights_type(torch_dtype if dtype is None else dtype, use_safetensors)
        folder = resolve(
            name_or_folder,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            variant=variant,
            allow_patterns=[f"{subfolder}/*", "model_index.json"] if subfolder else None,
        )
        if subfolder:
            folder = safe_join(folder, subfolder)
        settings = read_json(safe_join(folder, "config.json"))
        own = cls.file_class()
        if (name := settings.get("_class_name", own)) != own:
            raise ConfigError(f"{folder} contains a {name} (see its config.json), not a {own}; use that class")
        with torch.device("meta"):
            model = cls.from_config(settings)
        if isinstance(requested, str):
            if requested == "auto":
                requested = automatic_type(torch.device("cpu"))
            else:
                requested = stored_type(open_weights(folder, stem=cls.weights_stem, variant=variant))
        dtype = requested or torch.float32  # not torch's default type
        load_into(model, folder, stem=cls.weights_stem, variant=variant, dtype=dtype, skipped=cls.tables)
        return model.eval()


def _has_same_settings(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether the file contains this configuration; the version that wrote it does not matter."""

    def settings(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in entries.items() if key == "_class_name" or not key.startswith("_")}

    try:
        return settings(read_json(path)) == settings(json.loads(json.dumps(config)))
    except CheckpointError:
        return False


def _version() -> str:
    try:
        return version("unclip")
    except PackageNotFoundError:
        return "unknown"


def zero(*layers: nn.Module) -> None:
    """Set all parameters of `layers` to 0, so that a residual branch starts as the identity."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def check_rows(**tensors: Tensor) -> None:
    """Raise InputError unless the tensors, given by name, agree in their first dimension."""
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        sizes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise InputError(f"the batch sizes differ: {sizes}")


def check_shape(name: str, tensor: Tensor, *wanted: int | str) -> None:
    """Raise InputError unless a tensor has this shape; a word stands for any number."""
    shape = tuple(tensor.shape)
    fits = len(shape) == len(wanted) and all(isinstance(b, str) or a == b for a, b in zip(shape, wanted, strict=True))
    if not fits:
        raise InputError(f"{name} is {shape}; it must be [{', '.join(map(str, wanted))}]")
