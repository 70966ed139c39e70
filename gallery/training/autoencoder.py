"""Stage 1: train the autoencoder of the small text-to-video pipeline.

    torchrun --nproc-per-node 1 gallery/training/autoencoder.py --data build/training_data --out build/vae --minutes 20

Writes a stock `AutoencoderKLWan` folder. Pictures under synthetic camera motion, photographs and real clips; the error
is measured on held-out pictures and held-out clip files.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from camera import camera_clips
from data import FRAMES, SIDE, Pictures, real_clips
from diffusers import AutoencoderKLWan
from held_out import held_out_psnr
from loop import Meter, schedule, until
from parallel import finish, log, setup
from weights import Weights
from whole_clip import decode, encode

LATENT = 8
CONFIG = dict(
    base_dim=48,
    decoder_base_dim=64,
    z_dim=LATENT,
    dim_mult=[1, 2],
    num_res_blocks=1,
    temperal_downsample=[True],
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_temporal=2,
    scale_factor_spatial=4,
    latents_mean=[0.0] * LATENT,
    latents_std=[1.0] * LATENT,
)


class Batches:
    """Training clips: three of four from pictures, one of four real.

    Args:
        pictures: the held-out ones are left out.
        clips: real ones, each `uint8 [frames, 3, h, w]`.
        generator: of pictures and motions, on their device.
    """

    def __init__(self, pictures: Pictures, clips: list[torch.Tensor], generator: torch.Generator) -> None:
        self.pixels, self.clips, self.g = pictures.pixels, clips, generator
        self.train = (~pictures.held_out).nonzero()[:, 0]

    def real(self, frames: int) -> torch.Tensor:
        """A piece of a real clip, `[3, frames, side, side]` in -1..1, at its own or at double speed."""
        clip = random.choice(self.clips)
        stride = random.choice((1, 1, 2))
        start = random.randrange(max(1, len(clip) - stride * (frames - 1)))
        index = (start + stride * torch.arange(frames)).clamp_max(len(clip) - 1)
        h, w = clip.shape[2:]
        y, x = random.randrange(h - SIDE + 1), random.randrange(w - SIDE + 1)
        return clip[index, :, y : y + SIDE, x : x + SIDE].float().div(127.5).sub(1).transpose(0, 1)

    def __call__(self, n: int, frames: int) -> torch.Tensor:
        """A batch of clips `[n, 3, frames, side, side]` in -1..1."""
        made = n - n // 4
        index = self.train[torch.randint(len(self.train), (made,), generator=self.g, device=self.g.device)]
        motion = torch.randint(7, (made,), generator=self.g, device=self.g.device)
        clips = camera_clips(self.pixels, index, motion, self.g, frames, view=(0.75, 1.15))
        return torch.cat([clips, torch.stack([self.real(frames) for _ in range(n // 4)])])


def loss_of(vae: AutoencoderKLWan, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstruction, its gradients, a little KL; half-size latents must decode to the half-size clip.

    Args:
        vae: encodes and decodes.
        x: clips `[B, 3, F, H, W]` in -1..1.

    Returns:
        The loss, and the mean squared error in it.
    """
    mean, log_var = encode(vae, x).float().chunk(2, 1)
    log_var = log_var.clamp(-20, 10)
    z = mean + (log_var / 2).exp() * torch.randn_like(mean)
    z = z + 0.03 * torch.randn_like(z)
    y = decode(vae, z).float()
    n = max(1, len(x) // 4)
    small_z, small_x = F.avg_pool3d(z[:n], (1, 2, 2)), F.avg_pool3d(x[:n], (1, 2, 2))
    small = F.l1_loss(decode(vae, small_z).float(), small_x)
    edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3, 4))
    kl = 0.5 * (mean.square() + log_var.exp() - log_var - 1).mean()
    first = F.mse_loss(y[:, :, :1], x[:, :, :1])
    error = F.mse_loss(y, x)
    return F.l1_loss(y, x) + 2 * error + 0.5 * first + 0.4 * edges + 0.25 * small + 2e-3 * kl, error


def main() -> None:
    """Train for the minutes given, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/training_data"))
    parser.add_argument("--out", type=Path, default=Path("build/vae"))
    parser.add_argument("--resume", type=Path, help="a folder that an earlier run wrote")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=16, help="clips a process and step")
    parser.add_argument("--limit", type=int, help="use only about so many pictures (trial runs)")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    device, rank, world = setup()
    torch.manual_seed(0)
    random.seed(rank)
    pictures = Pictures(args.data, device, only_classes=False, limit=args.limit)
    batches = Batches(pictures, real_clips(args.data, device, "train"), torch.Generator(device).manual_seed(rank))
    log(f"{len(pictures.kind)} pictures, {len(batches.clips)} clips, {world} processes")
    vae = AutoencoderKLWan.from_pretrained(args.resume) if args.resume else AutoencoderKLWan(**CONFIG)
    vae = vae.float().train().to(device)
    for weight in vae.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.to(memory_format=torch.channels_last_3d)
    log(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=1e-4, fused=device.type == "cuda")
    weights = Weights(parameters, [optimizer], rate=1.5e-3, keep=0.998)
    step_loss = loss_of if args.no_compile else torch.compile(loss_of, dynamic=False)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(rank + 1)
    seconds, meter = 60 * args.minutes, Meter()
    for passed in until(seconds, device):
        fraction = passed / seconds
        short = fraction < 0.65
        x = batches(args.batch * (2 if short else 1), 9 if short else FRAMES)
        x = x.to(memory_format=torch.channels_last_3d)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss, error = step_loss(vae, x)
        weights.step(loss, schedule(fraction, weights.steps))
        meter.add(error)
        if weights.steps == 5 or weights.steps % 100 == 0:
            mean, milliseconds = meter.read()
            log(
                f"step {weights.steps} at {fraction:.2f}: PSNR {-10 * math.log10(mean / 4):.2f} dB, "
                f"loss {loss.item():.4f}, {milliseconds:.0f} ms a step"
            )
    weights.swap_average()
    vae.eval()
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        measured = held_out_psnr(vae, pictures, real_clips(args.data, device, "held_out"), args.out / "held_out.jpg")
        record = {"steps": weights.steps, "minutes": args.minutes, "processes": world, "batch": args.batch, **measured}
        log("held out:", json.dumps(record))
        vae.half().save_pretrained(args.out)
        (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    finish()


if __name__ == "__main__":
    main()
