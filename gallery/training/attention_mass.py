"""How concentrated is the trained attention? Per layer and head, the share of keys that hold 95 % of a row's mass.

    python gallery/training/attention_mass.py --out gallery/results/training/attention_mass.json

Runs the pipeline that ships with stock attention and looks at a sample of query rows at several steps.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from torch.overrides import TorchFunctionMode

from visparse.measure import Record
from visparse_pipelines import tiny_video_path

ATTENTION = torch.nn.functional.scaled_dot_product_attention
MASS = 0.95
TOKENS = 9 * 32 * 32  # of 17 frames of 128 x 128 pixels


class Watch(TorchFunctionMode):
    """Collects, for every call of self-attention, the share of keys that hold `MASS` of sampled rows, per head."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.shares: list[torch.Tensor] = []

    def share(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Mean share `[H]` over sampled rows, of `q` and `k` `[1, H, S, D]`."""
        n = q.shape[-2]
        picks = torch.randperm(n, generator=torch.Generator().manual_seed(len(self.shares)))[: self.rows]
        logits = q[0, :, picks.to(q.device)].float() @ k[0].float().transpose(-1, -2) * q.shape[-1] ** -0.5
        mass = logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
        return ((mass < MASS).sum(-1) + 1).float().div(n).mean(-1).cpu()

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the attention's inputs, then call it."""
        kwargs = kwargs or {}
        if function is ATTENTION:
            q, k = (kwargs[name] if name in kwargs else args[i] for i, name in enumerate(("query", "key")))
            if q.shape[-2] == k.shape[-2] == TOKENS:  # the denoiser's self-attention, not the text encoder's
                self.shares.append(self.share(q, k))
        return function(*args, **kwargs)


def main() -> None:
    """Run the pipeline, print the table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a motorbike, the camera pans left")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = WanPipeline.from_pretrained(tiny_video_path()).to(device)
    pipe.set_progress_bar_config(disable=True)
    layers = pipe.transformer.config.num_layers
    with torch.no_grad(), Watch(args.rows) as watch:
        pipe(
            args.prompt,
            height=128,
            width=128,
            num_frames=17,
            num_inference_steps=args.steps,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(args.seed),
            output_type="latent",
        )
    shares = torch.stack(watch.shares).view(args.steps, layers, -1)
    rows = [
        {
            "layer": layer,
            "head": head,
            "share": round(float(shares[:, layer, head].mean()), 4),
            "first_step": round(float(shares[0, layer, head]), 4),
            "last_step": round(float(shares[-1, layer, head]), 4),
        }
        for layer in range(layers)
        for head in range(shares.shape[2])
    ]
    print(f"share of {TOKENS} keys that hold {MASS:.0%} of a row's mass, mean over {args.steps} steps")
    for layer in range(layers):
        print(f"layer {layer}: " + "  ".join(f"{float(v):6.1%}" for v in shares[:, layer].mean(0)))
    values = shares.mean(0).flatten()
    print(f"least {values.min():.1%}, median {values.median():.1%}, most {values.max():.1%}")
    if args.out:
        settings = {"prompt": args.prompt, "steps": args.steps, "rows": args.rows, "seed": args.seed, "mass": MASS}
        Record.collect("quality", {**settings, "dtype": "float32"}, rows, device=device).write(args.out)


if __name__ == "__main__":
    main()
