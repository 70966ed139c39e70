"""What do dropping and compensating cost on trained attention? Errors of every layer and head of a saliency ViT.

    python gallery/saliency_vit/study.py --photos FOLDER --out gallery/results/saliency_vit.json

The first run downloads the weights with pip (90 MB, MIT; see weights.py). Pictures are cut to the square in their
middle and scaled to 784 px: 56 x 56 tokens and a class token, in 7 x 7 tiles of 8 x 8. The committed result used the
first 8 of the 13 photographs of Debian's package lomiri-wallpapers-16.04. 6 to 7 minutes on two idle cores, 5 GB
for each process.

The error is |out - dense| / |dense| of the output of attention, before its projection, over all heads of a layer; mean
over 12 layers, then over photographs. Maps: all layers sparse, the saliency map against that of the dense model.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cells import PROXIES, STUDY, Cell, outputs
from kept import SAMPLE
from layer import Layer, tiles_of
from maps import PLANS, compare, floor_map, sparse_map
from tables import errors_table, maps_table, rows_of
from torch import Tensor
from vit import PATCH, SaliencyViT, read_picture
from weights import PACKAGE, SHA256, fetch, load

from visparse.measure.results import Record

SIDE = 784
SUFFIXES = (".webp", ".jpg", ".jpeg", ".png")


class Studied(NamedTuple):
    """What one photograph gave.

    Attributes:
        errors: cell -> [layers, 2, heads], squared norms of differences and of dense outputs.
        maps: cell, or None for the floor -> PSNR and correlation of the saliency map.
    """

    errors: dict[Cell, Tensor]
    maps: dict[Cell | None, dict[str, Any]]


def study(photo: Path) -> Studied:
    """Run everything on one photograph."""
    torch.set_num_threads(1)  # photographs are shared out to processes
    model, tiles = SaliencyViT(*load(fetch()), SIDE), tiles_of((1, SIDE // PATCH, SIDE // PATCH))
    picture, layers = read_picture(photo, SIDE), []

    def dense(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers.append(Layer(tiles, q, k, v))
        return layers[-1].dense[0]

    wanted = model(picture, dense)
    errors: dict[Cell, list[Tensor]] = {}
    for layer in layers:
        for cell, out in outputs(layer):
            errors.setdefault(cell, []).append(layer.errors(out).double())
    maps: dict[Cell | None, dict[str, Any]] = {None: compare(floor_map(model, picture), wanted)}
    maps |= {plan: compare(sparse_map(model, tiles, picture, plan), wanted) for plan in PLANS}
    return Studied({cell: torch.stack(parts) for cell, parts in errors.items()}, maps)


def find_photos(folder: Path, limit: int) -> list[Path]:
    """Return the first pictures of a folder by name.

    Raises:
        ValueError: there are not enough.
    """
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not 1 <= limit <= len(found):
        raise ValueError(
            f"limit: wanted 1 to the {len(found)} pictures ({', '.join(SUFFIXES)}) of {folder}, got {limit}"
        )
    return found[:limit]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--limit", type=int, default=8, help="how many of them (8)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, one core each (all cores)")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args(arguments)
    photos = find_photos(args.photos, args.limit)
    fetch()
    with ProcessPoolExecutor(args.workers) as pool:
        results = list(pool.map(study, photos))
    rows = rows_of([result.errors for result in results], [result.maps for result in results])
    print(errors_table(rows), maps_table(rows), sep="\n")
    if args.out:
        settings = {
            "weights": {"package": PACKAGE, "sha256": SHA256},
            "photos": [photo.name for photo in photos],
            "picture": f"largest square in the middle, scaled to {SIDE} px",
            "tiles": "7 x 7 of 8 x 8 tokens; the class token is always seen and sees everything",
            "cells": {str(count): list(map(list, cell)) for count, cell in STUDY.items()},
            "proxies": {name: proxies.to_dict() for name, proxies in PROXIES.items()},
            "sample": SAMPLE,
            "attention_error": "|out - dense| / |dense| before the projection; mean over layers, then photographs",
            "spread": "standard deviation over photographs",
            "head_rms": "root mean square over heads of the error of each head",
        }
        Record.collect("quality", settings, rows).write(args.out)


if __name__ == "__main__":
    main()
