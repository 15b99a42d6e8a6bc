"""Single safetensors files with a kind, a version and text metadata, such as principal components and latents.

The module also computes fingerprints of weights.
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
"""The size limit of such a file, far above that of real files."""


def write_tensor_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    version: int,
    about: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `tensors` to the file `path` atomically, and return the path.

    Args:
        path: ends in .safetensors; missing folders are created.
        tensors: by name, on any device.
        kind: the kind of file, one word.
        version: the version of the format of this kind, from 1.
        about: metadata, texts by name.

    Raises:
        CheckpointError: `path` does not end in .safetensors.
        WeightsError: a tensor is not finite, or its name is not allowed in a file.
        OutputExistsError: the file exists and `overwrite` is false.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != SUFFIX:
        raise CheckpointError(f"{path} must end in {SUFFIX}, such as {path.name}{SUFFIX}")
    kept = {}
    for name, tensor in tensors.items():
        check_tensor_name(name, kind)
        check_finite(tensor, name, kind)
        kept[name] = tensor.detach().cpu().contiguous().clone()  # the format cannot express shared memory
    metadata = {**(about or {}), "kind": kind, "version": str(version)}
    with atomic_file(path, overwrite=overwrite) as draft:
        save_file(kept, draft, metadata=metadata)
    return path


def read_tensor_file(
    path: str | os.PathLike[str], *, kind: str, version: int, names: Mapping[str, bool]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and metadata of a file from `write_tensor_file`.

    Args:
        path: the file.
        kind: the required kind.
        version: the latest supported version.
        names: the allowed tensors, and whether each one is required.

    Returns: float32 tensors on the CPU by name, and the metadata without kind and version.

    Raises:
        MissingFileError: the file does not exist.
        CheckpointError: it is another kind of file, or a newer version.
        WeightsError: it is damaged, lacks a tensor, has another, or one that is not floating-point or not finite.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    header = read_header(path)
    size_bytes = sum(info.nbytes for info in header.values())
    if size_bytes > LIMIT_BYTES:
        raise CheckpointError(f"{path} has {size_bytes:,} bytes; the limit for a file of {kind} is {LIMIT_BYTES:,}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = dict(file.metadata() or {})
            _check(path, about, set(header), kind, version, names)
            tensors = {name: file.get_tensor(name) for name in header}
    except (SafetensorError, OSError) as problem:
        raise WeightsError(f"{path} cannot be read: {problem}") from problem
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise WeightsError(f"{name} in {path} is {tensor.dtype}; it must have floating-point numbers")
        check_finite(tensor, name, str(path))
    return {name: tensor.float() for name, tensor in tensors.items()}, about


def _check(
    path: Path, about: dict[str, str], found: set[str], kind: str, version: int, names: Mapping[str, bool]
) -> None:
    own, number = about.pop("kind", "none"), about.pop("version", "")
    if own != kind:
        raise CheckpointError(f"{path} is a file of kind {own[:80]!r}; a file of {kind!r} is needed")
    if number not in map(str, range(1, version + 1)):
        raise CheckpointError(
            f"{path} has version {number[:20]!r}; this version of unclip reads {kind!r} up to version {version}: "
            "update unclip"
        )
    lacking = {name for name, is_needed in names.items() if is_needed} - found
    problems = {"lacks": lacking, "has unknown tensors:": found - set(names)}
    shown = [f"it {what} {', '.join(sorted(some))[:200]}" for what, some in problems.items() if some]
    if shown:
        raise WeightsError(f"{path} is not a valid file of kind {kind!r}: {'; '.join(shown)}")


RECORDED = ("decoder_num_inference_steps", "super_res_num_inference_steps", "decoder_guidance_scale")
"""Settings of an inversion that are stored as JSON numbers, by the names of the call's arguments."""
TILE = "super_res_tile_px"
"""Side of the tiles of super-resolution, as JSON; omitted where pictures were not tiled."""
PROMPT = "prompt"
"""The caption given to the decoder, as plain text; omitted where there was none."""


def record_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings of an inversion as metadata of a latent's file; None is omitted.

    Raises: InputError for an unknown name, or a value of the wrong type.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    names = (*RECORDED, TILE, PROMPT)
    if unknown := given.keys() - set(names):
        raise InputError(f"settings have the unknown name {min(unknown)!r}; a latent's file has {', '.join(names)}")
    prompt = given.pop(PROMPT, "")
    if not isinstance(prompt, str):
        raise InputError(f"the prompt is {prompt!r:.100}; it must be a text")
    try:
        numbers = _checked(given, "settings")
    except ConfigError as problem:
        raise InputError(str(problem)) from problem
    return {name: json.dumps(value) for name, value in numbers.items()} | ({PROMPT: prompt} if prompt else {})


def read_record(about: Mapping[str, str], where: str) -> dict[str, Any]:
    """The settings of an inversion from the metadata of a latent's file; those that it lacks are omitted.

    Args:
        about: the metadata of the file.
        where: the name of the file in messages.

    Raises: CheckpointError for a text that is not a number.
    """
    texts = {name: about[name] for name in (*RECORDED, TILE) if name in about}
    try:
        found = _checked({name: json.loads(text) for name, text in texts.items()}, where)
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{where} has the inversion settings {texts!s:.200}, which are not numbers") from problem
    return found | ({PROMPT: about[PROMPT]} if PROMPT in about else {})


def _checked(numbers: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings as Python numbers. Raises: ConfigError for a value of the wrong type."""
    tile = {TILE: whole(numbers[TILE], f"{where}: {TILE}", error=ConfigError)} if TILE in numbers else {}
    return check_recommended({name: value for name, value in numbers.items() if name != TILE}, where) | tile


VALUES = 64
"""Approximate number of values of each tensor that go into a fingerprint."""
THRESHOLD = 257 * 2.0**-25
"""Halfway between two neighbouring values in float16 and in bfloat16, so rounding moves no value across it."""
OLD_THRESHOLD = 0.0
"""The threshold of older files. Very small values round to 0 in float16 and so change the fingerprint."""


def fingerprint(states: Iterable[Mapping[str, Tensor]]) -> str:
    """A short text that identifies the weights of some networks, given as state dicts.

    It is a hash of whether sampled values of each tensor are above a threshold, which does not change when weights are
    rounded to a smaller type. It is empty where weights are on the meta device (sequential offloading).
    """
    return _digest(states, THRESHOLD)


def may_be_of(made: str, states: Iterable[Mapping[str, Tensor]]) -> bool:
    """Whether a fingerprint belongs to these networks, or this is unknown (no fingerprint, or weights on meta)."""
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
