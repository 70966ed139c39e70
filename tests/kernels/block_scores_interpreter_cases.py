"""The Triton kernel of block scores in Triton's CPU interpreter; test_block_scores_interpreter.py runs this file.

fp16 and fp32 only: the interpreter multiplies bf16 wrongly.
"""

from dataclasses import replace

import pytest
import torch

from visparse_kernels import attend, lists_from_map
from visparse_kernels.bits import identity_order
from visparse_kernels.block_scores import triton_impl
from visparse_kernels.block_scores.slots import sampled_rows
from visparse_kernels.block_scores.testing import check_scores, random_case
from visparse_kernels.testing import check_attend, poisoned_memory

pytestmark = pytest.mark.interpreter

CASES = {
    "odd": {"q_len": 61, "k_len": 67, "block_q": 16, "block_k": 32, "batch": 2},
    "orders": {"q_len": 50, "k_len": 90, "block_q": 32, "block_k": 64, "padding": "anywhere", "sample": 2},
    "no power of two": {"q_len": 100, "k_len": 100, "block_q": 48, "block_k": 24, "padding": "anywhere", "sample": 4},
    "many tiles": {"q_len": 600, "k_len": 40, "block_q": 32, "block_k": 16, "padding": "blocks", "heads": 3},
    "no padding": {"q_len": 64, "k_len": 96, "block_q": 16, "block_k": 32, "sample": 4},
    "bias": {"q_len": 50, "k_len": 90, "block_q": 16, "block_k": 32, "bias": (1, 1), "padding": "anywhere"},
    "bias of heads": {"q_len": 50, "k_len": 90, "block_q": 16, "block_k": 32, "batch": 2, "bias": (2, 2)},
    "peaked": {"q_len": 50, "k_len": 90, "block_q": 16, "block_k": 32, "spread": 20.0},
    "one key": {"q_len": 5, "k_len": 7, "block_q": 4, "block_k": 1},
    "head of 72": {"q_len": 33, "k_len": 35, "block_q": 8, "block_k": 16, "head_dim": 72},
    "head of 8": {"q_len": 33, "k_len": 35, "block_q": 8, "block_k": 16, "head_dim": 8},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["mass", "mass_variance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_rule(case, kind, dtype) -> None:
    drawn = random_case(**CASES[case], dtype=dtype, seed=1)
    with poisoned_memory():
        scores = drawn.scores(kind, "triton")
    check_scores(scores, drawn, kind)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("tile_q", [32, 128])
@pytest.mark.parametrize("case", ["orders", "bias of heads"])
def test_every_variant(case, tile_q, tma) -> None:
    drawn = random_case(**CASES[case])
    rows = sampled_rows(drawn.q_order, drawn.block_q, drawn.sample), drawn.k_order.view(-1, drawn.block_k)
    cut = triton_impl.Variant(tile_q=tile_q, tma=tma)
    scores = triton_impl.run(drawn.q, drawn.k, drawn.lse, *rows, drawn.key_bias, drawn.scale, True, cut)
    check_scores(scores, drawn, "mass_variance")


@pytest.mark.parametrize("case", ["odd", "bias of heads"])
def test_some_heads_at_a_time(case, monkeypatch) -> None:
    drawn = random_case(**CASES[case] | {"heads": 2})
    whole = drawn.scores("mass_variance", "triton")
    monkeypatch.setattr(triton_impl, "_COPIED", 1)
    assert torch.equal(drawn.scores("mass_variance", "triton"), whole)


def test_padding_copies_nothing() -> None:
    drawn = random_case(**CASES["orders"])
    orders = {name: getattr(drawn, name).clone() for name in ("q_order", "k_order")}
    for order in orders.values():
        order[order == 0] = -1
    drawn = replace(drawn, **orders)
    poisoned = replace(drawn, q=drawn.q.clone(), k=drawn.k.clone(), lse=drawn.lse.clone())
    for tensor in (poisoned.q[:, 0], poisoned.k[:, 0], poisoned.lse[:, :, 0]):
        tensor.fill_(torch.nan)
    assert torch.equal(poisoned.scores("mass_variance", "triton"), drawn.scores("mass_variance", "triton"))


def test_a_query_that_sees_nothing_weighs_nothing() -> None:
    drawn = random_case(**CASES["bias of heads"])
    drawn.key_bias[1] = -torch.inf  # type: ignore[index]
    drawn = replace(drawn, lse=torch.stack([drawn.lse[0], torch.full_like(drawn.lse[1], -torch.inf)]))
    scores = drawn.scores("mass_variance", "triton")
    assert torch.equal(scores[1], torch.zeros_like(scores[1]))
    assert bool((scores[0] > 0).all())


@pytest.mark.parametrize("broken", ["scale", "sample", "order", "heads"])
def test_a_broken_kernel_breaks_the_error_rule(broken) -> None:
    drawn = random_case(**CASES["orders"], dtype=torch.float16)
    wrong = {
        "scale": replace(drawn, scale=0.13).scores("mass", "triton"),
        "sample": replace(drawn, sample=1).scores("mass", "triton"),
        "order": replace(drawn, k_order=drawn.k_order.roll(1)).scores("mass", "triton"),
        "heads": drawn.scores("mass", "triton").flip(1),
    }[broken]
    with pytest.raises(AssertionError, match="worst at"):
        check_scores(wrong, drawn, "mass")


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_attend_takes_lists_with_room_behind_the_last_offset(keep, make_qkv) -> None:
    kept = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)) < keep
    q_order, k_order = identity_order(60, 16)[0], identity_order(90, 32)[0]
    lists = lists_from_map(
        kept, q_len=60, k_len=90, block_q=16, block_k=32, q_order=q_order, k_order=k_order,
        head_group=torch.tensor([0, -1, 1], dtype=torch.int32),
    )  # fmt: skip
    q, k, v = make_qkv(lists)
    with poisoned_memory():
        out, lse = attend(q, k, v, lists, return_lse=True, impl="triton")
    check_attend(out, lse, q, k, v, lists)


def test_what_cannot_be_served() -> None:
    drawn = random_case(**CASES["odd"])
    with pytest.raises(ValueError, match="bf16 products are wrong in Triton's interpreter"):
        replace(drawn, q=drawn.q.bfloat16(), k=drawn.k.bfloat16()).scores("mass", "triton")
    wide = random_case(q_len=10, k_len=600, block_q=8, block_k=512)
    with pytest.raises(ValueError, match="needs at most 256 sampled queries and 256 keys in a block, got 8 and 512"):
        wide.scores("mass", "triton")
