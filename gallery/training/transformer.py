"""Stage 2: train transformer and text encoder by flow matching, and write the whole stock `WanPipeline` folder.

    torchrun --nproc-per-node 1 gallery/training/transformer.py --vae build/vae --out build/pipeline \\
        --stages 1:600,5:500,9:200,9g:300

A stage `FRAMES:SECONDS` trains on clips of so many latent frames (1: pictures). `g` distils guidance: the target is moved along
(conditional - unconditional) of the averaged weights at the start of that stage, so that the pipeline needs no second pass.
A later call resumes from the state that the first one left in `--out`, or with `--resume` from a pipeline folder.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from data import MOTIONS, NAMES, Pictures, contact_sheet, schedule
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from latents import LatentBank
from parallel import average_gradients, finish, log, same_clock, setup
from text import TEXT_DIM, Captions, build_encoder, build_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import UMT5EncoderModel
from whole_clip import decode

SHIFT = 3.0  # of the noise schedule, in training and sampling
BATCH = {1: 256, 5: 40, 9: 20}  # clips a process and step, by latent frames
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CONFIG = dict(
    patch_size=(1, 1, 1),
    num_attention_heads=4,
    attention_head_dim=64,
    text_dim=TEXT_DIM,
    freq_dim=256,
    ffn_dim=1024,
    num_layers=8,
    cross_attn_norm=True,
    rope_max_seq_len=256,
)


def build_transformer(channels: int) -> WanTransformer3DModel:
    """A new transformer: zero output, small gates."""
    model = WanTransformer3DModel(in_channels=channels, out_channels=channels, **CONFIG)
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
        model.condition_embedder.time_proj.weight.mul_(0.1)
        for block in model.blocks:
            block.scale_shift_table[:, 2::3].fill_(0.3)
            block.attn2.to_out[0].weight.mul_(0.3)
    return model


class Trainer:
    """Model, averaged weights, the two optimizers (Muon for the blocks' matrices, AdamW for the rest), and their state."""

    def __init__(self, model: WanTransformer3DModel, text: UMT5EncoderModel, rate: float) -> None:
        self.model, self.text, self.rate, self.steps = model, text, rate, 0
        named = list(model.named_parameters())
        matrices = [p for n, p in named if n.startswith("blocks") and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in chosen] + list(text.parameters())
        cuda = matrices[0].is_cuda
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=cuda),
        ]
        self.parameters = matrices + rest
        self.average = [p.detach().clone() for p in self.parameters]

    def step(self, loss: torch.Tensor, factor: float) -> torch.Tensor:
        loss.backward()
        average_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        keep = min(0.9985, (self.steps + 1) / (self.steps + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)
        return norm

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange the weights with their averages."""
        for p, a in zip(self.parameters, self.average, strict=True):
            p.data, a.data = a.data, p.data

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "text": self.text.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "steps": self.steps,
        }
        torch.save(state, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.average[0].device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.text.load_state_dict(state["text"])
        for a, b in zip(self.average, state["average"], strict=True):
            a.copy_(b)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps = state["steps"]


def noise_levels(n: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels in (0, 1): half stratified uniform, half logit-normal, then shifted as in sampling."""
    device = generator.device
    u = (torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device)) / n
    middle = torch.sigmoid(torch.randn(n, generator=generator, device=device))
    u = torch.where(torch.rand(n, generator=generator, device=device) < 0.5, u, middle)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def flow_loss(
    trainer: Trainer,
    teacher: WanTransformer3DModel | None,
    captions: Captions,
    batch: tuple[torch.Tensor, torch.Tensor],
    generator: torch.Generator,
    guidance: float,
) -> torch.Tensor:
    x, caption = batch
    n, device = len(x), x.device
    drop = torch.rand(n, generator=generator, device=device) < 0.1
    caption = torch.where(drop, captions.empty, caption)
    sigma = noise_levels(n, generator)
    noise = torch.randn(x.shape, generator=generator, device=device)
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy, target, t = (1 - level) * x + level * noise, noise - x, sigma * 1000
    table = captions.embed(trainer.text)
    if teacher is not None:
        with torch.no_grad():
            both = torch.cat([table[caption], table[torch.full_like(caption, captions.empty)]]).detach()
            given, free = teacher(noisy.repeat(2, 1, 1, 1, 1), t.repeat(2), both, return_dict=False)[0].float().chunk(2)
            strength = guidance * ((sigma > 0.15) & ~drop).float().view(-1, 1, 1, 1, 1)
            target = target + strength * (given - free)
    out = trainer.model(noisy, t, table[caption], return_dict=False)[0]
    return (out.float() - target).square().mean()


@torch.no_grad()
def sample(
    model: WanTransformer3DModel,
    text: torch.Tensor,
    shape: tuple[int, ...],
    steps: int,
    scale: float,
    empty: torch.Tensor,
) -> torch.Tensor:
    """Latents by Euler steps from fixed noise; `scale` 1 means one pass a step."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(11)).to(text.device)
    levels = torch.linspace(1, 0, steps + 1, device=text.device)
    levels = SHIFT * levels / (1 + (SHIFT - 1) * levels)
    x = noise
    for a, b in zip(levels[:-1], levels[1:], strict=True):
        t = (a * 1000).expand(len(x))
        v = model(x, t, text, return_dict=False)[0].float()
        if scale != 1:
            free = model(x, t, empty.expand_as(text), return_dict=False)[0].float()
            v = free + scale * (v - free)
        x = x + (b - a) * v
    return x


def sheet(
    trainer: Trainer, vae: AutoencoderKLWan, captions: Captions, frames: int, guided: bool, steps: int, path: Path
) -> None:
    """Every class, three noises and motions, first, middle and last frame, by the averaged weights."""
    table = captions.embed(trainer.text).detach()
    channels = vae.config.z_dim
    mean = torch.tensor(vae.config.latents_mean, device=table.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std, device=table.device).view(1, -1, 1, 1, 1)
    rows = []
    with (
        torch.no_grad(),
        torch.autocast(table.device.type, dtype=torch.bfloat16),
        sdpa_kernel(BACKENDS, set_priority=True),
    ):
        for j in range(3):
            picks = torch.tensor(
                [k * (len(MOTIONS) + 1) + (k + 2 * j) % len(MOTIONS) for k in range(len(NAMES))], device=table.device
            )
            x = sample(
                trainer.model,
                table[picks],
                (len(NAMES), channels, frames, 32, 32),
                steps,
                1.0 if guided else 3.0,
                table[captions.empty],
            )
            clips = decode(vae, x * std + mean).float()
            last = clips.shape[2] - 1
            rows += [[c[:, f] for c in clips] for f in ((0,) if last == 0 else (0, last // 2, last))]
    contact_sheet(rows, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/training_data"))
    parser.add_argument("--vae", type=Path, default=Path("build/vae"))
    parser.add_argument("--out", type=Path, default=Path("build/pipeline"))
    parser.add_argument("--resume", type=Path, help="a pipeline folder to start from, without optimizer state")
    parser.add_argument("--stages", default="1:600,5:500,9:200,9g:300")
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument(
        "--decay", type=float, default=0.45, help="share of this call's time over which the rate falls; 0: never"
    )
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--bank", type=int, default=16384, help="latents of pictures a process; half as many of clips")
    parser.add_argument("--bank-seconds", type=float, default=25)
    parser.add_argument("--batch-scale", type=float, default=1.0)
    parser.add_argument("--sheet-steps", type=int, default=12, help="sampling steps of the contact sheet")
    parser.add_argument("--limit", type=int, help="use only about so many pictures (trial runs)")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    device, rank, world = setup()
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(100 + rank)
    pictures = Pictures(args.data, device, only_classes=True, limit=args.limit)
    vae = AutoencoderKLWan.from_pretrained(args.vae).float().eval().requires_grad_(False).to(device)
    tokenizer = build_tokenizer()
    captions = Captions(tokenizer, device)
    if args.resume:
        model = WanTransformer3DModel.from_pretrained(args.resume / "transformer").float()
        text = UMT5EncoderModel.from_pretrained(args.resume / "text_encoder").float()
    else:
        model, text = build_transformer(vae.config.z_dim), build_encoder(len(tokenizer))
    trainer = Trainer(model.train().to(device), text.train().to(device), args.rate)
    state = args.out / "state.pt"
    if state.exists() and not args.resume:
        trainer.load(state)
        log(f"resumed after {trainer.steps} steps")
    log(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M + {sum(p.numel() for p in text.parameters()) / 1e6:.2f} M parameters, {len(pictures.kind)} pictures, {world} processes"
    )
    if not args.no_compile:
        torch._dynamo.config.cache_size_limit = 64
        for block in model.blocks:
            block.compile(dynamic=False)
    stages = [
        (int(f.rstrip("g")), f.endswith("g"), float(s))
        for f, s in (stage.split(":") for stage in args.stages.split(","))
    ]
    total, spent, history = sum(s for *_, s in stages), 0.0, []
    bank, bank_frames, teacher, started = None, 0, None, trainer.steps
    for frames, guided, seconds in stages:
        if frames != bank_frames:
            count = args.bank if frames == 1 else args.bank // 2
            bank = LatentBank(vae, pictures, 2 * frames - 1, count, args.bank_seconds, generator)
            if vae.config.latents_std[0] == 1.0:
                stats = torch.stack([bank.latents.mean((0, 2, 3, 4)), bank.latents.std((0, 2, 3, 4))])
                if world > 1:
                    torch.distributed.broadcast(stats, 0)
                vae.register_to_config(
                    latents_mean=[round(v, 5) for v in stats[0].tolist()],
                    latents_std=[round(v, 5) for v in stats[1].tolist()],
                )
            bank.normalise(
                torch.tensor(vae.config.latents_mean, device=device),
                torch.tensor(vae.config.latents_std, device=device),
            )
            bank_frames = frames
            log(
                f"bank of {len(bank.latents)} x {tuple(bank.latents.shape[1:])}; latents std {bank.latents.float().std():.3f}"
            )
        if guided and teacher is None:
            trainer.swap_average()
            teacher = copy.deepcopy(model).eval().requires_grad_(False)
            trainer.swap_average()
        n = max(1, int(BATCH[frames] * args.batch_scale * (0.8 if guided else 1)))
        start, since, losses = time.time(), time.time(), []
        while True:
            within = same_clock(time.time() - start, device)
            if within >= seconds:
                break
            with torch.autocast(device.type, dtype=torch.bfloat16), sdpa_kernel(BACKENDS, set_priority=True):
                loss = flow_loss(
                    trainer, teacher if guided else None, captions, bank(n, generator), generator, args.guidance
                )
            norm = trainer.step(
                loss, schedule((spent + within) / total, trainer.steps - started, decay=args.decay or 1e-9)
            )
            losses.append(loss.detach())
            if trainer.steps % 100 == 0 or len(history) + len(losses) < 3:
                mean = float(torch.stack(losses).mean())
                history.append({"step": trainer.steps, "frames": frames, "guided": guided, "loss": round(mean, 5)})
                log(
                    f"step {trainer.steps} frames {frames}{'g' if guided else ''} x {n}: loss {mean:.4f}, norm {float(norm):.2f}, {(time.time() - since) / len(losses) * 1000:.0f} ms a step"
                )
                since, losses = time.time(), []
        spent += seconds
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        trainer.save(state)
        trainer.swap_average()
        model.eval(), text.eval()
        sheet(trainer, vae, captions, bank_frames, stages[-1][1], args.sheet_steps, args.out / "sheet.jpg")
        record = {
            "steps": trainer.steps,
            "stages": args.stages,
            "processes": world,
            "rate": args.rate,
            "guidance": args.guidance,
            "history": history,
        }
        (args.out / "training.json").write_text(json.dumps(record) + "\n")
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        plain = build_transformer(vae.config.z_dim)
        plain.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in model.state_dict().items()})
        WanPipeline(
            tokenizer=tokenizer,
            text_encoder=text.cpu(),
            vae=vae.half().cpu(),
            scheduler=scheduler,
            transformer=plain.half(),
        ).save_pretrained(args.out / "pipeline")
        log("written", args.out)
    finish()


if __name__ == "__main__":
    main()
