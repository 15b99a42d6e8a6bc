"""Methods that count as a module's forward, so that whoever wraps `forward` wraps them too.

Offloading (accelerate's hooks, diffusers' group offloading) replaces a module's `forward` by one that brings the
weights to the device first. Knows neither library. Used on `prepare`, `denoise` and their like by the networks.
"""

import functools
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", bound=nn.Module)


class _Calls(threading.local):
    """What this thread is doing with wrapped modules, by the module's id."""

    def __init__(self) -> None:
        self.waiting: dict[int, Callable] = {}
        self.inside: set[int] = set()


_calls = _Calls()


def _is_wrapped(module: nn.Module) -> bool:
    # A wrapper is set on the instance, where it hides the class's own forward.
    return "forward" in vars(module)


def entry_point(method: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Send a call of `method` through the module's `forward` if that is wrapped, unless we are inside one already.

    The class's `forward` must be decorated with `routes_entry_points`.
    """

    @functools.wraps(method)
    def enter(self: M, *args: P.args, **kwargs: P.kwargs) -> R:
        if not _is_wrapped(self) or id(self) in _calls.inside:
            return method(self, *args, **kwargs)
        _calls.waiting[id(self)] = method
        try:
            return self.forward(*args, **kwargs)
        finally:
            _calls.waiting.pop(id(self), None)

    return enter


def routes_entry_points(forward: Callable[Concatenate[M, P], R]) -> Callable[Concatenate[M, P], R]:
    """Let a wrapped `forward` stand in for the entry point that was called, and mark what runs inside it."""

    @functools.wraps(forward)
    def route(self: M, *args: P.args, **kwargs: P.kwargs) -> R:
        if not _is_wrapped(self) or id(self) in _calls.inside:
            return forward(self, *args, **kwargs)
        method = _calls.waiting.pop(id(self), forward)
        _calls.inside.add(id(self))
        try:
            return method(self, *args, **kwargs)
        finally:
            _calls.inside.discard(id(self))

    return route
