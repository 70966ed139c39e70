"""What does a window cost in quality? PSNR against dense of many plans on the pipeline that ships.

    python gallery/windows.py --json gallery/results/windows_cuda.json

Three prompts, 12 steps, the first `dense_steps` dense. PSNR is the mean over frames of the decoded videos (floats,
before rounding to 8 bits), then over prompts. Beside the plans: dense with fewer steps. Seconds on a GPU;
an hour on a CPU.
"""

import argparse
from pathlib import Path

import torch
from diffusers import WanPipeline

import visparse
from visparse.measure.results import Record
from visparse_pipelines import tiny_video_path

PROMPTS = (
    ("a motorbike, the camera pans left", 0),
    ("a bonsai, the camera zooms out", 1),
    ("an airplane, the camera pans up", 2),
)
STEPS = 12
WINDOWS = (
    ((9, 8, 8), (1, 8, 8)),
    ((9, 8, 16), (1, 8, 16)),
    ((9, 9, 9), (1, 1, 1)),
    ((9, 12, 12), (1, 4, 4)),
    ((9, 16, 8), (1, 8, 8)),
    ((9, 16, 16), (1, 8, 8)),
    ((9, 24, 24), (1, 8, 8)),
    ((5, 16, 16), (1, 8, 8)),
    ((5, 24, 24), (1, 8, 8)),
    ((3, 32, 32), (1, 8, 8)),
)


def choices() -> list[tuple[str, dict]]:
    """Preset and overrides of every plan."""
    near = [("neighborhood", {"window": w, "stride": s, "dense_steps": 3}) for w, s in WINDOWS]
    later = [
        ("neighborhood", {"window": w, "stride": s, "dense_steps": n})
        for w, s in (WINDOWS[3], WINDOWS[5])
        for n in (2, 4, 5)
        if (w, n) != ((9, 12, 12), 5)
    ]
    layers = [
        ("neighborhood", {"window": (9, 12, 12), "stride": (1, 4, 4), "dense_steps": 3, "dense_layers": layers})
        for layers in ([0], [0, 1], [0, 1, 2], [7])
    ]
    radial = [("radial", {"dense_steps": n}) for n in (3, 4, 5)]
    other = [("radial", {"decay": 1.0, "dense_steps": 3}), ("radial", {"dense_steps": 3, "dense_layers": 0})]
    return [*near, *later, *layers, *radial, *other, ("radial", {}), ("neighborhood", {})]


class Bench:
    """The pipeline, and the dense videos."""

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        types = {"default": self.dtype, "vae": torch.float32}
        self.pipe = WanPipeline.from_pretrained(tiny_video_path(), dtype=types).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.dense = [self.video(STEPS, *prompt) for prompt in PROMPTS]

    @torch.no_grad()
    def video(self, steps: int, prompt: str, seed: int) -> torch.Tensor:
        latents = self.pipe(
            prompt,
            height=128,
            width=128,
            num_frames=17,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).frames.float()
        config = self.pipe.vae.config
        mean, std = (
            torch.tensor(v, device=self.device).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        return self.pipe.vae.decode(latents * std + mean).sample

    def psnr(self, steps: int) -> list[float]:
        """PSNR against dense, a prompt at a time, of what the pipeline makes now."""
        videos = [self.video(steps, *prompt) for prompt in PROMPTS]
        errors = [((a - b) / 2).square().mean((0, 1, 3, 4)) for a, b in zip(videos, self.dense, strict=True)]
        return [round(float(-10 * e.log10().mean()), 1) for e in errors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench, rows = Bench(), []
    common = {
        "model": "tiny_video",
        "grid": [9, 32, 32],
        "dtype": str(bench.dtype).removeprefix("torch."),
        "steps": STEPS,
    }
    for steps in range(4, 11):
        values = bench.psnr(steps)
        rows.append({**common, "plan": "fewer-steps", "steps": steps, "psnr": sum(values) / 3, "psnr_prompts": values})
    for plan, overrides in choices():
        with visparse.sparsify(bench.pipe, plan, **overrides) as handle:
            values = bench.psnr(STEPS)
            layers = handle.report().to_dict()["models"][0]["layers"]
        blocks = [1.0 if layer["state"] == "dense" else layer["block_density"] for layer in layers]
        rows.append({**common, "plan": plan, "overrides": overrides, "psnr": sum(values) / 3, "psnr_prompts": values,
                     "block_density": sum(blocks) / len(blocks)})  # fmt: skip
    for row in rows:
        density = f"{row['block_density']:.1%}" if "block_density" in row else ""
        print(
            f"{row['plan']:14}{row['steps']:3} steps  {row['psnr']:5.1f} dB  {density:>6}  {row.get('overrides', '')}"
        )
    if args.json:
        settings = {
            "prompts": [list(p) for p in PROMPTS],
            "block_density": "mean over layers; a dense layer counts as 1",
        }
        Record.collect("quality", settings, rows, device=bench.device).write(args.json)


if __name__ == "__main__":
    main()
