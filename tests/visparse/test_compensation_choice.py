"""The choice of tiles: lists of every step lie on the same tables."""

import pytest
import torch

from visparse.compensation.call import Call
from visparse.compensation.choice import choose_by_content, choose_tiles
from visparse.compensation.tiles import kept_tiles, tiles_for
from visparse.layout import Layout
from visparse.patterns import Dense, Neighborhood, Skip, TopK, TopP
from visparse_kernels import choose_top_k
from visparse_kernels.attend.gluon_tables import parts_of, tables_of


def test_every_choice_lies_on_the_same_tables() -> None:
    tiles = tiles_for(Layout((3, 10, 12), after=20), 64, 64, torch.device("cpu"))
    patterns = (TopK(share=0.5), Skip(), TopK(share=0.5))
    maps = torch.rand(2, 1, 2, tiles.visual_q, tiles.visual_k, generator=torch.Generator().manual_seed(0)) < 0.4
    one, two = (choose_tiles(tiles, patterns, chosen, {}, None).lists[0] for chosen in maps)
    assert not torch.equal(one.full_offsets, two.full_offsets)
    assert one.head_group is two.head_group
    assert one.head_group.tolist() == [0, -1, 1]
    assert tables_of(one) is tables_of(two)  # else the Hopper kernel would wait for the device at every step
    assert parts_of(one, tables_of(one)) is parts_of(two, tables_of(two))


def test_block_density_counts_what_is_visited() -> None:
    tiles = tiles_for(Layout((3, 10, 12), before=5, after=20), 64, 32, torch.device("cpu"))
    blocks, extra = tiles.n_q * tiles.n_k, tiles.n_q * tiles.n_k - tiles.visual_q * tiles.visual_k
    near, top, nucleus = Neighborhood(window=(3, 5, 5)), TopK(share=0.3), TopP(mass=0.5, least=0.01, most=0.6)
    assert tiles.block_density(Skip()) == (0.0, 0.0)
    assert tiles.block_density(Dense()) == (1.0, 1.0)
    visited = float(tiles.with_extra(tiles.widen(near)).float().mean())
    assert tiles.block_density(near) == pytest.approx((visited, visited))
    kept = choose_top_k(torch.rand(tiles.visual_q, tiles.visual_k), kept_tiles(0.3, tiles.visual_k))
    assert tiles.block_density(top) == pytest.approx((float(tiles.with_extra(kept).float().mean()),) * 2)
    most = round(0.6 * tiles.visual_k)
    assert tiles.block_density(nucleus) == pytest.approx(
        ((tiles.visual_q + extra) / blocks, (tiles.visual_q * most + extra) / blocks)
    )


@pytest.mark.parametrize("scores", [("mass", "mass", "mass"), ("mass", "mass_variance", "mass")])
def test_heads_with_several_selectors_choose_as_each_would_alone(scores) -> None:
    layout = Layout((2, 16, 16))
    tiles = tiles_for(layout, 64, 64, torch.device("cpu"))
    make = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(2, layout.tokens, 4, 16, generator=make) for _ in range(3))
    call = Call(q, k, v, None, None)
    lse = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 4).logsumexp(-1)
    shares = (0.25, 0.5, 0.125)
    a, b, c = (TopK(share=share, score=score) for share, score in zip(shares, scores, strict=True))
    names, patterns = ("a", "b", "c", "a"), (a, b, c, a)
    chosen = choose_by_content(call, tiles, names, patterns, lse, None)
    for head, (name, pattern) in enumerate(zip(names, patterns, strict=True)):
        alone = choose_by_content(call.heads([head]), tiles, [name], [pattern], lse[:, [head]], None)
        assert torch.equal(chosen[:, [head]], alone)
