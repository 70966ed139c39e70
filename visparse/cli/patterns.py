"""`visparse patterns`: list them, show one on a grid, compare several."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from visparse.cli.options import positive

if TYPE_CHECKING:
    from visparse.estimates import Estimate
    from visparse.layout import Layout
    from visparse.patterns import Pattern

_COLUMNS = ("pattern", "density", "blocks", "full", "masked", "bound", "time", "order")


def add_parser(commands: Any) -> None:
    """Add the subcommand with its own subcommands."""
    parser = commands.add_parser(
        "patterns",
        help="list the patterns, draw one on a grid with its cost, compare several",
        description="The patterns of visparse: what each keeps, and what it would cost on a grid.",
    )
    kinds = parser.add_subparsers(dest="patterns", metavar="WHAT", required=True)
    kinds.add_parser("list", help="names, parameters with defaults, sources").set_defaults(run=list_patterns)
    show = kinds.add_parser("show", help="the mask, one query's view on the frames, and the estimate")
    show.add_argument("name", metavar="NAME")
    show.add_argument("values", nargs="*", metavar="PARAM=VALUE", help="such as window=3x5x5 or variant=code")
    show.set_defaults(run=show_pattern)
    compare = kinds.add_parser("compare", help="a table and a picture of several patterns")
    compare.add_argument("specs", nargs="+", metavar="NAME[:PARAM=VALUE,...]", help="such as radial:variant=code")
    compare.set_defaults(run=compare_patterns)
    for kind in (show, compare):
        kind.add_argument("--grid", type=triple, required=True, metavar="T,H,W", help="frames, height, width in tokens")
        kind.add_argument(
            "--text", type=int, default=0, metavar="N", help="text tokens in front of the grid (default 0)"
        )
        kind.add_argument("--query", type=triple, metavar="T,H,W", help="whose view is drawn (default: the middle)")
        kind.add_argument("--png", metavar="FILE", help="write the picture here")
        kind.add_argument("--device", default="cpu", help="cpu, a measured GPU such as h200, or cuda (default cpu)")
        kind.add_argument("--head-dim", type=positive, metavar="N", help="default 64 on the CPU, 128 elsewhere")
        kind.add_argument("--heads", type=positive, default=24, metavar="N", help="default 24")
    for kind in kinds.choices.values():
        kind.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        kind.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object and nothing else"
        )


def list_patterns(arguments: argparse.Namespace) -> int:
    """Print every registered pattern."""
    entries = [describe(name) for name in sorted(_registry())]
    if arguments.json:
        print(json.dumps({"schema": 1, "patterns": entries}, indent=2))
        return 0
    width = max(len(entry["name"]) for entry in entries)
    for entry in entries:
        values = ", ".join(_parameter(key, value) for key, value in entry["parameters"].items())
        print(f"{entry['name']:<{width}}  ({values})  {entry['source'] or 'no source'}")
    return 0


def describe(name: str) -> dict[str, Any]:
    """What is known of a registered pattern: `name`, `summary`, `parameters` (None: has to be given), `source`."""
    cls = _registry()[name]
    text = inspect.getdoc(cls) or ""
    source = re.search(r"^Source: (.+?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    defaults = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(cls)
    }
    return {
        "name": name,
        "summary": text.split("\n\n")[0].replace("\n", " "),
        "parameters": {key: None if value is MISSING else value for key, value in defaults.items()},
        "source": " ".join(source[1].split()).rstrip(".") if source else None,
    }


def show_pattern(arguments: argparse.Namespace) -> int:
    """Draw one pattern and say what it costs."""
    from visparse.patterns.draw import parse_field
    from visparse.patterns.draw_pictures import pattern_picture
    from visparse.patterns.draw_views import mask_text, middle, seen_text

    pattern = _build(arguments.name, dict(parse_field(value) for value in arguments.values))
    layout = _layout(arguments)
    query = arguments.query or middle(layout.grid)
    found = _estimate(pattern, layout, arguments)
    if arguments.png:
        pattern_picture(pattern, layout, query, notes=[_headline(found)]).save(arguments.png)
    if arguments.json:
        print(json.dumps({"schema": 1, "pattern": pattern.to_dict(), "estimate": found.to_dict()}, indent=2))
        return 0
    print(pattern)
    print(f"\nmask of the grid, queries down, keys across:\n{mask_text(pattern, layout.grid)}")
    print(f"\nkeys that query {query} sees:\n{seen_text(pattern, layout.grid, query)}\n")
    print(found)
    if arguments.png:
        print(f"picture: {arguments.png}")
    return 0


def compare_patterns(arguments: argparse.Namespace) -> int:
    """Print one table of several patterns, and draw them in one picture."""
    from visparse.patterns.draw_pictures import pattern_picture, stack
    from visparse.patterns.draw_views import middle

    layout = _layout(arguments)
    patterns = {spec: _build(*parse_spec(spec)) for spec in arguments.specs}
    found = {spec: _estimate(pattern, layout, arguments) for spec, pattern in patterns.items()}
    if arguments.png:
        query = arguments.query or middle(layout.grid)
        pictures = [
            pattern_picture(pattern, layout, query, notes=[_headline(found[spec])], size=288)
            for spec, pattern in patterns.items()
        ]
        stack(pictures).save(arguments.png)
    if arguments.json:
        rows = [
            {"spec": spec, "pattern": patterns[spec].to_dict(), "estimate": found[spec].to_dict()} for spec in found
        ]
        print(json.dumps({"schema": 1, "rows": rows}, indent=2))
        return 0
    print(_table(found))
    if arguments.png:
        print(f"picture: {arguments.png}")
    return 0


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Read ``NAME[:PARAM=VALUE,...]``; commas inside of brackets or numbers in a row belong to the value."""
    from visparse.patterns.draw import parse_field

    name, _, rest = text.partition(":")
    parts = re.split(r",(?=[A-Za-z_]\w*=)", rest) if rest else []
    return name, dict(parse_field(part) for part in parts)


def triple(text: str) -> tuple[int, int, int]:
    """Three whole numbers such as 4,8,12."""
    parts = re.split("[,x]", text)
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"wanted FRAMES,HEIGHT,WIDTH such as 21,45,80, got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _registry() -> dict[str, type[Pattern]]:
    from visparse.patterns.registry import PATTERNS

    return PATTERNS


def _build(name: str, values: dict[str, Any]) -> Pattern:
    from visparse.patterns import pattern_from_dict

    return pattern_from_dict({**values, "name": name})


def _layout(arguments: argparse.Namespace) -> Layout:
    from visparse.layout import Layout

    return Layout(arguments.grid, before=arguments.text)


def _estimate(pattern: Pattern, layout: Layout, arguments: argparse.Namespace) -> Estimate:
    from visparse.estimates import estimate

    head_dim = arguments.head_dim or (64 if arguments.device == "cpu" else 128)
    return estimate(pattern, layout, device=arguments.device, head_dim=head_dim, heads=arguments.heads)


def _headline(found: Estimate) -> str:
    bound = "" if found.bound is None else f", at most {found.bound:.2f} times faster"
    return f"density {found.density:.2%}, visited blocks {found.block_density:.2%}{bound}"


def _table(found: dict[str, Estimate]) -> str:
    lines = [_COLUMNS]
    for spec, one in found.items():
        group = one.groups[0]
        time = "not measured" if one.milliseconds is None else f"{one.milliseconds:.3g} ms"
        bound = "-" if one.bound is None else f"{one.bound:.2f}x"
        numbers = f"{one.density:.2%}", f"{one.block_density:.2%}", str(group.full), str(group.masked), bound, time
        lines.append((spec, *numbers, group.order))
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    ends = (0, len(_COLUMNS) - 1)
    text = [
        "  ".join(
            cell.ljust(width) if i in ends else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    one = next(iter(found.values()))
    head = str(one).split("\n")[0]
    dense = "" if one.rate is None else f"dense ({one.rate.dense}) {one.dense_milliseconds:.3g} ms; {one.source}"
    return "\n".join([head, *text, dense or f"time not measured: {one.not_measured}"])


def _parameter(key: str, value: Any) -> str:
    return key if value is None else f"{key}={value}"
