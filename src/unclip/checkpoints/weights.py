"""Read, check and write weights in safetensors files: headers, shard indexes, state dicts."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from unclip.checkpoints.files import (
    TEMPORARY_PREFIX,
    atomic_file,
    file_size,
    hub_root,
    json_bytes,
    parse_json_object,
    read_json,
    safe_join,
    sync,
    writing,
)
from unclip.errors import CheckpointError, InputError, MissingFileError, UnsafeFileError, WeightsError
from unclip.numbers import plain

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

NAME_LIMIT = 512
TYPES = (
    "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64",
)  # fmt: skip
"""The supported types of tensors, by their names in the format."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor in a safetensors header: its type (`F32`, `BF16`, …), its shape, its size, and its file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path


class WeightsIndex(dict[str, TensorInfo]):
    """The tensors of one set of weights by name, in file order."""

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(info.file for info in self.values()))

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.values())

    def without(self, endings: tuple[str, ...]) -> WeightsIndex:
        """The index without tensors whose names end with one of `endings`."""
        return WeightsIndex((name, info) for name, info in self.items() if not name.endswith(endings))


def check_tensor_name(name: str, where: str) -> None:
    """Raise WeightsError for a tensor name that looks like a path, is empty, very long, or has control characters."""
    if not name or len(name) > NAME_LIMIT or not name.isprintable() or any(part in name for part in ("..", "/", "\\")):
        raise WeightsError(
            f"{where} has a tensor named {name[:80]!r}, which is not a parameter's name; the file is refused"
        )


def read_header(path: str | os.PathLike[str]) -> WeightsIndex:
    """The tensors of the safetensors file `path` in file order.

    The safetensors package checks types, shapes, offsets and the size of the file. This function also refuses duplicate
    keys, names that look like paths, and types that are not in `TYPES`.

    Raises MissingFileError when the file does not exist, and WeightsError when it is damaged or not accepted.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    size_bytes = file_size(path)
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as problem:
        raise WeightsError(
            f"{path} ({size_bytes} bytes) is damaged or not a safetensors file: {problem}; download it again"
        ) from problem
    with path.open("rb") as file:
        raw = file.read(int.from_bytes(file.read(8), "little"))
    entries = parse_json_object(raw, f"the header of {path}", WeightsError)
    entries.pop("__metadata__", None)
    index = WeightsIndex()
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        check_tensor_name(name, str(path))
        kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if kind not in TYPES:
            raise WeightsError(f"{path}: {name} has the type {kind!r}; the supported types are {', '.join(TYPES)}")
        if len(shape) > 16 or max(shape, default=0) >= 1 << 48:  # torch cannot hold it
            raise WeightsError(f"{path}: {name} has the shape {str(shape)[:80]}, which is not supported")
        index[name] = TensorInfo(kind, shape, end - start, path)
    return index


T = TypeVar("T")

_COMPILED = "_orig_mod"
"""The attribute in which `torch.compile` keeps the wrapped module; it is part of the names of the weights."""


def original(value: T) -> T:
    """The module that `torch.compile` wrapped; any other value unchanged."""
    return original(value._modules[_COMPILED]) if _COMPILED in getattr(value, "_modules", ()) else value  # type: ignore


def plain_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network, with the names of its uncompiled form."""
    return {_plain(name): value for name, value in module.state_dict().items()}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def offload_hooks(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's offloading hooks on one module, without those of its submodules."""
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network, including weights that sequential offloading keeps elsewhere.

    Raises: InputError when weights are on the meta device and have no values.
    """
    state = plain_state_dict(module)
    for path, part in module.named_modules():
        kept = [hook.weights_map for hook in offload_hooks(part) if getattr(hook, "weights_map", None) is not None]
        for name in (*part._parameters, *part._buffers) if kept else ():
            full = _plain(f"{path}.{name}" if path else name)
            if full in state and state[full].is_meta:
                state[full] = next((weights[name] for weights in kept if name in weights), state[full])
    if empty := [name for name, value in state.items() if value.is_meta]:
        raise InputError(
            f"{len(empty)} weights of {type(original(module)).__name__} (such as {empty[0]}) are on the meta device "
            "and have no values: load them before saving, or call remove_all_hooks() on an offloaded pipeline"
        )
    return state


DEFAULT_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".th", ".pkl")

_READ_GROUP_BYTES = 256 << 20  # a file is mapped again after this many bytes, which frees memory
_CHECK_ELEMENTS = 1 << 22


# -- files --------------------------------------------------------------------------------------------------------


def file_name(stem: str = DEFAULT_STEM, variant: str | None = None) -> str:
    """`stem.safetensors` or `stem.VARIANT.safetensors`; CheckpointError for a variant that is not a plain word."""
    return f"{stem}{_dotted(variant)}.safetensors"


def index_name(stem: str = DEFAULT_STEM, variant: str | None = None) -> str:
    """`stem.safetensors.index.json` or `stem.safetensors.index.VARIANT.json`."""
    return f"{stem}.safetensors.index{_dotted(variant)}.json"


def open_weights(
    folder: str | os.PathLike[str], *, stem: str = DEFAULT_STEM, variant: str | None = None
) -> WeightsIndex:
    """Find the weights `stem` in `folder` and check every header, without reading weights.

    Raises MissingFileError, which names the existing files; UnsafeFileError when there are only pickles, or an index
    points out of the folder; WeightsError for damaged files, an index that disagrees
    with its shards, or a folder with both a whole file and an index.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder")
    single = safe_join(folder, file_name(stem, variant))
    index = safe_join(folder, index_name(stem, variant))
    if single.exists() and index.exists():
        raise WeightsError(
            f"{folder} has its weights twice: in {single.name}, and in the shards of {index.name}; "
            "remove one of the two"
        )
    if single.exists():
        return read_header(single)
    if index.exists():
        return _open_shards(folder, index)
    raise _nothing_found(folder, stem, variant)


def _open_shards(folder: Path, index: Path) -> WeightsIndex:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise WeightsError(f"{index} must have a weight_map from tensor names to file names")
    shards = {name: safe_join(folder, name) for name in sorted(set(weight_map.values()))}
    if unsafe := [name for name in shards if not name.endswith(".safetensors")]:
        raise UnsafeFileError(f"{index} names {_some(unsafe)}; only .safetensors files are read")
    if missing := [name for name, path in shards.items() if not path.exists()]:
        raise MissingFileError(
            f"{index} names {_some(missing)}, which do not exist in {folder}; download the model again"
        )
    headers = {shard: read_header(path) for shard, path in shards.items()}
    found = {(name, shard) for shard, header in headers.items() for name in header}
    if different := found.symmetric_difference(weight_map.items()):
        places = (f"{name} in {shard}" for name, shard in sorted(different))
        raise WeightsError(f"{index} and its shards differ in {_some(places)}; download the model again")
    return WeightsIndex(item for header in headers.values() for item in header.items())


def _nothing_found(folder: Path, stem: str, variant: str | None) -> CheckpointError:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(TEMPORARY_PREFIX))
    weights = [name for name in names if ".safetensors" in name]
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles and not weights:
        return UnsafeFileError(
            f"{folder} has only pickles ({_some(pickles)}), which can run any code when read. "
            "If you trust them: unclip convert pickle FOLDER"
        )
    remedy = "; ask for one of these variants, or for none" if weights and variant else ""
    if not weights and hub_root(Path(os.path.realpath(folder))):
        remedy = (
            ". Pickles are not downloaded: if the repository has its weights as .bin alone and you trust it, "
            "`hf download NAME --local-dir FOLDER`, then unclip convert pickle FOLDER"
        )
    there = _some(weights or names) or "nothing"
    return MissingFileError(f"{folder} has no {file_name(stem, variant)}; there is {there}{remedy}")


def stored_type(index: WeightsIndex) -> torch.dtype | None:
    """The floating-point type of the largest part of the weights by size; None if there is none."""
    import torch

    types = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    sizes = {name: sum(info.nbytes for info in index.values() if info.dtype == name) for name in types}
    largest = max(sizes, key=sizes.__getitem__)
    return types[largest] if sizes[largest] else None


# -- reading -------------------------------------------------------------------------------------------------------


def read_tensors(index: WeightsIndex) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in file order, on the CPU, mapped from the file. Values are not checked."""
    from safetensors import SafetensorError, safe_open

    file, size_bytes, opened = None, 0, None
    try:
        for name, info in index.items():
            if file is None or info.file != opened or size_bytes >= _READ_GROUP_BYTES:
                file, size_bytes, opened = safe_open(info.file, framework="pt", device="cpu"), 0, info.file
            size_bytes += info.nbytes
            yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as problem:
        raise WeightsError(f"the weights in {opened} cannot be read: {problem}") from problem


def check_finite(tensor: Tensor, name: str, where: str = "the weights") -> None:
    """Raise WeightsError when a floating `tensor` has a NaN or an infinity; needs no memory of its size."""
    import torch

    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return
    for chunk in tensor.detach().reshape(-1).split(_CHECK_ELEMENTS):
        if chunk.element_size() == 1:
            chunk = chunk.float()  # torch has no minimum for its 8-bit floats
        if not torch.isfinite(torch.stack(torch.aminmax(chunk))).all():
            what = "NaN" if torch.isnan(chunk).any() else "an infinity"
            raise WeightsError(f"{name} in {where} has {what}; the file is damaged, or training failed")


def checked_cast(tensor: Tensor, dtype: torch.dtype, name: str, where: str = "the weights") -> Tensor:
    """`tensor` in `dtype`; WeightsError when it is not finite, or overflows in that type."""
    cast = tensor.to(dtype)
    try:
        check_finite(cast, name, where)
    except WeightsError:
        check_finite(tensor, name, where)
        raise WeightsError(f"{name} in {where} is too large for {dtype}; use bfloat16 or float32") from None
    return cast


def load_into(
    module: nn.Module,
    folder: str | os.PathLike[str],
    *,
    stem: str = DEFAULT_STEM,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    skipped: tuple[str, ...] = (),
) -> None:
    """Fill `module`, usually built on the meta device, with the weights in `folder`.

    Names and shapes are compared before any weight is read; on an error the module is unchanged. Floating-point tensors
    become `dtype`, or the module's type for them, and take the memory layout of its kernels; requires_grad does not
    change. Memory holds about one copy of the weights: those that keep their type stay mapped from the file, so the
    file may be replaced but not changed in place while the module exists. In a channels-last module all weights are
    copied. Tensors whose names end with one of `skipped` are not read.
    Raises what `open_weights` raises, and WeightsError when names or shapes differ, or a weight is not finite.
    """
    fill(module, open_weights(folder, stem=stem, variant=variant).without(skipped), folder, dtype=dtype)


def fill(
    module: nn.Module, index: WeightsIndex, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> None:
    """`load_into` for weights that are already open; `folder` is their name in messages."""
    wanted = module.state_dict(keep_vars=True)
    check_fit({name: tuple(value.shape) for name, value in wanted.items()}, index, folder)
    relaid = any(_is_channels_last(value) for value in wanted.values())
    loaded: dict[str, Any] = {}
    for name, tensor in read_tensors(index):
        target = wanted[name].dtype
        if tensor.is_floating_point() != target.is_floating_point:
            raise WeightsError(f"{name} in {folder} is {index[name].dtype}; the model needs {target}")
        if dtype is not None and target.is_floating_point:
            target = dtype
        loaded[name] = checked_cast(tensor, target, name, str(folder))
        if relaid:  # copy all: one mapped tensor would keep the whole file in memory
            loaded[name] = _copied(loaded[name], wanted[name])
    module.load_state_dict(loaded, strict=True, assign=True)
    left = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    if left:
        raise WeightsError(f"{_some(left)} of {type(module).__name__} are not in the checkpoint and have no value")


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether it is a kernel in channels-last order."""
    import torch

    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _copied(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy with the memory layout of `like`."""
    import torch

    return tensor.clone(memory_format=torch.channels_last if _is_channels_last(like) else torch.contiguous_format)


def check_fit(wanted: Mapping[str, tuple[int, ...]], index: WeightsIndex, folder: str | os.PathLike[str]) -> None:
    """Raise WeightsError unless `index` has the `wanted` names with these shapes, and no others."""
    missing = [name for name in wanted if name not in index]
    extra = [name for name in index if name not in wanted]
    wrong = [
        f"{name} is {list(info.shape)}, not {list(wanted[name])}"
        for name, info in index.items()
        if name in wanted and info.shape != wanted[name]
    ]
    kinds = {"missing": missing, "that the model does not have": extra, "of another shape": wrong}
    problems = [f"{len(names)} {what} ({_some(names)})" for what, names in kinds.items() if names]
    if problems:
        raise WeightsError(
            f"the weights in {folder} do not fit the model: {'; '.join(problems)}. Is its config.json right?"
        )


# -- writing -------------------------------------------------------------------------------------------------------


def save_weights(
    folder: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    *,
    stem: str = DEFAULT_STEM,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    before_replacing: Callable[[], None] = lambda: None,
) -> tuple[Path, ...]:
    """Write weights into `folder`, in shards above `max_shard_size`, and return the files.

    The folder is created if it does not exist. Each file is written atomically; files of an earlier save with this stem
    and variant are removed afterwards. If the process is killed while shards replace others, the folder does not load,
    but never holds a mixture; write inside `atomic_folder` to avoid this too. `before_replacing` is called once, after
    all new files are on the disk and before the first is renamed. Raises WeightsError, before anything is written, for
    weights that are not finite or names that are not allowed.
    """
    for name, tensor in state_dict.items():
        check_tensor_name(name, "the state dict")
        check_finite(tensor, name, "the state dict")
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stale = [path for path in folder.iterdir() if _is_ours(path.name, stem, variant)]
    shards = _plan(state_dict, parse_size(max_shard_size))
    base, total = f"{stem}{_dotted(variant)}", len(shards)
    paths = [folder / f"{base}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    if total == 1:
        paths = [folder / file_name(stem, variant)]
    index = folder / index_name(stem, variant)
    with contextlib.ExitStack() as renames:  # all files are on the disk before the first is renamed
        if total > 1:
            draft = renames.enter_context(atomic_file(index))  # renamed last
            weight_map = {name: path.name for names, path in zip(shards, paths, strict=True) for name in names}
            metadata = {"total_size": sum(tensor.nbytes for tensor in state_dict.values())}
            draft.write_bytes(json_bytes({"metadata": metadata, "weight_map": weight_map}, index))
        for names, path in zip(shards, paths, strict=True):
            draft = renames.enter_context(atomic_file(path))
            _save(state_dict, names, draft)
            sync(draft)
        before_replacing()
        if total > 1 and any(path.exists() for path in paths):
            index.unlink(missing_ok=True)  # its shards are about to be replaced
    written = paths if total == 1 else [*paths, index]
    for path in set(stale) - set(written):
        path.unlink(missing_ok=True)
    return tuple(written)


def _save(state_dict: Mapping[str, Tensor], names: list[str], path: Path) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in names:
        tensor = state_dict[name].detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if address in seen else tensor  # the format cannot express shared weights
        seen.add(address)
    save_file(tensors, path, metadata={"format": "pt"})


def _plan(state_dict: Mapping[str, Tensor], limit_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size_bytes = 0
    for name, tensor in state_dict.items():
        if shards[-1] and size_bytes + tensor.nbytes > limit_bytes:
            shards.append([])
            size_bytes = 0
        shards[-1].append(name)
        size_bytes += tensor.nbytes
    return shards


def parse_size(size: int | str) -> int:
    """Bytes in `size`: a number, or a string such as "10GB", "500MB" (decimal) or "2GiB" (binary)."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    found = re.fullmatch(r"(\d{1,15})\s*([A-Z]*)", str(plain(size)).strip().upper())
    if not found or found[2] not in units or int(found[1]) == 0:
        raise CheckpointError(f'max_shard_size is {size!r}; give bytes, or a string such as "500MB" or "10GB"')
    return int(found[1]) * units[found[2]]


def _is_ours(name: str, stem: str, variant: str | None) -> bool:
    shard = re.escape(stem + _dotted(variant)) + r"-\d{5}-of-\d{5}\.safetensors"
    return name in (file_name(stem, variant), index_name(stem, variant)) or re.fullmatch(shard, name) is not None


def _dotted(variant: str | None) -> str:
    if variant is None:
        return ""
    if not isinstance(variant, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", variant):
        raise CheckpointError(f"variant is {str(variant)[:80]!r}; it must be a word such as 'fp16'")
    return f".{variant}"


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
