"""The choice of blocks: against plain loops, ties, limits, and nothing that would wait for a device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from visparse_kernels import choose_per_head, choose_top_k, choose_top_p


def draw(*shape: int, seed: int = 0, levels: int = 6) -> torch.Tensor:
    """Draw scores with many ties."""
    return torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed)).float()


def ranking(row: list[float], banned: set[int]) -> list[int]:
    return sorted((j for j in range(len(row)) if j not in banned), key=lambda j: (-row[j], j))


def as_map(kept: set[int], n_k: int) -> list[bool]:
    return [j in kept for j in range(n_k)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.booleans(), st.booleans())
def test_top_k(seed, count, with_always, with_allowed) -> None:
    scores = draw(2, 3, 4, 9, seed=seed)
    make = torch.Generator().manual_seed(seed)
    always = torch.rand(9, generator=make) < 0.3 if with_always else None
    allowed = torch.rand(4, 9, generator=make) < 0.7 if with_allowed else None
    got = choose_top_k(scores, count, always, allowed).view(-1, 9)
    for number, row in enumerate(scores.view(-1, 9).tolist()):
        text = set() if always is None else set(always.nonzero()[:, 0].tolist())
        out = set() if allowed is None else set((~allowed[number % 4]).nonzero()[:, 0].tolist())
        wanted = (set(ranking(row, text | out)[:count]) | text) - out
        assert got[number].tolist() == as_map(wanted, 9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.3, 0.5, 0.9, 1.0]), st.integers(1, 4), st.integers(4, 9))
def test_top_p(seed, mass, least, most) -> None:
    scores = draw(2, 3, 9, seed=seed, levels=4)
    always = torch.rand(9, generator=torch.Generator().manual_seed(seed)) < 0.2
    got = choose_top_p(scores, mass, least, most, always).view(-1, 9)
    for number, row in enumerate(scores.view(-1, 9).tolist()):
        text = set(always.nonzero()[:, 0].tolist())
        order = ranking(row, text)
        total = sum(row[j] for j in order)
        enough = next(n for n in range(10) if sum(row[j] for j in order[:n]) >= torch.tensor(mass * total))
        wanted = set(order[: min(max(enough, least), most)]) | text
        assert got[number].tolist() == as_map(wanted, 9)


def test_top_p_keeps_the_least_where_nothing_scores_and_the_most_where_all_score_alike() -> None:
    scores = torch.stack([torch.zeros(8), torch.ones(8)])
    kept = choose_top_p(scores, 1.0, 2, 5)
    assert kept.sum(-1).tolist() == [2, 5]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.5, 0.55]), st.integers(1, 2), st.integers(6, 9), st.booleans())
def test_per_head_spends_the_budget_on_what_scores_most(seed, share, least, most, with_always) -> None:
    scores = torch.rand(2, 3, 4, 9, generator=torch.Generator().manual_seed(seed)) ** 3
    always = torch.arange(9) == 2 if with_always else None
    kept = choose_per_head(scores, share, least, most, always)
    counts = kept.sum(-1) - (1 if with_always else 0)
    assert (counts.flatten(1).sum(1) == round(share * 9 * 12)).all()
    assert bool(((counts >= least) & (counts <= most)).all())
    for row in range(2):
        # no exchange of a kept block for one that is not would gain, where limits allow it
        free = ~always if with_always else torch.ones(9, dtype=torch.bool)
        can_lose = kept[row] & free & (counts[row] > least)[..., None]
        can_win = ~kept[row] & (counts[row] < most)[..., None]
        if can_lose.any() and can_win.any():
            assert scores[row][can_lose].min() >= scores[row][can_win].max()
        for head in range(3):
            for i in range(4):
                inside, outside = kept[row, head, i] & free, ~kept[row, head, i]
                assert bool((scores[row, head, i][inside].min() >= scores[row, head, i][outside]).all())


def test_per_head_gives_more_to_the_head_that_needs_more() -> None:
    scores = (
        torch.rand(1, 2, 4, 10, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0])[:, None, None]
    )
    counts = choose_per_head(scores, 0.4, 1, 10).sum(-1)[0]
    assert counts[0].tolist() == [1, 1, 1, 1]
    assert int(counts[1].sum()) == 12 + 16


def test_ties_go_to_the_lowest_head_and_row() -> None:
    kept = choose_per_head(torch.ones(1, 2, 2, 4), 0.5, 1, 4)
    assert kept.sum(-1).tolist() == [[[4, 2], [1, 1]]]


@pytest.mark.parametrize(
    "choose",
    [
        lambda scores, always: choose_top_k(scores, 2, always, scores > 0.1),
        lambda scores, always: choose_top_p(scores, 0.8, 1, 4, always),
        lambda scores, always: choose_per_head(scores, 0.4, 1, 4, always),
    ],
)
def test_nothing_depends_on_the_data_but_the_result(choose) -> None:
    # fake tensors hold no data: whatever would read a number, or size a tensor by one, raises here
    scores, always = torch.rand(2, 3, 4, 8), torch.arange(8) > 6
    graph = make_fx(choose, tracing_mode="fake")(scores, always)
    other = torch.rand(2, 3, 4, 8)
    assert torch.equal(graph(other, ~always), choose(other, ~always))


ERRORS = {
    "count": (lambda s: choose_top_k(s, 9), r"count: wanted 1 to 8 blocks \(a row of scores\), got 9"),
    "counts of bytes": (
        lambda s: choose_top_k(s.view(1, 2, -1, 8), torch.ones(2, dtype=torch.uint8)),
        r"count: wanted an int, or int32 \[heads\] on cpu .*got torch.uint8 \[2\] on cpu beside \[1, 2, ",
    ),
    "counts beside rows": (
        lambda s: choose_top_k(s, torch.ones(8, dtype=torch.int32)),
        r"count: wanted an int, or int32",
    ),
    "no count": (lambda s: choose_top_k(s, 0), r"count: wanted 1 to 8 blocks .*, got 0; clip"),
    "ints": (lambda s: choose_top_k(s.long(), 1), r"scores: wanted floats \[..., n_k\], got torch.int64"),
    "always": (lambda s: choose_top_k(s, 1, torch.ones(8)), r"always: wanted bool \[8\] .*got torch.float32 \[8\]"),
    "always rows": (lambda s: choose_top_k(s, 1, torch.ones(4, 8).bool()), r"always: .*got torch.bool \[4, 8\]"),
    "allowed": (
        lambda s: choose_top_k(s, 1, None, torch.ones(3, 8).bool()),
        r"allowed: wanted bool that broadcasts to \[2, 3, 4, 8\], got torch.bool \[3, 8\]",
    ),
    "mass": (lambda s: choose_top_p(s, 1.5, 1, 2), r"mass: wanted a share over 0 up to 1, got 1.5"),
    "limits": (lambda s: choose_top_p(s, 0.5, 3, 2), r"least, most: wanted 1 <= least <= most <= 8 .*, got 3 and 2"),
    "least": (lambda s: choose_per_head(s, 0.5, 0, 2), r"least, most: .* got 0 and 2; a row that keeps nothing"),
    "rank": (lambda s: choose_per_head(s[0], 0.5, 1, 8), r"scores: wanted \[batch, heads, n_q, n_k\], got \[3, 4, 8\]"),
    "share": (
        lambda s: choose_per_head(s, 0.5, 1, 3),
        r"total_share: wanted a mean of 1 to 3 blocks .* of 8, got 0.5 \* 8 = 4; change",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name) -> None:
    call, text = ERRORS[name]
    with pytest.raises(ValueError, match=text):
        call(torch.rand(2, 3, 4, 8))


def test_each_head_keeps_as_many_as_it_may() -> None:
    scores = torch.rand(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([1, 8, 3], dtype=torch.int32)
    made = choose_top_k(scores, counts)
    for head, count in enumerate(counts.tolist()):
        assert torch.equal(made[:, head], choose_top_k(scores[:, head], count))
