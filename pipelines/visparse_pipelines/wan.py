"""Wan text-to-video: `WanTransformer3DModel` (Wan 2.1, both transformers of 2.2, TI2V)."""

from collections.abc import Mapping
from typing import Any

from visparse.adapter import Adapter
from visparse.layout import Layout


def layout(config: Any, arguments: Mapping[str, Any]) -> Layout:
    """The grid of latent patches; Wan's self-attention sees nothing else (text has its own cross-attention).

    Args:
        config: the model's config, with `patch_size` (frames, height, width).
        arguments: of the model's forward; `hidden_states` is [batch, channels, frames, height, width].

    Returns:
        Layout without extra tokens.
    """
    size, patch = arguments["hidden_states"].shape[-3:], config.patch_size
    return Layout(grid=(size[0] // patch[0], size[1] // patch[1], size[2] // patch[2]))


ADAPTER = Adapter(model_class="WanTransformer3DModel", attention="blocks.*.attn1", layout=layout)
