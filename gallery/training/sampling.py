"""Sampling during training: Euler steps, and a contact sheet of all classes."""

from itertools import pairwise
from pathlib import Path

import torch
from data import MOTIONS, NAMES, SIDE, caption_index, contact_sheet
from denoiser import BACKENDS
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from flow import shifted
from text import Captions
from torch.nn.attention import sdpa_kernel
from trainer import Trainer
from whole_clip import decode


@torch.no_grad()
def sample(
    model: WanTransformer3DModel,
    text: torch.Tensor,
    shape: tuple[int, ...],
    steps: int,
    scale: float,
    empty: torch.Tensor,
) -> torch.Tensor:
    """Latents by Euler steps from fixed noise.

    Args:
        model: the transformer.
        text: `[n, length, dim]`, embedded captions.
        shape: of the latents, `(n, z, t, h, w)`.
        steps: Euler steps.
        scale: of guidance; 1 means one pass a step.
        empty: `[length, dim]`, the embedded empty caption.

    Returns:
        Normalised latents of that shape, fp32.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(11)).to(text.device)
    for a, b in pairwise(shifted(torch.linspace(1, 0, steps + 1, device=text.device))):
        t = (a * 1000).expand(len(x))
        v = model(x, t, text, return_dict=False)[0].float()
        if scale != 1:
            free = model(x, t, empty.expand_as(text), return_dict=False)[0].float()
            v = free + scale * (v - free)
        x = x + (b - a) * v
    return x


def sheet(
    trainer: Trainer, vae: AutoencoderKLWan, captions: Captions, frames: int, scale: float, steps: int, path: Path
) -> None:
    """Save every class under three motions, first, middle and last frame.

    Args:
        trainer: its present weights are used.
        vae: decodes; its configuration holds the mean and deviation of the latents.
        captions: of all classes and motions.
        frames: latent frames.
        scale: of guidance; 1 means one pass a step.
        steps: Euler steps.
        path: of the picture.
    """
    table = captions.embed(trainer.text).detach()
    device = table.device
    side = SIDE // vae.config.scale_factor_spatial
    shape = (len(NAMES), vae.config.z_dim, frames, side, side)
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    kinds = torch.arange(len(NAMES), device=device)
    rows = []
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)
    with torch.no_grad(), autocast, sdpa_kernel(BACKENDS, set_priority=True):
        for j in range(3):
            picks = caption_index(kinds, (kinds + 2 * j) % len(MOTIONS))
            x = sample(trainer.model, table[picks], shape, steps, scale, table[captions.empty])
            clips = decode(vae, x * std + mean).float()
            last = clips.shape[2] - 1
            rows += [[c[:, f] for c in clips] for f in ((0,) if last == 0 else (0, last // 2, last))]
    contact_sheet(rows, path)
