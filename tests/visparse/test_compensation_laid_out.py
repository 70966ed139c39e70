"""Sequences in the order of their tiles: the same tokens in the same tiles, and the same results as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from visparse.compensation import serve
from visparse.compensation.call import Call
from visparse.compensation.config import Proxies, ReuseResidual, ReuseStatistics
from visparse.compensation.laid_out import laid_out, pays
from visparse.compensation.testing import BLOCKS, LAYOUT, NEAR, Run
from visparse.compensation.tiles import tiles_for
from visparse.layout import Layout
from visparse.patterns import TopK
from visparse_kernels import lists_from_map
from visparse_kernels.attend.gluon_program import Program, build_full_program
from visparse_kernels.lists_check import check_contents

CPU = torch.device("cpu")
PLANS: dict[str, dict[str, Any]] = {
    "tiles alone": {"patterns": {"near": TopK(share=0.4, refresh=2)}},
    "pooled with parts": {
        "patterns": {"near": TopK(share=0.4, score="pooled", parts=4)},
        "proxies": Proxies(per_tile=2),
    },
    "pooled with several parts and neighbourhoods": {
        "patterns": {"four": TopK(share=0.4, score="pooled", parts=4), "one": TopK(share=0.3, score="pooled")},
        "default": "four",
        "assignment": [{"heads": [1], "pattern": "one"}],
        "proxies": Proxies(per_tile=1, levels=2),
    },
    "agents": {
        "patterns": {"near": TopK(share=0.4, score="pooled", parts=2)},
        "proxies": Proxies(kind="agent"),
    },
    "foveal": {
        "patterns": {"near": TopK(share=0.4, score="mass_variance", refresh=2)},
        "proxies": Proxies(levels=2),
        "statistics": ReuseStatistics(refresh=2),
        "residual": ReuseResidual(refresh=2),
    },
    "mixed": {
        "patterns": {"near": NEAR, "top": TopK(share=0.3, refresh=2)},
        "assignment": [{"heads": [1], "pattern": "top"}],
        "proxies": Proxies(),
    },
}


@pytest.mark.parametrize("layout", [LAYOUT, Layout((1, 13, 17), before=1), Layout((3, 8, 8))], ids=str)
def test_every_tile_keeps_its_tokens(layout) -> None:
    tiles = tiles_for(layout, *BLOCKS, CPU, serpentine=True)
    laid = laid_out(tiles)
    queries = laid.places.argsort()
    for mine, old, tokens in (
        (laid.tiles.q_order, tiles.q_order, queries),
        (laid.tiles.k_order, tiles.k_order, laid.keys),
    ):
        assert torch.equal(mine < 0, old < 0)
        assert torch.equal(tokens[mine[mine >= 0].long()], old[old >= 0].long())
        assert torch.equal(tokens.sort().values, torch.arange(layout.tokens))


def test_the_tiles_are_runs_that_hardware_can_fetch() -> None:
    laid = laid_out(tiles_for(LAYOUT, *BLOCKS, CPU, serpentine=True))
    kept = torch.rand(2, laid.tiles.n_q, laid.tiles.n_k, generator=torch.Generator().manual_seed(0)) < 0.5
    lists = lists_from_map(
        kept,
        q_len=LAYOUT.tokens,
        k_len=LAYOUT.tokens,
        block_q=BLOCKS[0],
        block_k=BLOCKS[1],
        q_order=laid.tiles.q_order,
        k_order=laid.tiles.k_order,
        head_group=torch.tensor([0, 1], dtype=torch.int32),
        boxes=laid.tiles.boxes,
    )
    check_contents(lists)  # raises where boxes and order tables disagree
    assert isinstance(build_full_program(lists), Program)


@pytest.mark.parametrize(("masked", "batch"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_results_are_the_same(plan, masked, batch, monkeypatch) -> None:
    mask = None
    if masked:
        mask = torch.ones(1, 1, 1, LAYOUT.tokens, dtype=torch.bool)
        mask[..., [1, 40, 200, -1]] = False
    runs = {}
    for laid in (False, True):
        monkeypatch.setattr(serve, "pays", lambda tiles, laid=laid: laid)
        run = Run(**plan)
        runs[laid] = [run.call(step, step, batch=batch, mask=mask)[0] for step in range(6)]
        assert run.stats.compensated >= 3
    for step, (wanted, got) in enumerate(zip(runs[False], runs[True], strict=True)):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4, msg=f"step {step}")


def test_a_bias_goes_with_its_keys() -> None:
    laid = laid_out(tiles_for(LAYOUT, *BLOCKS, CPU, serpentine=True))
    x = torch.arange(LAYOUT.tokens, dtype=torch.float32)[None, :, None, None].expand(2, -1, 3, 4)
    call = laid.lay(Call(x, x, x, x[..., 0].transpose(1, 2)[:1, :1], None)).call
    assert torch.equal(call.bias[0, 0], call.k[0, :, 0, 0])
    assert torch.equal(call.k, call.v)
    out, lse = laid.put_back(call.q, call.q[..., 0].transpose(1, 2))
    assert torch.equal(out, x)
    assert torch.equal(lse, x[..., 0].transpose(1, 2))


def test_it_pays_where_tiles_are_no_boxes_on_a_gpu() -> None:
    assert not pays(tiles_for(LAYOUT, *BLOCKS, CPU, serpentine=True))
    assert not pays(tiles_for(LAYOUT, *BLOCKS, CPU))
