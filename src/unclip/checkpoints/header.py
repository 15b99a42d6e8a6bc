"""Read and judge the header of a safetensors file: names, types, shapes and places of its tensors.

Does not read weights and needs no torch; the checks are ours because the safetensors package leaves some out.
Called by weights.py before a file is opened for reading, and by whoever only wants to know what a file holds.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unclip.checkpoints.files import file_size, parse_json_object
from unclip.errors import WeightsError

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
