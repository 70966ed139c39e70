"""Score: the error of every candidate for every head of a layer, in one call of its attention."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visparse.compensation.call import Call
from visparse.compensation.choice import select
from visparse.compensation.pooled import pooled_tiles
from visparse.compensation.proxy_table import ProxyTable, proxy_table
from visparse.compensation.tiles import tile_blocks, tiles_for
from visparse.head_search.candidates import FAMILIES, Candidates, has_selector
from visparse.head_search.lab import Lab, make_lab
from visparse.head_search.rows import Rows, kept_keys, kept_tiles, sample_rows
from visparse.layout import Layout
from visparse.patterns import Dense, Pattern, Selector, Skip

_NUMBERS = 1 << 26  # of one table of logits: 256 MiB; a call needs about six of these


@dataclass
class Kept:
    """What one layer keeps from the last call at which it was measured, for the sampled queries only.

    Attributes:
        chosen: bool [H, T, selectors, n_k].
        residual: [C, H, T, r, D], in the dtype of the model.
    """

    chosen: Tensor
    residual: Tensor


@dataclass
class Fixed:
    """What belongs to a layout: rows, proxies, and what candidates by position keep."""

    rows: Rows
    table: ProxyTable
    masks: dict[int, Tensor] = field(default_factory=dict)
    tiles: dict[int, Tensor] = field(default_factory=dict)


class Scorer:
    """Scores the calls of all layers; remembers, per branch and layer, what a plan would reuse.

    Memory on the device: about six tables of at most 256 MiB; a byte for each sampled query, key and candidate by
    position; and for each layer and branch the sampled rows of the residual of every foveal candidate.
    """

    def __init__(self, candidates: Candidates, *, count: int | None, every: int, seed: int, head_dim: int) -> None:
        """Prepare.

        Args:
            candidates: what heads may do.
            count: sampled tiles of the grid; None: all.
            every: every so many queries of a tile.
            seed: of the sample.
            head_dim: size of a head.
        """
        self.candidates, self.head_dim = candidates, head_dim
        self._sample = count, every, seed
        self._fixed: dict[tuple[Layout, torch.device], Fixed] = {}
        self._kept: dict[Hashable, Kept] = {}
        plain, self._reused, self._pooled = (
            [(place, candidates.kept[place].pattern) for place in candidates.of(family)] for family in FAMILIES
        )
        self._exact = plain

    def forget(self) -> None:
        """A new run begins: nothing that was measured holds any more."""
        self._kept.clear()

    @torch.no_grad()
    def measure(self, key: Hashable, call: Call, layout: Layout) -> None:
        """Measure what foveal candidates reuse: the choice of tiles and the residual.

        Args:
            key: branch, row of the batch and layer.
            call: with one row of the batch.
            layout: of its tokens.
        """
        if not self._reused:
            return
        fixed = self._of(layout, call.q.device)
        chosen: list[list[Tensor]] = []
        residual: list[list[Tensor]] = []
        for heads, row in self._parts(call, fixed.rows):
            lab = make_lab(call, heads, row[1], fixed.table)
            picks = self._choose(lab)
            delta = self._tiles(self._reused, fixed, lab, picks, row[0])
            if heads.start == 0:
                chosen.append([])
                residual.append([])
            chosen[-1].append(picks)
            residual[-1].append(delta.to(call.q.dtype))
        self._kept[key] = Kept(
            torch.cat([torch.cat(parts) for parts in chosen], 1),
            torch.cat([torch.cat(parts, 1) for parts in residual], 2),
        )

    @torch.no_grad()
    def judge(self, key: Hashable, call: Call, layout: Layout, projection: Tensor | None) -> dict[str, Any]:
        """Score every candidate for every head.

        Args:
            key: as in `measure`; candidates that reuse something and were not measured are left out.
            call: with one row of the batch.
            layout: of its tokens.
            projection: weights [out, H * D] of the layer's output projection; None: errors are those of the heads.

        Returns:
            ``error`` [C, H]: squared error of a head's contribution over the squared norm of the layer's output, both
            after the projection and summed over the sampled queries; None for a candidate that was left out.
            ``mse`` [C, H]: mean squared error of the head itself, for candidates of the plain family.
        """
        fixed, kept = self._of(layout, call.q.device), self._kept.get(key)
        heads_all, size = call.q.shape[2], call.q.shape[3]
        weights = None if projection is None else projection.float().view(-1, heads_all, size).permute(1, 0, 2)
        grams = None if weights is None else weights.transpose(1, 2) @ weights  # [H, D, D]
        count = len(self.candidates.kept)
        error = torch.zeros(count, heads_all, dtype=torch.float64)
        mse = torch.zeros(count, heads_all, dtype=torch.float64)
        total = 0.0
        output: list[Tensor] = []
        pooled = self._choose_pooled(call, fixed)
        for heads, (cut, rows) in self._parts(call, fixed.rows):
            lab = make_lab(call, heads, rows, fixed.table if self._reused or self._pooled else None)
            gram = None if grams is None else grams[heads]
            for place, delta in self._deltas(fixed, lab, kept, pooled, heads, cut):
                delta = delta * rows.real[..., None]
                error[place, heads] += _norm(delta, gram).cpu()
                mse[place, heads] += _norm(delta, None).cpu()
            dense = lab.dense * rows.real[..., None]
            output.append(dense.flatten(1, 2))
            if heads.stop == heads_all:
                whole = torch.cat(output)  # [H, T * r, D]
                joined = whole if weights is None else torch.bmm(whole, weights.transpose(1, 2)).sum(0)
                total += float(joined.double().square().sum())
                output = []
        relative = (error / max(total, 1e-300)).tolist()
        numbers = int(fixed.rows.real.sum()) * size
        missing = {place for place, _ in self._reused} if kept is None else set()
        return {
            "error": [None if place in missing else row for place, row in enumerate(relative)],
            "mse": [row if place in dict(self._exact) else None for place, row in enumerate((mse / numbers).tolist())],
        }

    def _of(self, layout: Layout, device: torch.device) -> Fixed:
        key = (layout, device)
        if key not in self._fixed:
            serpentine = has_selector(self.candidates.kept)
            blocks = self.candidates.proxies.blocks or tile_blocks(self.head_dim)
            tiles = tiles_for(layout, *blocks, device, serpentine=serpentine)
            fixed = Fixed(rows=sample_rows(tiles, *self._sample), table=proxy_table(tiles, self.candidates.proxies))
            for place, pattern in self._exact:
                if not isinstance(pattern, (Dense, Skip)):
                    fixed.masks[place] = kept_keys(fixed.rows, pattern)
            for place, pattern in (*self._reused, *self._pooled):
                if not isinstance(pattern, (Selector, Skip)):
                    fixed.tiles[place] = kept_tiles(fixed.rows, pattern)
            self._fixed[key] = fixed
        return self._fixed[key]

    def _parts(self, call: Call, rows: Rows) -> Iterator[tuple[slice, tuple[slice, Rows]]]:
        """Parts of heads and tiles that fit into memory: all heads of some tiles, then of the next ones."""
        heads, slots = call.q.shape[2], len(rows.tiles.k_order)
        per_tile = rows.tokens.shape[1] * slots
        tiles = min(len(rows.blocks), max(1, _NUMBERS // per_tile))
        step = min(heads, max(1, _NUMBERS // (per_tile * tiles)))
        for start in range(0, len(rows.blocks), tiles):
            cut = slice(start, min(start + tiles, len(rows.blocks)))
            part = rows.part(cut.start, cut.stop)
            for head in range(0, heads, step):
                yield slice(head, min(head + step, heads)), (cut, part)

    def _deltas(
        self, fixed: Fixed, lab: Lab, kept: Kept | None, pooled: Tensor | None, heads: slice, cut: slice
    ) -> Iterator[tuple[int, Tensor]]:
        """The error of each candidate's output: place of the candidate, [H, T, r, D]."""
        dense, per_tile = lab.dense, lab.rows.tokens.shape[1]
        for place, pattern in self._exact:
            if isinstance(pattern, Dense):
                continue
            if isinstance(pattern, Skip):
                yield place, dense
                continue
            mask = fixed.masks[place][cut.start * per_tile : cut.stop * per_tile]
            yield place, dense - lab.exact(mask)
        if kept is not None:
            delta = self._tiles(self._reused, fixed, lab, kept.chosen[heads, cut], cut)
            for (place, _), now, before in zip(self._reused, delta, kept.residual[:, heads, cut], strict=True):
                yield place, now - before.float()
        if pooled is not None:
            delta = self._tiles(self._pooled, fixed, lab, pooled[heads, cut], cut)
            for (place, _), now in zip(self._pooled, delta, strict=True):
                yield place, now

    def _choose(self, lab: Lab) -> Tensor:
        """The tiles that each selector chooses, bool [H, T, selectors, n_k]."""
        tiles = lab.rows.tiles
        found = []
        for _, pattern in self._reused:
            if isinstance(pattern, Selector):
                scores = lab.scores(pattern.score)[None, ..., : tiles.visual_k]
                found.append(self._with_extra(select(pattern, scores)[0], lab.rows))
        if not found:
            return torch.zeros(*lab.mass.shape[:2], 0, tiles.n_k, dtype=torch.bool, device=lab.mass.device)
        return torch.stack(found, 2)

    def _choose_pooled(self, call: Call, fixed: Fixed) -> Tensor | None:
        """The tiles that selectors by pooled scores choose, bool [H, T, selectors, n_k]; None without that family."""
        if not self._pooled:
            return None
        rows, tiles = fixed.rows, fixed.rows.tiles
        known: dict[int, Tensor] = {}
        found = []
        for _, pattern in self._pooled:
            if isinstance(pattern, Selector):
                if pattern.parts not in known:
                    known[pattern.parts] = pooled_tiles(call, tiles, pattern)[:, :, rows.blocks, : tiles.visual_k]
                found.append(self._with_extra(select(pattern, known[pattern.parts])[0], rows))
        if not found:
            shape = (call.q.shape[2], len(rows.blocks), 0, tiles.n_k)
            return torch.zeros(shape, dtype=torch.bool, device=call.q.device)
        return torch.stack(found, 2)

    def _with_extra(self, kept: Tensor, rows: Rows) -> Tensor:
        """Add extra tokens to the tiles that are kept, bool [H, T, visual_k] -> [H, T, n_k]."""
        tiles = rows.tiles
        wide = torch.nn.functional.pad(kept, (0, tiles.n_k - tiles.visual_k), value=True)
        return wide | (rows.blocks >= tiles.visual_q)[:, None]

    def _tiles(
        self, candidates: Sequence[tuple[int, Pattern]], fixed: Fixed, lab: Lab, chosen: Tensor, cut: slice
    ) -> Tensor:
        """Dense minus sparse output of candidates in whole tiles, before any residual, [C, H, T, r, D]."""
        shape = (*lab.mass.shape[:2], lab.rows.tiles.n_k)
        maps, skips, selector = [], [], 0
        for index, (place, pattern) in enumerate(candidates):
            if isinstance(pattern, Selector):
                maps.append(chosen[:, :, selector])
                selector += 1
            elif isinstance(pattern, Skip):
                maps.append(torch.ones(shape, dtype=torch.bool, device=lab.mass.device))
                skips.append(index)
            else:
                maps.append(fixed.tiles[place][cut].expand(shape))
        out = lab.tiled(torch.stack(maps, 2))
        delta = lab.dense[None] - out
        for index in skips:
            delta[index] = lab.dense
        return delta


def _norm(delta: Tensor, gram: Tensor | None) -> Tensor:
    """Squared norm of each head's rows, after the projection that `gram` is of; fp64 [H]."""
    flat = delta.flatten(1, 2)
    other = flat if gram is None else torch.bmm(flat, gram)
    return (flat * other).sum((1, 2)).double().clamp(min=0.0)
