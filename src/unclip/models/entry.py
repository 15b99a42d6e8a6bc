"""Run methods besides `forward` through the function that replaces a module's `forward`, such as an offloading hook.

Offloading (accelerate's hooks, diffusers' group offloading) replaces `forward` on the instance with a function that
first moves the weights to the device. A method decorated with `entry_point` is called through that function too.
PyTorch's own hooks and compilation apply to calls of the module, not to these methods.
"""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)

_METHOD = "_entry_point"
"""The keyword argument that names the method to a replaced `forward`."""


def entry_point(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Call `method` through the module's `forward` if that is replaced on the instance.

    The class's `forward` must be decorated with `routes_entry_points`, and must not call entry points itself.
    """

    @functools.wraps(method)
    def enter(self: M, *args: P.args, **kwargs: P.kwargs) -> R:
        if "forward" not in vars(self):
            return method(self, *args, **kwargs)
        return self.forward(*args, **kwargs, **{_METHOD: method})

    return enter


def routes_entry_points(forward: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Run the entry point for which a replaced `forward` was called, or else `forward`."""

    @functools.wraps(forward)
    def route(self: M, *args: P.args, **kwargs: P.kwargs) -> R:
        method: Any = kwargs.pop(_METHOD, forward)
        return method(self, *args, **kwargs)

    return route
