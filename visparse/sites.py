"""Sites: where a layer calls attention, how a route is put there, and how it comes off again."""

from __future__ import annotations

from typing import Any

from visparse.intercept import Route, can_route, routed, routed_class

_ROUTE = "visparse_route"


class Site:
    """One attention layer of a model, with what was there before and what leads its attention through a route.

    Attributes:
        layer: the module.
        original: what `sparsify` found.
        obstacle: why its attention cannot be led through a route; None where it can.
    """

    changed = ""
    """Why calls do not come to the route any more, where `installed` is not true after `install`."""

    layer: Any
    original: Any
    obstacle: str | None

    def install(self) -> None:
        """Lead the layer's attention through the route."""
        raise NotImplementedError

    def uninstall(self) -> None:
        """Put the original back; what somebody else has put over ours since stays."""
        raise NotImplementedError

    @property
    def installed(self) -> bool:
        """Whether the layer's attention is led through the route."""
        raise NotImplementedError


class ProcessorSite(Site):
    """A layer that hands its attention to a `processor`, as diffusers has them: the processor is replaced."""

    changed = "its processor was replaced after sparsify; call sparsify again"

    def __init__(self, layer: Any, route: Route, before: Site | None) -> None:
        """Prepare, and change nothing yet.

        Args:
            layer: the module.
            route: where its attention goes.
            before: a site that is installed on it now.
        """
        self.layer = layer
        self.original = layer.processor if before is None else before.original
        self.obstacle = can_route(type(self.original))
        self.replacement = None if self.obstacle is not None else routed(self.original, route)

    def install(self) -> None:
        """Put our processor in."""
        self.layer.processor = self.replacement

    def uninstall(self) -> None:
        """Put the original processor back."""
        if self.installed:
            self.layer.processor = self.original

    @property
    def installed(self) -> bool:
        """Whether our processor is there."""
        return self.layer.processor is self.replacement


class ModuleSite(Site):
    """A layer that calls attention in its own `forward`, as timm has them: it becomes one of a subclass.

    The module stays the very same object, with its weights, hooks and attributes.
    """

    changed = "its class or its forward was changed after sparsify; call sparsify again"

    def __init__(self, layer: Any, route: Route, before: Site | None) -> None:
        """Prepare, and change nothing yet; arguments as for `ProcessorSite`."""
        self.layer, self._route = layer, route
        self.original = type(layer) if before is None else before.original
        while _ROUTE in vars(self.original):  # ours, and its forward was replaced or switched off since
            self.original = self.original.__base__
        self.obstacle = self._obstacle() or can_route(self.original, "forward")

    def install(self) -> None:
        """Make the module one of our subclass."""
        setattr(self.layer, _ROUTE, self._route)
        self.layer.__class__ = routed_class(self.original, "forward")

    def uninstall(self) -> None:
        """Give the module its own class back."""
        if vars(self.layer).get(_ROUTE) is not self._route:
            return
        delattr(self.layer, _ROUTE)
        if type(self.layer) is routed_class(self.original, "forward"):
            self.layer.__class__ = self.original

    @property
    def installed(self) -> bool:
        """Whether the module is one of our subclass, and its forward comes to our route."""
        ours = vars(self.layer).get(_ROUTE) is self._route and self._obstacle() is None
        return ours and type(self.layer) is routed_class(self.original, "forward")

    def _obstacle(self) -> str | None:
        if "forward" in vars(self.layer):
            return f"the forward of this {self.original.__name__} was replaced, as accelerate's hooks do it"
        if not getattr(self.layer, "fused_attn", True):
            return (
                "its fused_attn is off, so it does not call F.scaled_dot_product_attention; set layer.fused_attn = "
                "True, or make the model after timm.layers.set_fused_attn(True)"
            )
        return None
