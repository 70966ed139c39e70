"""Stage 1: train the autoencoder of the small text-to-video pipeline.

    torchrun --nproc-per-node 1 gallery/training/autoencoder.py --data build/training_data --out build/vae --minutes 20

Writes a stock `AutoencoderKLWan` folder. Pictures under synthetic camera motion, photographs and real clips; the error is
measured on held-out pictures and held-out clip files.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from data import FRAMES, SIDE, Pictures, camera_clips, contact_sheet, psnr, real_clips, schedule
from diffusers import AutoencoderKLWan
from parallel import average_gradients, finish, log, same_clock, setup
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
    """Training clips: three of four from pictures, one of four real."""

    def __init__(self, pictures: Pictures, clips: list[torch.Tensor], generator: torch.Generator) -> None:
        self.pixels, self.clips, self.g = pictures.pixels, clips, generator
        self.train = (~pictures.held_out).nonzero()[:, 0]

    def real(self, frames: int) -> torch.Tensor:
        clip = random.choice(self.clips)
        stride = random.choice((1, 1, 2))
        start = random.randrange(max(1, len(clip) - stride * (frames - 1)))
        index = (start + stride * torch.arange(frames)).clamp_max(len(clip) - 1)
        h, w = clip.shape[2:]
        y, x = random.randrange(h - SIDE + 1), random.randrange(w - SIDE + 1)
        return clip[index, :, y : y + SIDE, x : x + SIDE].float().div(127.5).sub(1).transpose(0, 1)

    def __call__(self, n: int, frames: int) -> torch.Tensor:
        made = n - n // 4
        index = self.train[torch.randint(len(self.train), (made,), generator=self.g, device=self.g.device)]
        motion = torch.randint(7, (made,), generator=self.g, device=self.g.device)
        clips = camera_clips(self.pixels, index, motion, self.g, frames, view=(0.75, 1.15))
        return torch.cat([clips, torch.stack([self.real(frames) for _ in range(n // 4)])])


def loss_of(vae: AutoencoderKLWan, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstruction, its gradients, a little KL; half-size latents must decode to the half-size clip."""
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


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKLWan, pictures: Pictures, clips: list[torch.Tensor], out: Path) -> dict[str, float]:
    """PSNR by the stock encode and decode, over held-out pictures under motion and held-out clip files."""
    g = torch.Generator(pictures.pixels.device).manual_seed(5)
    held = pictures.held_out.nonzero()[:, 0]
    held = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(7))[:96].to(held.device)]
    values, sheet = [], []
    for i in range(0, len(held), 16):
        index = held[i : i + 16]
        x = camera_clips(pictures.pixels, index, torch.arange(len(index), device=index.device) % 7, g)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        values.append(psnr(y, x))
        if i == 0:
            sheet = [[x[j, :, 0], y[j, :, 0], x[j, :, -1], y[j, :, -1]] for j in range(6)]
    real = []
    for clip in clips:
        x = clip[:FRAMES, :, :SIDE, 20 : 20 + SIDE].float().div(127.5).sub(1).transpose(0, 1)[None]
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        real.append(psnr(y, x))
        sheet.append([x[0, :, 0], y[0, :, 0], x[0, :, -1], y[0, :, -1]])
    contact_sheet(sheet, out / "held_out.jpg")
    pictures_db, real_db = torch.cat(values), torch.cat(real)
    return {
        "held_out_pictures_db": float(pictures_db.mean()),
        "worst_db": float(pictures_db.min()),
        "held_out_clips_db": float(real_db.mean()),
    }


def main() -> None:
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
    average = [p.detach().clone() for p in parameters]
    step_loss = loss_of if args.no_compile else torch.compile(loss_of, dynamic=False)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(rank + 1)
    start = warm = time.time()
    step, errors = 0, []
    while True:
        fraction = same_clock((time.time() - start) / (60 * args.minutes), device)
        if fraction >= 1:
            break
        short = fraction < 0.65
        x = batches(args.batch * (2 if short else 1), 9 if short else FRAMES)
        x = x.to(memory_format=torch.channels_last_3d)
        rate = 1.5e-3 * schedule(fraction, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss, error = step_loss(vae, x)
        loss.backward()
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.998, (step + 1) / (step + 10)))
        errors.append(error.detach())
        if step == 5 or step % 100 == 0:
            mean = float(torch.stack(errors).mean())
            rate_text = f"{(time.time() - warm) / len(errors) * 1000:.0f} ms a step"
            log(
                f"step {step} at {fraction:.2f}: PSNR {-10 * torch.tensor(mean / 4).log10():.2f} dB, loss {loss.item():.4f}, {rate_text}"
            )
            errors, warm = [], time.time()
    with torch.no_grad():
        for p, a in zip(parameters, average, strict=True):
            p.copy_(a)
    vae.eval()
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        measured = held_out_psnr(vae, pictures, real_clips(args.data, device, "held_out"), args.out)
        record = {"steps": step, "minutes": args.minutes, "processes": world, "batch": args.batch, **measured}
        log("held out:", json.dumps(record))
        vae.half().save_pretrained(args.out)
        (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    finish()


if __name__ == "__main__":
    main()
