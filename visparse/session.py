"""Session: what is installed on one denoiser, and how it comes off again."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from visparse import context
from visparse.adapter import Adapter, unwrapped
from visparse.intercept import can_route, routed
from visparse.router import Router

_ATTRIBUTE = "_visparse"


class Session:
    """One sparsified denoiser: its layers with their original and present processors, and the hooks on its root.

    Copying or pickling the denoiser copies the session with it.
    """

    def __init__(self, module: nn.Module, adapter: Adapter, router: Router) -> None:
        """Prepare, and install nothing yet.

        Args:
            module: the denoiser, or what `torch.compile(denoiser)` returned; the hooks go there.
            adapter: of its family.
            router: serves its layers.

        Raises:
            ValueError: no layer can be served; with `strict`, one layer cannot.
        """
        self.adapter, self.router, self.module = adapter, router, module
        self.names = tuple(inspect.signature(unwrapped(module).forward).parameters)
        self.layers: list[tuple[Any, Any, Any]] = []
        self._hooks: list[Any] = []
        self._device = torch.device("cpu")
        self._started: float | None = None
        present = session_of(module)
        for route, (path, attention) in zip(router.routes, adapter.layers(unwrapped(module)).items(), strict=True):
            original = attention.processor if present is None else present.original(attention)
            route.unserved = can_route(type(original))
            if route.unserved is None:
                self.layers.append((attention, original, routed(original, route)))
            elif router.settings.strict:
                raise ValueError(f"strict: {path} cannot be served: {route.unserved}")
        if not self.layers:
            where = adapter.attention if isinstance(adapter.attention, str) else " or ".join(adapter.attention)
            reasons = {str(route.unserved) for route in router.routes} or {f"no module is at {where}"}
            raise ValueError(
                f"no attention layer of {type(unwrapped(module)).__name__} can be served: {'; '.join(reasons)}"
            )
        for reason in dict.fromkeys(route.unserved for route in router.routes if route.unserved is not None):
            router.refuse(reason)

    def original(self, attention: Any) -> Any:
        """The processor that an attention module had before us; its present one where that is not ours."""
        for mine, original, replacement in self.layers:
            if mine is attention and attention.processor is replacement:
                return original
        return attention.processor

    @property
    def installed(self) -> bool:
        """Whether this session is the one on the denoiser."""
        return session_of(self.module) is self

    def install(self) -> None:
        """Put processors, hooks and context listener in place; on an exception all of it comes off again."""
        model = unwrapped(self.module)
        setattr(model, _ATTRIBUTE, self)
        try:
            for attention, _, replacement in self.layers:
                attention.processor = replacement
            self._hooks.append(self.module.register_forward_pre_hook(self.before, with_kwargs=True))
            self._hooks.append(self.module.register_forward_hook(self.after, always_call=True))
            context.listen(model, self.router.clock)
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> bool:
        """Put the original processors back and take the hooks off.

        A processor that somebody else has put over ours since stays.

        Returns:
            False where this session was not installed.
        """
        if not self.installed:
            return False
        model = unwrapped(self.module)
        context.unlisten(model)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for attention, original, replacement in self.layers:
            if attention.processor is replacement:
                attention.processor = original
        delattr(model, _ATTRIBUTE)
        self.router.undo = None
        if self.router.compensation is not None:
            self.router.compensation.clear()
        return True

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs before each call of the denoiser: finds layout and step, and hands out block lists."""
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        try:
            layout = self.adapter.layout(unwrapped(self.module).config, arguments)
        except ValueError as error:
            self.router.fail(error)
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        self._device, self._started = device, None
        self.router.begin(layout, arguments.get(self.adapter.timestep), device)
        if torch.compiler.is_compiling():
            return
        for attention, _, replacement in self.layers:
            if attention.processor is not replacement:
                replacement.visparse_route.lost("its processor was replaced after sparsify; call sparsify again")
        self._started = self.router.now(device)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Runs after each call of the denoiser, also when it raised; `output` is None then."""
        self.router.end(output is not None)
        if torch.compiler.is_compiling() or self._started is None:
            return
        now = self.router.now(self._device)
        if now is not None:
            self.router.denoiser_seconds += now - self._started
        self._started = None


def session_of(module: object) -> Session | None:
    """The session that is installed on a denoiser; None where there is none."""
    session = getattr(unwrapped(module), _ATTRIBUTE, None)
    return session if isinstance(session, Session) else None
