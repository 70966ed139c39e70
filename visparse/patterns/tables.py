"""Tables of patterns, built once for each device.

A plain dictionary, which `torch.compile` reads as a constant: it would trace through a cached function and build the
table inside FlexAttention's kernel, which cannot be compiled.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_KEPT = 64
_TABLES: dict[Hashable, Tensor] = {}


def table_on(device: torch.device, build: Callable[..., Tensor], *arguments: Hashable) -> Tensor:
    """Return a table on a device; do not change it, it is kept.

    Args:
        device: where it shall lie.
        build: makes it on the CPU.
        arguments: for ``build``.

    Raises:
        ValueError: as ``build`` does.
    """
    key = (build.__module__, build.__name__, arguments, device.type, device.index)
    if key not in _TABLES:
        while len(_TABLES) >= _KEPT:
            _TABLES.pop(next(iter(_TABLES)))
        _TABLES[key] = build(*arguments).to(device)
    return _TABLES[key]
