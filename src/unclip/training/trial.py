"""Whether a run's settings fit together and fit into memory, found out before any data are read.

A step is computed on the meta device, which has shapes and no memory: settings that do not fit each other fail there at
once, and what the step would keep for its backward pass can be counted.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from unclip.errors import ConfigError, UnclipError
from unclip.training.recipe import Recipe
from unclip.training.task import Batch, check_room, computing_device, num_processes

STATE_COPIES = 4
"""Of each number in a network that is trained, at least: weight, gradient, the optimizer's and the average."""

SURE_SHARE = 0.8
"""Of the counted bytes, what a step surely needs: kernels differ in what they keep."""

N = TypeVar("N", bound=nn.Module)


def built(make: Callable[[], N], recipe: Recipe, what: str) -> N:
    """The network that `make` makes, once it is known that it can be trained in this machine's memory.

    Args:
        make: builds the network on torch's default device.
        recipe: of the run.
        what: names it in messages.

    Raises: ConfigError when the memory does not suffice.
    """
    with torch.device("meta"):
        check_parameters(make(), recipe, what)
    return make()


def check_parameters(module: nn.Module, recipe: Recipe, what: str) -> None:
    """Raises: ConfigError when `module`, all of which is trained, is too large for this machine's memory."""
    count = sum(parameter.numel() for parameter in module.parameters())
    check_room(
        4 * count * (1 if recipe.shard else STATE_COPIES),
        computing_device(),
        f"{what} has {count:,} parameters; to train them",
        "make the network smaller",
    )


def try_step(module: nn.Module, batch: Callable[[int], Batch], recipe: Recipe, *, large: Batch | None = None) -> None:
    """Compute a step of a task without memory.

    Args:
        module: the task's, wherever its weights lie.
        batch: makes a batch of so many rows on the meta device.
        recipe: of the run.
        large: a batch that the networks must be able to read too, beside those they are trained on.

    Raises: ConfigError when the networks cannot read such a batch, or a step needs more memory than there is.
    """
    for tried in (batch(2), large):
        if tried is None:
            continue
        try:
            kept_bytes(module, tried)
        except (UnclipError, RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(
                f"the networks of [{recipe.stage}] do not fit what they are given: {error!s:.300}. Check their settings"
            ) from error
    rows = -(-recipe.batch_size // (recipe.accumulation * num_processes()))
    try:
        kept = kept_bytes(module, batch(rows))
    except RuntimeError:  # more than 64 bits can count
        kept = 2**63
    share = SURE_SHARE / 2 if recipe.precision != "no" or recipe.compile else SURE_SHARE
    check_room(
        int(share * kept),
        computing_device(),
        f"batch_size is {recipe.batch_size}, with accumulation {recipe.accumulation}; for a step of {rows:,} pictures",
        "lower batch_size, or raise accumulation",
    )


def kept_bytes(module: nn.Module, batch: Batch) -> int:
    """Bytes that the forward pass of `module` keeps for the backward pass, besides the weights; nothing is computed.

    Args:
        module: a task's.
        batch: on the meta device.
    """
    on_meta = {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    own = {tensor.untyped_storage()._cdata for tensor in on_meta.values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other gets its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        torch.func.functional_call(module, on_meta, (batch,))
    return sum(storage.nbytes() for storage in kept.values())
