"""timm's vision transformers: `VisionTransformer` (ViT, DeiT, DINOv2, SigLIP, CLIP's picture side, ...).

Such a model has no denoising steps. Class, distillation and register tokens lie before the grid of patches. Attention
that pools (`global_pool="map"`) is no self-attention of patches, and stays the model's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from visparse.adapter import Adapter
from visparse.layout import Layout
from visparse.rules import ModelFingerprint


def layout(model: Any, arguments: Mapping[str, Any]) -> Layout:
    """The grid of patches as one frame, with the model's prefix tokens before it.

    Args:
        model: with `patch_embed` and `num_prefix_tokens`.
        arguments: of the model's forward; `x` is [batch, channels, height, width].

    Returns:
        Layout for this size of pictures, which may change from call to call (`dynamic_img_size`).
    """
    height, width = model.patch_embed.dynamic_feat_size(tuple(arguments["x"].shape[-2:]))
    return Layout(grid=(1, height, width), before=model.num_prefix_tokens)


@dataclass(frozen=True, kw_only=True)
class TimmAdapter(Adapter):
    """A family of timm: no config, no processors, and the size of heads stands in the attention modules."""

    timestep: str | None = None
    library: str | None = "timm"
    own_forward: bool = True
    entry: str | None = "patch_embed"

    def layers(self, model: nn.Module) -> dict[str, Any]:
        """The self-attention modules in layer order; a block that is its own attention (ViT-22B's) among them."""
        found = super().layers(model)
        return {name: module for name, module in found.items() if hasattr(module, "fused_attn")}

    def layout_of(self, model: Any, arguments: Mapping[str, Any]) -> Layout:
        """The layout of a call: `layout` is given the model, since there is no config."""
        return self.layout(model, arguments)

    def fingerprint(self, model: Any) -> ModelFingerprint:
        """The shape of a model; heads are those of its first attention.

        Raises:
            ValueError: it has no attention of timm's own kind.
        """
        layers = self.layers(model)
        if not layers:
            kinds = ", ".join(sorted({type(block).__name__ for block in model.blocks})) or "none"
            raise ValueError(
                f"no attention of timm's own kind in this {self.model_class}, its blocks are {kinds}; visparse serves "
                "attention modules that have fused_attn"
            )
        first = next(iter(layers.values()))
        return ModelFingerprint(
            model_class=self.model_class, layers=len(layers), heads=first.num_heads, head_dim=first.head_dim
        )


ADAPTER = TimmAdapter(
    model_class="VisionTransformer", attention=("blocks.*", "blocks.*.attn", "blocks.*.attns.*.attn"), layout=layout
)
