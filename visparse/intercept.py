"""Interception: a layer's own code, with only its call to dense attention led through a route.

`routed_class(base)` is a subclass of a processor's class whose `__call__` runs the original code object in a copy of
its globals, in which `dispatch_attention_fn` and `F` are ours; `routed_class(base, "forward")` is the same for a module
that has no processor. Projections, norms, rotary embedding, LoRA and quantised layers stay the model's own, and nothing
of another library is changed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional
from torch import Tensor

_DISPATCH = "dispatch_attention_fn"
_SDPA = "scaled_dot_product_attention"
_DISPATCH_NAMES = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
    "attention_kwargs",
)
_SDPA_NAMES = _DISPATCH_NAMES[:8]


class Route(Protocol):
    """Where a layer's attention goes."""

    def attention(self, call: dict[str, Any], dense: Callable[[], Tensor], heads_first: bool) -> Tensor:
        """Serve one call.

        Args:
            call: the arguments of the call, by name.
            dense: makes the original call, untouched.
            heads_first: query, key, value are [batch, heads, tokens, channels], not [batch, tokens, heads, channels].

        Returns:
            The attention's output, in the layout of the query.
        """


class _PerThread(threading.local):
    route: Route | None = None


class _WhileTracing:
    def __init__(self) -> None:
        self.route: Route | None = None  # of the object, so that the first call is guarded like all later ones


# The route of the processor that is running. torch.compile cannot trace thread-local storage, and traces in one thread.
_eager, _tracing = _PerThread(), _WhileTracing()


def _current() -> Route | None:
    return _tracing.route if torch.compiler.is_compiling() else _eager.route


def _set(route: Route | None) -> None:
    if torch.compiler.is_compiling():
        _tracing.route = route
    else:
        _eager.route = route


def _led(original: Callable[..., Tensor], names: tuple[str, ...], heads_first: bool) -> Callable[..., Tensor]:
    """`original`, led through the current route."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        route = _current()
        if route is None:
            return original(*args, **kwargs)
        named = dict(zip(names, args, strict=False)) | kwargs
        return route.attention(named, lambda: original(*args, **kwargs), heads_first)

    return call


class _Functional:
    """`torch.nn.functional`, with `scaled_dot_product_attention` led through the current route."""

    scaled_dot_product_attention = staticmethod(
        _led(torch.nn.functional.scaled_dot_product_attention, _SDPA_NAMES, True)
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.functional, name)


def can_route(base: Any, method: str = "__call__") -> str | None:
    """Why a class cannot be led through a route; None where it can.

    Args:
        base: class of a processor, or of a module.
        method: that calls attention: ``"__call__"`` of a processor, ``"forward"`` of a module.
    """
    function = getattr(base, method)
    if method == "__call__" and issubclass(base, torch.nn.Module):
        return f"{base.__name__} is a module with weights of its own"
    if not isinstance(function, FunctionType):
        return f"{base.__name__}.{method} is not a plain function"
    names, scope = _names(function.__code__), function.__globals__
    if _DISPATCH in names and _DISPATCH in scope:
        return None
    if _SDPA in names and scope.get("F") is torch.nn.functional:
        return None
    return f"{base.__name__}.{method} calls neither {_DISPATCH} nor F.{_SDPA}"


def _names(code: CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


@functools.cache
def routed_class(base: Any, method: str = "__call__") -> Any:
    """The subclass of a class that leads its attention through `self.visparse_route`.

    Args:
        base: class of a live processor or module.
        method: see `can_route`.

    Returns:
        The subclass; the same object for the same arguments.

    Raises:
        TypeError: the class cannot be led; the text says why.
    """
    reason = can_route(base, method)
    if reason is not None:
        raise TypeError(f"cannot lead this attention through visparse: {reason}")
    original: Any = getattr(base, method)
    scope = dict(original.__globals__)
    scope.pop("__name__", None)  # else torch.compile looks names up in the module that has this name
    if _DISPATCH in scope:
        scope[_DISPATCH] = _led(scope[_DISPATCH], _DISPATCH_NAMES, False)
    if scope.get("F") is torch.nn.functional:
        scope["F"] = _Functional()
    inner = FunctionType(original.__code__, scope, original.__name__, original.__defaults__, original.__closure__)
    inner.__kwdefaults__ = original.__kwdefaults__

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _current()
        _set(self.visparse_route)
        try:
            return inner(self, *args, **kwargs)
        finally:
            _set(before)

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _blank, (base, method), self.__dict__

    return type(f"Sparse{base.__name__}", (base,), {method: call, "__reduce__": __reduce__, "visparse_route": None})


def routed(processor: object, route: Route) -> Any:
    """A copy of a live processor, with all its attributes, that leads its attention through `route`."""
    new = _blank(type(processor), "__call__")
    new.__dict__.update(processor.__dict__)
    new.visparse_route = route
    return new


def _blank(base: type, method: str) -> Any:
    cls = routed_class(base, method)
    return cls.__new__(cls)
