"""Read and judge the header of a safetensors file: names, types, shapes and places of its tensors.

Does not read weights and needs no torch; the checks are ours because the safetensors package leaves some out.
Called by weights.py before a file is opened for reading, and by whoever only wants to know what a file holds.
"""

from __future__ import annotations

import contextlib
import math
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

HEADER_LIMIT_BYTES = 100_000_000
NAME_LIMIT = 512
SIZE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes an element takes, by the format's name of its type; types that are not here are refused."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a safetensors header says of one tensor: the type (`F32`, `BF16`, …), the shape, the file that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZE_BYTES[self.dtype]


def check_tensor_name(name: str, where: str) -> None:
    """Raise WeightsError for a tensor name that looks like a path, is empty, very long, or has control characters."""
    bad = not name or len(name) > NAME_LIMIT or ".." in name or any(c in "/\\" or not c.isprintable() for c in name)
    if bad:
        raise WeightsError(
            f"{where} has a tensor named {name[:80]!r}, which is no parameter's name; the file is refused"
        )


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """The tensors of the safetensors file `path` in the order in which they lie there.

    Raises MissingFileError when it is not there, and WeightsError for a header that is absurdly large, is no JSON,
    names a tensor twice, or has path-like names, unknown types, sizes that do not follow from shapes, tensors that
    overlap or leave gaps, and for a file that is shorter or longer than its header says.
    """
    path = Path(path)
    size_bytes = file_size(path)
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size_bytes - 8:
            raise WeightsError(f"{path} is truncated ({size_bytes} bytes) or is no safetensors file; download it again")
        if not 2 <= length <= HEADER_LIMIT_BYTES:
            raise WeightsError(f"{path} has a header of {length} bytes; at most {HEADER_LIMIT_BYTES} are read")
        raw = file.read(length)
    entries = parse_json_object(raw, f"the header of {path}", WeightsError)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path} has metadata that are not texts by name; the file is refused")
    spans = [_span(name, entry, path) for name, entry in entries.items()]
    spans.sort(key=lambda span: (span[0], span[1]))
    end_of_last = 0
    for begin, end, name, _ in spans:
        if begin != end_of_last:
            what = "overlaps the tensor before it" if begin < end_of_last else "leaves a gap before it"
            raise WeightsError(f"{path}: {name} begins at byte {begin} and {what}, which ends at {end_of_last}")
        end_of_last = end
    data_bytes = size_bytes - 8 - length
    if end_of_last != data_bytes:
        what = "truncated" if end_of_last > data_bytes else "longer than it says"
        raise WeightsError(
            f"{path} is {what}: {data_bytes} bytes of weights, the header says {end_of_last}; get it again"
        )
    return {name: info for _, _, name, info in spans}


def _span(name: str, entry: Any, path: Path) -> tuple[int, int, str, TensorInfo]:
    """(begin, end, name, info) of one entry of the header, judged by itself."""
    check_tensor_name(name, str(path))
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{path}: {name} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZE_BYTES:
        raise WeightsError(f"{path}: {name} has the type {str(dtype)[:40]!r}; known are {', '.join(SIZE_BYTES)}")
    if not _are_counts(shape) or len(shape) > 16:
        raise WeightsError(f"{path}: {name} has the shape {str(shape)[:80]}; it must be a list of counts")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightsError(f"{path}: {name} has the data_offsets {str(offsets)[:80]}; they must be [begin, end]")
    info = TensorInfo(dtype, tuple(shape), path)
    if offsets[1] - offsets[0] != info.nbytes:
        raise WeightsError(f"{path}: {name} takes {offsets[1] - offsets[0]} bytes; {dtype} {shape} needs {info.nbytes}")
    return offsets[0], offsets[1], name, info


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)


T = TypeVar("T")

_COMPILED = "_orig_mod"
"""Where `torch.compile` keeps the module that it wraps; it is also part of the names of that module's weights."""


def original(value: T) -> T:
    """The module that `torch.compile(module)` was made of; any other value as it is."""
    return original(value._modules[_COMPILED]) if _COMPILED in getattr(value, "_modules", ()) else value  # type: ignore


def plain_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network by the names that it has when neither it nor a part of it is compiled."""
    return {_plain(name): value for name, value in module.state_dict().items()}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def offload_hooks(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's hooks on one module (not on those inside it): what offloading works by."""
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network, with the weights that sequential offloading keeps for it in place of empty ones.

    Raises: InputError when weights have no values: nothing keeps them.
    """
    state = plain_state_dict(module)
    for path, part in module.named_modules():
        kept = [hook.weights_map for hook in offload_hooks(part) if getattr(hook, "weights_map", None) is not None]
        for name in (*part._parameters, *part._buffers) if kept else ():
            full = _plain(f"{path}.{name}" if path else name)
            if full in state and state[full].is_meta:
                state[full] = next((weights[name] for weights in kept if name in weights), state[full])
    empty = [name for name, value in state.items() if value.is_meta]
    if empty:
        raise InputError(
            f"{len(empty)} weights of {type(original(module)).__name__} ({empty[0]}, say) lie on the meta device, "
            "where they have no values: before they are saved, load them, or call the remove_all_hooks() of a pipeline "
            "that is offloaded"
        )
    return state


DEFAULT_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".th", ".pkl")

_READ_GROUP_BYTES = 256 << 20  # a file is mapped anew after so many bytes, so that originals leave memory
_CHECK_ELEMENTS = 1 << 22


# -- what is there -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightsIndex(Mapping[str, TensorInfo]):
    """The tensors of one set of weights by name, in file order; headers are read and judged, weights are not read."""

    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def without(self, endings: tuple[str, ...]) -> WeightsIndex:
        """These tensors but those whose names end with one of `endings`."""
        kept = {name: info for name, info in self.tensors.items() if not name.endswith(endings)}
        return WeightsIndex(kept, self.files)


def file_name(stem: str = DEFAULT_STEM, variant: str | None = None) -> str:
    """`stem.safetensors` or `stem.VARIANT.safetensors`; CheckpointError for a variant that is no plain word."""
    return f"{stem}{_dotted(variant)}.safetensors"


def index_name(stem: str = DEFAULT_STEM, variant: str | None = None) -> str:
    """`stem.safetensors.index.json` or `stem.safetensors.index.VARIANT.json`."""
    return f"{stem}.safetensors.index{_dotted(variant)}.json"


def open_weights(
    folder: str | os.PathLike[str], *, stem: str = DEFAULT_STEM, variant: str | None = None
) -> WeightsIndex:
    """Find the weights `stem` in `folder` and judge every header, without reading weights.

    Raises MissingFileError (the message names what is there), UnsafeFileError when
    there are only pickles or an index points out of the folder, WeightsError for damaged files, an index that disagrees
    with its shards, or a folder with both a whole file and an index.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder")
    single = safe_join(folder, file_name(stem, variant))
    index = safe_join(folder, index_name(stem, variant))
    if single.exists() and index.exists():
        raise WeightsError(
            f"{folder} has its weights twice: whole in {single.name}, and in the shards that {index.name} lists; "
            "remove one of the two"
        )
    if single.exists():
        return WeightsIndex(read_header(single), (single,))
    if index.exists():
        return _open_shards(folder, index)
    raise _nothing_found(folder, stem, variant)


def _open_shards(folder: Path, index: Path) -> WeightsIndex:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise WeightsError(f"{index} must have a weight_map from tensor names to file names")
    shards = {name: safe_join(folder, name) for name in sorted(set(weight_map.values()))}
    for name in shards:
        if not name.endswith(".safetensors"):
            raise UnsafeFileError(f"{index} names {name[:80]!r}; only .safetensors files are read")
    missing = [name for name, path in shards.items() if not path.exists()]
    if missing:
        raise MissingFileError(f"{index} names {_some(missing)}, which {folder} lacks; download the model again")
    tensors: dict[str, TensorInfo] = {}
    for shard, path in shards.items():
        for name, info in read_header(path).items():
            if name in tensors:
                raise WeightsError(f"{name} is in two shards, {tensors[name].file.name} and {shard}")
            if weight_map.get(name) != shard:
                raise WeightsError(f"{shard} holds {name}, but {index} places it in {weight_map.get(name)}")
            tensors[name] = info
    lacking = sorted(set(weight_map) - set(tensors))
    if lacking:
        raise WeightsError(f"{index} lists {_some(lacking)}, which no shard holds")
    return WeightsIndex(tensors, tuple(shards.values()))


def _nothing_found(folder: Path, stem: str, variant: str | None) -> CheckpointError:
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(TEMPORARY_PREFIX))
    weights = [name for name in names if ".safetensors" in name]
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    wanted = file_name(stem, variant)
    if weights:
        remedy = "; ask for one of these variants, or for none" if variant else ""
        return MissingFileError(f"{folder} has no {wanted}; there is {_some(weights)}{remedy}")
    if pickles:
        return UnsafeFileError(
            f"{folder} has only pickles ({_some(pickles)}), which can run any code when read. "
            "If you trust them: unclip convert pickle FOLDER"
        )
    remedy = ""
    if hub_root(Path(os.path.realpath(folder))):
        remedy = (
            ". Pickles are not downloaded: if the repository has its weights as .bin alone and you trust it, "
            "`hf download NAME --local-dir FOLDER`, then unclip convert pickle FOLDER"
        )
    return MissingFileError(f"{folder} has no {wanted}; there is {_some(names) or 'nothing'}{remedy}")


def stored_type(index: WeightsIndex) -> torch.dtype | None:
    """The floating type that takes most of the weights' memory; None if there is none."""
    import torch

    types = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    sizes = {name: sum(info.nbytes for info in index.values() if info.dtype == name) for name in types}
    largest = max(sizes, key=sizes.__getitem__)
    return types[largest] if sizes[largest] else None


# -- reading -------------------------------------------------------------------------------------------------------


def read_tensors(index: WeightsIndex) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in file order, on the CPU, mapped from the file; nothing is checked for NaN here."""
    from safetensors import SafetensorError, safe_open

    for path, names in _groups(index):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in names:
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as problem:
            raise WeightsError(f"{path} cannot be read: {problem}") from problem


def _groups(index: WeightsIndex) -> Iterator[tuple[Path, list[str]]]:
    """Tensor names by file, in groups of a bounded size."""
    path, names, size_bytes = None, [], 0
    for name, info in index.items():
        if path is not None and (info.file != path or size_bytes >= _READ_GROUP_BYTES):
            yield path, names
            names, size_bytes = [], 0
        path = info.file
        names.append(name)
        size_bytes += info.nbytes
    if path is not None:
        yield path, names


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
            raise WeightsError(f"{name} in {where} holds {what}; the file is damaged or its training went wrong")


def checked_cast(tensor: Tensor, dtype: torch.dtype, name: str, where: str = "the weights") -> Tensor:
    """`tensor` in `dtype`; WeightsError when it is not finite, or is not any more in that type."""
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
    passed_over: tuple[str, ...] = (),
) -> None:
    """Fill `module`, usually built on the meta device, with the weights in `folder`; all of it or nothing.

    Names and shapes are compared before any weight is read. Floating tensors become `dtype`, or the type that the
    module has for them, and take its kernels' memory layout; requires_grad stays as it is. At most about one copy of
    the weights is in memory: those that keep their type stay mapped from the file, privately, so the file may be
    replaced (as unclip always does it) but not changed in place while the module lives; unless the module's kernels are
    channels-last, which no file has. What the file holds under names that end with one of `passed_over` is not read.
    Raises what `open_weights` raises, and WeightsError when names or shapes differ, or a weight is not finite.
    """
    fill(module, open_weights(folder, stem=stem, variant=variant).without(passed_over), folder, dtype=dtype)


def fill(
    module: nn.Module, index: WeightsIndex, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> None:
    """`load_into` for weights that are already open; `folder` is how messages call their place."""
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
        if relaid:  # then all are copied: a single tensor that stays mapped would keep its whole file in memory
            loaded[name] = _copied(loaded[name], wanted[name])
    module.load_state_dict(loaded, strict=True, assign=True)
    left = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    if left:
        raise WeightsError(
            f"{_some(left)} of {type(module).__name__} are in no checkpoint and were never given a value"
        )


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether it is a kernel in channels-last order; in a file none is."""
    import torch

    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _copied(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy in memory of its own, laid out as `like`."""
    import torch

    return tensor.clone(memory_format=torch.channels_last if _is_channels_last(like) else torch.contiguous_format)


def check_fit(wanted: Mapping[str, tuple[int, ...]], index: WeightsIndex, folder: str | os.PathLike[str]) -> None:
    """Raise WeightsError unless `index` has the `wanted` names with these shapes, and no others."""
    problems = []
    missing = [name for name in wanted if name not in index]
    extra = [name for name in index if name not in wanted]
    wrong = [name for name in index if name in wanted and index[name].shape != wanted[name]]
    if missing:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if extra:
        problems.append(f"{len(extra)} that the model does not have ({_some(extra)})")
    if wrong:
        shown = [f"{name} is {list(index[name].shape)}, not {list(wanted[name])}" for name in wrong]
        problems.append(f"{len(wrong)} of another shape ({_some(shown)})")
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
    """Write weights into `folder` (made if need be) and return the files, in shards where they exceed `max_shard_size`.

    Every file appears whole or not at all, and files of an earlier save with this stem and variant go once the new ones
    stand. A kill while shards that replace others get their names leaves a folder that does not load rather than a
    mixture; where even that may not be, write inside `atomic_folder`. `before_replacing` is called once, when all new
    files are whole on the disk and none has its name yet. Raises WeightsError, before anything is written,
    for weights that are not finite or names that no file may hold.
    """
    for name, tensor in state_dict.items():
        check_tensor_name(name, "the state dict")
        check_finite(tensor, name, "the state dict")
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stale = [path for path in folder.iterdir() if _is_ours(path.name, stem, variant)]
    shards = _plan(state_dict, parse_size(max_shard_size))
    if len(shards) == 1:
        written = [folder / file_name(stem, variant)]
        with atomic_file(written[0]) as draft:
            _save(state_dict, shards[0], draft)
            sync(draft)
            before_replacing()
    else:
        written = _save_shards(folder, state_dict, shards, stem, variant, before_replacing)
    for path in stale:
        if path not in written:
            path.unlink(missing_ok=True)
    return tuple(written)


def _save_shards(
    folder: Path,
    state_dict: Mapping[str, Tensor],
    shards: list[list[str]],
    stem: str,
    variant: str | None,
    before_replacing: Callable[[], None],
) -> list[Path]:
    base, total = f"{stem}{_dotted(variant)}", len(shards)
    paths = [folder / f"{base}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    index = folder / index_name(stem, variant)
    weight_map = {name: path.name for names, path in zip(shards, paths, strict=True) for name in names}
    total_bytes = sum(state_dict[name].nbytes for name in state_dict)
    with contextlib.ExitStack() as renames:  # all is written and on the disk before the first file gets its name
        draft = renames.enter_context(atomic_file(index))  # the first to be written is the last to be renamed
        draft.write_bytes(json_bytes({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, index))
        for names, path in zip(shards, paths, strict=True):
            draft = renames.enter_context(atomic_file(path))
            _save(state_dict, names, draft)
            sync(draft)
        before_replacing()
        if any(path.exists() for path in paths):
            index.unlink(missing_ok=True)  # its shards are about to change under it
    return [*paths, index]


def _save(state_dict: Mapping[str, Tensor], names: list[str], path: Path) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in names:
        tensor = state_dict[name].detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if address in seen else tensor  # the format has no notion of shared weights
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
    """Bytes in `size`: a count, or text such as "10GB", "500MB" (decimal) or "2GiB" (binary)."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    found = re.fullmatch(r"(\d{1,15})\s*([A-Z]*)", str(plain(size)).strip().upper())
    if not found or found[2] not in units or int(found[1]) == 0:
        raise CheckpointError(f'max_shard_size is {size!r}; give bytes, or a text such as "500MB" or "10GB"')
    return int(found[1]) * units[found[2]]


def _is_ours(name: str, stem: str, variant: str | None) -> bool:
    base = re.escape(stem + _dotted(variant))
    shard = re.fullmatch(base + r"-\d{5}-of-\d{5}\.safetensors", name)
    return shard is not None or name in (file_name(stem, variant), index_name(stem, variant))


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
