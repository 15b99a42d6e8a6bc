"""Weights cut into shards over a run's processes (FSDP), and put together again.

Knows modules, tensors and torch's `fully_shard`; knows neither recipe nor task. Called by the trainer, the run's state
and `unclip train`.
"""

import copy
import os
import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, debug, distribute_tensor
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from unclip.models.layers import AddedKeyValueAttention, PriorBlock, ResnetBlock

UNITS = (PriorBlock, ResnetBlock, AddedKeyValueAttention, CLIPEncoderLayer)
"""What is gathered for as long as it computes, one after another; the rest of a module is one unit more."""

LAUNCHER_FLAG = "ACCELERATE_USE_FSDP"


def asked_by_launcher() -> bool:
    """Whether `accelerate launch --use_fsdp` started this process. It is asked once: the flag is taken down.

    Left up, accelerate would wrap the module itself (on accelerators only, and blind for what is no forward), and
    transformers would leave the frozen CLIP without weights in every process but the first.
    """
    asked = parse_flag_from_env(LAUNCHER_FLAG)
    os.environ.pop(LAUNCHER_FLAG, None)
    return asked


def sharded(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a module of which each process holds its share of every trained parameter, on `device`.

    Its parameters have the names and the (whole) shapes of the module's. Frozen ones stay whole: they have neither
    gradient nor optimizer state. To be called by all processes, which must hold the same weights.
    """
    # It warns of writing into what a unit returns, which none of ours does: their results are added, never added to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    module = copy.deepcopy(module)
    for parameter in module.parameters():  # channels-last kernels cannot be cut
        parameter.data = parameter.data.contiguous()
    how: dict[str, Any] = {"mesh": mesh, "ignored_params": {p for p in module.parameters() if not p.requires_grad}}
    for parameter in how["ignored_params"]:
        parameter.data = parameter.data.to(device)
    for unit in [part for part in module.modules() if isinstance(part, UNITS)]:
        fully_shard(unit, **how)
        if hasattr(unit, "prepare"):
            register_fsdp_forward_method(unit, "prepare")
    fully_shard(module, **how)  # it changes the copy itself
    return module


def is_sharded(module: nn.Module) -> bool:
    """Whether a module came from `sharded`."""
    return isinstance(module, FSDPModule)


def leave_group(module: nn.Module) -> None:
    """Have a module of shards, which is used no more, hold the processes' group no longer.

    Its meshes hold it, and so does what torch remembers of operations on shards. There is no public way.
    """
    for mesh in {parameter.device_mesh for parameter in module.parameters() if isinstance(parameter, DTensor)}:
        getattr(mesh, "_pg_registry", {}).clear()
    for name in ("_clear_sharding_prop_cache", "_clear_fast_path_sharding_prop_cache"):
        getattr(debug, name, lambda: None)()  # not every version has both


def share_of(tensor: Tensor) -> Tensor:
    """What this process holds of it: memory of its own, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shares_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`share_of` each."""
    return [share_of(tensor) for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """All of it, gathered from all processes, which must all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut as `like` is, if that is cut and of the same shape; else the tensor itself."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return cast(Tensor, distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements))
