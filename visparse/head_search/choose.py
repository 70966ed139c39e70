"""Choose: from scores and costs to what each head does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from visparse.head_search.allocate import Allocation, Option
from visparse.head_search.allocate_layers import Layer, allocate_layers, cheapest_layers
from visparse.head_search.candidates import Candidate, Candidates
from visparse.head_search.costs import Costs
from visparse.head_search.published import MODES, sparse_vdit
from visparse.head_search.schedule import Schedule
from visparse.head_search.work import Key
from visparse.patterns import Band, Dense, MultiDiagonal, Skip, Stripe

Part = tuple[int, int]  # range of steps, layer


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the heads do.

    Attributes:
        family: of all candidates.
        picks: (range of steps, layer, head) -> candidate; layers without scores are missing.
        error: predicted relative error of attention's output, root of the mean square over steps and scored layers.
        milliseconds: of attention in a sparse step, all layers, one sequence, mean over the ranges.
        attention: that over dense attention's.
        block_density: mean over all heads of all layers.
        gap: of the allocation; None for a rule without one.
        layers: layer -> (relative error, milliseconds).
        output_error: predicted root mean square error of decoded frames; None where no weights were measured.
    """

    family: str
    picks: Mapping[tuple[int, int, int], Candidate]
    error: float
    milliseconds: float
    attention: float
    block_density: float
    gap: float | None
    layers: Mapping[int, tuple[float, float]]
    output_error: float | None = None


class Table:
    """Mean scores of all candidates: (range of steps, layer) -> candidate -> head."""

    def __init__(
        self,
        scores: Mapping[Key, Mapping[str, list]],
        candidates: Candidates,
        costs: Costs,
        schedules: Mapping[str, Schedule],
    ) -> None:
        """Average what was scored.

        Args:
            scores: of a work file.
            candidates: as they were scored.
            costs: of these.
            schedules: of the families; their ranges of steps start alike.
        """
        self.scores, self.candidates, self.costs, self.schedules = scores, candidates, costs, schedules
        self.error = _by_range(scores, "error", len(candidates.kept), next(iter(schedules.values())))
        self.mse = _by_range(scores, "mse", len(candidates.kept), next(iter(schedules.values())))
        self.layers = sorted({layer for _, layer in self.error})

    @property
    def ranges(self) -> int:
        """Number of ranges of steps."""
        return len({number for number, _ in self.error})

    def by_budget(
        self,
        family: str,
        layers: int,
        *,
        attention: float | None = None,
        density: float | None = None,
        max_error: float | None = None,
        weights: Mapping[Part, float] | None = None,
        only: Callable[[Candidate], bool] | None = None,
    ) -> Chosen:
        """One allocation over all heads of all layers and ranges of steps.

        Args:
            family: of the candidates.
            layers: of the model; those without scores stay dense and are paid for.
            attention: share of the time of dense attention.
            density: share of the blocks.
            max_error: predicted relative error.
            weights: by how much the squared errors of a range and layer count; None: all alike.
            only: which candidates may be chosen; None: all of the family.

        Raises:
            ValueError: the budget is too small.
        """
        scored, costs = self.layers, self.costs
        heads = len(self.error[0, scored[0]][self.candidates.of(family)[0]] or ())
        whole = (costs.dense if density is None else 1.0) * heads
        budget = (attention or density or 0.0) * whole * layers - whole * (layers - len(scored))
        calls = 0.0 if density is not None else costs.call.get(family, 0.0) * len(scored)
        if max_error is None and budget <= calls:
            raise ValueError(self._too_small(family, layers, heads))
        parts = self._parts(family, heads, density is not None, weights, only)
        try:
            if max_error is None:
                found = allocate_layers([layer for _, layer in parts.values()], budget)
            else:
                found = cheapest_layers([layer for _, layer in parts.values()], max_error**2 * len(scored))
        except ValueError as error:
            raise ValueError(f"{family} family: {error}") from None
        options = {(*part, head): known for part, (known, _) in parts.items() for head in range(heads)}
        picked = {name: own[pick] for (name, own), pick in zip(options.items(), found.picks, strict=True)}
        return self._chosen(family, picked, layers, heads, found, weights)

    def uniform(self, family: str, place: int, layers: int) -> Chosen:
        """One candidate for all heads.

        Args:
            family: of its plan.
            place: of the candidate.
            layers: of the model.
        """
        heads = len(self.error[0, self.layers[0]][self.candidates.of(family)[0]] or ())
        picked = {
            (number, layer, head): place
            for number in range(self.ranges)
            for layer in self.layers
            for head in range(heads)
        }
        return self._chosen(family, picked, layers, heads, None, None)

    def parts_of_error(self, chosen: Chosen, weights: Mapping[Part, float]) -> dict[Part, float]:
        """What each range and layer adds to the predicted squared error of the output.

        Args:
            chosen: an allocation.
            weights: as in `by_budget`.
        """
        places = {one: place for place, one in enumerate(self.candidates.kept)}
        shares = self._shares(chosen.family)
        found = dict.fromkeys(shares, 0.0)
        for (number, layer, head), one in chosen.picks.items():
            part = number, layer
            found[part] += weights[part] * shares[part] * self._at(part, places[one], head)
        return found

    def local_error(self, part: Part, place: int) -> float:
        """Squared relative error of a layer in a range of steps where all its heads have one candidate."""
        row = self.error[part][place]
        return sum(row or ())

    def by_paper(self, layers: int, *, limit: float) -> Chosen:
        """Sparse-vDiT's rule, with the modes that `paper_modes` finds among the candidates.

        Args:
            layers: of the model.
            limit: the paper's epsilon.
        """
        modes = paper_modes(self.candidates)
        dense = next(p for p in self.candidates.of("plain") if isinstance(self.candidates.kept[p].pattern, Dense))
        density, picked, heads = self.costs.block_density, {}, 0
        for (number, layer), mse in self.mse.items():
            heads = len(mse[dense] or ())
            for head in range(heads):
                losses = [mse[place][head] for place in modes]  # type: ignore[index]
                best = sparse_vdit(losses, [density[place] for place in modes], limit=limit)
                picked[number, layer, head] = dense if best is None else modes[best]
        return self._chosen("plain", picked, layers, heads, None, None)

    def _parts(
        self,
        family: str,
        heads: int,
        by_density: bool,
        weights: Mapping[Part, float] | None,
        only: Callable[[Candidate], bool] | None,
    ) -> dict[Part, tuple[list[int], Layer]]:
        """Ranges and layers: the places of their heads' candidates, and these as options."""
        costs, kept = self.costs, self.candidates.kept
        prices = costs.block_density if by_density else costs.milliseconds
        one, call = (1.0, 0.0) if by_density else (costs.dense, costs.call.get(family, 0.0))
        parts: dict[Part, tuple[list[int], Layer]] = {}
        for part, share in self._shares(family).items():
            weight = share * (1.0 if weights is None else weights[part])
            known = [
                place
                for place in self.candidates.of(family)
                if self.error[part][place] is not None and (only is None or only(kept[place]))
            ]
            items = [
                [Option(share * prices[p], weight * self._at(part, p, head)) for p in known] for head in range(heads)
            ]
            at = next((at for at, p in enumerate(known) if isinstance(kept[p].pattern, Dense)), None)
            whole = None if at is None else Option(share * heads * one, sum(options[at].error for options in items))
            parts[part] = known, Layer(heads=items, call=share * call, place=at, dense=whole)
        return parts

    def _too_small(self, family: str, layers: int, heads: int) -> str:
        """Why nothing is left for blocks."""
        missing, call = layers - len(self.layers), self.costs.call.get(family, 0.0)
        if missing:
            return (
                f"budget: {missing} of {layers} layers were not scored and stay dense, which is more than the budget; "
                "give the search more minutes"
            )
        return (
            f"budget: a sparse call of a layer takes {call:.3g} ms before its first block, dense attention "
            f"{heads * self.costs.dense:.3g} ms; ask for more, or for longer sequences"
        )

    def _shares(self, family: str) -> dict[Part, float]:
        """Share of the sparse steps in each range, for each layer."""
        shares = self.schedules[family].weights
        return {(number, layer): shares[number] for number, layer in sorted(self.error)}

    def _at(self, part: Part, place: int, head: int) -> float:
        row = self.error[part][place]
        if row is None:
            raise ValueError(f"candidate {self.candidates.kept[place].name!r} was not scored in layer {part[1]}")
        return row[head]

    def _chosen(
        self,
        family: str,
        picked: Mapping[tuple[int, int, int], int],
        layers: int,
        heads: int,
        found: Allocation | None,
        weights: Mapping[Part, float] | None,
    ) -> Chosen:
        costs, kept, missing = self.costs, self.candidates.kept, layers - len(self.layers)
        errors, times = dict.fromkeys(self.layers, 0.0), dict.fromkeys(self.layers, 0.0)
        blocks, output = float(missing * heads), 0.0
        for part, share in self._shares(family).items():
            number, layer = part
            own = [picked[number, layer, head] for head in range(heads)]
            error = share * sum(self._at(part, place, head) for head, place in enumerate(own))
            all_dense = all(isinstance(kept[place].pattern, Dense) for place in own)
            spent = sum(costs.milliseconds[place] for place in own) + costs.call.get(family, 0.0)
            errors[layer] += error
            times[layer] += share * (heads * costs.dense if all_dense else spent)
            blocks += share * sum(costs.block_density[place] for place in own)
            output += error * (0.0 if weights is None else weights[part])
        time = missing * heads * costs.dense + sum(times.values())
        return Chosen(
            family=family,
            picks={name: kept[place] for name, place in picked.items()},
            error=(sum(errors.values()) / len(errors)) ** 0.5,
            milliseconds=time,
            attention=time / (costs.dense * heads * layers),
            block_density=blocks / (heads * layers),
            gap=None if found is None else found.gap,
            layers={layer: (errors[layer] ** 0.5, times[layer]) for layer in self.layers},
            output_error=None if weights is None else output**0.5,
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
        "output_error": None if chosen.output_error is None else round(chosen.output_error, 6),
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


def _by_range(
    scores: Mapping[Key, Mapping[str, list]], what: str, count: int, schedule: Schedule
) -> dict[Part, list[list[float] | None]]:
    """Means over the calls of each range of steps; over all of them where a layer has no score in a range."""
    whole = _means(scores, what, count)
    found: dict[Part, list[list[float] | None]] = {}
    for number in range(len(schedule.starts)):
        own = {key: value for key, value in scores.items() if schedule.range_of(key[1]) == number}
        means = _means(own, what, count)
        for layer, rows in whole.items():
            mine = means.get(layer, rows)
            found[number, layer] = [rows[place] if row is None else row for place, row in enumerate(mine)]
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
