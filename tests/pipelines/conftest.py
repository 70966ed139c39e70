"""Tiny random pipelines, built offline from configs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

HEADS, HEAD_DIM, LAYERS = 2, 32, 3


def make_wan_transformer(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=LAYERS,
        rope_max_seq_len=64,
    ).eval()


@pytest.fixture
def wan_transformer() -> Any:
    return make_wan_transformer()


@pytest.fixture
def make_wan() -> Callable[..., Any]:
    def make(seed: int = 0, **parts: Any) -> Any:
        vae = AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ).eval()
        parts.setdefault("transformer", make_wan_transformer(seed))
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def wan(make_wan: Callable[..., Any]) -> Any:
    return make_wan()


@pytest.fixture
def film() -> Callable[..., torch.Tensor]:
    """Runs a Wan pipeline; by default 13 frames of 64 x 96 pixels, a grid of 4 x 4 x 6, in 3 steps."""

    def run(pipe: Any, *, batch: int = 1, guidance: float = 1.0, **settings: Any) -> torch.Tensor:
        settings = {"height": 64, "width": 96, "num_frames": 13, "num_inference_steps": 3} | settings
        random = torch.Generator().manual_seed(1)
        texts = torch.randn(2, batch, 8, 32, generator=random)
        latents: torch.Tensor = pipe(
            prompt_embeds=texts[0],
            negative_prompt_embeds=texts[1],
            guidance_scale=guidance,
            output_type="latent",
            generator=random,
            **settings,
        ).frames
        return latents

    return run


@pytest.fixture
def dit() -> Any:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=LAYERS,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=1000,
        out_channels=4,
    ).eval()
    pipe = DiTPipeline(transformer=transformer, vae=AutoencoderKL().eval(), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def picture() -> Callable[..., torch.Tensor]:
    """Runs a DiT pipeline: 16 x 16 latents, a grid of 1 x 8 x 8."""

    def run(pipe: Any, *, guidance: float = 4.0, steps: int = 3) -> torch.Tensor:
        seen = []
        hook = pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(output.sample))
        pipe(
            class_labels=[3, 5],
            guidance_scale=guidance,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(1),
            output_type="pt",
        )
        hook.remove()
        return torch.stack(seen)

    return run
