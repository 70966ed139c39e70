"""The attention of a compensated layer as one operator, for `torch.compile`.

What a call does depends on the step, on what was measured before and on the plan; in compiled code all of it happens
inside this operator, so dense, measured and sparse steps share one graph. CUDA graphs would replay a single kind of
step: do not use them with it, but for models without steps.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from visparse.route import LayerRoute

_routes: weakref.WeakValueDictionary[int, LayerRoute] = weakref.WeakValueDictionary()
_keys = itertools.count()


def register(route: LayerRoute) -> Tensor:
    """Make a route known to the operator, as long as it lives.

    Args:
        route: of a layer.

    Returns:
        Its key: a tensor on the CPU, so that the layers of a model share one graph; a number would be a constant of it.
    """
    key = next(_keys)
    _routes[key] = route
    return torch.tensor(key)


@torch.library.custom_op("visparse::compensated", mutates_args=())
def compensated_op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, heads_first: bool, key: Tensor
) -> Tensor:
    """Serve a call of the route with a key."""
    call: dict[str, Any] = {"query": q, "key": k, "value": v, "attn_mask": mask, "scale": scale}

    def dense() -> Tensor:
        states = [x if heads_first else x.transpose(1, 2) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(
            states[0], states[1], states[2], attn_mask=mask, scale=scale
        )
        return out if heads_first else out.transpose(1, 2)

    return _routes[int(key)].attention(call, dense, heads_first).contiguous()


@compensated_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, heads_first: bool, key: Tensor
) -> Tensor:
    return q.new_empty(q.shape)
