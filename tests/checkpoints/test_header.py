"""Headers of safetensors files: faults are found before a weight is read."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unclip.checkpoints.weights import TYPES, open_weights, read_header, read_tensors, save_weights
from unclip.errors import CheckpointError, WeightsError

NAME = "diffusion_pytorch_model.safetensors"


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file written by hand, so that it can be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


GOOD = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
BAD_HEADERS = {
    "twice": (GOOD + b',"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4, "'a' twice"),
    "key twice": (b'{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', 4, "damaged"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "damaged"),
    "same bytes": ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "damaged"),
    "gap": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "damaged"),
    "late start": ({"a": entry(4, 8)}, 8, "damaged"),
    "truncated": ({"a": entry(0, 400)}, 100, "damaged"),
    "too long": ({"a": entry(0, 4)}, 100, "damaged"),
    "path": ({"../../etc/passwd": entry(0, 4)}, 4, "not a parameter's name"),
    "slash": ({"a/b": entry(0, 4)}, 4, "not a parameter's name"),
    "backslash": ({"a\\b": entry(0, 4)}, 4, "not a parameter's name"),
    "dots": ({"a..b": entry(0, 4)}, 4, "not a parameter's name"),
    "NUL": ({"a\0": entry(0, 4)}, 4, "not a parameter's name"),
    "control": ({"a\x1b[2J": entry(0, 4)}, 4, "not a parameter's name"),
    "empty name": ({"": entry(0, 4)}, 4, "not a parameter's name"),
    "long name": ({"a" * 600: entry(0, 4)}, 4, "not a parameter's name"),
    "unknown type": ({"a": entry(0, 4, dtype="F4")}, 4, "damaged"),
    "no type": ({"a": entry(0, 4, dtype=["F32"])}, 4, "damaged"),
    "negative": ({"a": entry(0, 4, shape=[-1])}, 4, "damaged"),
    "boolean": ({"a": entry(0, 4, shape=[True])}, 4, "damaged"),
    "shape text": ({"a": entry(0, 4, shape="4")}, 4, "damaged"),
    "deep": ({"a": entry(0, 4, shape=[1] * 100)}, 4, "has the shape"),
    "huge": ({"a": entry(0, 4, shape=[1 << 47, 1 << 47])}, 4, "damaged"),
    "wrong size": ({"a": entry(0, 4, shape=[2])}, 4, "damaged"),
    "backwards": ({"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}}, 4, "damaged"),
    "one offset": ({"a": {"dtype": "F32", "shape": [0], "data_offsets": [4]}}, 4, "damaged"),
    "no object": ({"a": 3}, 4, "damaged"),
    "list": ([1, 2], 0, "damaged"),
    "no JSON": (b"{not json", 0, "damaged"),
    "NaN": (b'{"__metadata__":{"a":NaN}}', 0, "damaged"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "damaged"),
    "metadata list": ({"__metadata__": []}, 0, "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused(tmp_path, case):
    header, num_bytes, match = BAD_HEADERS[case]
    raw(tmp_path / NAME, header, b"\0" * num_bytes)
    for read in (
        lambda: read_header(tmp_path / NAME),
        lambda: open_weights(tmp_path),
    ):
        with pytest.raises(WeightsError, match=match):
            read()


@pytest.mark.parametrize(
    "content", [b"", b"\x05", b"\xff" * 8, struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 3) + b"{}"]
)
def test_files_that_are_cut_or_lie_about_their_header(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(WeightsError, match="damaged"):
        open_weights(tmp_path)


def test_an_absurd_header_is_not_read(tmp_path):
    path = tmp_path / NAME
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(200_000_008)  # sparse: no disk, no memory
    with pytest.raises(WeightsError, match="header too large"):
        read_header(path)
    raw(path, b"", length=1)
    with pytest.raises(WeightsError):
        read_header(path)


def test_a_truncated_download_is_refused_at_every_length(tmp_path):
    save_weights(tmp_path, {"a.weight": torch.ones(4, 3), "a.bias": torch.ones(4)})
    whole = (tmp_path / NAME).read_bytes()
    for length in (*range(0, len(whole), 7), len(whole) - 1):
        (tmp_path / NAME).write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            open_weights(tmp_path)
    (tmp_path / NAME).write_bytes(whole)
    assert len(open_weights(tmp_path)) == 2


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_in_a_header_is_an_error_of_ours_or_harmless(tmp_path, data):
    save_weights(tmp_path, {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.int8)})
    content = bytearray((tmp_path / NAME).read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    place = data.draw(st.integers(0, 8 + length - 1))
    content[place] = data.draw(st.integers(0, 255))
    (tmp_path / NAME).write_bytes(content)
    try:
        index = open_weights(tmp_path)
    except CheckpointError:
        return
    tensors = dict(read_tensors(index))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {n: i.shape for n, i in index.items()}


def test_every_known_type_is_one_that_safetensors_writes_and_reads(tmp_path):
    kinds = [
        torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.uint16,
        torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.float32, torch.int64, torch.uint64,
        torch.float64,
    ]  # fmt: skip
    state = {str(kind)[6:]: torch.ones(3).to(kind) for kind in kinds}
    save_weights(tmp_path, state)
    index = open_weights(tmp_path)
    assert {info.dtype for info in index.values()} == set(TYPES)
    assert index.nbytes == sum(tensor.nbytes for tensor in state.values())
    for name, tensor in read_tensors(index):
        assert tensor.dtype == state[name].dtype
        assert tensor.float().tolist() == [1, 1, 1]
