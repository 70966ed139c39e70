"""CogVideoX: `CogVideoXTransformer3DModel` (1.0, 1.5, image-to-video)."""

from collections.abc import Mapping
from typing import Any

from visparse.adapter import Adapter
from visparse.layout import Layout


def layout(config: Any, arguments: Mapping[str, Any]) -> Layout:
    """The grid of latent patches, and the text tokens in front of it.

    Args:
        config: the model's config, with `patch_size` and `patch_size_t` (None in CogVideoX 1.0).
        arguments: of the model's forward; `hidden_states` is [batch, frames, channels, height, width],
            `encoder_hidden_states` [batch, text tokens, channels].

    Returns:
        Layout with the text before the grid.
    """
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch = config.patch_size
    grid = (frames // (config.patch_size_t or 1), height // patch, width // patch)
    return Layout(grid=grid, before=arguments["encoder_hidden_states"].shape[1])


ADAPTER = Adapter(model_class="CogVideoXTransformer3DModel", attention="transformer_blocks.*.attn1", layout=layout)
