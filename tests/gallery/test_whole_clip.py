"""Training runs the autoencoder on whole clips; the numbers must be those of the stock class."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderKLWan

Script = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], in_channels=12,
        out_channels=12, patch_size=2, scale_factor_temporal=2, scale_factor_spatial=4,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("frames", [1, 5, 9])
@torch.no_grad()
def test_encode_is_the_stock_encode(script: Script, vae: AutoencoderKLWan, frames: int) -> None:
    video = torch.rand(2, 3, frames, 16, 24) * 2 - 1
    ours = script("whole_clip").encode(vae, video)
    torch.testing.assert_close(ours, vae.encode(video).latent_dist.parameters, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("latent_frames", [1, 2, 5])
@torch.no_grad()
def test_decode_is_the_stock_decode(script: Script, vae: AutoencoderKLWan, latent_frames: int) -> None:
    latents = torch.randn(2, 4, latent_frames, 4, 6)
    ours = script("whole_clip").decode(vae, latents).clamp(-1, 1)
    torch.testing.assert_close(ours, vae.decode(latents).sample, atol=1e-5, rtol=1e-5)
