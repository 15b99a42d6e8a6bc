"""Safetensors files and folders: good ones come back exactly, bad ones are refused before they are read."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unclip.checkpoints import weights
from unclip.checkpoints.weights import (
    WeightsIndex,
    check_finite,
    checked_cast,
    load_into,
    open_weights,
    parse_size,
    read_tensors,
    save_weights,
)
from unclip.errors import CheckpointError, MissingFileError, UnsafeFileError, WeightsError

NAME = "diffusion_pytorch_model.safetensors"


class Net(nn.Module):
    """Something with parameters, a buffer, and an integer buffer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.one = nn.Linear(3, width)
        self.two = nn.Linear(width, 2, bias=False)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("count", torch.tensor(7))


def on_meta(width: int = 4) -> Net:
    with torch.device("meta"):
        return Net(width)


# -- finite --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_refused(tmp_path, value, dtype):
    tensor = torch.zeros(50, 40, dtype=dtype)
    tensor[31, 7] = value
    save_file({"a": torch.ones(2), "b": tensor}, tmp_path / NAME)
    match = "b .* has (NaN|an infinity)"
    module = nn.ParameterDict({"a": torch.empty(2, device="meta"), "b": torch.empty(50, 40, device="meta")})
    with pytest.raises(WeightsError, match=match):
        load_into(module, tmp_path)
    assert module["a"].is_meta
    with pytest.raises(WeightsError, match=match):
        save_weights(tmp_path / "new", {"b": tensor})
    assert not (tmp_path / "new").exists()


def test_eight_bit_floats_and_far_places_are_looked_at(monkeypatch):
    monkeypatch.setattr(weights, "_CHECK_ELEMENTS", 16)
    tensor = torch.zeros(10, 10)
    check_finite(tensor, "a")
    check_finite(torch.full((4,), 3, dtype=torch.int32), "a")
    check_finite(torch.empty(0), "a")
    check_finite(torch.empty(5, device="meta"), "a")
    tensor[9, 9] = float("nan")
    with pytest.raises(WeightsError, match="a in the weights has NaN"):
        check_finite(tensor, "a")
    with pytest.raises(WeightsError, match="NaN"):
        check_finite(tensor.t(), "a")  # not contiguous
    with pytest.raises(WeightsError, match="NaN"):
        check_finite(tensor.to(torch.float8_e4m3fn), "a")


def test_a_weight_too_large_for_the_type_asked_for_is_said_so(tmp_path):
    save_weights(tmp_path, {"a": torch.tensor([1e6])})
    module = nn.ParameterDict({"a": torch.empty(1, device="meta")})
    with pytest.raises(WeightsError, match=r"too large for torch\.float16; use bfloat16"):
        load_into(module, tmp_path, dtype=torch.float16)
    load_into(module, tmp_path, dtype=torch.bfloat16)
    assert module["a"].dtype is torch.bfloat16
    with pytest.raises(WeightsError, match="NaN"):
        checked_cast(torch.tensor([float("nan")]), torch.float16, "a")


# -- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("limit", ["10GB", 24])
def test_what_was_saved_comes_back(tmp_path, variant, limit):
    net = Net()
    written = save_weights(tmp_path, net.state_dict(), variant=variant, max_shard_size=limit)
    assert sorted(path.name for path in written) == sorted(os.listdir(tmp_path))
    loaded = on_meta()
    loaded.one.requires_grad_(False)
    load_into(loaded, tmp_path, variant=variant)
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert loaded.state_dict()[name].dtype == value.dtype
    assert not loaded.one.weight.requires_grad
    assert loaded.two.weight.requires_grad
    assert isinstance(loaded.one.weight, nn.Parameter)
    with torch.no_grad():
        loaded.two.weight.add_(1)  # the file must not change with the module
    again = on_meta()
    load_into(again, tmp_path, variant=variant)
    assert torch.equal(again.two.weight, net.two.weight)


def test_a_loaded_module_keeps_its_weights_when_the_files_are_replaced(tmp_path):
    old = Net()
    save_weights(tmp_path, old.state_dict())
    module = on_meta()
    load_into(module, tmp_path)
    save_weights(tmp_path, Net().state_dict())
    assert torch.equal(module.one.weight, old.one.weight)
    shutil.rmtree(tmp_path)
    assert torch.equal(module.two.weight, old.two.weight)


def test_file_names_are_those_of_the_ecosystem(tmp_path):
    state = {"a": torch.ones(4), "b": torch.ones(4)}
    (single,) = save_weights(tmp_path / "1", state, stem="model", variant="fp16")
    assert single.name == "model.fp16.safetensors"
    assert sorted(p.name for p in save_weights(tmp_path / "2", state, max_shard_size=16)) == [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
    ]
    assert json.loads((tmp_path / "2" / "diffusion_pytorch_model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 32},
        "weight_map": {
            "a": "diffusion_pytorch_model-00001-of-00002.safetensors",
            "b": "diffusion_pytorch_model-00002-of-00002.safetensors",
        },
    }
    assert sorted(p.name for p in save_weights(tmp_path / "3", state, max_shard_size=16, variant="fp16")) == [
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ]
    assert set(load_file(single)) == {"a", "b"}


def test_types_are_the_modules_or_the_ones_asked_for(tmp_path):
    save_weights(tmp_path, Net().half().state_dict())
    plain, asked = on_meta(), on_meta()
    load_into(plain, tmp_path)
    load_into(asked, tmp_path, dtype=torch.bfloat16)
    assert plain.one.weight.dtype is torch.float32
    assert asked.one.weight.dtype is torch.bfloat16
    assert asked.scale.dtype is torch.bfloat16
    assert asked.count.dtype is torch.int64


def test_names_and_shapes_are_compared_before_weights_are_read(tmp_path, monkeypatch):
    state = Net(5).state_dict()
    state["strange"] = torch.ones(1)
    del state["scale"], state["count"]
    save_weights(tmp_path, state)
    monkeypatch.setattr(weights, "read_tensors", lambda index: pytest.fail("weights were read"))
    module = on_meta()
    with pytest.raises(WeightsError) as caught:
        load_into(module, tmp_path)
    message = str(caught.value)
    assert "2 missing (scale, count)" in message
    assert "1 that the model does not have (strange)" in message
    assert "3 of another shape" in message
    assert "one.weight is [5, 3], not [4, 3]" in message
    assert str(tmp_path) in message
    assert module.one.weight.is_meta


def test_long_lists_of_differences_are_shortened(tmp_path):
    save_weights(tmp_path, {f"w{i}": torch.ones(1) for i in range(30)})
    with pytest.raises(
        WeightsError, match=r"30 that the model does not have \(w0, w1, w2, w3 and 26 more\)|and 26 more"
    ):
        load_into(nn.Identity(), tmp_path)


def test_an_integer_where_a_float_belongs_is_refused(tmp_path):
    state = {**Net().state_dict(), "count": torch.tensor(7.0)}
    save_weights(tmp_path, state)
    with pytest.raises(WeightsError, match=r"count .* is F32; the model needs torch\.int64"):
        load_into(on_meta(), tmp_path)


def test_a_buffer_that_no_file_fills_is_found(tmp_path):
    save_weights(tmp_path, Net().state_dict())
    module = on_meta()
    module.register_buffer("forgotten", torch.empty(1, device="meta"), persistent=False)
    with pytest.raises(WeightsError, match="forgotten of Net are not in the checkpoint"):
        load_into(module, tmp_path)


def test_reading_in_groups_gives_everything_once(tmp_path, monkeypatch):
    state = {f"w{i}": torch.full((8,), float(i)) for i in range(9)}
    save_weights(tmp_path, state, max_shard_size=128)
    monkeypatch.setattr(weights, "_READ_GROUP_BYTES", 64)
    found = list(read_tensors(open_weights(tmp_path)))
    assert [name for name, _ in found] == list(state)
    assert all(torch.equal(t, state[n]) for n, t in found)
    assert list(read_tensors(WeightsIndex())) == []


def test_a_file_that_vanishes_between_looking_and_reading(tmp_path):
    save_weights(tmp_path, Net().state_dict())
    index = open_weights(tmp_path)
    (tmp_path / NAME).unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        list(read_tensors(index))


# -- what is there -------------------------------------------------------------------------------------------------


def test_what_is_missing_is_said_with_what_is_there(tmp_path):
    with pytest.raises(MissingFileError, match="is not a folder"):
        open_weights(tmp_path / "absent")
    with pytest.raises(MissingFileError, match=f"no {NAME}; there is nothing"):
        open_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingFileError, match=r"there is config\.json"):
        open_weights(tmp_path)
    save_weights(tmp_path, Net().state_dict())
    with pytest.raises(MissingFileError, match=r"no diffusion_pytorch_model\.fp16\.safetensors; there is " + NAME):
        open_weights(tmp_path, variant="fp16")


@pytest.mark.parametrize("variant", ["../x", "a/b", "", "a.b", "a\0", "x" * 100, 3])
def test_a_variant_is_a_word(tmp_path, variant):
    with pytest.raises(CheckpointError, match="variant is"):
        open_weights(tmp_path, variant=variant)
    with pytest.raises(CheckpointError, match="variant is"):
        save_weights(tmp_path, {"a": torch.ones(1)}, variant=variant)


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.bin", "model.ckpt", "diffusion_pytorch_model.fp16.bin", "x.pt", "x.th"]
)
def test_pickles_are_refused_with_the_remedy(tmp_path, name):
    torch.save({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(UnsafeFileError, match="unclip convert pickle FOLDER"):
        load_into(nn.Identity(), tmp_path)


def test_a_repository_of_pickles_has_a_remedy_too(tmp_path):
    """None of them was downloaded, so nothing in the folder tells of them."""
    folder = tmp_path / "models--owner--name" / "snapshots" / ("a" * 40) / "prior"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(MissingFileError, match="hf download NAME --local-dir FOLDER`, then unclip convert pickle"):
        open_weights(folder)


def test_a_pickle_beside_safetensors_is_ignored(tmp_path):
    save_weights(tmp_path, Net().state_dict())
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    load_into(on_meta(), tmp_path)


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "model"
    save_weights(folder, {"a": torch.ones(4), "b": torch.ones(4)}, max_shard_size=16)
    return folder


def change_map(folder: Path, **changes: object) -> None:
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {k: v for k, v in {**index["weight_map"], **changes}.items() if v is not None}
    path.write_text(json.dumps(index))


FIRST, SECOND = (f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"b": "../secret.safetensors"}, UnsafeFileError, "leads out"),
        ({"b": "/etc/passwd"}, UnsafeFileError, "leads out"),
        ({"b": "a\0.safetensors"}, UnsafeFileError, "NUL"),
        ({"b": "x.bin"}, UnsafeFileError, "only .safetensors"),
        ({"b": "absent.safetensors"}, MissingFileError, "absent.safetensors, which do not exist"),
        ({"b": FIRST}, WeightsError, "and its shards differ in b in"),
        ({"a": SECOND}, WeightsError, "and its shards differ in a in"),
        ({"c": FIRST}, WeightsError, "and its shards differ in c in"),
        ({"b": None}, None, ""),
        ({"b": 3}, WeightsError, "weight_map"),
        ({"a": None, "b": None}, WeightsError, "weight_map"),
    ],
)
def test_an_index_must_agree_with_its_shards(sharded, changes, error, match):
    save_weights(sharded.parent, {"b": torch.ones(4)}, stem="secret")
    change_map(sharded, **changes)
    if error is None:  # a shard that the index does not name is not part of the model
        assert set(open_weights(sharded)) == {"a"}
        return
    with pytest.raises(error, match=match):
        open_weights(sharded)


def test_shards_that_hold_more_than_the_index_says(sharded):
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, sharded / SECOND)
    with pytest.raises(WeightsError, match=f"differ in a in {SECOND}"):
        open_weights(sharded)
    save_file({"b": torch.ones(4), "c": torch.ones(4)}, sharded / SECOND)
    with pytest.raises(WeightsError, match=f"differ in c in {SECOND}"):
        open_weights(sharded)


def test_a_shard_that_is_a_link_out_of_the_folder(sharded):
    outside = sharded.parent / "outside.safetensors"
    (sharded / SECOND).rename(outside)
    (sharded / SECOND).symlink_to(outside)
    with pytest.raises(UnsafeFileError, match="link that leaves"):
        open_weights(sharded)
    (sharded / SECOND).unlink()
    with pytest.raises(MissingFileError, match=SECOND):
        open_weights(sharded)


def test_weights_in_the_hubs_cache_are_read_through_its_links(tmp_path):
    root = tmp_path / "models--owner--name"
    snapshot = root / "snapshots" / "abc" / "prior"
    snapshot.mkdir(parents=True)
    (path,) = save_weights(root / "blobs", Net().state_dict())
    (snapshot / NAME).symlink_to(f"../../../blobs/{path.name}")
    load_into(on_meta(), snapshot)
    (snapshot / NAME).unlink()
    (snapshot / NAME).symlink_to("/dev/zero")
    with pytest.raises(UnsafeFileError):
        load_into(on_meta(), snapshot)


# -- saving --------------------------------------------------------------------------------------------------------


def test_a_new_save_takes_the_old_one_away_but_nothing_else(tmp_path):
    state = Net().state_dict()
    for stem, variant in ((weights.DEFAULT_STEM, "fp16"), ("other", None)):
        save_weights(tmp_path, state, stem=stem, variant=variant)
    kept = set(os.listdir(tmp_path))
    for limit in ("10GB", 24, 40, "1MB", 24, 24):
        written = save_weights(tmp_path, state, max_shard_size=limit)
        assert set(os.listdir(tmp_path)) - kept == {path.name for path in written}
        load_into(on_meta(), tmp_path)


def test_a_failed_save_leaves_the_old_weights(tmp_path, monkeypatch):
    old = Net()
    save_weights(tmp_path, old.state_dict(), max_shard_size=24)
    names = sorted(os.listdir(tmp_path))

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    for limit in ("10GB", 40):
        with pytest.raises(OSError, match="no space"):
            save_weights(tmp_path, Net().state_dict(), max_shard_size=limit)
    assert sorted(os.listdir(tmp_path)) == names
    loaded = on_meta()
    load_into(loaded, tmp_path)
    assert torch.equal(loaded.one.weight, old.one.weight)


def test_a_half_replaced_set_of_shards_does_not_load_as_a_mixture(tmp_path, monkeypatch):
    save_weights(tmp_path, Net().state_dict(), max_shard_size=24)
    replace, calls = os.replace, []

    def second_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("input/output error")
        replace(*arguments)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="input/output"):
        save_weights(tmp_path, Net().state_dict(), max_shard_size=24)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    with pytest.raises(MissingFileError):
        load_into(on_meta(), tmp_path)


def test_a_killed_save_leaves_the_old_weights(tmp_path):
    old = Net()
    save_weights(tmp_path, old.state_dict())
    code = f"""
import time, torch, safetensors.torch as s
from unclip.checkpoints.weights import save_weights
def slow(tensors, path, metadata):
    open(path, "wb").write(b"half")
    print("now", flush=True)
    time.sleep(60)
s.save_file = slow
save_weights({str(tmp_path)!r}, {{"a": torch.ones(3)}})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    loaded = on_meta()
    load_into(loaded, tmp_path)
    assert torch.equal(loaded.one.weight, old.one.weight)
    with pytest.raises(MissingFileError) as caught:  # and the half file is not offered to anybody
        open_weights(tmp_path, variant="fp16")
    assert ".unclip-tmp" not in str(caught.value)


def test_shared_strided_and_empty_tensors_are_saved_by_value(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    state = {"a": base, "b": base, "c": base.t(), "d": base[1], "e": torch.empty(0, 3)}
    save_weights(tmp_path, state)
    for name, tensor in read_tensors(open_weights(tmp_path)):
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("name", ["../a", "a/b", "", "a\0"])
def test_bad_names_are_not_written(tmp_path, name):
    with pytest.raises(WeightsError, match="not a parameter's name"):
        save_weights(tmp_path / "new", {name: torch.ones(1)})
    assert not (tmp_path / "new").exists()


def test_sizes():
    assert parse_size("10GB") == 10**10
    assert parse_size("5 MB") == 5 * 10**6
    assert parse_size("2GiB") == 2 << 30
    assert parse_size("7kb") == 7000
    assert parse_size(123) == 123
    assert parse_size("123") == 123
    for bad in ("", "GB", "-1GB", 0, "0MB", "1.5GB", "10XB", True, None):
        with pytest.raises(CheckpointError, match="max_shard_size"):
            parse_size(bad)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("dtype", "factor"), [("torch.float32", 1.3), ("torch.bfloat16", 1.3)])
@pytest.mark.parametrize("layout", ["torch.contiguous_format", "torch.channels_last"])
def test_loading_takes_about_one_copy_of_memory(tmp_path, dtype, factor, layout):
    size_mb = 160
    kernels = {f"l{i:02}w": torch.ones(size_mb, 16, 32, 32) for i in range(16)}
    save_weights(tmp_path, kernels | {f"l{i:02}b": torch.ones(8) for i in range(16)})  # beside them in the file
    code = f"""
import torch, torch.nn as nn
from unclip.checkpoints import weights
import safetensors, safetensors.torch
def peak_mb():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
weights._READ_GROUP_BYTES = 16 << 20
torch.aminmax(torch.ones(1 << 22).to({dtype}))
before = peak_mb()
kernel = torch.empty({size_mb}, 16, 32, 32, device="meta").to(memory_format={layout})
bias = torch.empty(8, device="meta")
names = [(f"l{{i:02}}{{kind}}", value) for i in range(16) for kind, value in (("b", bias), ("w", kernel))]
module = nn.ParameterDict({{name: nn.Parameter(value.clone()) for name, value in names}})
weights.load_into(module, {str(tmp_path)!r}, dtype={dtype})
print(peak_mb() - before)
"""
    used = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert used < factor * size_mb, f"{used:.0f} MB for a file of {size_mb} MB"


def test_kernels_take_the_modules_layout(tmp_path):
    kernel = torch.randn(8, 4, 3, 3)
    save_weights(tmp_path, {"weight": kernel, "bias": torch.zeros(8)})
    plain, last = torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    for module in (plain, last):
        load_into(module, tmp_path)
        assert torch.equal(module.weight, kernel)
    assert plain.weight.is_contiguous()
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    assert not last.weight.is_contiguous()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_folder_with_shards_and_a_whole_file_is_refused(tmp_path, variant):
    save_weights(tmp_path, Net().state_dict(), variant=variant, max_shard_size=100)
    save_weights(tmp_path / "whole", Net().state_dict(), variant=variant)
    (whole,) = (tmp_path / "whole").iterdir()
    shutil.copy(whole, tmp_path)
    for read in (open_weights, lambda folder, **about: load_into(on_meta(), folder, **about)):
        with pytest.raises(WeightsError) as caught:
            read(tmp_path, variant=variant)
        assert f"twice: in {whole.name}" in str(caught.value)
        assert weights.index_name(variant=variant) in str(caught.value)
    # Another variant's shards are another set of weights; shards without an index are none.
    other = "fp16" if variant is None else None
    assert len(open_weights(tmp_path / "whole", variant=variant)) == len(Net().state_dict())
    save_weights(tmp_path / "whole", Net().state_dict(), variant=other, max_shard_size=100)
    assert open_weights(tmp_path / "whole", variant=variant).files == (tmp_path / "whole" / whole.name,)
    (tmp_path / weights.index_name(variant=variant)).unlink()
    assert open_weights(tmp_path, variant=variant).files == (tmp_path / whole.name,)


@pytest.mark.parametrize("sizes", [("10GB", 100), (100, "10GB")])
def test_shards_replace_a_whole_file_and_the_other_way_round(tmp_path, sizes):
    for size in sizes:
        save_weights(tmp_path, Net().state_dict(), max_shard_size=size)
        open_weights(tmp_path)
