"""Choose: from scores and costs to what each head does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from visparse.head_search.allocate import Allocation, Option, allocate, cheapest
from visparse.head_search.candidates import Candidate, Candidates
from visparse.head_search.costs import Costs
from visparse.head_search.published import MODES, sparse_vdit
from visparse.head_search.schedule import Schedule
from visparse.head_search.work import Key
from visparse.patterns import Band, Dense, MultiDiagonal, Skip, Stripe


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the heads do.

    Attributes:
        family: of all candidates.
        picks: (layer, head) -> candidate; layers without scores are missing.
        error: predicted relative error of attention's output, root of the mean square over the scored layers.
        milliseconds: of attention in a sparse step, all layers, one sequence.
        attention: that over dense attention's.
        block_density: mean over all heads of all layers.
        gap: of the allocation; None for a rule without one.
        layers: layer -> (relative error, milliseconds).
    """

    family: str
    picks: Mapping[tuple[int, int], Candidate]
    error: float
    milliseconds: float
    attention: float
    block_density: float
    gap: float | None
    layers: Mapping[int, tuple[float, float]]


class Table:
    """Mean scores of all candidates: layer -> candidate -> head."""

    def __init__(self, scores: Mapping[Key, Mapping[str, list]], candidates: Candidates, costs: Costs) -> None:
        """Average what was scored.

        Args:
            scores: of a work file.
            candidates: as they were scored.
            costs: of these.
        """
        self.candidates, self.costs = candidates, costs
        self.error = _means(scores, "error", len(candidates.kept))
        self.mse = _means(scores, "mse", len(candidates.kept))

    @property
    def layers(self) -> list[int]:
        """Layers that were scored."""
        return sorted(self.error)

    def by_budget(
        self,
        family: str,
        layers: int,
        *,
        attention: float | None = None,
        density: float | None = None,
        max_error: float | None = None,
        weights: Sequence[float] | None = None,
        only: Callable[[Candidate], bool] | None = None,
    ) -> Chosen:
        """One allocation over all heads of all layers.

        Args:
            family: of the candidates.
            layers: of the model; those without scores stay dense and are paid for.
            attention: share of the time of dense attention.
            density: share of the blocks.
            max_error: predicted relative error.
            weights: by how much the errors of each scored layer count; None: 1.
            only: which candidates may be chosen; None: all of the family.

        Raises:
            ValueError: the budget is too small.
        """
        scored = self.layers
        heads = len(self.error[scored[0]][self.candidates.of(family)[0]] or ())
        whole = (self.costs.dense if density is None else 1.0) * heads
        budget = (attention or density or 0.0) * whole * layers - whole * (layers - len(scored))
        if max_error is None and budget <= 0:
            raise ValueError(
                f"budget: {layers - len(scored)} of {layers} layers were not scored and stay dense, which is more "
                "than the budget; give the search more minutes"
            )
        names, options, items = self._items(family, heads, density is not None, weights, only)
        try:
            found = allocate(items, budget) if max_error is None else cheapest(items, max_error**2 * len(scored))
        except ValueError as error:
            raise ValueError(f"{family} family: {error}") from None
        picked = {name: own[pick] for name, own, pick in zip(names, options, found.picks, strict=True)}
        return self._chosen(family, picked, layers, heads, found)

    def _items(
        self,
        family: str,
        heads: int,
        by_density: bool,
        weights: Sequence[float] | None,
        only: Callable[[Candidate], bool] | None,
    ) -> tuple[list[tuple[int, int]], list[list[int]], list[list[Option]]]:
        """Heads, the places of their candidates, and these as options."""
        prices = self.costs.block_density if by_density else self.costs.milliseconds
        names, options, items = [], [], []
        for index, layer in enumerate(self.layers):
            weight = 1.0 if weights is None else weights[index]
            known = [
                place
                for place in self.candidates.of(family)
                if self.error[layer][place] is not None and (only is None or only(self.candidates.kept[place]))
            ]
            for head in range(heads):
                names.append((layer, head))
                options.append(known)
                items.append([Option(prices[p], weight * self._at(layer, p, head)) for p in known])
        return names, options, items

    def by_paper(self, layers: int, *, limit: float) -> Chosen:
        """Sparse-vDiT's rule, with the modes that `paper_modes` finds among the candidates.

        Args:
            layers: of the model.
            limit: the paper's epsilon.
        """
        modes = paper_modes(self.candidates)
        dense = next(p for p in self.candidates.of("plain") if isinstance(self.candidates.kept[p].pattern, Dense))
        density, picked, heads = self.costs.block_density, {}, 0
        for layer in self.layers:
            mse = self.mse[layer]
            heads = len(mse[dense] or ())
            for head in range(heads):
                losses = [mse[place][head] for place in modes]  # type: ignore[index]
                best = sparse_vdit(losses, [density[place] for place in modes], limit=limit)
                picked[layer, head] = dense if best is None else modes[best]
        return self._chosen("plain", picked, layers, heads, None)

    def _at(self, layer: int, place: int, head: int) -> float:
        row = self.error[layer][place]
        if row is None:
            raise ValueError(f"candidate {self.candidates.kept[place].name!r} was not scored in layer {layer}")
        return row[head]

    def _chosen(
        self,
        family: str,
        picked: Mapping[tuple[int, int], int],
        layers: int,
        heads: int,
        found: Allocation | None,
    ) -> Chosen:
        costs, missing = self.costs, layers - len(self.layers)
        per_layer: dict[int, tuple[float, float]] = {}
        time = missing * heads * costs.dense
        blocks = float(missing * heads)
        for layer in self.layers:
            own = [picked[layer, head] for head in range(heads)]
            error = sum(self._at(layer, place, head) for head, place in enumerate(own))
            all_dense = all(isinstance(self.candidates.kept[place].pattern, Dense) for place in own)
            spent = heads * costs.dense if all_dense else sum(costs.milliseconds[place] for place in own)
            per_layer[layer] = (error**0.5, spent)
            time += spent
            blocks += sum(costs.block_density[place] for place in own)
        return Chosen(
            family=family,
            picks={name: self.candidates.kept[place] for name, place in picked.items()},
            error=(sum(error**2 for error, _ in per_layer.values()) / len(per_layer)) ** 0.5,
            milliseconds=time,
            attention=time / (costs.dense * heads * layers),
            block_density=blocks / (heads * layers),
            gap=None if found is None else found.gap,
            layers=per_layer,
        )


def predicted(chosen: Chosen, schedule: Schedule, share: float | None) -> dict[str, float | None]:
    """What a plan keeps of a prediction, rounded.

    Args:
        chosen: what the heads do.
        schedule: of the plan.
        share: of attention in a dense step; None while unknown.
    """
    speedup = None if share is None else round(schedule.speedup_at(chosen.attention, share), 4)
    return {
        "attention_milliseconds": round(chosen.milliseconds, 6),
        "attention": round(chosen.attention, 6),
        "block_density": round(chosen.block_density, 6),
        "error": round(chosen.error, 6),
        "gap": None if chosen.gap is None else round(chosen.gap, 6),
        "run_speedup": speedup,
    }


def paper_modes(candidates: Candidates) -> list[int]:
    """Places of Sparse-vDiT's modes M1 to M4 among the candidates: skip, diagonal, multi-diagonal, stripe.

    The paper gives no sizes. An eighth of the sequence is taken for each, or what comes nearest among the candidates.

    Raises:
        ValueError: a mode is missing.
    """
    found = []
    for kind, size, label in (
        (Skip, "", "skip"),
        (Band, "8", MODES[0]),
        (MultiDiagonal, "8", MODES[1]),
        (Stripe, "8", MODES[2]),
    ):
        fits = [p for p in candidates.of("plain") if isinstance(candidates.kept[p].pattern, kind)]
        if not fits:
            raise ValueError(f"candidates: the published rule needs the mode {label}; do not leave its pattern out")
        exact = [p for p in fits if candidates.kept[p].name.endswith(size)]
        found.append((exact or fits)[0])
    return found


def _means(scores: Mapping[Key, Mapping[str, list]], what: str, count: int) -> dict[int, list[list[float] | None]]:
    """Mean over prompts, steps, branches and rows, in the order of their keys; None: a candidate was never scored."""
    sums: dict[int, list[list[float] | None]] = {}
    numbers: dict[int, list[int]] = {}
    for key in sorted(scores):
        total, number = sums.setdefault(key[4], [None] * count), numbers.setdefault(key[4], [0] * count)
        for place, row in enumerate(scores[key][what]):
            if row is not None:
                before = total[place]
                total[place] = list(row) if before is None else [a + b for a, b in zip(before, row, strict=True)]
                number[place] += 1
    return {
        layer: [
            None if row is None else [value / number for value in row]
            for row, number in zip(total, numbers[layer], strict=True)
        ]
        for layer, total in sums.items()
    }
