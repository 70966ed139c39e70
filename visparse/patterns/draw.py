"""Draw the mask of a pattern: ``python -m visparse.patterns.radial variant=code block=8 --out mask.png``."""

import argparse
import json
import re
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from visparse.layout import Grid, Layout
from visparse.patterns.base import Pattern
from visparse.patterns.draw_pictures import pattern_picture
from visparse.patterns.draw_views import middle
from visparse.patterns.registry import pattern_from_dict

_MOST = 4096  # tokens that can be drawn; the mask is their square


def mask(pattern: Pattern, grid: Grid) -> Tensor:
    """Return the whole mask of a small grid.

    Args:
        pattern: what to draw.
        grid: (frames, height, width), in tokens.

    Returns:
        bool [tokens, tokens], query by key, in row-major order.

    Raises:
        ValueError: the grid is too large to draw, or the pattern does not fit it.
    """
    if prod(grid) > _MOST:
        raise ValueError(f"grid: {prod(grid)} tokens are too many to draw, at most {_MOST}; give a smaller grid")
    at = Layout(grid).coordinates()
    return pattern.keep(at, at, grid)


def text(pattern: Pattern, grid: Grid) -> str:
    """Draw the mask as half-block characters, two queries a line.

    Args:
        pattern: what to draw.
        grid: (frames, height, width), in tokens.

    Returns:
        Lines without a final line break.
    """
    rows = mask(pattern, grid).tolist()
    rows += [[False] * len(rows)] * (len(rows) % 2)
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return "\n".join("".join(" ▄▀█"[2 * up + down] for up, down in zip(*pair, strict=True)) for pair in pairs)


def main(name: str, argv: list[str] | None = None, **defaults: Any) -> None:
    """Draw one pattern from the command line.

    Args:
        name: name of the pattern.
        argv: arguments; None takes those of the process.
        **defaults: values of its fields where the command line gives none.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m visparse.patterns.{name}", description=f"Draw the mask of {name!r}: queries down, keys across."
    )
    parser.add_argument("fields", nargs="*", metavar="FIELD=VALUE", help="for example window=[2,3,3] or variant=code")
    parser.add_argument("--grid", nargs=3, type=int, default=(4, 4, 6), metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--out", type=Path, help="write a picture here (.png); without it, draw in the terminal")
    args = parser.parse_args(argv)
    try:
        grid = Layout(tuple(args.grid)).grid
        pattern = pattern_from_dict(defaults | dict(parse_field(field) for field in args.fields) | {"name": name})
        said = f"density {mask(pattern, grid).float().mean().item():.1%}"
        if args.out:
            pattern_picture(pattern, Layout(grid), middle(grid), notes=[said]).save(args.out)
        else:
            print(text(pattern, grid))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    print(f"{pattern} on {grid}: {said}")


def parse_field(text: str) -> tuple[str, Any]:
    """Read ``FIELD=VALUE``; the value is JSON, lengths such as ``3x5x5`` or ``3,5,5``, or text.

    Raises:
        ValueError: there is no ``=`` in it.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{text}: wanted FIELD=VALUE, for example window=3 or window=3x5x5")
    lengths = re.split("[x,]", value)
    if len(lengths) > 1 and all(length.isdigit() for length in lengths):
        return key, [int(length) for length in lengths]
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
