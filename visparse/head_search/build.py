"""Build: the plan that a choice of candidates makes, and its file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visparse.compensation import Proxies
from visparse.head_search.candidates import Candidate, compensations
from visparse.layout import Grid
from visparse.patterns import Dense
from visparse.plan import SparsePlan
from visparse.ranges import Selector
from visparse.rules import ModelFingerprint, Rule
from visparse.templates import PatternTemplate

_DENSE = "dense"


def build_plan(
    name: str,
    picks: Mapping[tuple[int, int, int], Candidate],
    *,
    family: str,
    model: ModelFingerprint,
    grid: Grid,
    dense_steps: int | float,
    refresh: float | int | None,
    notes: str,
    measured: Mapping[str, Any],
    starts: Sequence[int] = (0,),
    proxies: Proxies | None = None,
) -> SparsePlan:
    """Make a plan of what each head does.

    Args:
        name: of the plan.
        picks: (range of steps, layer, head) -> candidate, all of one family; a layer that is missing stays dense.
        family: of the candidates.
        model: fingerprint.
        grid: (frames, height, width) in tokens that the patterns were made for.
        dense_steps: as in `SparsePlan`.
        refresh: as in `candidates.compensations`.
        notes: of the plan.
        measured: of the plan.
        starts: first step of each range.
        proxies: as in `candidates.compensations`.
    """
    by_name = {one.name: one.pattern for one in picks.values()} or {_DENSE: Dense()}
    scored = sorted({layer for _, layer, _ in picks})
    counts = Counter(one.name for one in picks.values())
    default = max(counts, key=lambda key: (counts[key], key)) if counts else _DENSE
    dense_layers = tuple(layer for layer in range(model.layers) if layer not in scored)
    rules: dict[tuple[str, Selector, Selector], list[int]] = {}
    for layer in scored:
        rows = [[picks[number, layer, head].name for head in range(model.heads)] for number in range(len(starts))]
        same = all(row == rows[0] for row in rows)
        for number, row in enumerate(rows[:1] if same else rows):
            steps = "all" if same else _range(starts, number)
            heads: dict[str, list[int]] = {}
            for head, pattern in enumerate(row):
                heads.setdefault(pattern, []).append(head)
            for pattern, own in heads.items():
                if pattern != default:
                    rules.setdefault((pattern, _short(own, model.heads), steps), []).append(layer)
    pooled, residual = compensations(family, refresh, proxies) if counts else (None, None)
    return SparsePlan(
        name=name,
        patterns={key: PatternTemplate(one.to_dict()) for key, one in sorted(by_name.items())},
        default=default,
        assignment=tuple(
            Rule(pattern=pattern, layers=_short(layers, model.layers), heads=heads, steps=steps)
            for (pattern, heads, steps), layers in sorted(rules.items(), key=lambda item: (item[1], item[0][0]))
        ),
        dense_steps=dense_steps,
        dense_layers=dense_layers,
        proxies=pooled,
        residual=residual,
        model=model,
        made_for=grid,
        notes=notes,
        measured=measured,
    )


def _range(starts: Sequence[int], number: int) -> str:
    """A range of steps as a selector."""
    stop = str(starts[number + 1]) if number + 1 < len(starts) else ""
    return f"{starts[number] or ''}:{stop}"


def write_plan(plan: SparsePlan, path: str | Path) -> Path:
    """Write a plan as a small file that people can read: a line for each pattern and each rule.

    Args:
        plan: the plan.
        path: of the file; an earlier one is only replaced by a whole one.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    entries = []
    for key, value in plan.to_dict().items():
        if value and key == "patterns":
            lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in value.items())
            text = f"{{\n{lines}\n }}"
        elif value and key == "assignment":
            lines = ",\n".join(f"  {json.dumps(_rule(rule))}" for rule in value)
            text = f"[\n{lines}\n ]"
        elif value and key == "measured":
            lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in value.items())
            text = f"{{\n{lines}\n }}"
        else:
            text = json.dumps(value)
        entries.append(f" {json.dumps(key)}: {text}")
    waiting = target.with_name(target.name + ".part")
    waiting.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")
    waiting.replace(target)
    return target


def _rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rule.items() if value != "all"}


def _short(numbers: Sequence[int], total: int) -> Selector:
    """Numbers as a selector: all, one, a range or a list."""
    if len(numbers) == total:
        return "all"
    if len(numbers) == 1:
        return numbers[0]
    first, last = numbers[0], numbers[-1]
    return f"{first}:{last + 1}" if len(numbers) == last - first + 1 else tuple(numbers)
