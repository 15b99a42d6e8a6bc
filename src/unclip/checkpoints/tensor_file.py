"""One small safetensors file of a named kind: tensors, and a few words on where they come from.

Knows the container, a kind and its version; knows not what the tensors mean. Called by the classes that save
themselves as one file: principal components, bipartite latents.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unclip.checkpoints.files import atomic_file
from unclip.checkpoints.recommended import check_recommended
from unclip.checkpoints.weights import check_finite, check_tensor_name, read_header
from unclip.errors import CheckpointError, ConfigError, InputError, WeightsError
from unclip.numbers import whole

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


RECORDED = ("decoder_num_inference_steps", "super_res_num_inference_steps", "decoder_guidance_scale")
"""Numbers, by the names of a call's arguments, as JSON."""
TILE = "super_res_tile_px"
"""Side of super-resolution's tiles, as JSON; left out where it saw pictures as a whole."""
PROMPT = "prompt"
"""A caption that the decoder saw too, as it is; left out where it saw none."""


def record_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as a latent's file has them; None is left out.

    Raises: InputError for a name that is none of the above, or a value of a wrong type.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    names = (*RECORDED, TILE, PROMPT)
    for name in given:
        if name not in names:
            raise InputError(f"settings have {name!r}; a latent is kept with {', '.join(names)}")
    prompt = given.pop(PROMPT, None)
    if prompt is not None and not isinstance(prompt, str):
        raise InputError(f"the prompt is {prompt!r:.100}; it must be a text")
    try:
        numbers = _checked(given, "settings")
    except ConfigError as problem:
        raise InputError(str(problem)) from problem
    return {name: json.dumps(value) for name, value in numbers.items()} | ({PROMPT: prompt} if prompt else {})


def read_record(about: Mapping[str, str], where: str) -> dict[str, Any]:
    """The settings among the texts of a latent's file, by the names above; what it does not say is left out.

    Args:
        about: all texts of the file.
        where: how messages call it.

    Raises: CheckpointError for a text that is no number.
    """
    texts = {name: about[name] for name in (*RECORDED, TILE) if name in about}
    try:
        found = _checked({name: json.loads(text) for name, text in texts.items()}, where)
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{where} says it was inverted with {texts!s:.200}, which are no numbers") from problem
    return found | ({PROMPT: about[PROMPT]} if PROMPT in about else {})


def _checked(numbers: dict[str, Any], where: str) -> dict[str, Any]:
    """The same, as Python's own numbers. Raises: ConfigError for a value of a wrong type."""
    tile = {TILE: whole(numbers[TILE], f"{where}: {TILE}", error=ConfigError)} if TILE in numbers else {}
    return check_recommended({name: value for name, value in numbers.items() if name != TILE}, where) | tile


VALUES = 64
"""Of each tensor, about."""
THRESHOLD = 257 * 2.0**-25
"""Halfway between two neighbours in float16 and in bfloat16 too, so that rounding to either leads no value across."""
OLD_THRESHOLD = 0.0
"""Of files from before: a very small value is 0 in float16."""


def fingerprint(states: Iterable[Mapping[str, Tensor]]) -> str:
    """A text that tells the weights of some networks, by name, from any other's.

    It says of some values of each tensor whether they are above a threshold, which rounding to a smaller type leaves.
    Empty where weights are away (offloaded layer by layer).
    """
    return _digest(states, THRESHOLD)


def may_be_of(made: str, states: Iterable[Mapping[str, Tensor]]) -> bool:
    """Whether a fingerprint is of these networks, or it cannot be known: it is empty, or weights are away."""
    states = list(states)
    own = [_digest(states, threshold) for threshold in (THRESHOLD, OLD_THRESHOLD)]
    return not made or not own[0] or made in own


def _digest(states: Iterable[Mapping[str, Tensor]], threshold: float) -> str:
    digest = hashlib.sha256()
    for state in states:
        for name, tensor in sorted(state.items()):
            if tensor.is_meta:
                return ""
            flat = tensor.detach().flatten()
            above = flat[:: max(1, len(flat) // VALUES)].float() > threshold
            digest.update(f"{name} {tuple(tensor.shape)} ".encode() + bytes(above.cpu().tolist()))
    return digest.hexdigest()[:16]
