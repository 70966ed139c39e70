"""DiT, class-conditional images: `DiTTransformer2DModel`."""

from collections.abc import Mapping
from typing import Any

from visparse.adapter import Adapter
from visparse.layout import Layout


def layout(config: Any, arguments: Mapping[str, Any]) -> Layout:
    """The grid of latent patches, as one frame.

    Args:
        config: the model's config, with `patch_size`.
        arguments: of the model's forward; `hidden_states` is [batch, channels, height, width].

    Returns:
        Layout without extra tokens.
    """
    height, width = arguments["hidden_states"].shape[-2:]
    return Layout(grid=(1, height // config.patch_size, width // config.patch_size))


ADAPTER = Adapter(model_class="DiTTransformer2DModel", attention="transformer_blocks.*.attn1", layout=layout)
