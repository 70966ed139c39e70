"""Why proxies alone gain so little on the model that ships: the error of attention, layer by layer and step by step.

    python gallery/compensation/proxy_errors.py --out proxy_errors.json

One dense run is watched. At some steps each layer's attention is taken apart for a sample of queries, and compared with
what is left of it when 12.5 % of the tiles are seen exactly: nothing else, or a proxy for each other tile, pooled after
the rotary embedding (as visparse does, since it serves attention where that has been applied) or before it and rotated
to the middle of the tile. All errors are relative to the layer's output, behind its output projection.
"""

import argparse
import sys
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ablation_clips import SIZES, Size, calibration_wishes

from visparse.compensation import Proxies
from visparse.compensation.call import Call
from visparse.compensation.choice import select
from visparse.compensation.proxy_table import ProxyTable, proxy_table
from visparse.compensation.tiles import tile_blocks, tiles_for
from visparse.head_search.capture import Calibration, Watch, captured, run_pipeline
from visparse.head_search.lab import Lab, make_lab
from visparse.head_search.rows import Rows, kept_tiles, sample_rows
from visparse.head_search.score import Scorer
from visparse.head_search.work import WorkFile
from visparse.layout import Layout
from visparse.measure.generate import load_pipeline
from visparse.measure.results import Record
from visparse.patterns import Neighborhood, TopK
from visparse_kernels import pool_tokens
from visparse_pipelines import tiny_video_path

TOP = TopK(share=0.125, score="mass_variance")


class Errors(Scorer):
    """Scores the ways to fill in for what is not seen, in the place of candidates.

    Args:
        rotary: cosines and sines of the rotary embedding, [N, D] each.
        window: the fixed pattern beside tiles chosen by content.
    """

    def __init__(self, rotary: tuple[Tensor, Tensor], window: Neighborhood) -> None:
        self.rotary, self.window = rotary, window
        self.known: tuple[Rows, ProxyTable] | None = None

    def forget(self) -> None:
        """Nothing is remembered."""

    def measure(self, key: Hashable, call: Call, layout: Layout) -> None:
        """Nothing is measured."""

    @torch.no_grad()
    def judge(self, key: Hashable, call: Call, layout: Layout, projection: Tensor | None) -> dict[str, Any]:
        """Relative error of the layer's output for each way."""
        if self.known is None:
            tiles = tiles_for(layout, *tile_blocks(call.q.shape[3]), torch.device("cpu"))
            self.known = sample_rows(tiles, 8, 4, 0), proxy_table(tiles, Proxies())
        rows, table = self.known
        lab = make_lab(call, slice(None), rows, table)
        before = replace(lab, proxied=self._pooled_before(call, lab, rows, table))
        n_k = rows.tiles.n_k
        chosen = select(TOP, lab.scores("mass_variance")[None])[0]
        fixed = kept_tiles(rows, self.window).expand(len(lab.v), -1, -1)
        found: dict[str, list[float]] = {}
        for what, kept in (("tiles by mass x variance", chosen), ("window", fixed)):
            shown = kept.view(*lab.mass.shape[:2], 1, n_k)
            ways = {"dropped": replace(lab, proxied=None), "proxies": lab, "proxies before rotation": before}
            for way, one in ways.items():
                error = (lab.dense - one.tiled(shown)[0]) * rows.real[..., None]
                found[f"{what}, {way}"] = [self._size(error, projection) / self._size(lab.dense, projection)]
        found["mass seen by tiles"] = [float((lab.mass.sum(-1) * chosen).sum() / lab.mass.sum())]
        return {"error": found}

    def _pooled_before(self, call: Call, lab: Lab, rows: Rows, table: ProxyTable) -> Any:
        """Proxies whose keys were pooled without their rotation, and rotated to the middle member of their tile."""
        assert lab.proxied is not None
        k = rotate(call.k.float(), self.rotary, -1)
        pooled, _, log_n = pool_tokens(k, call.v.float(), table.members)
        middle = table.members[:, table.members.shape[1] // 2].long()
        at = tuple(part[middle] for part in self.rotary)
        pooled = rotate(pooled, at, 1)
        q = call.q[0].transpose(0, 1).float()[:, rows.tokens.flatten().clamp(min=0)]
        scale = q.shape[-1] ** -0.5
        seen = torch.bmm(q, pooled[0].permute(1, 2, 0)) * scale + log_n[0][:, None]
        lse = (torch.bmm(q, call.k[0].permute(1, 2, 0).float()) * scale).logsumexp(-1, keepdim=True)
        return replace(lab.proxied, weight=(seen - lse).exp().view(lab.proxied.weight.shape))

    @staticmethod
    def _size(x: Tensor, projection: Tensor | None) -> float:
        flat = x.permute(1, 2, 0, 3).flatten(2)  # [T, r, H * D]
        return float((flat if projection is None else flat @ projection.float().T).norm())


def rotate(x: Tensor, rotary: tuple[Tensor, ...], sign: int) -> Tensor:
    """Rotate pairs of channels, x [1, N, H, D], by the angles of each token; sign -1: back."""
    cos, sin = (part[None, :, None, ::2].float() for part in rotary)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - sign * b * sin, sign * a * sin + b * cos], -1).flatten(-2)


def angles(pipe: Any, size: Size) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the model's rotary embedding, [N, D] each."""
    frames, height, width = size.grid
    cos, sin = pipe.transformer.rope(torch.zeros(1, 1, frames, height, width))
    return cos[0, :, 0], torch.stack([sin[0, :, 0, 1::2]] * 2, -1).flatten(-2)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="small", choices=SIZES)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--at", type=int, nargs="+", default=[3, 7, 11], help="steps that are looked at")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    size = SIZES[args.grid]
    pipe, dtype = load_pipeline(tiny_video_path(), device="cpu")
    frames, height, width = size.grid
    window = Neighborhood(window=(frames, max(1, height // 4), width // 2), stride=(1, max(1, height // 4), width // 2))
    scorer = Errors(angles(pipe, size), window)
    work = WorkFile(None, {})
    watch = Watch(Calibration(total=args.steps, judge=frozenset(args.at)), scorer, work)
    wish = calibration_wishes()[0]
    call = {"prompt": wish.prompt, "num_frames": size.num_frames, "height": size.height, "width": size.width}
    with captured(pipe, watch) as routers, torch.no_grad():
        for router in routers:
            router.restart()
        run_pipeline(pipe, {**call, "guidance_scale": 1.0}, args.steps, wish.seed)
    rows = [
        {"step": key[1], "layer": key[4], **{name: round(value[0], 5) for name, value in found["error"].items()}}
        for key, found in sorted(work.scores.items())
    ]
    settings = {"grid": args.grid, "tokens": list(size.grid), "steps": args.steps, "prompt": wish.prompt}
    settings |= {"seed": wish.seed, "dtype": dtype, "block_density": TOP.share, "window": window.to_dict()}
    Record.collect("quality", settings, rows, device="cpu").write(args.out)
    names = [name for name in rows[0] if name not in ("step", "layer")]
    for name in names:
        by_layer = [
            sum(row[name] for row in rows if row["layer"] == layer) / len(args.at)
            for layer in sorted({row["layer"] for row in rows})
        ]
        mean = sum(row[name] for row in rows) / len(rows)
        print(f"{name:45} {mean:6.3f}   by layer: {' '.join(f'{value:.3f}' for value in by_layer)}")


if __name__ == "__main__":
    main()
