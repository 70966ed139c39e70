"""The kernels of lists, choices and hidden proxies: bit by bit what torch operations give, in memory with guards."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need the triton package")

from visparse_kernels import choose_top_k, lists_from_map
from visparse_kernels.attend import gluon_program, gluon_program_triton
from visparse_kernels.attend.gluon_tables import Tables
from visparse_kernels.bits import identity_order, unpack_bits
from visparse_kernels.block_scores.choosing_triton import LONGEST, can_choose, top_k
from visparse_kernels.kernels_apply import INTERPRET
from visparse_kernels.lists_map_triton import fill
from visparse_kernels.proxies.hidden import hidden_proxies

lists_map, choosing, hidden = (
    import_module(f"visparse_kernels.{name}") for name in ("lists_map", "block_scores.choosing", "proxies.hidden")
)  # functions hide some of these modules

SMALL = [(1, 1, 1), (1, 3, 32), (2, 5, 44), (3, 19, 33), (1, 2, 1024), (1, 3, 1300)]  # groups, n_q, n_k
LARGE = [*SMALL, (96, 30, 44), (40, 591, 591), (3, 930, 930), (2, 70, 3001)]
if INTERPRET:
    CASES = [pytest.param("cpu", shape, marks=pytest.mark.interpreter) for shape in SMALL]
else:
    CASES = [pytest.param("cuda", shape, marks=pytest.mark.gpu) for shape in LARGE]
DEVICE = [pytest.param(*CASES[0].values[:1], marks=CASES[0].marks)]

shapes = pytest.mark.parametrize(("device", "shape"), CASES)
somewhere = pytest.mark.parametrize("device", DEVICE)
keeps = pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])

_GUARD = 64  # elements in front of and behind each tensor


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Poison what torch.empty returns, and see to it that nothing is written outside of it."""
    made = []

    def empty(*size, dtype, device):
        shape = size[0] if size and isinstance(size[0], tuple) else size
        number, poison = math.prod(shape), True if dtype == torch.bool else 0x7F7F7F7F
        made.append(torch.full((number + 2 * _GUARD,), poison, dtype=dtype, device=device))
        return made[-1][_GUARD : _GUARD + number].view(shape)

    with mock.patch.object(torch, "empty", empty):
        yield
    for whole in made:
        ends = torch.cat([whole[:_GUARD], whole[-_GUARD:]])
        assert bool((ends == (True if whole.dtype == torch.bool else 0x7F7F7F7F)).all())


def draw(shape, keep: float, device: str, seed: int = 0) -> torch.Tensor:
    """Draw a map; with some rows that are empty, and some that are full."""
    make = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=make) < keep
    if 0.0 < keep < 1.0:
        full = torch.rand(shape[:2], generator=make)
        kept = (kept | (full < 0.2)[..., None]) & (full < 0.8)[..., None]
    return kept.to(device)


@shapes
@keeps
@pytest.mark.parametrize("checked", [False, True])
def test_lists(device, shape, keep, checked) -> None:
    kept = draw(shape, keep, device)
    number = int(kept.sum())
    offsets, indices, zeros, fits = lists_map._fill(kept, kept.numel(), checked=False)
    for room in {max(number, 1), kept.numel()}:
        with guarded_memory():
            made = fill(kept, room, checked=checked)
        assert torch.equal(made[0], offsets)
        assert made[0].dtype == torch.int32
        assert made[1].shape == (room,)
        assert torch.equal(made[1][:number], indices[:number])
        assert bool((made[1][number:] == 0x7F7F7F7F).all())  # never written
        assert torch.equal(made[2], zeros)
        assert made[3].item() is True if checked else made[3] is None
    assert fits is None


@shapes
def test_nothing_is_written_behind_the_room(device, shape) -> None:
    kept = draw(shape, 1.0, device)
    for room in {1, kept.numel() // 2, kept.numel() - 1} - {0, kept.numel()}:
        with guarded_memory():
            offsets, indices, _, fits = fill(kept, room, checked=True)
        assert fits.item() is False
        assert torch.equal(indices, lists_map._fill(kept, kept.numel(), checked=False)[1][:room])
        assert int(offsets[-1]) == kept.numel()


@somewhere
def test_maps_with_gaps_between_rows(device) -> None:
    kept = draw((4, 6, 90), 0.4, device)[:, ::2, 3:80]
    tables = {"q_order": identity_order(48, 16, device), "k_order": identity_order(77 * 32, 32, device)}
    sizes = {"q_len": 48, "k_len": 77 * 32, "block_q": 16, "block_k": 32}
    heads = torch.arange(4, dtype=torch.int32, device=device)
    with mock.patch.object(lists_map, "_fill", side_effect=AssertionError):
        made = lists_from_map(kept, **sizes, **tables, head_group=heads, capacity=76)
    wanted = lists_map._fill(kept, made.full_indices.numel(), checked=False)
    assert torch.equal(made.full_offsets, wanted[0])
    assert torch.equal(made.full_indices[: int(kept.sum())], wanted[1][: int(kept.sum())])
    made.validate()
    if device == "cpu":  # on a GPU the assertion ends the process's use of it
        with pytest.raises(RuntimeError, match=r"capacity: wanted room for all kept blocks, got 1 a row"):
            lists_from_map(kept, **sizes, **tables, head_group=heads, capacity=1)


def tables_with(n_k: int, padded: float, device: str) -> Tables:
    """Draw tables of key blocks; the rest of them is not looked at."""
    make = torch.Generator().manual_seed(n_k)
    masks = torch.where(torch.rand(n_k, generator=make) < padded, torch.arange(n_k) % 7, -1).to(torch.int32)
    starts = torch.randint(-(2**62), 2**62, (n_k,), generator=make)
    none = torch.zeros(0, dtype=torch.int32)
    return Tables(
        k_starts=starts.to(device),
        k_masks=masks.to(device),
        tiles=none,
        ragged=bool((masks >= 0).any()),
        q_starts=none,
        q_whole=none,
        q_runs=(True,),
        k_runs=True,
    )


@shapes
@keeps
@pytest.mark.parametrize("padded", [0.0, 0.3, 1.0])
def test_program(device, shape, keep, padded) -> None:
    kept = draw(shape, keep, device, seed=1)
    tables, number = tables_with(shape[-1], padded, device), int(kept.sum())
    for room in {max(number, 1), kept.numel()}:
        offsets, indices, *_ = lists_map._fill(kept, room, checked=False)
        indices[number:] = 0x7F7F7F7F  # what lies behind the last offset is not looked at
        wanted = gluon_program.fill_entries(offsets, indices, tables)
        with guarded_memory():
            made = gluon_program_triton.fill_entries(offsets, indices, tables)
        for got, one in zip(made[:2], wanted[:2], strict=True):
            assert torch.equal(got, one)
            assert got.dtype == one.dtype
        for got, one in zip(made[2:], wanted[2:], strict=True):  # one more entry is read ahead
            assert got.shape == one.shape == (room + 1,)
            assert torch.equal(got[: number + 1], one[: number + 1])
            assert got.dtype == one.dtype
        assert made[0].data_ptr() != offsets.data_ptr()


@shapes
@pytest.mark.parametrize("padded", [0.0, 0.3])
def test_programs_of_lists_that_overflow_stay_inside(device, shape, padded) -> None:
    kept = draw(shape, 1.0, device)
    room = max(1, kept.numel() // 2)
    offsets, indices, *_ = fill(kept, room, checked=True)
    tables = tables_with(shape[-1], padded, device)
    with guarded_memory():
        made = gluon_program_triton.fill_entries(offsets, indices, tables)
    assert torch.equal(made[0], offsets.clamp(max=room))
    assert torch.equal(made[4][:room].sort().values, indices.sort().values)
    assert int(made[4][room]) == 0


@shapes
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_hidden_proxies(device, shape, dtype) -> None:
    kept = draw(shape, 0.4, device)
    for number in (1, 31, 32, 33, 4 * shape[-1]):
        tile = torch.randint(0, shape[-1], (number,), generator=torch.Generator().manual_seed(number))
        tile = tile.to(device, dtype)
        with guarded_memory(), mock.patch.object(hidden, "pack_bits", side_effect=AssertionError):
            words = hidden_proxies(kept, tile)
        assert words.shape == (*shape[:2], -(-number // 32))
        assert words.dtype == torch.int32
        bits = unpack_bits(words)
        assert torch.equal(bits[..., :number], kept[..., tile])
        assert bool(bits[..., number:].all())


@somewhere
def test_hidden_proxies_of_any_axes_and_strides(device) -> None:
    kept = draw((6, 20, 44), 0.4, device).view(2, 3, 20, 44)[..., ::2, 5:40]
    tile = torch.arange(35, device=device).repeat(2)[::2]
    assert torch.equal(unpack_bits(hidden_proxies(kept, tile))[..., :35], kept[..., tile])
    assert hidden_proxies(kept[0, 0], tile).shape == (10, 2)
    assert hidden_proxies(kept, tile[:0]).shape == (2, 3, 10, 0)


def scores_of(shape, device: str, dtype=torch.float32) -> torch.Tensor:
    """Draw scores: rows with ties, zeros of both signs, infinities, what is smaller than normal numbers, or NaN."""
    make = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=make).exp_()
    rows = scores.view(-1, shape[-1])
    rows[1::7] = rows[1::7].round()
    rows[2::7] = torch.where(rows[2::7] > 1, 0.0, -0.0)
    rows[3::7, ::3] = -torch.inf
    rows[3::7, 1::5] = torch.inf
    if not INTERPRET or dtype != torch.bfloat16:  # the interpreter reads these wrongly
        rows[4::7] *= torch.finfo(dtype).tiny / 10
    rows[5::7, ::4] = torch.nan
    rows[6::7] *= -1
    return scores.to(device, dtype)


def ranked(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Choose with torch's stable sort."""
    return choose_top_k(scores, count, allowed=torch.ones_like(scores, dtype=torch.bool))


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_top_k(device, shape, dtype) -> None:
    scores = scores_of(shape, device, dtype)
    n_k = shape[-1]
    assert can_choose(scores) == (n_k <= LONGEST and dtype != torch.bfloat16)  # GPUs sort bf16 zeros by sign
    for count in {1, 2, n_k // 4, n_k - 1, n_k} & set(range(1, n_k + 1)):
        with guarded_memory():
            made = choose_top_k(scores, count)
        assert torch.equal(made, ranked(scores, count))
        if can_choose(scores):
            assert torch.equal(made.cpu(), ranked(scores.cpu(), count))


@somewhere
def test_top_k_of_any_axes_and_strides(device) -> None:
    whole = scores_of((2, 2, 5, 50), device)
    with mock.patch.object(choosing, "_ranked", side_effect=AssertionError):
        for scores in (whole[..., :4, :44], whole[:, ::2, 1:, 3:], whole[0, 0], whole[0, 0, 0], whole.mT, whole[:1, 1]):
            wanted = top_k(scores.contiguous(), 4)
            assert torch.equal(choose_top_k(scores, 4), wanted)
            assert wanted.shape == scores.shape
    for scores in (whole[..., :4, :44], whole[0, 0, 0], whole.mT):
        assert torch.equal(choose_top_k(scores, 4), ranked(scores, 4))
    negative = whole.clone()
    negative[..., 9] = -torch.tensor(torch.nan)
    assert bool(choose_top_k(negative, 20)[..., 9].all())


@somewhere
def test_top_k_with_a_count_for_each_head(device) -> None:
    scores = scores_of((3, 4, 7, 50), device)
    counts = torch.tensor([1, 50, 9, 24], dtype=torch.int32, device=device)
    with mock.patch.object(choosing, "_ranked", side_effect=AssertionError), guarded_memory():
        made = choose_top_k(scores, counts)
        part = choose_top_k(scores[:, 1::2, 1:], counts[1::2])
    for head, count in enumerate(counts.tolist()):
        assert torch.equal(made[:, head], ranked(scores[:, head], count))
    assert torch.equal(part, made[:, 1::2, 1:])


@somewhere
def test_what_the_kernel_of_top_k_leaves_to_torch(device) -> None:
    scores = scores_of((3, 20), device)
    assert not can_choose(scores.double())
    assert torch.equal(choose_top_k(scores.double(), 5), ranked(scores, 5))
    always = torch.arange(20, device=device) == 3
    assert bool(choose_top_k(scores, 5, always)[:, 3].all())
    assert choose_top_k(scores[:0], 5).shape == (0, 20)


@somewhere
def test_compilers_get_torch_operations(device) -> None:
    kept, tile = draw((2, 5, 44), 0.4, device), torch.arange(44, device=device)
    scores = scores_of((2, 5, 44), device)

    def run(kept, scores):
        return hidden_proxies(kept, tile), choose_top_k(scores, 7)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(kept, scores), run(kept, scores), strict=True):
        assert torch.equal(got, wanted)
