"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) in a network, through peft, and out of it again.

Knows networks' linear layers by name; knows no task. Called by the tasks.
"""

import copy
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from unclip.errors import ConfigError, MissingDependencyError
from unclip.training.recipe import LoraSettings

N = TypeVar("N", bound=nn.Module)


def adapt(network: N, settings: LoraSettings, seed: int) -> N:
    """Freeze a network and put adapters, which alone are trained, beside its linear layers. Changes `network` itself.

    Fresh adapters add nothing: the network computes what it did.

    Raises:
        MissingDependencyError: peft is not installed.
        ConfigError: no layer has one of the names in `settings.targets`.
    """
    peft = _peft()
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, network)
        except ValueError as error:
            raise ConfigError(f"lora.targets are {', '.join(settings.targets)}: {error}") from error
    return network


def is_adapted(network: nn.Module) -> bool:
    """Whether there are adapters in it."""
    return any(name.endswith("base_layer") for name, _ in network.named_modules())


def merged(network: N) -> N:
    """A copy with the adapters added into the weights, in the network's own layout; the network itself without any."""
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
    """The adapters alone, in peft's layout (`adapter_config.json` and weights); nothing where there are none."""
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
