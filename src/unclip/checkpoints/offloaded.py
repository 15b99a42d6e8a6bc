"""A network as it was before it was offloaded or compiled: its hooks, its class and its weights by their own names.

Neither accelerate nor torch's compiler is imported: their hooks and wrappers are recognised by their attributes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from unclip.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

_COMPILED = "_orig_mod"
"""Where `torch.compile` keeps the module that it wraps; it is also part of the names of that module's weights."""


def original(value: T) -> T:
    """The module that `torch.compile(module)` was made of; any other value as it is."""
    return original(value._modules[_COMPILED]) if _COMPILED in getattr(value, "_modules", ()) else value  # type: ignore


def plain_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network by the names that it has when neither it nor a part of it is compiled."""
    return {_plain(name): value for name, value in module.state_dict().items()}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def offload_hooks(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's hooks on one module (not on those inside it): what offloading works by."""
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network, with the weights that sequential offloading keeps for it in place of empty ones.

    Raises: InputError when weights have no values: nothing keeps them.
    """
    state = plain_state_dict(module)
    for path, part in module.named_modules():
        kept = [hook.weights_map for hook in offload_hooks(part) if getattr(hook, "weights_map", None) is not None]
        for name in (*part._parameters, *part._buffers) if kept else ():
            full = _plain(f"{path}.{name}" if path else name)
            if full in state and state[full].is_meta:
                state[full] = next((weights[name] for weights in kept if name in weights), state[full])
    empty = [name for name, value in state.items() if value.is_meta]
    if empty:
        raise InputError(
            f"{len(empty)} weights of {type(original(module)).__name__} ({empty[0]}, say) lie on the meta device, "
            "where they have no values: before they are saved, load them, or call the remove_all_hooks() of a pipeline "
            "that is offloaded"
        )
    return state
