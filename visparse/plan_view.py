"""A plan made ready to be looked at: which pattern each head of each layer has, under short ids, and what it costs."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from visparse.plan import SparsePlan
from visparse.ranges import edges
from visparse.rules import ModelFingerprint
from visparse.templates import PatternTemplate

DENSE_ID = "."
_LONGEST_ID = 3  # names of patterns up to here are their own ids
DEFAULT_HEAD_DIM = 64  # of a model of which only layers and heads are known; it decides about block sizes

Cells = tuple[tuple[str | None, ...], ...]


@dataclass(frozen=True, kw_only=True)
class HeadTable:
    """The patterns of all heads over steps at which they stay the same.

    Attributes:
        first: first step.
        stop: the step after the last one; None: to the end.
        cells: layer by head: table name of the pattern; None where the head is dense.
    """

    first: int
    stop: int | None
    cells: Cells

    @property
    def steps(self) -> str:
        """The steps as a plan's rules write them, such as `"0:10"`, or `"all"`."""
        if self.stop is None:
            return f"{self.first}:" if self.first else "all"
        return f"{self.first}:{self.stop}"

    @property
    def words(self) -> str:
        """The steps for people, such as `"steps 0 to 9"`."""
        return steps_text(self.first, self.stop)


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What a plan's `measured` says of a layer.

    Attributes:
        layer: its index.
        error: relative error of its output that was predicted or measured; None where there is none.
        milliseconds: time of a step in it; None where there is none.
    """

    layer: int
    error: float | None
    milliseconds: float | None


@dataclass(frozen=True, kw_only=True)
class PlanView:
    """A plan with its heads laid out: what text and picture of it are made of.

    Attributes:
        plan: the plan.
        shape: layers and heads that it is laid out for; None where nobody said and the plan is for any model.
        tables: in order of steps; empty without a shape. Steps that the schedule makes dense are in them too.
        ids: table name -> id of a few characters, for all patterns that are in the table of patterns or used.
        heads: table name -> number of heads of all layers that have it at the last steps; empty without a shape.
        costs: of the layers, as `measured` has them; may be empty.
    """

    plan: SparsePlan
    shape: ModelFingerprint | None
    tables: tuple[HeadTable, ...]
    ids: Mapping[str, str]
    heads: Mapping[str, int]
    costs: tuple[LayerCost, ...]

    def id_of(self, name: str | None) -> str:
        """Id of a cell."""
        return DENSE_ID if name is None else self.ids[name]

    def pattern(self, name: str) -> PatternTemplate:
        """The pattern of a table name, parts of lists with one per head among them."""
        return self.plan.patterns[name]

    def to_dict(self) -> dict[str, Any]:
        """The view as JSON values."""
        return {
            "plan": self.plan.to_dict(),
            "layers": None if self.shape is None else self.shape.layers,
            "heads": None if self.shape is None else self.shape.heads,
            "ids": dict(self.ids),
            "heads_of_patterns": dict(self.heads),
            "tables": [
                {"steps": one.steps, "ids": [[self.id_of(name) for name in row] for row in one.cells]}
                for one in self.tables
            ],
            "costs": [asdict(cost) for cost in self.costs],
        }


def view_plan(plan: SparsePlan, shape: ModelFingerprint | None) -> PlanView:
    """Lay a plan out.

    Args:
        plan: the plan.
        shape: from `shape_for`.

    Raises:
        ValueError: the plan does not fit the shape.
    """
    tables = () if shape is None else head_tables(plan, shape)
    count = Counter(name for row in tables[-1].cells for name in row if name is not None) if tables else Counter()
    used = dict.fromkeys(name for table in tables for row in table.cells for name in row if name is not None)
    return PlanView(
        plan=plan,
        shape=shape,
        tables=tables,
        ids=_ids(plan, [*plan.patterns, *(name for name in used if name not in plan.patterns)]),
        heads=dict(count),
        costs=layer_costs(plan.measured),
    )


def shape_for(
    plan: SparsePlan,
    *,
    layers: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    model_class: str | None = None,
) -> ModelFingerprint | None:
    """The model that a plan is looked at for: what was asked for, else as the plan's own model has it.

    Args:
        plan: the plan.
        layers, heads, head_dim, model_class: what was asked for; None: the plan's own. A plan for any model has heads
            of 64 then.

    Returns:
        The shape, or None where the plan is for any model and neither layers nor heads were asked for.

    Raises:
        ValueError: only one of layers and heads is known, or the plan does not fit the shape.
    """
    own = plan.model
    if own is None and layers is None and heads is None:
        return None
    if own is not None:
        layers, heads = layers or own.layers, heads or own.heads
    if layers is None or heads is None:
        missing = "--layers" if layers is None else "--heads"
        raise ValueError(f"plan {plan.name!r} is for any model, so layers and heads go together; give {missing} too")
    shape = ModelFingerprint(
        model_class=model_class or (own.model_class if own else "any"),
        layers=layers,
        heads=heads,
        head_dim=head_dim or (own.head_dim if own else DEFAULT_HEAD_DIM),
    )
    plan.check_model(shape)
    return shape


def head_tables(
    plan: SparsePlan, shape: ModelFingerprint, marks: frozenset[int] = frozenset()
) -> tuple[HeadTable, ...]:
    """The patterns of all heads, for each stretch of steps at which no rule begins or ends.

    Args:
        plan: the plan.
        shape: layers and heads.
        marks: steps at which a new table begins in any case; without them tables with equal cells are one.

    Returns:
        At least one table. Only rules and dense layers count: which steps are dense depends on the run.
    """
    firsts = sorted(step_marks(plan) | marks)
    tables: list[HeadTable] = []
    for first, stop in zip(firsts, [*firsts[1:], None], strict=True):
        cells = tuple(_row(plan, layer, shape.heads, first) for layer in range(shape.layers))
        if tables and tables[-1].cells == cells and not marks:
            tables[-1] = HeadTable(first=tables[-1].first, stop=stop, cells=cells)
        else:
            tables.append(HeadTable(first=first, stop=stop, cells=cells))
    return tuple(tables)


def step_marks(plan: SparsePlan) -> frozenset[int]:
    """Steps at which a rule may begin or end; 0 is always one."""
    return frozenset({0}).union(*(edges(rule.steps) for rule in plan.assignment))


def layer_costs(measured: Mapping[str, Any]) -> tuple[LayerCost, ...]:
    """The layers of a plan's `measured`: `{"layers": [{"layer": 0, "error": 0.01, "milliseconds": 2.5}, ...]}`.

    The short form of a search is known too: `{"layers": {"0": [0.01, 2.5], ...}}`.

    Returns:
        In order of layers; empty where `measured`, which is free JSON, has no such list.
    """
    entries = measured.get("layers")
    if isinstance(entries, Mapping):
        pairs = [(key, value) for key, value in entries.items() if key.isdigit() and _is_pair(value)]
        short = [{"layer": int(key), "error": value[0], "milliseconds": value[1]} for key, value in pairs]
        entries = short if len(short) == len(entries) else None
    if not isinstance(entries, (list, tuple)) or not all(_is_cost(entry) for entry in entries):
        return ()
    costs = [
        LayerCost(layer=entry["layer"], error=entry.get("error"), milliseconds=entry.get("milliseconds"))
        for entry in entries
    ]
    return tuple(sorted(costs, key=lambda cost: cost.layer))


def steps_text(first: int, stop: int | None) -> str:
    """Steps from `first` up to, without, `stop` (None: to the end) in words."""
    if stop is None:
        return f"steps from {first} on" if first else "all steps"
    return f"steps {first} to {stop - 1}" if stop > first + 1 else f"step {first}"


def _row(plan: SparsePlan, layer: int, heads: int, step: int) -> tuple[str | None, ...]:
    names = plan.names(layer, heads, step) or (None,) * heads
    return tuple(None if name is None or plan.patterns[name].is_dense else name for name in names)


def _ids(plan: SparsePlan, names: list[str]) -> dict[str, str]:
    sparse = [name for name in names if not plan.patterns[name].is_dense]
    own = all(len(name) <= _LONGEST_ID and name.isprintable() and not set(name) & {DENSE_ID, " "} for name in sparse)
    count = len(string.ascii_letters)
    short = [string.ascii_letters[i % count] + (str(i // count) if i >= count else "") for i in range(len(sparse))]
    ids = dict(zip(sparse, sparse if own else short, strict=True))
    return {name: ids.get(name, DENSE_ID) for name in names}


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2


def _is_cost(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or type(entry.get("layer")) is not int:
        return False
    numbers = [entry.get(key) for key in ("error", "milliseconds")]
    return all(n is None or (type(n) in (int, float) and math.isfinite(n) and n >= 0) for n in numbers)
