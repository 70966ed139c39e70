"""Adapters: what visparse must know about a family of models, as data. They live in `visparse_pipelines`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from visparse.layout import Layout
from visparse.rules import ModelFingerprint

# Class name -> module that holds its `ADAPTER`; imported when a model of that class is met.
ADAPTERS = {
    "CogVideoXTransformer3DModel": "visparse_pipelines.cogvideox",
    "DiTTransformer2DModel": "visparse_pipelines.dit",
    "Eva": "visparse_pipelines.timm_eva",
    "FluxTransformer2DModel": "visparse_pipelines.flux",
    "HunyuanVideoTransformer3DModel": "visparse_pipelines.hunyuan_video",
    "VisionTransformer": "visparse_pipelines.timm_vit",
    "WanTransformer3DModel": "visparse_pipelines.wan",
}


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One family of denoisers, or of vision transformers.

    Attributes:
        model_class: name of the model's class.
        attention: path of its self-attention modules, or several; `*` stands for one part, such as `blocks.*.attn1`.
            Self-attention may be joint with text: text tokens lie before or after the grid and stay dense.
        layout: function (model's config, arguments of its forward by name) -> `Layout` of the tokens that the
            self-attention sees.
        timestep: name of the timestep argument; None: a model without denoising steps.
        library: package that the class must come from, where other packages have one of the same name; None: any.
        own_forward: attention modules call attention in their own `forward`; False: in a `processor`.
        entry: path of the submodule that sees the inputs first, where the library calls parts of the model without its
            `forward`; None: it does not.
    """

    model_class: str
    attention: str | tuple[str, ...]
    layout: Callable[[Any, Mapping[str, Any]], Layout]
    timestep: str | None = "timestep"
    library: str | None = None
    own_forward: bool = False
    entry: str | None = None

    def layers(self, model: nn.Module) -> dict[str, Any]:
        """The self-attention modules of a model in layer order, by path."""
        paths = (self.attention,) if isinstance(self.attention, str) else self.attention
        found = re.compile("|".join(re.escape(path).replace(r"\*", r"[^.]+") for path in paths))
        return {name: module for name, module in model.named_modules() if found.fullmatch(name)}

    def layout_of(self, model: Any, arguments: Mapping[str, Any]) -> Layout:
        """The layout of the tokens that a call's self-attention sees.

        Args:
            model: the model.
            arguments: of its forward, by name.

        Raises:
            ValueError: they make no grid.
        """
        return self.layout(model.config, arguments)

    def fingerprint(self, model: Any) -> ModelFingerprint:
        """The shape of a model."""
        return ModelFingerprint(
            model_class=self.model_class,
            layers=len(self.layers(model)),
            heads=model.config.num_attention_heads,
            head_dim=model.config.attention_head_dim,
        )


def unwrapped(module: Any) -> Any:
    """The model inside what `torch.compile(model)` returned, or the module itself."""
    return getattr(module, "_orig_mod", module)


def find_adapter(model: object) -> Adapter | None:
    """The adapter for a model, by the names of its class and base classes; None where there is none."""
    for cls in type(unwrapped(model)).__mro__:
        if cls.__name__ in ADAPTERS:
            adapter = importlib.import_module(ADAPTERS[cls.__name__]).ADAPTER
            if not isinstance(adapter, Adapter):
                raise TypeError(f"{ADAPTERS[cls.__name__]}.ADAPTER must be an Adapter, got {type(adapter).__name__}")
            if adapter.library in (None, cls.__module__.partition(".")[0]):
                return adapter
    return None


def find_denoisers(target: object) -> dict[str, tuple[nn.Module, Adapter]]:
    """The denoisers of a pipeline, or the model itself, that have an adapter.

    A pipeline's models without denoising steps, such as encoders of pictures, are left alone.

    Args:
        target: a diffusers pipeline, a denoiser, or a timm vision transformer.

    Returns:
        Component name -> (module, adapter); a bare model has the name "model".

    Raises:
        ValueError: there is no known denoiser; the text lists what was found and what is known.
        TypeError: the target is neither a pipeline nor a module.
    """
    if isinstance(target, nn.Module):
        parts: dict[str, Any] = {"model": target}
    elif isinstance(getattr(target, "components", None), Mapping):
        parts = dict(target.components)  # type: ignore[attr-defined]
    else:
        raise TypeError(f"wanted a diffusers pipeline or a denoiser (torch.nn.Module), got {type(target).__name__}")
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    found = {}
    for name, module in modules.items():
        adapter = find_adapter(module)
        if adapter is not None and (adapter.timestep is not None or module is target):
            found[name] = (module, adapter)
    if not found:
        have = (
            ", ".join(f"{name}: {type(unwrapped(module)).__name__}" for name, module in modules.items()) or "no modules"
        )
        raise ValueError(f"no denoiser that visparse knows; found {have}; known are {', '.join(sorted(ADAPTERS))}")
    return found
