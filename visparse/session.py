"""Session: what is installed on one denoiser, and how it comes off again."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from visparse.adapter import Adapter, unwrapped
from visparse.route import LayerRoute
from visparse.router import Router
from visparse.sites import ModuleSite, ProcessorSite, Site

_ATTRIBUTE = "_visparse"


class Session:
    """One sparsified denoiser: its layers with what led their attention before and does now, and the hooks on it.

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
        self.sites: list[tuple[LayerRoute, Site]] = []
        self._hooks: list[Any] = []
        self._device = torch.device("cpu")
        self._started: float | None = None
        self._inside = False  # a call of the denoiser's own forward runs
        self._entered = False  # a call that goes round it has begun
        present = session_of(module)
        kind = ModuleSite if adapter.own_forward else ProcessorSite
        for route, (path, attention) in zip(router.routes, adapter.layers(unwrapped(module)).items(), strict=True):
            site = kind(attention, route, None if present is None else present.site(attention))
            route.unserved = site.obstacle
            if route.unserved is None:
                self.sites.append((route, site))
            elif router.settings.strict:
                raise ValueError(f"strict: {path} cannot be served: {route.unserved}")
        if not self.sites:
            where = adapter.attention if isinstance(adapter.attention, str) else " or ".join(adapter.attention)
            reasons = dict.fromkeys(str(route.unserved) for route in router.routes) or [f"no module is at {where}"]
            raise ValueError(
                f"no attention layer of {type(unwrapped(module)).__name__} can be served: {'; '.join(reasons)}"
            )
        for reason in dict.fromkeys(route.unserved for route in router.routes if route.unserved is not None):
            router.refuse(reason)

    def site(self, attention: Any) -> Site | None:
        """The site that is installed on an attention module; None where there is none."""
        return next((site for _, site in self.sites if site.layer is attention and site.installed), None)

    @property
    def installed(self) -> bool:
        """Whether this session is the one on the denoiser."""
        return session_of(self.module) is self

    def install(self) -> None:
        """Put routes, hooks and context listener in place; on an exception all of it comes off again."""
        model = unwrapped(self.module)
        setattr(model, _ATTRIBUTE, self)
        try:
            for _, site in self.sites:
                site.install()
            self._hooks.append(self.module.register_forward_pre_hook(self.before, with_kwargs=True))
            self._hooks.append(self.module.register_forward_hook(self.after, always_call=True))
            if self.adapter.entry is not None:
                entry = model.get_submodule(self.adapter.entry)
                self._hooks.append(entry.register_forward_pre_hook(self.enter))
            if hasattr(model, "cache_context"):
                from visparse import context  # here, since it needs diffusers

                context.listen(model, self.router.clock)
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> bool:
        """Put back what was there, and take the hooks off.

        What somebody else has put over ours since stays.

        Returns:
            False where this session was not installed.
        """
        if not self.installed:
            return False
        model = unwrapped(self.module)
        if hasattr(model, "cache_context"):
            from visparse import context

            context.unlisten(model)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for _, site in self.sites:
            site.uninstall()
        delattr(model, _ATTRIBUTE)
        self._inside = self._entered = False
        self.router.undo = None
        if self.router.compensation is not None:
            self.router.compensation.clear()
        return True

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs before each call of the denoiser: finds layout and step, and hands out block lists."""
        self._inside = True
        self._begin(dict(zip(self.names, args, strict=False)) | kwargs)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Runs before the part that sees the inputs first: the same for calls that go round the denoiser's forward.

        timm's `forward_features` and `forward_intermediates` are such calls. They end where the next one begins.
        """
        if self._inside:
            return
        if self._entered:
            self.router.end(True)
        self._begin({self.names[0]: args[0]})
        self._entered = True

    def _begin(self, arguments: dict[str, Any]) -> None:
        try:
            layout = self.adapter.layout_of(unwrapped(self.module), arguments)
        except ValueError as error:
            self.router.fail(error)
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        self._device, self._started = device, None
        timestep = None if self.adapter.timestep is None else arguments.get(self.adapter.timestep)
        self.router.begin(layout, timestep, device)
        if torch.compiler.is_compiling():
            return
        for route, site in self.sites:
            if not site.installed:
                route.lost(site.changed)
        self._started = self.router.now(device)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Runs after each call of the denoiser, also when it raised; `output` is None then."""
        self._inside = self._entered = False
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
