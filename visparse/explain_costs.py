"""What a step of a plan costs, by its block lists and the measured rates of a device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from visparse.estimates import Estimate, estimate
from visparse.layout import Layout
from visparse.patterns import Dense
from visparse.plan import SparsePlan
from visparse.rules import ModelFingerprint
from visparse.schedule import Timetable

# Shares of one dense attention: what visparse holds itself to, not measurements. Exact scores of a selector take a
# quarter; proxies at most 5 %, and 3 % for one or two of them per tile of 128 tokens: 1 to 2 % more keys, their pooling
# and the merge of two outputs. A look at the overlap takes at most 2 %.
SCORES_SHARE = 0.25
PROXIES_SHARE = 0.03
LOOK_SHARE = 0.02

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Steps at which the same happens.

    Attributes:
        first, last: its first and its last step.
        sparse: whether its outputs are sparse.
        measured: what is measured there, for later steps.
        perhaps: what is measured there if the overlap falls; `sparse`, density and time are those of a step where it
            does not.
        patterns: table names of the patterns that sparse layers use; empty for dense steps.
        block_density: visited blocks / all blocks, mean over layers and heads: least and most.
        milliseconds: predicted time of self-attention in all layers for one step: least and most; None where the device
            was not measured.
    """

    first: int
    last: int
    sparse: bool
    measured: tuple[str, ...]
    patterns: tuple[str, ...]
    block_density: Range
    milliseconds: Range | None
    perhaps: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Number of its steps."""
        return self.last - self.first + 1

    def __str__(self) -> str:
        """What happens, in words."""
        if self.sparse:
            text = f"sparse: {', '.join(self.patterns) or 'no layer'}"
        else:
            text = "dense" + (f", measured ({', '.join(self.measured)})" if self.measured else "")
        return text + (f"; may be measured ({', '.join(self.perhaps)})" if self.perhaps else "")


class Costs:
    """What a step costs, from estimates that are made once for each distinct list of patterns."""

    def __init__(self, plan: SparsePlan, model: ModelFingerprint, layout: Layout, device: str) -> None:
        """Prepare; dense attention is estimated at once."""
        self.plan, self.model, self.layout, self.device = plan, model, layout, device
        self.whole = self._estimate([Dense()])
        one = self.whole.dense_milliseconds
        self.dense = None if one is None else one * model.heads * model.layers
        self._known: dict[tuple[str, ...], tuple[Range, Range]] = {}

    def dense_step(self, step: int, measured: tuple[str, ...] = (), milliseconds: Range | None = None) -> Stretch:
        """A step whose outputs are dense; `milliseconds` None: the time of dense attention."""
        if milliseconds is None and self.dense is not None:
            milliseconds = self.dense, self.dense
        return Stretch(
            first=step,
            last=step,
            sparse=False,
            measured=measured,
            patterns=(),
            block_density=(1.0, 1.0),
            milliseconds=milliseconds,
        )

    def step(self, step: int, table: Timetable) -> Stretch:
        """Any step of the run."""
        measured, perhaps = table.measured(step), table.perhaps(step)
        if measured or table.scheduled(step):
            time = self._measuring(step, measured, table) if measured else None
            return replace(self.dense_step(step, measured, time), perhaps=perhaps)
        stage = self.plan.stage(step, table.total, table.sigmas)
        density, milliseconds, names = self._sparse(stage)
        if milliseconds is not None:
            looks = self._looks(stage)
            milliseconds = milliseconds[0] + looks, milliseconds[1] + looks
        return Stretch(
            first=step,
            last=step,
            sparse=True,
            measured=(),
            patterns=names,
            block_density=density,
            milliseconds=milliseconds,
            perhaps=perhaps,
        )

    def once_more(self, step: int, table: Timetable) -> Range | None:
        """What is added to the time of a step, least and most, if it is measured since the overlap falls."""
        usual, time = self.step(step, table).milliseconds, self._measuring(step, table.perhaps(step), table)
        return None if usual is None or time is None else (time[0] - usual[0], time[1] - usual[1])

    def _measuring(self, step: int, measured: tuple[str, ...], table: Timetable) -> Range | None:
        """Time of a step at which something is measured, for the next sparse step."""
        use = next((later for later in range(step, table.total or 0) if not table.scheduled(later)), step)
        stage = self.plan.stage(use, table.total, table.sigmas)
        _, milliseconds, _ = self._sparse(stage)
        if milliseconds is None or self.dense is None:
            return None
        scores = sum(self._share_of(name, stage) for name in measured)
        fixed = self.dense * (1 + SCORES_SHARE * scores)
        if not {"statistics", "residual"} & set(measured):
            return fixed, fixed
        fixed -= self.dense * self._layers(stage)[None] / self.model.layers  # dense layers need no sparse pass
        return fixed + milliseconds[0], fixed + milliseconds[1]

    def _looks(self, stage: int) -> float:
        """Time that looking at the overlap takes, spread over all sparse steps."""
        rule = self.plan.overlap
        if rule is None or self.dense is None:
            return 0.0
        followed = [name for name, one in self.plan.selectors.items() if one.refresh == rule]
        return LOOK_SHARE * self.dense / rule.every * sum(self._share_of(name, stage) for name in followed)

    def _sparse(self, stage: int) -> tuple[Range, Range | None, tuple[str, ...]]:
        """Block density, time and names of a step of sparse attention, over all layers."""
        density, time, used = [0.0, 0.0], [0.0, 0.0], dict[str, None]()
        dense_layer = (self.dense or 0.0) / self.model.layers
        for names, layers in self._layers(stage).items():
            blocks, milliseconds = ((1.0, 1.0), (dense_layer, dense_layer)) if names is None else self._layer(names)
            extra = PROXIES_SHARE * dense_layer if names is not None and self.plan.proxies is not None else 0.0
            for end in (0, 1):
                density[end] += blocks[end] * layers / self.model.layers
                time[end] += (milliseconds[end] + extra) * layers
            used |= dict.fromkeys(names or ())
        return (
            (density[0], density[1]),
            None if self.dense is None else (time[0], time[1]),
            tuple(used),
        )

    def _layers(self, stage: int) -> Counter[tuple[str, ...] | None]:
        return Counter(self.plan.names(layer, self.model.heads, stage) for layer in range(self.model.layers))

    def _share_of(self, name: str, stage: int) -> float:
        """Share of all heads of all layers that a pattern serves."""
        heads = sum(layers * names.count(name) for names, layers in self._layers(stage).items() if names is not None)
        return heads / (self.model.heads * self.model.layers)

    def _layer(self, names: tuple[str, ...]) -> tuple[Range, Range]:
        """Block density and time of a layer."""
        if names not in self._known:
            density, time = [0.0, 0.0], [0.0, 0.0]
            for name, heads in Counter(names).items():
                blocks, milliseconds = self._head(name)
                for end in (0, 1):
                    density[end] += blocks[end] * heads / len(names)
                    time[end] += milliseconds[end] * heads
            self._known[names] = (density[0], density[1]), (time[0], time[1])
        return self._known[names]

    def _head(self, name: str) -> tuple[Range, Range]:
        """Block density and time of one head."""
        selector = self.plan.selectors.get(name)
        if selector is None:
            found = self._estimate([self.plan.patterns[name].resolve(self.layout.grid)])
            time = found.milliseconds or 0.0
            return (found.block_density, found.block_density), (time, time)
        kept, group, rate = selector.shares, self.whole.groups[0], self.whole.rate
        if rate is None:
            return kept, (0.0, 0.0)
        least, most = (
            rate.milliseconds(group.query_blocks, group.full * share, group.masked * share) for share in kept
        )
        return kept, (least, most)

    def _estimate(self, patterns: list[Any]) -> Estimate:
        return estimate(patterns, self.layout, device=self.device, head_dim=self.model.head_dim)
