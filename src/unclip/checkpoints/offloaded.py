"""What accelerate's offloading has made of a network in memory: its hooks, and the weights that these keep.

Does not know who offloads, nor import accelerate: hooks are known by their attributes.
Called by pipelines, and where networks are saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unclip.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn


def offload_hooks(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's hooks on one module (not on those inside it): what offloading works by."""
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network, with the weights that sequential offloading keeps for it in place of empty ones.

    Raises: InputError when weights have no values: nothing keeps them.
    """
    state = module.state_dict()
    for path, part in module.named_modules():
        kept = [hook.weights_map for hook in offload_hooks(part) if getattr(hook, "weights_map", None) is not None]
        for name in (*part._parameters, *part._buffers) if kept else ():
            full = f"{path}.{name}" if path else name
            if full in state and state[full].is_meta:
                state[full] = next((weights[name] for weights in kept if name in weights), state[full])
    empty = [name for name, value in state.items() if value.is_meta]
    if empty:
        raise InputError(
            f"{len(empty)} weights of {type(module).__name__} ({empty[0]}, say) lie on the meta device, "
            "where they have no values: before they are saved, load them, or call the remove_all_hooks() of a pipeline "
            "that is offloaded"
        )
    return state
