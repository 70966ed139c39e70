"""The plan: which pattern serves which layer, head and step. JSON, schema 1."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from visparse.compensation import Proxies, ReuseResidual, ReuseStatistics
from visparse.compensation.refresh import parse_refresh
from visparse.errors import check_keys, nearest
from visparse.plan_steps import PlanSteps
from visparse.ranges import largest, parse_selector, selects
from visparse.rules import ModelFingerprint, Rule
from visparse.schedule import DenseSteps, Sigmas
from visparse.templates import PatternTable, PatternTemplate

SCHEMA = 1
FILE_NAME = "visparse_plan.json"
COMPENSATIONS: dict[str, Any] = {"proxies": Proxies, "statistics": ReuseStatistics, "residual": ReuseResidual}
_SCHEDULE = ("dense_steps", "dense_layers", *COMPENSATIONS)


@dataclass(frozen=True, kw_only=True)
class SparsePlan(PlanSteps):
    """Which pattern serves which layer, head and step, and what stays dense.

    Attributes:
        name: short name, shown in reports.
        patterns: table name -> pattern: a `PatternTemplate`, a `Pattern` or its JSON form; templates once built.
            Lengths may be percentages of the grid, see `visparse.templates`. `PerHead`, or its JSON form, is a list
            with one pattern for each of a layer's heads.
        default: table name of the pattern where no rule matches.
        assignment: rules, or their JSON form; where several match, the last one wins.
        dense_steps: an int: that many steps at the start of each run are dense. A float in [0, 1): that share of the
            run's steps, rounded to the nearest whole step (half up). A `DenseSteps`, or its JSON form: those at the
            start, at the end, every n-th, or down to a noise level.
        dense_layers: an int: that many layers from the first are dense. A tuple: these layers. `"a:b"`: this range.
        proxies, statistics, residual: what stands in for the keys that a query does not see, or its JSON form; None:
            nothing. They go with every pattern, and with each other; see `visparse.compensation`.
        model: the model that the plan was made for; None: any.
        grids: grids (frames, height, width) in tokens that the plan is for; None: any. On other grids all runs dense.
        made_for: grid (frames, height, width) in tokens that lengths in tokens were chosen for. On any other grid each
            pattern is taken there by its own `Pattern.rescale`; percentages are of the grid at hand in either case.
            None: lengths in tokens are the same on all grids.
        notes: free text.
        measured: free JSON: what was measured, on what device, with which versions.
    """

    name: str
    patterns: Mapping[str, PatternTemplate]
    default: str
    assignment: tuple[Rule, ...] = ()
    dense_steps: int | float | DenseSteps = 0
    dense_layers: int | str | tuple[int, ...] = 0
    proxies: Proxies | None = None
    statistics: ReuseStatistics | None = None
    residual: ReuseResidual | None = None
    model: ModelFingerprint | None = None
    grids: tuple[tuple[int, int, int], ...] | None = None
    made_for: tuple[int, int, int] | None = None
    notes: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field."""
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"plan: name must be a non-empty string, got {self.name!r}")
        if not _object(self.patterns, "plan: patterns"):
            raise ValueError("plan: patterns is empty; give at least one pattern")
        if self.made_for is not None:
            object.__setattr__(self, "made_for", _grid(self.made_for, "made_for"))
        table = PatternTable()
        for name, pattern in self.patterns.items():
            table[name] = PatternTemplate.from_dict(pattern, f"plan: pattern {name!r}", self.made_for)
        for name in table:
            mix = name.rpartition("[")[0]
            if name.endswith("]") and mix in table and table[mix].per_head:
                raise ValueError(f"plan: pattern {name!r} has the name of a part of {mix!r}; give it another name")
        object.__setattr__(self, "patterns", table)
        rules = [Rule.from_dict(rule, f"plan: rule {i}") for i, rule in enumerate(_list(self.assignment, "assignment"))]
        object.__setattr__(self, "assignment", tuple(rules))
        for used in (self.default, *(rule.pattern for rule in rules)):
            if not isinstance(used, str) or used not in table:
                raise ValueError(
                    f"plan: there is no pattern {used!r} in its table of patterns{nearest(str(used), table)} "
                    f"(known: {', '.join(table)})"
                )
        if not isinstance(self.notes, str):
            raise ValueError(f"plan: notes must be text, got {self.notes!r}")
        _object(self.measured, "plan: measured")
        steps = DenseSteps.from_value(self.dense_steps)
        if not isinstance(self.dense_steps, (int, float)):
            object.__setattr__(self, "dense_steps", steps)
        if isinstance(self.dense_layers, int) and not isinstance(self.dense_layers, bool) and self.dense_layers >= 0:
            layers: Any = self.dense_layers
        elif isinstance(self.dense_layers, (list, tuple)) and not self.dense_layers:
            layers = 0
        else:
            layers = parse_selector(self.dense_layers, "plan: dense_layers")
        object.__setattr__(self, "dense_layers", layers)
        if self.grids is not None:
            object.__setattr__(self, "grids", tuple(_grid(grid, "a grid") for grid in _list(self.grids, "grids")))
        for key, kind in COMPENSATIONS.items():
            if getattr(self, key) is not None:
                object.__setattr__(self, key, kind.from_dict(getattr(self, key), f"plan: {key}"))
        self._check_schedule()

    # ---- what a layer does -------------------------------------------------------------------------------------------

    def is_dense_layer(self, layer: int) -> bool:
        """Whether a layer is dense at all steps, by `dense_layers`."""
        if isinstance(self.dense_layers, int):
            return layer < self.dense_layers
        return selects(self.dense_layers, layer)

    def names(self, layer: int, heads: int, stage: int) -> tuple[str, ...] | None:
        """Table names of the patterns of one layer's heads; None where the whole layer is dense.

        Args:
            layer: index of the layer.
            heads: number of heads.
            stage: from `stage`.

        Returns:
            One name per head, or None: a dense step, a dense layer, or the dense pattern for every head. `"mix[2]"` is
            the third pattern of `mix`, a list with one per head; `patterns` knows that name too.

        Raises:
            ValueError: a list with one pattern per head has not one for each.
        """
        if stage < 0 or self.is_dense_layer(layer):
            return None
        names = [self.default] * heads
        for rule in self.assignment:
            if selects(rule.layers, layer) and selects(rule.steps, stage):
                names = [rule.pattern if selects(rule.heads, head) else name for head, name in enumerate(names)]
        for mix in {name for name in names if self.patterns[name].per_head}:
            places = self.patterns[mix].places(heads)
            names = [f"{mix}[{places[head]}]" if name == mix else name for head, name in enumerate(names)]
        return None if all(self.patterns[name].is_dense for name in names) else tuple(names)

    def check_model(self, model: ModelFingerprint) -> None:
        """Refuse a model that the plan does not fit.

        Args:
            model: fingerprint of the model at hand.

        Raises:
            ValueError: names the first difference, the rule that names a layer or head that the model lacks, or the
                list that has not one pattern per head.
        """
        if self.model is not None:
            self.model.check(model)
        for name, template in self.patterns.items():
            if template.per_head:
                try:
                    template.places(model.heads)
                except ValueError as error:
                    raise ValueError(f"plan: pattern {name!r}: {error}") from None
        for index, rule in enumerate(self.assignment):
            for what, have in (("layers", model.layers), ("heads", model.heads)):
                top = largest(getattr(rule, what))
                if top >= have:
                    raise ValueError(
                        f"plan: rule {index} names {what[:-1]} {top}, this model has {have} {what} (0 to {have - 1})"
                    )
        top = self.dense_layers - 1 if isinstance(self.dense_layers, int) else largest(self.dense_layers)
        if top >= model.layers:
            raise ValueError(
                f"plan: dense_layers reaches layer {top}, this model has {model.layers} layers "
                f"(0 to {model.layers - 1})"
            )

    def check_grid(
        self, model: ModelFingerprint, grid: tuple[int, int, int], total: int | None, sigmas: Sigmas | None = None
    ) -> None:
        """Refuse a grid that a pattern does not fit, before the first dense step is paid for.

        Args:
            model: fingerprint of the model at hand.
            grid: (frames, height, width), in tokens.
            total: number of steps of the run, None while unknown.
            sigmas: noise level of each step, None while unknown.

        Raises:
            ValueError: a pattern that some layer uses at some step does not fit; the text says how.
        """
        stages = self._marks(total, sigmas)
        uses = [self.names(layer, model.heads, stage) for layer in range(model.layers) for stage in stages]
        for name in sorted({name for names in uses if names is not None for name in names}):
            self.patterns[name].check(grid)

    # ---- JSON --------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values; `from_dict` gives back an equal plan."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "model": None if self.model is None else vars(self.model).copy(),
            "grids": None if self.grids is None else [list(grid) for grid in self.grids],
            "made_for": _json(self.made_for),
            "patterns": {name: template.to_dict() for name, template in self.patterns.items()},
            "default": self.default,
            "assignment": [{key: _json(value) for key, value in vars(rule).items()} for rule in self.assignment],
            "dense_steps": _json(self.dense_steps),
            "dense_layers": _json(self.dense_layers),
            **{key: _json(getattr(self, key)) for key in COMPENSATIONS},
            "notes": self.notes,
            "measured": json.loads(json.dumps(dict(self.measured))),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsePlan:
        """Read a plan from JSON values.

        Args:
            data: as `to_dict` writes it; all keys but `schema`, `name`, `patterns` and `default` may be left out.

        Raises:
            ValueError: wrong schema, an unknown or missing key, or a value that does not fit.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a plan must be a JSON object, got {type(data).__name__}")
        if type(data.get("schema")) is not int or data["schema"] != SCHEMA:
            raise ValueError(
                f"plan: schema must be {SCHEMA}, got {data.get('schema')!r}; this visparse reads schema {SCHEMA} only"
            )
        fields = {key: value for key, value in data.items() if key != "schema"}
        check_keys(fields, cls.__dataclass_fields__, "plan")
        for key in ("name", "patterns", "default"):
            if key not in fields:
                raise ValueError(f"plan: the key {key!r} is missing")
        if fields.get("model") is not None:
            model = _object(fields["model"], "plan: model")
            check_keys(model, ModelFingerprint.__dataclass_fields__, "plan: model")
            missing = [key for key in ModelFingerprint.__dataclass_fields__ if key not in model]
            if missing:
                raise ValueError(f"plan: model lacks the key {missing[0]!r}")
            fields["model"] = ModelFingerprint(**model)
        return cls(**fields)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `visparse_plan.json` into a folder, which is made if needed.

        Returns:
            Path of the file.
        """
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls, path: str | Path) -> SparsePlan:
        """Read a plan from a file, or from the `visparse_plan.json` of a folder. Never touches the network.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON (the text says where), or not a plan.
        """
        path = Path(path)
        file = path / FILE_NAME if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no plan at {file}; wanted a JSON file, or a folder that holds {FILE_NAME}")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not a complete JSON file: {error}") from error
        return cls.from_dict(data)

    def with_changes(self, settings: Sequence[str] = (), **changes: Any) -> SparsePlan:
        """A copy with another schedule, other compensations or other parameters of its pattern; its notes say so.

        Args:
            settings: further names that the caller knows, for the hint in the error text.
            changes: `dense_steps`, `dense_layers`, `proxies`, `statistics`, `residual` (objects, their JSON form, or
                None; each replaces the plan's own as a whole), or parameters of the plan's pattern such as `window` or
                `decay`; these need a plan with one pattern (dense and skip aside). `refresh` changes that of the
                statistics and the residual too, where they had the same as the pattern.

        Raises:
            ValueError: a name that neither the plan nor the pattern has; names the nearest.
        """
        changed = list(changes)
        fields: dict[str, Any] = {key: changes.pop(key) for key in _SCHEDULE if key in changes}
        if changes:
            tunable = [name for name, template in self.patterns.items() if template.parameters]
            known = [
                *(self.patterns[tunable[0]].parameters if len(tunable) == 1 else ()),
                *_SCHEDULE,
                *settings,
            ]
            if len(tunable) > 1:
                raise ValueError(
                    f"{next(iter(changes))!r} cannot be set: the plan has several patterns ({', '.join(tunable)}); "
                    "change the plan itself"
                )
            check_keys(changes, known, f"sparsify with plan {self.name!r}")
            template = self.patterns[tunable[0]]
            fields["patterns"] = {**self.patterns, tunable[0]: template.with_changes(**changes)}
            if "refresh" in changes:
                before = parse_refresh(template.entry.get("refresh"))
                for key in ("statistics", "residual"):
                    part = getattr(self, key)
                    if part is not None and part.refresh == before:
                        fields.setdefault(key, replace(part, refresh=changes["refresh"]))
        if changed:
            fields["notes"] = "; ".join(filter(None, [self.notes, f"changed: {', '.join(changed)}"]))
        return replace(self, **fields)

    def describe(self) -> str:
        """The plan in a few lines for people."""
        steps, layers = _steps(self.dense_steps), _layers(self.dense_layers)
        lines = [f"plan {self.name!r}: default pattern {self.default!r}; dense: {steps}, layers {layers}"]
        lines += [f"  {name}: {template}" for name, template in self.patterns.items()]
        lines += [f"  layers {r.layers}, heads {r.heads}, steps {r.steps}: {r.pattern}" for r in self.assignment]
        lines += [f"  {key}: {getattr(self, key)}" for key in COMPENSATIONS if getattr(self, key) is not None]
        if self.model is not None:
            m = self.model
            lines.append(f"  made for {m.model_class}: {m.layers} layers, {m.heads} heads of {m.head_dim}")
        if self.grids is not None:
            lines.append("  for grids " + ", ".join("x".join(map(str, grid)) for grid in self.grids))
        if self.made_for is not None:
            lines.append(f"  lengths in tokens made for grid {'x'.join(map(str, self.made_for))}, rescaled to others")
        return "\n".join([*lines, *([f"  {self.notes}"] if self.notes else [])])


def _json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value.to_dict() if hasattr(value, "to_dict") else value


def _steps(value: int | float | DenseSteps) -> str:
    if isinstance(value, DenseSteps):
        return f"steps {value}"
    return f"{value:.0%} of the steps" if isinstance(value, float) else f"{value} steps"


def _layers(value: Any) -> str:
    return f"first {value}" if isinstance(value, int) else str(value)


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a JSON object, got {value!r}")
    return value


def _list(value: Any, key: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"plan: {key} must be a list, got {value!r}")
    return value


def _grid(value: Any, what: str) -> tuple[int, int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(type(n) is int and n > 0 for n in value):
        raise ValueError(f"plan: {what} must be three ints > 0 (frames, height, width), got {value!r}")
    return value[0], value[1], value[2]
