"""The device on which a model runs, which offloading makes another one than that of its weights."""

from __future__ import annotations

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a module runs.

    Hooks of accelerate and diffusers keep weights elsewhere between calls: on the CPU, or nowhere (device "meta").

    Args:
        module: a denoiser.
    """
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        group = None if registry is None else registry.get_hook("group_offloading")
        if group is not None:
            return torch.device(group.config.onload_device)
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device
