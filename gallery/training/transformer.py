"""Stage 2: train transformer and text encoder by flow matching, and write the whole stock `WanPipeline` folder.

    torchrun --nproc-per-node 1 gallery/training/transformer.py --vae build/vae --out build/pipeline \\
        --stages 1:600,5:500,9:200,9g:300

A stage `FRAMES:SECONDS` trains on clips of so many latent frames (1: pictures). `g` distils guidance: the target is
moved along (conditional - unconditional) of the averaged weights at the start of the first such stage, so that the
pipeline needs no second pass. A later call resumes from the state that the first one left in `--out`, or with
`--resume` from a pipeline folder. Give it that pipeline's autoencoder, `--vae build/pipeline/pipeline/vae`: its
configuration holds the statistics of the latents that the weights were trained on. Those of `build/vae` are measured.
"""

import argparse
import json
from pathlib import Path

import torch
from data import Pictures
from denoiser import BACKENDS, build_transformer
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from flow import SHIFT, flow_loss
from latents import LatentBank
from loop import Meter, schedule, until
from parallel import finish, log, setup
from sampling import sheet
from stages import Stage, parse_stages
from text import Captions, build_encoder, build_tokenizer
from torch.nn.attention import sdpa_kernel
from trainer import Trainer
from transformers import UMT5EncoderModel

BATCH = {1: 256, 5: 40, 9: 20}  # clips a process and step, by latent frames


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("build/training_data"))
    add("--vae", type=Path, default=Path("build/vae"))
    add("--out", type=Path, default=Path("build/pipeline"))
    add("--resume", type=Path, help="a pipeline folder to start from, without optimizer state")
    add("--stages", default="1:600,5:500,9:200,9g:300")
    add("--rate", type=float, default=1.5e-3)
    add("--decay", type=float, default=0.45, help="share of this call's time over which the rate falls; 0: never")
    add("--guidance", type=float, default=2.0)
    add("--bank", type=int, default=16384, help="latents of pictures a process; half as many of clips")
    add("--bank-seconds", type=float, default=25)
    add("--batch-scale", type=float, default=1.0)
    add("--sheet-steps", type=int, default=12, help="sampling steps of the contact sheet")
    add("--limit", type=int, help="use only about so many pictures (trial runs)")
    add("--no-compile", action="store_true")
    return parser.parse_args()


class Run:
    """One call: what it trains, and its log.

    Args:
        args: the command line.
        device: of this process.
        generator: of this process, on that device.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, generator: torch.Generator) -> None:
        self.args, self.device, self.generator = args, device, generator
        self.stages = parse_stages(args.stages)
        self.seconds = sum(stage.seconds for stage in self.stages)
        self.pictures = Pictures(args.data, device, only_classes=True, limit=args.limit)
        self.vae = AutoencoderKLWan.from_pretrained(args.vae).float().eval().requires_grad_(False).to(device)
        self.tokenizer = build_tokenizer()
        self.captions = Captions(self.tokenizer, device)
        if args.resume:
            model = WanTransformer3DModel.from_pretrained(args.resume / "transformer").float()
            text = UMT5EncoderModel.from_pretrained(args.resume / "text_encoder").float()
        else:
            model, text = build_transformer(self.vae.config.z_dim), build_encoder(len(self.tokenizer))
        self.trainer = Trainer(model.train().to(device), text.train().to(device), args.rate)
        if (args.out / "state.pt").exists() and not args.resume:
            self.trainer.load(args.out / "state.pt")
            log(f"resumed after {self.trainer.steps} steps")
        if not args.no_compile:
            torch._dynamo.config.cache_size_limit = 64
            for block in model.blocks:
                block.compile(dynamic=False)
        self.started = self.trainer.steps
        self.history: list[dict[str, float]] = []

    def fill_bank(self, frames: int) -> LatentBank:
        """Normalised latents of so many frames; the first bank of all sets the statistics of the autoencoder."""
        count = self.args.bank if frames == 1 else self.args.bank // 2
        bank = LatentBank(self.vae, self.pictures, 2 * frames - 1, count, self.args.bank_seconds, self.generator)
        if self.vae.config.latents_std[0] == 1.0:
            mean, std = bank.statistics()
            self.vae.register_to_config(latents_mean=mean, latents_std=std)
        bank.normalise(self.vae.config.latents_mean, self.vae.config.latents_std)
        shape = tuple(bank.latents.shape[1:])
        log(f"bank of {len(bank.latents)} x {shape}; latents std {bank.latents.float().std():.3f}")
        return bank

    def train(self, stage: Stage, bank: LatentBank, teacher: WanTransformer3DModel | None, spent: float) -> None:
        """One stage; the stages before it took `spent` seconds of this call's time."""
        args, trainer = self.args, self.trainer
        n = max(1, int(BATCH[stage.frames] * args.batch_scale * (0.8 if stage.guided else 1)))
        meter = Meter()
        for passed in until(stage.seconds, self.device):
            with torch.autocast(self.device.type, dtype=torch.bfloat16), sdpa_kernel(BACKENDS, set_priority=True):
                batch = bank(n, self.generator)
                loss = flow_loss(trainer, teacher, self.captions, batch, self.generator, args.guidance)
            done, fraction = trainer.steps - self.started, (spent + passed) / self.seconds
            norm = trainer.step(loss, schedule(fraction, done, decay=args.decay or 1e-9))
            meter.add(loss)
            if trainer.steps % 100 == 0 or done < 2:
                mean, milliseconds = meter.read()
                entry = {"step": trainer.steps, "frames": stage.frames, "guided": stage.guided, "loss": round(mean, 5)}
                self.history.append(entry)
                log(
                    f"step {trainer.steps} frames {stage.frames}{'g' if stage.guided else ''} x {n}: "
                    f"loss {mean:.4f}, norm {float(norm):.2f}, {milliseconds:.0f} ms a step"
                )

    def write(self, world: int) -> None:
        """State, contact sheet, log and the pipeline folder with the averaged weights; the run ends with it."""
        args, trainer, vae, last = self.args, self.trainer, self.vae, self.stages[-1]
        args.out.mkdir(parents=True, exist_ok=True)
        trainer.save(args.out / "state.pt")
        trainer.swap_average()
        trainer.model.eval()
        trainer.text.eval()
        scale = 1.0 if last.guided else 3.0
        sheet(trainer, vae, self.captions, last.frames, scale, args.sheet_steps, args.out / "sheet.jpg")
        record = {
            "steps": trainer.steps,
            "stages": args.stages,
            "processes": world,
            "rate": args.rate,
            "guidance": args.guidance,
            "history": self.history,
        }
        (args.out / "training.json").write_text(json.dumps(record) + "\n")
        plain = build_transformer(vae.config.z_dim)  # not compiled, and its configuration names no folder
        plain.load_state_dict(trainer.model.state_dict())
        WanPipeline(
            tokenizer=self.tokenizer,
            text_encoder=trainer.text.cpu(),
            vae=vae.half().cpu(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            transformer=plain.half(),
        ).save_pretrained(args.out / "pipeline")
        log("written", args.out)


def main() -> None:
    """Run the stages one after the other, then write."""
    args = parse_arguments()
    device, rank, world = setup()
    torch.manual_seed(0)
    run = Run(args, device, torch.Generator(device).manual_seed(100 + rank))
    sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (run.trainer.model, run.trainer.text)]
    pictures = len(run.pictures.kind)
    log(f"{sizes[0]:.2f} M + {sizes[1]:.2f} M parameters, {pictures} pictures, {world} processes")
    bank, bank_frames, teacher, spent = None, 0, None, 0.0
    for stage in run.stages:
        if bank is None or stage.frames != bank_frames:
            bank, bank_frames = run.fill_bank(stage.frames), stage.frames
        if stage.guided and teacher is None:
            teacher = run.trainer.averaged_model()
        run.train(stage, bank, teacher if stage.guided else None, spent)
        spent += stage.seconds
    if rank == 0:
        run.write(world)
    finish()


if __name__ == "__main__":
    main()
