"""The kernels of lists, choices and hidden proxies on a GPU: CUDA graphs, no wait, and the number of launches."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("triton", reason="the kernels need the triton package")

from visparse_kernels import BlockLists, choose_top_k, lists_from_map
from visparse_kernels.attend import gluon_program
from visparse_kernels.attend.gluon_program import Program, build_full_program
from visparse_kernels.proxies.hidden import hidden_proxies
from visparse_kernels.testing_boxes import random_boxed_lists

pytestmark = pytest.mark.gpu

GRIDS = [(5, 21, 27), (2, 8, 16)]  # blocks of the first one hang over


class Layer:
    """What a layer keeps from call to call."""

    def __init__(self, grid, groups: int = 3, parts: int = 4) -> None:
        after = 0 if grid == (2, 8, 16) else 300
        boxed = random_boxed_lists(
            grid=grid, after=after, q_box=(2, 8, 8), k_box=(1, 8, 16), head_group=[0], device="cuda"
        )
        self.boxed = boxed
        self.shape = (groups, boxed.n_q, boxed.n_k)
        self.heads = torch.arange(groups, dtype=torch.int32, device="cuda")
        self.tile = torch.arange(boxed.n_k * parts, device="cuda") // parts

    def scores(self, seed: int) -> torch.Tensor:
        return torch.rand(self.shape, generator=torch.Generator(device="cuda").manual_seed(seed), device="cuda")

    def lists(self, kept: torch.Tensor) -> BlockLists:
        boxed = self.boxed
        return lists_from_map(
            kept,
            q_len=boxed.q_len,
            k_len=boxed.k_len,
            block_q=boxed.block_q,
            block_k=boxed.block_k,
            q_order=boxed.q_order,
            k_order=boxed.k_order,
            head_group=self.heads,
            boxes=boxed.boxes,
            capacity=max(1, boxed.n_k // 2),
        )

    def call(self, scores: torch.Tensor) -> tuple[torch.Tensor, BlockLists, Program, torch.Tensor]:
        kept = choose_top_k(scores, max(1, scores.shape[-1] // 4))
        lists = self.lists(kept)
        return kept, lists, build_full_program(lists), hidden_proxies(kept, self.tile)


def check(got, wanted) -> None:
    (kept, lists, program, hidden), (its_kept, its_lists, its_program, its_hidden) = got, wanted
    assert torch.equal(kept, its_kept)
    assert torch.equal(hidden, its_hidden)
    assert torch.equal(lists.full_offsets, its_lists.full_offsets)
    assert torch.equal(lists.partial_offsets, its_lists.partial_offsets)
    number = int(its_lists.full_offsets[-1])
    assert torch.equal(lists.full_indices[:number], its_lists.full_indices[:number])
    for name in ("offsets", "unmasked"):
        assert torch.equal(getattr(program, name), getattr(its_program, name)), name
    for name in ("starts", "masks", "blocks"):
        assert torch.equal(getattr(program, name)[: number + 1], getattr(its_program, name)[: number + 1]), name


def in_torch(layer: Layer, scores: torch.Tensor):
    """The same call in torch operations, on the CPU."""
    kept = choose_top_k(scores.cpu(), max(1, scores.shape[-1] // 4)).cuda()
    with mock.patch("visparse_kernels.lists_map.kernels_apply", return_value=False):
        lists = layer.lists(kept)
    with mock.patch.object(gluon_program, "kernels_apply", return_value=False):
        program = build_full_program(lists)
    return kept, lists, program, hidden_proxies(kept.cpu(), layer.tile.cpu()).cuda()


@pytest.mark.parametrize("grid", GRIDS)
def test_nothing_waits_for_the_device(grid) -> None:
    layer = Layer(grid)
    layer.call(layer.scores(0))
    inputs = [layer.scores(seed) for seed in range(1, 4)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = [layer.call(scores) for scores in inputs]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for scores, one in zip(inputs, made, strict=True):
        check(one, in_torch(layer, scores))


@pytest.mark.parametrize("grid", GRIDS)
def test_cuda_graph_replays_with_new_scores(grid) -> None:
    layer = Layer(grid)
    scores = layer.scores(0)
    layer.call(scores)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = layer.call(scores)
    for seed in (1, 2):
        scores.copy_(layer.scores(seed))
        for part in made[1].full_indices, made[2].starts, made[2].masks, made[2].blocks, made[3]:
            part.fill_(0x7F7F7F7F)
        graph.replay()
        torch.cuda.synchronize()
        check(made, in_torch(layer, scores))


def launches(run) -> list[str]:
    """Names of what a call starts on the device."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_number_of_launches() -> None:
    layer = Layer(GRIDS[0])
    scores = layer.scores(0)
    kept = choose_top_k(scores, 3)
    lists = layer.lists(kept)
    if not launches(lambda: scores + 1):
        pytest.skip("the profiler sees nothing of this device")
    for most, run in (
        (5, lambda: layer.lists(kept)),  # counted, a running sum (two), written, asserted
        (1, lambda: build_full_program(replace(lists))),
        (1, lambda: hidden_proxies(kept, layer.tile)),
        (1, lambda: choose_top_k(scores, 3)),
    ):
        names = launches(run)
        assert 1 <= len(names) <= most, names
