"""The Pareto picture: PSNR against measured time of attention in the run."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from visparse.patterns.draw_pictures import INK, LINE, PAPER, Colour

if TYPE_CHECKING:
    from PIL.Image import Image

SERIES: dict[str, tuple[str, Colour]] = {
    "searched plain": ("searched, plain", (90, 180, 200)),
    "searched foveal": ("searched, foveal", (38, 98, 190)),
    "single": ("best single patterns", (238, 150, 46)),
    "compensated": ("one pattern, proxies and residual", (46, 150, 90)),
    "published": ("Sparse-vDiT's rule", (130, 84, 170)),
    "fewer": ("dense, fewer steps", (90, 96, 106)),
}
_WIDTH, _HEIGHT, _LEFT, _TOP, _LEGEND = 640, 400, 56, 24, 260


def points(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """The points of each series: share of the dense run's attention time, PSNR in dB.

    Args:
        rows: of the record; those without both figures are left out.
    """
    dense = next((row for row in rows if row["plan"] == "dense"), None)
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["plan"] == "fewer-steps" and dense is not None:
            found.setdefault("fewer", []).append((row["steps"] / dense["steps"], row["psnr"]))
        elif row["plan"] == "sparse" and row.get("attention_cost") is not None:
            kind = row["kind"]
            series = f"searched {row['what']}" if kind == "searched" else kind
            found.setdefault(series, []).append((row["attention_cost"], row["psnr"]))
    return {key: sorted(values) for key, values in found.items()}


def pareto_picture(rows: Sequence[Mapping[str, Any]], title: str) -> "Image":
    """Draw the picture.

    Args:
        rows: of the record.
        title: above the picture.

    Raises:
        ValueError: there is no point.
    """
    from PIL import Image, ImageDraw

    series = points(rows)
    every = [point for values in series.values() for point in values]
    if not every:
        raise ValueError("rows: wanted at least one sparse row with times, got none; run more rows")
    right = max(1.0, max(x for x, _ in every))
    low = 5 * int(min(y for _, y in every) // 5)
    high = 5 * int(max(y for _, y in every) // 5 + 1)
    image = Image.new("RGB", (_LEFT + _WIDTH + _LEGEND, _TOP + _HEIGHT + 48), PAPER)
    draw = ImageDraw.Draw(image)

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + _WIDTH * x / right, _TOP + _HEIGHT * (high - y) / (high - low)

    draw.text((_LEFT, 4), title, INK)
    for level in range(low, high + 1, 5):
        draw.line([at(0, level), at(right, level)], LINE)
        draw.text((8, at(0, level)[1] - 6), f"{level} dB", INK)
    for tenth in range(0, int(10 * right) + 1, 2):
        draw.line([at(tenth / 10, low), at(tenth / 10, high)], LINE)
        draw.text((at(tenth / 10, low)[0] - 8, _TOP + _HEIGHT + 4), f"{10 * tenth}%", INK)
    draw.text((_LEFT, _TOP + _HEIGHT + 24), "time of self-attention in the run, of the dense run's", INK)
    for number, (key, (name, colour)) in enumerate(SERIES.items()):
        own = series.get(key, [])
        places = [at(x, y) for x, y in own]
        if len(places) > 1 and key not in ("single", "compensated"):
            draw.line(places, colour, 2)
        for x, y in [*places, (_LEFT + _WIDTH + 20, _TOP + 10 + 22 * number)]:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], colour)
        draw.text((_LEFT + _WIDTH + 32, _TOP + 4 + 22 * number), f"{name} ({len(own)})", INK)
    return image
