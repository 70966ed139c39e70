"""The architectures of `visparse bench step`, as data: published configurations, sizes, and windows to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from visparse.errors import nearest
from visparse.layout import Grid
from visparse.plan import SparsePlan
from visparse.presets import load_plan

Window = tuple[Grid, Grid]
Random = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """One kind of transformer blocks of a model.

    Args:
        config: name of the number of blocks in the model's config.
        path: attribute of the model that holds them.
        published: their number in the published model.
    """

    config: str
    path: str
    published: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One denoiser at one size, with batch 1.

    Args:
        name: as on the command line.
        model_class: class in diffusers.
        config: its config as published, without the numbers of blocks.
        blocks: kinds of blocks, in the order in which they run.
        grid: (frames, height, width), in tokens.
        inputs: function (architecture, random) -> arguments of the denoiser's forward, by name; `random(*shape)` gives
            normal numbers on the right device and of the right dtype.
        before, after: text tokens that share the attention, in front of the grid and behind it.
        padding: how many of those behind are padding, hidden by the model's mask.
        windows: (window, stride) of the neighbourhoods that are tried.
        radial: whether radial attention is tried.
        compensated: whether plans with selectors and compensations are tried where no plan is asked for by name.
    """

    name: str
    model_class: str
    config: Mapping[str, Any]
    blocks: tuple[Blocks, ...]
    grid: Grid
    inputs: Callable[[Architecture, Random], dict[str, Any]] = field(repr=False)
    before: int = 0
    after: int = 0
    padding: int = 0
    windows: tuple[Window, ...] = ()
    radial: bool = True
    compensated: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that one attention layer sees."""
        return prod(self.grid) + self.before + self.after

    @property
    def heads(self) -> int:
        """Heads of one attention layer."""
        return int(self.config["num_attention_heads"])

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return int(self.config["attention_head_dim"])

    def plans(self) -> list[SparsePlan]:
        """The sparse plans that are tried, with no dense step or layer."""
        near = [_neighborhood(window, stride) for window, stride in self.windows]
        return [*near, *([load_plan("radial").with_changes(dense_steps=0, dense_layers=0)] if self.radial else [])]


def everything() -> SparsePlan:
    """A plan that keeps every pair, and has it computed from block lists."""
    return SparsePlan(
        name="density-1",
        patterns={"all": {"name": "neighborhood", "window": ["100%"] * 3, "stride": 1}},  # type: ignore[dict-item]
        default="all",
    )


def find_architectures(names: list[str]) -> list[Architecture]:
    """The architectures of these names.

    Raises:
        ValueError: an unknown name; names the nearest.
    """
    for name in names:
        if name not in ARCHITECTURES:
            raise ValueError(
                f"model: unknown {name!r}{nearest(name, ARCHITECTURES)} (known: {', '.join(ARCHITECTURES)})"
            )
    return [ARCHITECTURES[name] for name in names]


def _neighborhood(window: Grid, stride: Grid) -> SparsePlan:
    text = ["x".join(map(str, sizes)) for sizes in (window, stride)]
    return SparsePlan(
        name=f"neighborhood {text[0]} stride {text[1]}",
        patterns={"near": {"name": "neighborhood", "window": window, "stride": stride}},  # type: ignore[dict-item]
        default="near",
    )


# ---- arguments of forward --------------------------------------------------------------------------------------------


def _wan_inputs(model: Architecture, random: Random) -> dict[str, Any]:
    frames, height, width = model.grid
    text = random(1, 512, model.config["text_dim"])
    return {
        "hidden_states": random(1, model.config["in_channels"], frames, 2 * height, 2 * width),
        "timestep": torch.full((1,), 500, device=text.device),
        "encoder_hidden_states": text,
    }


def _hunyuan_inputs(model: Architecture, random: Random) -> dict[str, Any]:
    frames, height, width = model.grid
    text = random(1, model.after, model.config["text_embed_dim"])
    mask = torch.ones(1, model.after, dtype=torch.int64, device=text.device)
    mask[:, model.after - model.padding :] = 0
    return {
        "hidden_states": random(1, model.config["in_channels"], frames, 2 * height, 2 * width),
        "timestep": text.new_full((1,), 500),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "pooled_projections": random(1, model.config["pooled_projection_dim"]),
        "guidance": text.new_full((1,), 6000),
    }


def _flux_inputs(model: Architecture, random: Random) -> dict[str, Any]:
    _, height, width = model.grid
    text = random(1, model.before, model.config["joint_attention_dim"])
    at = torch.arange(height * width, device=text.device)
    return {
        "hidden_states": random(1, height * width, model.config["in_channels"]),
        "encoder_hidden_states": text,
        "pooled_projections": random(1, model.config["pooled_projection_dim"]),
        "timestep": text.new_full((1,), 0.5),
        "img_ids": torch.stack([torch.zeros_like(at), at // width, at % width], dim=1).to(text.dtype),
        "txt_ids": text.new_zeros(model.before, 3),
        "guidance": text.new_full((1,), 3.5),
    }


def _cogvideox_inputs(model: Architecture, random: Random) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = model.grid
    text = random(1, model.before, model.config["text_embed_dim"])
    area = (height, width)
    rotary = get_3d_rotary_pos_embed(model.head_dim, ((0, 0), area), area, frames, device=text.device)
    return {
        "hidden_states": random(1, frames, model.config["in_channels"], 2 * height, 2 * width),
        "encoder_hidden_states": text,
        "timestep": torch.full((1,), 500, device=text.device),
        "image_rotary_emb": rotary,
    }


# ---- published configurations ----------------------------------------------------------------------------------------


def _wan(
    name: str,
    grid: Grid,
    heads: int,
    ffn: int,
    layers: int,
    windows: tuple[Window, ...],
    compensated: bool = False,
) -> Architecture:
    """Wan 2.1 text-to-video: config of the published checkpoints."""
    return Architecture(
        name=name,
        model_class="WanTransformer3DModel",
        config={
            "num_attention_heads": heads,
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": (1, 2, 2),
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": ffn,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
        },
        blocks=(Blocks(config="num_layers", path="blocks", published=layers),),
        grid=grid,
        inputs=_wan_inputs,
        windows=windows,
        compensated=compensated,
    )


def _flux(name: str, side: int, window: Window) -> Architecture:
    """FLUX.1 dev: config of the published checkpoint."""
    return Architecture(
        name=name,
        model_class="FluxTransformer2DModel",
        config={
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "in_channels": 64,
            "patch_size": 1,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
        blocks=(
            Blocks(config="num_layers", path="transformer_blocks", published=19),
            Blocks(config="num_single_layers", path="single_transformer_blocks", published=38),
        ),
        grid=(1, side, side),
        inputs=_flux_inputs,
        before=512,
        windows=(window,),
        radial=False,
    )


_HUNYUAN_VIDEO = Architecture(
    name="hunyuan-video-720p",
    model_class="HunyuanVideoTransformer3DModel",
    config={
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "num_refiner_layers": 2,
        "mlp_ratio": 4.0,
        "patch_size": 2,
        "patch_size_t": 1,
        "qk_norm": "rms_norm",
        "guidance_embeds": True,
        "text_embed_dim": 4096,
        "pooled_projection_dim": 768,
        "rope_theta": 256.0,
        "rope_axes_dim": (16, 56, 56),
    },
    blocks=(
        Blocks(config="num_layers", path="transformer_blocks", published=20),
        Blocks(config="num_single_layers", path="single_transformer_blocks", published=40),
    ),
    grid=(33, 45, 80),
    inputs=_hunyuan_inputs,
    after=256,
    padding=128,
    windows=(((18, 24, 24), (16, 8, 8)),),
)

_COGVIDEOX = Architecture(
    name="cogvideox-5b",
    model_class="CogVideoXTransformer3DModel",
    config={
        "num_attention_heads": 48,
        "attention_head_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "time_embed_dim": 512,
        "text_embed_dim": 4096,
        "sample_width": 90,
        "sample_height": 60,
        "sample_frames": 49,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 226,
        "use_rotary_positional_embeddings": True,
    },
    blocks=(Blocks(config="num_layers", path="transformer_blocks", published=42),),
    grid=(13, 30, 45),
    inputs=_cogvideox_inputs,
    before=226,
    windows=(((8, 8, 16), (4, 8, 8)),),
)

_TINY = Architecture(
    name="tiny",
    model_class="WanTransformer3DModel",
    config={
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 64,
        "rope_max_seq_len": 64,
    },
    blocks=(Blocks(config="num_layers", path="blocks", published=6),),
    grid=(4, 16, 16),
    inputs=_wan_inputs,
    windows=(((2, 8, 8), (2, 8, 8)),),
    compensated=True,
)

# In the order in which they are measured where no name is given: what matters most comes first. Windows visit about
# 12.5 % of the blocks or less, text included; 1k pictures cannot, since their text alone touches 21 % of all pairs.
ARCHITECTURES = {
    model.name: model
    for model in (
        _wan("wan-14b-720p", (21, 45, 80), 40, 13824, 40, (((12, 24, 24), (4, 8, 8)), ((12, 16, 24), (4, 8, 8))), True),
        _wan("wan-14b-480p", (21, 30, 52), 40, 13824, 40, (((12, 8, 24), (4, 8, 8)),)),
        _wan("wan-1.3b-480p", (21, 30, 52), 12, 8960, 30, (((12, 8, 24), (4, 8, 8)),)),
        _HUNYUAN_VIDEO,
        _flux("flux-1k", 64, ((1, 24, 16), (1, 8, 16))),
        _flux("flux-2k", 128, ((1, 24, 48), (1, 8, 16))),
        _flux("flux-4k", 256, ((1, 80, 80), (1, 16, 16))),
        _COGVIDEOX,
        _TINY,
    )
}
