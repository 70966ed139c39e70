"""The choice of tiles: lists of every step lie on the same tables."""

import pytest
import torch

from visparse.compensation.call import Call, unfolded
from visparse.compensation.choice import choose_by_content, choose_tiles
from visparse.compensation.pooled import parted, pooled_tiles
from visparse.compensation.tiles import kept_tiles, tiles_for
from visparse.layout import Layout
from visparse.patterns import Dense, Neighborhood, Skip, TopK, TopP, pattern_from_dict
from visparse_kernels import block_scores, choose_top_k
from visparse_kernels.attend.gluon_tables import parts_of, tables_of


def test_every_choice_lies_on_the_same_tables() -> None:
    tiles = tiles_for(Layout((3, 10, 12), after=20), 64, 64, torch.device("cpu"))
    patterns = (TopK(share=0.5), Skip(), TopK(share=0.5))
    maps = torch.rand(2, 2, 2, tiles.visual_q, tiles.visual_k, generator=torch.Generator().manual_seed(0)) < 0.4
    one, two = (choose_tiles(tiles, patterns, chosen, {}, None).lists for chosen in maps)
    assert not torch.equal(one.full_offsets, two.full_offsets)
    assert one.head_group is two.head_group
    assert tables_of(one) is tables_of(two)  # else the Hopper kernel would wait for the device at every step
    assert parts_of(one, tables_of(one)) is parts_of(two, tables_of(two))


def test_rows_of_a_batch_are_more_heads() -> None:
    tiles = tiles_for(Layout((3, 10, 12), after=20), 64, 64, torch.device("cpu"))
    patterns = (TopK(share=0.5), Skip(), Dense())
    maps = torch.rand(2, 1, tiles.visual_q, tiles.visual_k, generator=torch.Generator().manual_seed(0)) < 0.4
    static = {Dense(): torch.ones(tiles.visual_q, tiles.visual_k, dtype=torch.bool)}
    both = choose_tiles(tiles, patterns, maps, static, None)
    assert both.rows == 2
    assert both.head_group.tolist() == [1, -1, 0]
    assert both.lists.head_group.tolist() == [1, -1, 0, 3, -1, 2]
    whole = both.lists.to_mask()
    for row in range(2):
        alone = choose_tiles(tiles, patterns, maps[row : row + 1], static, None)
        assert alone.rows == 1
        assert torch.equal(whole[3 * row : 3 * row + 3], alone.lists.to_mask())
    assert choose_tiles(tiles, (Dense(), Skip()), None, static, None).rows == 1  # the same for every batch


def test_folding_a_call_makes_heads_of_rows() -> None:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, 3, 8, generator=make) for _ in range(3))
    for shape in ((1, 1), (2, 1), (1, 3), (2, 3)):
        bias = torch.randn(*shape, 5, generator=make)
        folded = Call(q, k, v, bias, 0.5).folded()
        assert folded.q.shape == (1, 5, 6, 8)
        for place, (row, head) in enumerate((row, head) for row in range(2) for head in range(3)):
            assert torch.equal(folded.k[0, :, place], k[row, :, head])
            assert torch.equal(folded.bias.expand(1, 6, 5)[0, place], bias.expand(2, 3, 5)[row, head])
    out, lse = unfolded(folded.v, folded.v[..., 0].transpose(1, 2), 2)
    assert torch.equal(out, v)
    assert torch.equal(lse, v[..., 0].transpose(1, 2))


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


@pytest.mark.parametrize(
    "scores",
    [("mass", "mass", "mass"), ("mass", "mass_variance", "mass"), ("pooled", "mass", "pooled")],
)
def test_heads_with_several_selectors_choose_as_each_would_alone(scores) -> None:
    layout = Layout((2, 16, 16))
    tiles = tiles_for(layout, 64, 64, torch.device("cpu"))
    make = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(2, layout.tokens, 4, 16, generator=make) for _ in range(3))
    call = Call(q, k, v, None, None)
    lse = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 4).logsumexp(-1)
    shares = (0.25, 0.5, 0.125)
    parts = (1, 1, 8 if scores[2] == "pooled" else 1)
    a, b, c = (TopK(share=s, score=score, parts=n) for s, score, n in zip(shares, scores, parts, strict=True))
    names, patterns = ("a", "b", "c", "a"), (a, b, c, a)
    chosen = choose_by_content(call, tiles, names, patterns, lse, None)
    for head, (name, pattern) in enumerate(zip(names, patterns, strict=True)):
        alone = choose_by_content(call.heads([head]), tiles, [name], [pattern], lse[:, [head]], None)
        assert torch.equal(chosen[:, [head]], alone)


def test_parts_are_boxes_of_a_tile() -> None:
    tiles = tiles_for(Layout((1, 24, 32), before=3), 192, 128, torch.device("cpu"))
    order, own = (table.view(-1, tiles.block_k) for table in (parted(tiles, 8), tiles.k_order))
    assert torch.equal(order.sort(1).values, own.sort(1).values)
    assert torch.equal(order[tiles.visual_k :], own[tiles.visual_k :])  # extra tokens stay runs
    places = order[: tiles.visual_k].view(-1, 8, 16).long() - 3
    assert int(places.min()) >= 0
    for axis in (places // 32, places % 32):
        assert bool((axis.amax(-1) - axis.amin(-1) == 3).all())  # 4 x 4 tokens
    assert parted(tiles, 1) is tiles.k_order


@pytest.mark.parametrize("parts", [1, 8])
def test_pooled_scores_are_those_of_their_parts(parts) -> None:
    layout = Layout((2, 12, 16), before=1, after=9)
    tiles = tiles_for(layout, 64, 32, torch.device("cpu"))
    make = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(2, layout.tokens, 3, 16, generator=make) for _ in range(3))
    bias = torch.randn(2, 1, layout.tokens, generator=make)
    found = pooled_tiles(Call(q, k, v, bias, 0.3), tiles, TopK(score="pooled", parts=parts))
    # the same from key blocks as small as the parts, summed
    small = {"block_q": 64, "block_k": 32 // parts, "kind": "pooled", "key_bias": bias, "scale": 0.3}
    scores = block_scores(q, k, None, q_order=tiles.q_order, k_order=parted(tiles, parts), **small)
    torch.testing.assert_close(found, scores.unflatten(3, (tiles.n_k, parts)).sum(-1), rtol=1e-5, atol=1e-7)
    assert found.shape == (2, 3, tiles.n_q, tiles.n_k)


def test_parts_of_a_selector() -> None:
    fine = TopK(score="pooled", parts=8, share=0.25)
    assert pattern_from_dict(fine.to_dict()) == fine
    assert fine.to_dict()["parts"] == 8
    assert not fine.reused
    old = {"name": "top_k", "share": 0.25, "score": "pooled"}
    assert pattern_from_dict(old) == TopK(share=0.25, score="pooled", parts=1)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"score": "pooled", "parts": 3}, "parts: wanted 1, 2, 4, 8 or 16, got 3; 1 takes one mean of each tile"),
        ({"score": "pooled", "parts": True}, "parts: wanted 1, 2, 4, 8 or 16, got True"),
        ({"score": "mass", "parts": 4}, "parts: wanted 1 for score='mass', which is exact, got 4; leave it out"),
        ({"score": "pooled", "parts": 8, "refresh": 3}, "refresh: pooled scores are computed anew"),
    ],
)
def test_errors_of_pooled_selectors(wrong, text) -> None:
    with pytest.raises(ValueError, match=text):
        TopK(**wrong)
    with pytest.raises(ValueError, match=text):
        TopP(**wrong)
