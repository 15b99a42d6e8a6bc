"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) by peft: adding, merging and writing them."""

import copy
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from unclip.errors import ConfigError, MissingDependencyError
from unclip.training.recipe import LoraSettings

N = TypeVar("N", bound=nn.Module)


def adapt(network: nn.Module, settings: LoraSettings | None, seed: int) -> None:
    """Freeze a network, and add adapters to its linear layers, in place; nothing without settings.

    Only the adapters are trained. New adapters do not change the network's output.

    Raises:
        MissingDependencyError: peft is not installed.
        ConfigError: no layer has one of the names in `settings.targets`.
    """
    if settings is None:
        return
    peft, sizes = _peft(), {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    config = peft.LoraConfig(target_modules=list(settings.targets), **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, network)
        except ValueError as error:
            raise ConfigError(f"lora.targets are {', '.join(settings.targets)}: {error}") from error


def is_adapted(network: nn.Module) -> bool:
    """Whether a network has adapters."""
    return any(name.endswith("base_layer") for name, _ in network.named_modules())


def merged(network: N) -> N:
    """A copy of a network with its adapters merged into the weights; the network itself if it has none."""
    if not is_adapted(network):
        return network
    plain = copy.deepcopy(network)
    for name, module in list(plain.named_modules()):
        if hasattr(module, "get_base_layer"):
            adapted: Any = module
            adapted.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, adapted.get_base_layer())
    return plain


def write_adapter(network: nn.Module, folder: Path) -> None:
    """Write a network's adapters, if it has any, in the layout of peft (`adapter_config.json` and weights)."""
    if not is_adapted(network):
        return
    from safetensors.torch import save_file

    peft = _peft()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = peft.get_peft_model_state_dict(network)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    network.peft_config["default"].save_pretrained(str(folder))  # type: ignore[index, union-attr]


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("LoRA needs peft: pip install peft") from error
    return peft
