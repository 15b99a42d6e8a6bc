"""One small safetensors file of a named kind: tensors, and a few words on where they come from.

Knows the container, a kind and its version; knows not what the tensors mean. Called by the classes that save
themselves as one file: principal components, bipartite latents.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from unclip.checkpoints.files import atomic_file
from unclip.checkpoints.header import check_tensor_name, read_header
from unclip.checkpoints.weights import check_finite
from unclip.errors import CheckpointError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
LIMIT_BYTES = 4 << 30
"""More than any such file holds; what is larger is another thing."""


def write_tensor_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    version: int,
    about: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `tensors` as the file `path`, whole or not at all, and return its path.

    Args:
        path: ends in .safetensors; missing folders are made.
        tensors: by name, any device.
        kind: what the file is, a word; `version`: of that kind, from 1.
        about: texts by name, kept beside the tensors.

    Raises:
        CheckpointError: `path` does not end in .safetensors.
        WeightsError: a tensor is not finite, or its name is none that a file may hold.
        OutputExistsError: the file is there and `overwrite` is false.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != SUFFIX:
        raise CheckpointError(f"{path} must end in {SUFFIX}: name it {path.name}{SUFFIX}, say")
    kept = {}
    for name, tensor in tensors.items():
        check_tensor_name(name, kind)
        check_finite(tensor, name, kind)
        kept[name] = tensor.detach().cpu().contiguous().clone()  # the format has no notion of shared memory
    metadata = {**(about or {}), "kind": kind, "version": str(version)}
    with atomic_file(path, overwrite=overwrite) as draft:
        save_file(kept, draft, metadata=metadata)
    return path


def read_tensor_file(
    path: str | os.PathLike[str], *, kind: str, version: int, names: Mapping[str, bool]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and texts of a file that `write_tensor_file` wrote.

    Args:
        path: the file.
        kind: what it must be; `version`: the latest that the caller understands.
        names: the tensors that such a file may hold, and whether it must.

    Returns: float32 tensors on the CPU by name, and the texts (without kind and version).

    Raises:
        MissingFileError: there is no such file.
        CheckpointError: it is another kind of file, or of a version that is newer.
        WeightsError: it is damaged, lacks a tensor or has one too many, or one is no finite floating-point tensor.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    header = read_header(path)
    size_bytes = sum(info.nbytes for info in header.values())
    if size_bytes > LIMIT_BYTES:
        raise CheckpointError(f"{path} holds {size_bytes:,} bytes; a file of {kind} has at most {LIMIT_BYTES:,}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = dict(file.metadata() or {})
            _check_kind(path, about, kind, version)
            _check_names(path, set(header), names, kind)
            tensors = {name: file.get_tensor(name) for name in header}
    except (SafetensorError, OSError) as problem:
        raise WeightsError(f"{path} cannot be read: {problem}") from problem
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise WeightsError(f"{name} in {path} is {tensor.dtype}; it must hold floating-point numbers")
        check_finite(tensor, name, str(path))
    return {name: tensor.float() for name, tensor in tensors.items()}, about


def _check_kind(path: Path, about: dict[str, str], kind: str, version: int) -> None:
    found, number = about.pop("kind", None), about.pop("version", "")
    if found != kind:
        what = f"says it is {found[:80]!r}" if found else "does not say what it is"
        raise CheckpointError(f"{path} {what}; a file of {kind!r} is needed")
    if not number.isascii() or not number.isdecimal() or not 1 <= int(number) <= version:
        raise CheckpointError(
            f"{path} is of version {number[:20]!r}; this unclip reads {kind!r} up to version {version}: update it"
        )


def _check_names(path: Path, found: set[str], names: Mapping[str, bool], kind: str) -> None:
    lacking = sorted(name for name, needed in names.items() if needed and name not in found)
    extra = sorted(found - set(names))
    if lacking or extra:
        problems = [f"lacks {', '.join(lacking)}"] if lacking else []
        problems += [f"has {', '.join(extra)[:200]}, which it should not"] if extra else []
        raise WeightsError(f"{path} is no whole file of {kind!r}: it {' and '.join(problems)}")
