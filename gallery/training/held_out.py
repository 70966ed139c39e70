"""How well the autoencoder reconstructs what it was not trained on."""

from pathlib import Path

import torch
from camera import camera_clips
from data import FRAMES, SIDE, Pictures, contact_sheet
from diffusers import AutoencoderKLWan


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each clip of two batches in -1..1."""
    error = ((a.float().clamp(-1, 1) - b.float().clamp(-1, 1)) / 2).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-10))


@torch.no_grad()
def held_out_psnr(
    vae: AutoencoderKLWan, pictures: Pictures, clips: list[torch.Tensor], sheet: Path
) -> dict[str, float]:
    """PSNR by the stock encode and decode, over held-out pictures under motion and held-out clip files.

    Args:
        vae: the trained one.
        pictures: 96 of the held-out ones are used.
        clips: held-out ones, each `uint8 [frames, 3, h, w]`.
        sheet: where a picture of some of them goes.

    Returns:
        Means over pictures and over clips, and the worst picture, in dB.
    """
    g = torch.Generator(pictures.pixels.device).manual_seed(5)
    held = pictures.held_out.nonzero()[:, 0]
    held = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(7))[:96].to(held.device)]
    values, rows = [], []
    for i in range(0, len(held), 16):
        index = held[i : i + 16]
        x = camera_clips(pictures.pixels, index, torch.arange(len(index), device=index.device) % 7, g)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        values.append(psnr(y, x))
        if i == 0:
            rows = [[x[j, :, 0], y[j, :, 0], x[j, :, -1], y[j, :, -1]] for j in range(6)]
    real = []
    for clip in clips:
        x = clip[:FRAMES, :, :SIDE, 20 : 20 + SIDE].float().div(127.5).sub(1).transpose(0, 1)[None]
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        real.append(psnr(y, x))
        rows.append([x[0, :, 0], y[0, :, 0], x[0, :, -1], y[0, :, -1]])
    contact_sheet(rows, sheet)
    pictures_db, real_db = torch.cat(values), torch.cat(real)
    return {
        "held_out_pictures_db": float(pictures_db.mean()),
        "worst_db": float(pictures_db.min()),
        "held_out_clips_db": float(real_db.mean()),
    }
