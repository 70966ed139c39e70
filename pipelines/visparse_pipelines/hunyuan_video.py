"""HunyuanVideo: `HunyuanVideoTransformer3DModel`, text-to-video and both forms of image-to-video."""

from collections.abc import Mapping
from typing import Any

from visparse.adapter import Adapter
from visparse.layout import Layout


def layout(config: Any, arguments: Mapping[str, Any]) -> Layout:
    """The grid of latent patches, and the text tokens behind it; padded text is hidden by the model's key mask.

    Args:
        config: the model's config, with `patch_size_t` and `patch_size`.
        arguments: of the model's forward; `hidden_states` is [batch, channels, frames, height, width],
            `encoder_hidden_states` [batch, text tokens, channels].

    Returns:
        Layout with the text after the grid.
    """
    frames, height, width = arguments["hidden_states"].shape[-3:]
    patch = config.patch_size
    grid = (frames // config.patch_size_t, height // patch, width // patch)
    return Layout(grid=grid, after=arguments["encoder_hidden_states"].shape[1])


ADAPTER = Adapter(
    model_class="HunyuanVideoTransformer3DModel",
    attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
)
