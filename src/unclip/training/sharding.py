"""Sharding of weights over the processes of a run with PyTorch's FSDP."""

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
"""The modules that are gathered one at a time while they compute. The rest of a module is another unit."""

LAUNCHER_FLAG = "ACCELERATE_USE_FSDP"


def requested_by_launcher() -> bool:
    """Whether `accelerate launch --use_fsdp` started this process. The call removes the launcher's flag.

    With the flag set, accelerate would wrap the module itself (only on accelerators, and only its `forward`), and
    transformers would not load the frozen CLIP's weights except in the first process.
    """
    requested = parse_flag_from_env(LAUNCHER_FLAG)
    os.environ.pop(LAUNCHER_FLAG, None)
    return requested


def sharded(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a module on `device` in which each process has a shard of every trained parameter.

    Names and shapes of the parameters do not change. Frozen parameters are not sharded, because they have no gradient
    and no optimizer state. All processes must call it with the same weights.
    """
    # The warning concerns in-place changes of a unit's output. Our networks make none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    module = copy.deepcopy(module)
    for parameter in module.parameters():  # channels-last kernels cannot be sharded
        parameter.data = parameter.data.contiguous()
    how: dict[str, Any] = {"mesh": mesh, "ignored_params": {p for p in module.parameters() if not p.requires_grad}}
    for parameter in how["ignored_params"]:
        parameter.data = parameter.data.to(device)
    for unit in [part for part in module.modules() if isinstance(part, UNITS)]:
        fully_shard(unit, **how)
        if hasattr(unit, "prepare"):
            register_fsdp_forward_method(unit, "prepare")
    fully_shard(module, **how)  # changes the copy in place
    return module


def is_sharded(module: nn.Module) -> bool:
    """Whether a module came from `sharded`."""
    return isinstance(module, FSDPModule)


def leave_group(module: nn.Module) -> None:
    """Release the process group of a sharded module that is no longer used.

    The device meshes and PyTorch's caches of sharded operations refer to the group. PyTorch has no public API for it.
    """
    for mesh in {parameter.device_mesh for parameter in module.parameters() if isinstance(parameter, DTensor)}:
        getattr(mesh, "_pg_registry", {}).clear()
    for name in ("_clear_sharding_prop_cache", "_clear_fast_path_sharding_prop_cache"):
        getattr(debug, name, lambda: None)()  # not in every version of PyTorch


def share_of(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shares_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`share_of` each."""
    return [share_of(tensor) for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all processes, which must all call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded like `like`; the tensor itself if `like` is not sharded or has another shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return cast(Tensor, distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements))
