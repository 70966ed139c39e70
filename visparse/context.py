"""Listens to diffusers' cache context, so that a denoiser's step and branch are known without reading tensors.

The listener sits on an empty child module of the denoiser: `cache_context` calls every stateful hook below the model,
and no `forward` that ever runs is touched. Imported only when a pipeline is sparsified.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook, StateManager

from visparse.steps import Clock

CHILD = "_visparse_context"
_NAME = "visparse"


class ContextListener(StateManager):
    """A state manager without state: hands each context on to the clock."""

    def __init__(self, clock: Clock) -> None:
        """Tell `clock` about each context."""
        super().__init__(None)
        self.clock = clock

    def set_context(self, context: Any) -> None:
        """Called by diffusers before each call of the denoiser, and after it with None."""
        self.clock.enter(context)

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Called by diffusers at the end of a run."""
        self.clock.end_run()


class ContextHook(ModelHook):
    """The hook that carries the listener; its module is never called."""

    _is_stateful = True

    def __init__(self, clock: Clock) -> None:
        """Carry a listener for `clock`."""
        super().__init__()
        self.listener = ContextListener(clock)

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """End of a run."""
        self.listener.reset()
        return module


class ContextRegistry(HookRegistry):
    """The registry of the empty child module; diffusers' own cannot be pickled once it holds a hook."""

    def __init__(self, clock: Clock) -> None:
        """Hold one `ContextHook` for `clock`."""
        super().__init__(torch.nn.Identity())
        self.clock = clock
        self.register_hook(ContextHook(clock), _NAME)

    def __reduce__(self) -> tuple[type[ContextRegistry], tuple[Clock]]:
        """Copy and pickle as the clock alone."""
        return ContextRegistry, (self.clock,)


def listen(model: torch.nn.Module, clock: Clock) -> None:
    """Let `clock` hear the cache contexts of `model`; does nothing for a model that has none.

    Args:
        model: a diffusers denoiser.
        clock: told about every context.
    """
    if not hasattr(model, "cache_context"):
        return
    child = torch.nn.Identity()
    child._diffusers_hook = ContextRegistry(clock)
    setattr(model, CHILD, child)
    _forget_cached_children(model)


def unlisten(model: torch.nn.Module) -> None:
    """Take the listener off `model` again; harmless where there is none."""
    if hasattr(model, CHILD):
        delattr(model, CHILD)
        _forget_cached_children(model)


def _forget_cached_children(model: torch.nn.Module) -> None:
    registry = getattr(model, "_diffusers_hook", None)
    if registry is not None:
        registry.invalidate_child_registries_cache()
