"""Block scores on a CUDA device: the error rule in bf16, every variant, and nothing that waits for the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from visparse_kernels import attend, choose_per_head, choose_top_k, choose_top_p, lists_from_map
from visparse_kernels.block_scores import triton_impl
from visparse_kernels.block_scores.slots import sampled_rows
from visparse_kernels.block_scores.testing import Case, check_scores, pooled_definition, random_case
from visparse_kernels.testing import check_attend, poisoned_memory

pytestmark = pytest.mark.gpu

KINDS = ["mass", "mass_variance"]
DTYPES = [torch.bfloat16, torch.float16]
CASES = {
    "odd": {"q_len": 517, "k_len": 611, "block_q": 128, "block_k": 128, "batch": 2},
    "orders": {"q_len": 517, "k_len": 611, "block_q": 128, "block_k": 128, "padding": "anywhere", "sample": 4},
    "blocks of padding": {"q_len": 500, "k_len": 400, "block_q": 64, "block_k": 64, "padding": "blocks", "sample": 2},
    "no padding": {"q_len": 512, "k_len": 1024, "block_q": 128, "block_k": 128, "sample": 4},
    "no power of two": {"q_len": 700, "k_len": 700, "block_q": 192, "block_k": 96, "sample": 4, "padding": "anywhere"},
    "wide": {"q_len": 700, "k_len": 700, "block_q": 256, "block_k": 256, "padding": "anywhere"},
    "narrow": {"q_len": 200, "k_len": 200, "block_q": 16, "block_k": 16, "sample": 4},
    "bias": {"q_len": 300, "k_len": 500, "block_q": 64, "block_k": 128, "bias": (1, 1), "padding": "anywhere"},
    "bias of heads": {"q_len": 300, "k_len": 500, "block_q": 64, "block_k": 128, "batch": 2, "bias": (2, 3)},
    "peaked": {"q_len": 300, "k_len": 500, "block_q": 64, "block_k": 128, "spread": 20.0},
}


@contextmanager
def without_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def to_gpu(case: Case) -> Case:
    moved = {name: getattr(case, name).cuda() for name in ("q", "k", "lse", "q_order", "k_order")}
    return replace(case, **moved, key_bias=None if case.key_bias is None else case.key_bias.cuda())


def draw(name: str, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, **changes: object) -> Case:
    return to_gpu(random_case(**{"heads": 3, "head_dim": head_dim, "dtype": dtype, **CASES[name], **changes}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_error_rule(case, kind, dtype) -> None:
    drawn = draw(case, dtype)
    with poisoned_memory():
        scores = drawn.scores(kind, "triton")
    check_scores(scores, drawn, kind)


@pytest.mark.parametrize("head_dim", [8, 32, 72, 128, 256])
def test_error_rule_for_head_sizes(head_dim) -> None:
    drawn = draw("orders", head_dim=head_dim)
    check_scores(drawn.scores("mass_variance", "triton"), drawn, "mass_variance")


@pytest.mark.parametrize("tile_q", [64, 128])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("case", ["orders", "bias of heads"])
def test_every_variant(case, tile_q, tma, stages) -> None:
    drawn = draw(case, head_dim=128)
    rows = sampled_rows(drawn.q_order, drawn.block_q, drawn.sample), drawn.k_order.view(-1, drawn.block_k)
    cut = triton_impl.Variant(tile_q=tile_q, num_warps=tile_q // 16, num_stages=stages, tma=tma)
    scores = triton_impl.run(drawn.q, drawn.k, drawn.lse, *rows, drawn.key_bias, drawn.scale, True, cut)
    check_scores(scores, drawn, "mass_variance")


def test_fp32_goes_to_the_reference() -> None:
    drawn = draw("odd", torch.float32)
    check_scores(drawn.scores("mass"), drawn, "mass")
    with pytest.raises(ValueError, match=r"needs bf16 or fp16, got torch.float32"):
        drawn.scores("mass", "triton")


def test_some_heads_at_a_time(monkeypatch) -> None:
    drawn = draw("bias of heads")
    whole = drawn.scores("mass_variance", "triton")
    monkeypatch.setattr(triton_impl, "_COPIED", 1)
    assert torch.equal(drawn.scores("mass_variance", "triton"), whole)


@pytest.mark.parametrize("broken", ["scale", "sample", "order", "heads"])
def test_a_broken_kernel_breaks_the_error_rule(broken) -> None:
    drawn = draw("orders")
    wrong = {
        "scale": replace(drawn, scale=0.14).scores("mass", "triton"),
        "sample": replace(drawn, sample=1).scores("mass", "triton"),
        "order": replace(drawn, k_order=drawn.k_order.roll(64)).scores("mass", "triton"),
        "heads": drawn.scores("mass", "triton").flip(1),
    }[broken]
    with pytest.raises(AssertionError, match="worst at"):
        check_scores(wrong, drawn, "mass")


@pytest.mark.parametrize("case", ["odd", "orders", "bias of heads"])
def test_pooled_scores_of_parts(case) -> None:
    drawn = draw(case, parts=8)
    wanted = pooled_definition(drawn, torch.float64)
    torch.testing.assert_close(drawn.scores("pooled").double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "pooled"])
@pytest.mark.parametrize(
    "choose",
    [
        lambda scores: choose_top_k(scores, 2),
        lambda scores: choose_top_p(scores, 0.5, 1, 3),
        lambda scores: choose_per_head(scores, 0.5, 1, 4),
    ],
)
def test_from_scores_to_lists_nothing_waits(choose, kind) -> None:
    drawn = draw("orders", parts=8 if kind == "pooled" else 1)
    heads = torch.arange(3, dtype=torch.int32, device="cuda")

    def build():
        kept = choose(drawn.scores(kind))[0]
        lists = lists_from_map(
            kept, q_len=517, k_len=611, block_q=128, block_k=128, q_order=drawn.q_order, k_order=drawn.k_order,
            head_group=heads, capacity=4,
        )  # fmt: skip
        return lists, attend(drawn.q, drawn.k, drawn.k, lists, scale=drawn.scale, return_lse=True, impl="triton")

    build()  # compiles
    torch.cuda.synchronize()
    with without_waiting():
        lists, (out, lse) = build()
    check_attend(out, lse, drawn.q, drawn.k, drawn.k, lists, scale=drawn.scale)
    assert lists.validate() is lists


@pytest.mark.parametrize("kind", ["mass_variance", "pooled"])
def test_cuda_graph_replays_with_new_inputs(kind) -> None:
    parts = 8 if kind == "pooled" else 1
    drawn, other = draw("orders", parts=parts), draw("orders", seed=7, parts=parts)
    drawn.scores(kind)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = choose_top_k(drawn.scores(kind), 2)
    for name in ("q", "k", "lse"):
        getattr(drawn, name).copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(kept, choose_top_k(drawn.scores(kind), 2))


def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    drawn = to_gpu(random_case(q_len=64, k_len=64, block_q=64, block_k=64, head_dim=64, dtype=torch.bfloat16))
    n = 32768
    order = torch.arange(n, dtype=torch.int32, device="cuda")
    q = torch.randn(1, n, 2, 64, dtype=torch.bfloat16, device="cuda")
    large = replace(
        drawn, q=q, k=q, lse=torch.zeros(1, 2, n, device="cuda"), q_order=order, k_order=order, block_q=128, block_k=128
    )
    large.scores("mass")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    large.scores("mass")
    copies = 2 * q.numel() * 2
    assert torch.cuda.max_memory_allocated() - before <= copies + 4 * (1 << 20)
