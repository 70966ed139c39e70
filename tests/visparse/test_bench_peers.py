"""What the benchmark hands to peers: stand-ins with the peers' call signatures, which compute from the definition.

The stand-ins run on the CPU. They show that lists, orders and layouts are translated rightly, not that a peer is fast.
"""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from visparse.bench import problem as bench_problem
from visparse.bench.cases import Case
from visparse.bench.check import sample_rows
from visparse.bench.contenders import base, fastvideo, flash3, flash4, flashinfer, flex, natten, ours, sdpa
from visparse.bench.contenders.registry import all_contenders, choose_contenders
from visparse.bench.contenders.slots import Slots, block_rows
from visparse.bench.problem import Inputs, Problem
from visparse.layout import coordinates
from visparse.patterns import Neighborhood
from visparse_kernels import BlockLists
from visparse_kernels.testing import random_lists

PLAIN = Case(name="plain", grid=(1, 1, 512), heads=2, head_dim=16, patterns=("dense",))
GRID = Case(
    name="grid",
    grid=(4, 8, 16),
    heads=2,
    head_dim=16,
    window=(4, 8, 8),
    stride=(2, 8, 8),
    patterns=("dense",),
)
TILES = Case(name="tiles", grid=(30, 8, 16), heads=2, head_dim=128, tile=(6, 8, 8), tiles=(3, 1, 1), patterns=("sta",))


def masked(q, k, v, mask):
    """[B, S, H, D] with mask [H, S, S]; in fp32, as kernels sum."""
    logits = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.float()).to(q.dtype)


def expand(count, index, n_k, block_q, block_k):
    """Token mask [H, S, S] of padded rows [H, n_q, longest]."""
    blocks = torch.zeros(*count.shape, n_k, dtype=torch.bool)
    for head, row in torch.cartesian_prod(*map(torch.arange, count.shape)).tolist():
        blocks[head, row, index[head, row, : count[head, row]].long()] = True
    return blocks.repeat_interleave(block_q, 1).repeat_interleave(block_k, 2)


def fake(monkeypatch, name, **members):
    module = ModuleType(name)
    module.__spec__ = SimpleNamespace(name=name)
    module.__path__ = []
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    for module in (flash3, flash4, flex, fastvideo, flashinfer, natten, sdpa):
        monkeypatch.setattr(module, "not_cuda", lambda problem: None)


def verdict(contender, case, pattern, dtype=torch.bfloat16, blocks=(128, 128)):
    problem = Problem(Inputs.random(case, "cpu", dtype, 0), pattern, blocks)
    assert contender.absent() is None
    assert contender.can_run(problem) is None
    return sample_rows(problem).verdict(contender.prepare(problem)())


def dense_attention(q, k, v, **rest):
    return masked(q, k, v, torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)), None


def test_flash_attention_3(monkeypatch):
    fake(monkeypatch, "fa3_fwd_interface", flash_attn_func=lambda q, k, v: dense_attention(q, k, v)[0])
    assert verdict(flash3.Flash3(), PLAIN, "dense") is None


def test_flash_attention_3_under_its_other_name(monkeypatch):
    fake(monkeypatch, "flash_attn_interface", flash_attn_func=dense_attention)
    assert verdict(flash3.Flash3(), PLAIN, "dense") is None


@pytest.fixture
def flash_attn(monkeypatch):
    def attention(q, k, v, block_sparse_tensors=None):
        if block_sparse_tensors is None:
            return dense_attention(q, k, v)
        given = block_sparse_tensors
        assert int(given["mask_block_cnt"].sum()) == 0
        n_k = -(-k.shape[1] // given["block_size"][1])
        mask = expand(given["full_block_cnt"][0], given["full_block_idx"][0], n_k, *given["block_size"])
        return masked(q, k, v, mask[:, : q.shape[1], : k.shape[1]]), None

    fake(monkeypatch, "flash_attn")
    fake(monkeypatch, "flash_attn.cute", flash_attn_func=attention)
    fake(monkeypatch, "flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=dict)


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize(("case", "pattern"), [(PLAIN, "random_25"), (PLAIN, "uneven_25"), (GRID, "gna_strided")])
def test_flash_attention_4(case, pattern):
    assert verdict(flash4.Flash4Sparse(), case, pattern) is None
    assert verdict(flash4.Flash4(), case, "dense") is None


@pytest.mark.usefixtures("flash_attn")
def test_flash_attention_4_with_a_ragged_end():
    case = Case(name="ragged", grid=(1, 1, 500), heads=2, head_dim=16, patterns=("dense",))
    assert verdict(flash4.Flash4Sparse(), case, "random_50") is None


@pytest.mark.usefixtures("flash_attn")
def test_masks_are_not_for_flash_attention_4():
    problem = Problem(Inputs.random(PLAIN, "cpu", torch.bfloat16, 0), "partial_50", (128, 128))
    assert "blocks with a bit mask" in flash4.Flash4Sparse().can_run(problem)
    assert flash4.Flash4().can_run(problem) == "computes dense attention only"


def test_flash_infer_with_heads_folded_into_rows(monkeypatch):
    class Wrapper:
        def __init__(self, workspace, backend):
            assert workspace.numel() == 128 * 2**20
            assert backend == "fa3"

        def plan(self, indptr, indices, rows, columns, block_q, block_k, q_heads, k_heads, head_dim, **dtypes):
            assert (q_heads, k_heads, head_dim) == (1, 1, 16)
            assert set(dtypes.values()) == {torch.bfloat16}
            mask = torch.zeros(rows // block_q, columns // block_k, dtype=torch.bool)
            mask[torch.arange(len(mask)).repeat_interleave(indptr.diff()), indices.long()] = True
            self.mask = mask.repeat_interleave(block_q, 0).repeat_interleave(block_k, 1)

        def run(self, q, k, v):
            return masked(q[None], k[None], v[None], self.mask)[0]

    fake(monkeypatch, "flashinfer", BlockSparseAttentionWrapper=Wrapper)
    assert verdict(flashinfer.FlashInfer("fa3"), PLAIN, "random_25") is None
    assert verdict(flashinfer.FlashInfer("fa3"), GRID, "gna_strided") is None


@pytest.fixture
def fastvideo_kernel(monkeypatch):
    def from_indices(q, k, v, index, count, sizes):
        assert sizes.tolist() == [64] * (k.shape[2] // 64)
        mask = expand(count[0], index[0], len(sizes), 64, 64)
        return masked(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2), None

    def sliding(q, k, v, windows, text_length, has_text, shape):
        assert (text_length, has_text) == (0, False)
        assert len(windows) == q.shape[1]
        sides = [int(side) // tile for side, tile in zip(shape.split("x"), (6, 8, 8), strict=True)]
        at = coordinates(torch.arange(q.shape[2]) // 384, tuple(sides))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        for axis, window in enumerate(windows[0]):
            middle = at[:, axis].clamp(window // 2, sides[axis] - 1 - window // 2)
            mask &= (at[None, :, axis] - middle[:, None]).abs() <= window // 2
        return masked(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)

    fake(monkeypatch, "fastvideo_kernel", sliding_tile_attention=sliding)
    fake(monkeypatch, "fastvideo_kernel.ops", sta_fwd=None)
    fake(
        monkeypatch,
        "fastvideo_kernel.block_sparse_attn",
        block_sparse_attn_from_indices=from_indices,
        _get_sm90_ops=lambda: (print, print),
    )


@pytest.mark.usefixtures("fastvideo_kernel")
@pytest.mark.parametrize(("case", "pattern"), [(PLAIN, "random_25"), (GRID, "gna_strided")])
def test_fast_video_sparse(case, pattern):
    assert verdict(fastvideo.VideoSparse(), case, pattern) is None


@pytest.mark.usefixtures("fastvideo_kernel")
def test_fast_video_sliding_tiles(monkeypatch):
    """Also shows that sliding tile attention is the neighbourhood that the pattern `sta` is."""
    monkeypatch.setattr(fastvideo, "_GRIDS", (TILES.grid,))
    assert verdict(fastvideo.SlidingTile(), TILES, "sta") is None


@pytest.mark.usefixtures("fastvideo_kernel")
def test_fast_video_says_which_kernel_ran():
    assert fastvideo.SlidingTile().facts(None) == {"variant": "triton"}
    assert fastvideo.VideoSparse().facts(None) == {"variant": "thunderkittens"}


@pytest.mark.parametrize("pattern", ["gna", "gna_strided"])
def test_natten(monkeypatch, pattern):
    def na3d(q, k, v, kernel_size, stride):
        at = coordinates(torch.arange(GRID.tokens), GRID.grid)
        mask = Neighborhood(window=kernel_size, stride=stride).keep(at, at, GRID.grid)
        return masked(*(x.flatten(1, 3) for x in (q, k, v)), mask).view(q.shape)

    fake(monkeypatch, "natten", na3d=na3d, HAS_LIBNATTEN=True)
    assert verdict(natten.Natten(), GRID, pattern) is None
    assert natten.Natten().facts(None) == {"variant": "libnatten"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("case", "pattern"), [(PLAIN, "partial_50"), (GRID, "gna"), (GRID, "dense")])
def test_flex(monkeypatch, case, pattern):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert verdict(flex.Flex(), case, pattern, dtype=torch.float32) is None


def test_pytorch():
    assert verdict(sdpa.Sdpa("sdpa_default", None), PLAIN, "dense") is None


@pytest.mark.parametrize("text", [0, 5])
def test_blocks_from_tiled_memory(monkeypatch, text):
    """On a ragged grid, so that slots without a token lie between tokens; the kernel is asked for boxes."""
    monkeypatch.setattr(bench_problem, "prefers_boxes", lambda *_: True)
    case = replace(GRID, grid=(5, 10, 18), window=(5, 4, 4), stride=(1, 2, 4), after=text)
    problem = Problem(Inputs.random(case, "cpu", torch.float32, 0), "gna_strided", (32, 32))
    one = ours.Pretiled("cpu")
    assert one.can_run(problem) is None
    call = one.prepare(problem)
    assert call().shape[1] > case.tokens
    assert sample_rows(problem).verdict(one.tokens(problem, call())) is None


def test_only_what_auto_takes_gets_boxes(monkeypatch):
    monkeypatch.setattr(bench_problem, "prefers_boxes", lambda *_: True)
    problem = Problem(Inputs.random(GRID, "cpu", torch.float32, 0), "gna_strided", (32, 32))
    assert ours.Ours("cpu").built(problem).lists.boxes is not None
    assert ours.Ours("reference").built(problem).lists.boxes is None
    assert ours.Ours("cpu").facts(problem) == {"impl": "cpu", "block_q": 32, "block_k": 32, "boxes": True}


def test_names_of_contenders_are_checked():
    every = all_contenders()
    assert [one.name for one in choose_contenders(every, ["fa3"])] == ["fa3"]
    ours = choose_contenders(every, ["visparse"])
    assert len(ours) >= 3
    assert all(one.name.startswith("visparse:") for one in ours)
    with pytest.raises(ValueError, match=r"contender: wanted some of visparse, .*, got 'fa33'; did you mean 'fa3'"):
        choose_contenders(every, ["fa33"])


def test_what_is_not_installed_is_named():
    assert base.not_installed("no_such_module", "no-such") == "no_such_module is not installed (pip install no-such)"
    assert base.not_installed("no_such.sub", "no-such") == "no_such.sub is not installed (pip install no-such)"
    assert base.not_installed("torch", "torch") is None


def test_slots_and_back():
    lists = random_lists(q_len=70, k_len=70, block_q=32, block_k=32, head_group=[0, 0], shuffled=True)
    slots = Slots(lists)
    x = torch.randn(2, 70, 3)
    assert slots.padded
    assert not slots.plain
    assert torch.equal(slots.tokens(slots.queries(x, 1), 1), x)
    real = lists.k_order[0] >= 0
    assert torch.equal(slots.keys(x, 1)[:, real], x[:, lists.k_order[0][real].long()])


def test_block_rows_are_the_full_blocks():
    lists = BlockLists.dense(q_len=64, k_len=96, heads=3, block_q=32, block_k=32)
    count, index = block_rows(lists)
    assert count.tolist() == [[3, 3]] * 3
    assert index.tolist() == [[[0, 1, 2]] * 2] * 3
