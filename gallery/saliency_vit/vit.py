"""The saliency ViT (S/14, 12 layers of 6 heads of 64): timm's own model, or block by block with any attention in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 14
_TABLE = 37  # patches along a side of the trained position table
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# layer, q, k, v [B, N, H, D] -> output [B, N, H, D]
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class SaliencyViT(nn.Module):
    """Backbone and head.

    Args:
        body, head: weights as `weights.load` returns them.
        side: pixels along a side of the pictures, a multiple of 14.

    Raises:
        ValueError: ``side`` is no multiple of 14.
        RuntimeError: weights are missing or left over.
    """

    def __init__(self, body: dict[str, Tensor], head: dict[str, Tensor], side: int = 784) -> None:
        super().__init__()
        if side < PATCH or side % PATCH:
            raise ValueError(f"side: wanted a multiple of {PATCH} pixels, got {side}; 784 gives 56 x 56 patches")
        self.side = side
        self.backbone = timm.create_model("vit_small_patch14_dinov2", img_size=side, num_classes=0)
        weights = {
            name: tensor for name, tensor in body.items() if not name.endswith("position") and name != "positions"
        }
        weights["pos_embed"] = _positions(body["class_position"], body["positions"], side // PATCH)
        self.backbone.load_state_dict(weights)
        self.decoder = nn.ModuleDict()
        for number, (inner, outer) in enumerate(((384, 256), (256, 128), (128, 64)), 1):
            self.decoder[f"upconv{number}"] = nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1)
            self.decoder[f"bn{number}"] = nn.BatchNorm2d(outer)
        self.decoder["final_conv"] = nn.Conv2d(64, 1, 1)
        counters = {f"bn{number}.num_batches_tracked": torch.tensor(0) for number in (1, 2, 3)}
        self.decoder.load_state_dict({**head, **counters})
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, pictures: Tensor, attention: Attention) -> Tensor:
        """Return saliency maps in 0..1, fp32 [B, 1, side, side].

        Args:
            pictures: fp32 [B, 3, side, side], normalised.
            attention: called once for every layer.
        """
        net = self.backbone
        x = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(pictures))))
        for layer, block in enumerate(net.blocks):
            qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.num_heads, -1))
            out = attention(layer, *qkv.unbind(2))
            x = x + block.ls1(block.attn.proj(out.flatten(2)))
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return self._decode(net.norm(x)[:, 1:])

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Return what the backbone gives by timm's own forward, which `visparse.sparsify` serves, [B, 1 + N, 384].

        Args:
            pictures: [B, 3, side, side], normalised.
        """
        return self.backbone.forward_features(pictures)  # type: ignore[no-any-return]

    @torch.no_grad()
    def saliency(self, features: Tensor) -> Tensor:
        """Return saliency maps in 0..1 of features, [B, 1, side, side]."""
        return self._decode(features[:, 1:])

    def _decode(self, tokens: Tensor) -> Tensor:
        x = tokens.transpose(1, 2).unflatten(2, (self.side // PATCH, -1))
        for number in (1, 2, 3):
            x = F.relu(self.decoder[f"bn{number}"](self.decoder[f"upconv{number}"](x)))
        x = self.decoder["final_conv"](x)
        return F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False).sigmoid()


def read_picture(path: Path, side: int = 784) -> Tensor:
    """Return the largest square in the middle of a picture, scaled and normalised, fp32 [1, 3, side, side].

    The weights' own package pads pictures to a square instead; here no token is padding.

    Args:
        path: of the picture.
        side: pixels.
    """
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    square = picture.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(side, side, 3).permute(2, 0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return ((pixels / 255 - mean) / std)[None]


def _positions(first: Tensor, table: Tensor, patches: int) -> Tensor:
    """Interpolate the position table as the ONNX file does: bicubic, without smoothing."""
    grid = table.unflatten(1, (_TABLE, _TABLE)).permute(0, 3, 1, 2)
    if patches != _TABLE:
        grid = F.interpolate(grid, size=(patches, patches), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.flatten(2).transpose(1, 2)], 1)
