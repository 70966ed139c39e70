"""Stored residuals: what each storage gives back, what it costs, and what it refuses."""

import pytest
import torch
from torch import Tensor

from visparse.compensation.residual_bench import measure
from visparse.compensation.residual_groups import TokenGroups, count_groups
from visparse.compensation.residual_sizes import STORAGES, StorageChoice, choose_storage, storage_bytes
from visparse.compensation.residual_store import Stored, store
from visparse.layout import Layout

LAYOUT = Layout((3, 5, 19), before=4, after=3)
TILE = (2, 2, 4)
SHAPE = (2, LAYOUT.tokens, 3, 16)
WAN = Layout((21, 45, 80))


def random(dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(SHAPE, generator=generator) * scale).to(dtype)


def stored(residual: Tensor, storage: str, rank: int | None = None) -> Stored:
    groups = TokenGroups.from_tiles(LAYOUT, TILE) if storage.startswith("average") else None
    return store(residual, storage, groups=groups, rank=rank)


def recovered(kept: Stored) -> Tensor:
    return kept.add_to(torch.zeros(kept.shape, dtype=kept.dtype))


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def group_means(residual: Tensor) -> Tensor:
    """The definition, token by token: the mean over the tile that holds the token; an extra token keeps its own."""
    _, height, width = LAYOUT.grid
    tiles: dict[tuple[int, int, int], list[int]] = {}
    for place in range(LAYOUT.visual):
        frame, row, column = place // (height * width), place // width % height, place % width
        tile = (frame // TILE[0], row // TILE[1], column // TILE[2])
        tiles.setdefault(tile, []).append(place + LAYOUT.before)
    result = residual.double().clone()
    for tokens in tiles.values():
        result[:, tokens] = residual.double()[:, tokens].mean(1, keepdim=True)
    return result


@pytest.mark.parametrize("storage", ["full", "host"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_full_is_bitwise(storage, dtype) -> None:
    residual, out = random(dtype), random(dtype, seed=1)
    before = out.clone()
    kept = stored(residual, storage)
    kept.prefetch()
    assert torch.equal(kept.add_to(out), out + residual)
    assert torch.equal(out, before)
    assert kept.host_nbytes == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fp8_loses_less_than_four_percent(dtype) -> None:
    residual = random(dtype, scale=3e-4)
    error = relative(recovered(stored(residual, "fp8")), residual)
    assert 0.01 < error < 0.04
    # neither a loud head nor a loud group of 128 tokens costs the others their precision
    loud = residual.clone()
    loud[:, :128, 1] *= 1e4
    back = recovered(stored(loud, "fp8"))
    assert relative(back[:, :, 0], loud[:, :, 0]) < 0.04
    assert relative(back[:, 128:, 1], loud[:, 128:, 1]) < 0.04


def test_fp8_adds_with_one_rounding() -> None:
    residual, out = random(torch.bfloat16), random(torch.bfloat16, seed=1)
    kept = stored(residual, "fp8")
    values, scales = kept.values.float(), kept.scales.repeat_interleave(128, 1)[:, : SHAPE[1], :, None]
    wanted = out.double() + values.double() * scales.double()
    once = wanted.abs() * torch.finfo(torch.bfloat16).eps / 2 + 1e-6
    assert ((kept.add_to(out).double() - wanted).abs() <= once).all()
    twice = out + (values * scales).bfloat16()
    assert ((twice.double() - wanted).abs() > once).any()
    assert kept.scales.shape == (2, -(-SHAPE[1] // 128), 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_average_equals_group_means(dtype) -> None:
    residual, out = random(dtype), random(dtype, seed=1)
    wanted = group_means(residual)
    kept = stored(residual, "average")
    eps = torch.finfo(dtype).eps
    assert (recovered(kept).double() - wanted).abs().max() <= 4 * eps * wanted.abs().max()
    sums = out.double() + wanted
    assert (kept.add_to(out).double() - sums).abs().max() <= 4 * eps * sums.abs().max()
    assert 0.01 < relative(recovered(stored(residual, "average-fp8")), wanted) < 0.04


def test_average_keeps_extra_tokens_and_shares_of_a_tile() -> None:
    residual = random()
    back = recovered(stored(residual, "average"))
    extra = [*range(LAYOUT.before), *range(LAYOUT.before + LAYOUT.visual, LAYOUT.tokens)]
    assert torch.equal(back[:, extra], residual[:, extra])
    first = LAYOUT.before
    assert torch.equal(back[:, first], back[:, first + 1])
    assert not torch.equal(back[:, first + 3], back[:, first + 4])


def test_groups_from_members_are_those_given() -> None:
    members = torch.tensor([[4, 0, -1], [1, 5, 3]], dtype=torch.int32)
    groups = TokenGroups.from_members(members, 7)
    assert groups.count == 4
    assert groups.tokens == 7
    assert torch.equal(groups.members[:2], members)
    assert groups.members[2:].tolist() == [[2, -1, -1], [6, -1, -1]]
    assert groups.of_token.tolist() == [0, 1, 2, 1, 0, 1, 3]
    residual = torch.arange(7.0).reshape(1, 7, 1, 1)
    kept = store(residual, "average", groups=groups)
    assert kept.add_to(torch.zeros_like(residual)).flatten().tolist() == [2, 3, 2, 3, 2, 3, 6]


def test_padding_of_groups_reads_no_token() -> None:
    residual = torch.full((1, 4, 1, 8), torch.nan)
    residual[:, 1:] = 1.0
    groups = TokenGroups.from_members(torch.tensor([[0, -1], [1, 2], [3, -1]]), 4)
    assert (store(residual, "average", groups=groups).add_to(torch.zeros_like(residual))[:, 1:] == 1).all()


@pytest.mark.parametrize(("layout", "tile"), [(LAYOUT, TILE), (LAYOUT, (1, 1, 1)), (Layout((1, 7, 7)), (2, 2, 2))])
def test_groups_are_counted_without_making_them(layout, tile) -> None:
    assert count_groups(layout, tile) == TokenGroups.from_tiles(layout, tile).count


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 8e-3)])
def test_low_rank_is_exact_for_a_residual_of_that_rank(rank, dtype, bound) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(2, 3, SHAPE[1], rank, generator=generator, dtype=torch.float64)
    right = torch.randn(2, 3, rank, 16, generator=generator, dtype=torch.float64)
    residual, out = (left @ right).transpose(1, 2).to(dtype), random(dtype, seed=1)
    kept = stored(residual, "low-rank", rank)
    assert relative(recovered(kept), residual) < bound
    assert relative(kept.add_to(out), out.double() + residual.double()) < bound


def test_low_rank_is_the_best_of_its_rank() -> None:
    residual = random(torch.float64)
    got = (recovered(stored(residual, "low-rank", 4)) - residual).square().sum((1, 3))
    lost = torch.linalg.svdvals(residual.transpose(1, 2))[..., 4:].square().sum(-1)
    assert torch.allclose(got, lost)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_zero_residual_adds_nothing(storage, dtype) -> None:
    out = random(dtype, seed=1)
    assert torch.equal(stored(torch.zeros(SHAPE, dtype=dtype), storage).add_to(out), out)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides_do_not_matter(storage, dtype) -> None:
    residual, out = random(dtype), random(dtype, seed=1)
    wanted = stored(residual, storage).add_to(out)
    swapped = residual.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([out, out], -1)[..., : SHAPE[3]]
    assert torch.allclose(stored(swapped, storage).add_to(wide).float(), wanted.float(), rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_is_what_the_figures_say(storage, dtype) -> None:
    kept = stored(random(dtype), storage)
    said = storage_bytes(
        "full" if storage == "host" else storage,
        batch=SHAPE[0],
        tokens=SHAPE[1],
        heads=SHAPE[2],
        head_dim=SHAPE[3],
        dtype_bytes=dtype.itemsize,
        groups=count_groups(LAYOUT, TILE),
    )
    held = [x for x in vars(kept).values() if isinstance(x, Tensor)]
    assert kept.nbytes == said == sum(x.untyped_storage().nbytes() for x in held)


def test_wan_720p_fits_six_gib() -> None:
    full = storage_bytes("full", tokens=75_600, heads=40, head_dim=128)
    assert full * 40 == 30_965_760_000
    assert storage_bytes("host", tokens=75_600, heads=40, head_dim=128) == 0
    choice = choose_storage(WAN, layers=40, heads=40, head_dim=128)
    groups = count_groups(WAN, (2, 2, 2))
    assert groups == 11 * 23 * 40
    assert choice == StorageChoice("average-fp8", (2, 2, 2), 80 * 40 * (groups * 128 + 4 * 80))
    assert choice.nbytes < 6 * 2**30


def test_choice_is_the_most_exact_that_fits() -> None:
    def choose(budget: int) -> str:
        choice = choose_storage(WAN, layers=40, heads=40, head_dim=128, budget_bytes=budget)
        assert choice.nbytes <= budget
        return f"{choice.storage} {choice.tile}"

    assert choose(61_931_520_000) == "full None"
    assert choose(61_931_520_000 - 1) == "fp8 None"
    assert choose(20 * 2**30) == "average-fp8 (1, 1, 2)"
    assert choose(10 * 2**30) == "average-fp8 (1, 2, 2)"
    assert choose(2**30 + 2**29) == "average-fp8 (2, 4, 4)"
    with pytest.raises(ValueError, match=r"budget_bytes: wanted at least \d+ .*got 1000; .* 61931520000 bytes"):
        choose(1000)


@pytest.mark.parametrize("storage", STORAGES)
def test_move(storage) -> None:
    kept = stored(random(), storage)
    assert kept.to("meta").add_to(torch.zeros(SHAPE, device="meta")).shape == SHAPE
    assert torch.equal(recovered(kept.to("cpu")), recovered(kept))


@pytest.mark.parametrize("storage", STORAGES)
def test_adding_compiles_to_one_graph(storage) -> None:
    kept, out = stored(random(), storage), random(seed=1)
    compiled = torch.compile(lambda x: kept.add_to(x), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(out), kept.add_to(out))


def test_benchmark_measures_every_storage() -> None:
    rows = measure(Layout((2, 4, 4)), 2, 16, "cpu")
    assert [row["storage"] for row in rows] == list(STORAGES)
    assert [row["nbytes"] for row in rows] == [4096, 1024 + 8, 512, 128 + 8, 2 * (32 + 16) * 16 * 4, 4096]
    assert all(min(row["store_ms"], row["add_ms"], row["add_fetched_ms"]) >= 0 for row in rows)


def test_wrong_calls_are_refused() -> None:
    residual = random()
    groups = TokenGroups.from_tiles(LAYOUT, TILE)
    with pytest.raises(ValueError, match="wanted one of full, fp8, average, average-fp8, low-rank, host, got 'fp4'"):
        store(residual, "fp4")
    with pytest.raises(ValueError, match=r"storage: wanted one of full, .*got 'half'"):
        storage_bytes("half", tokens=1, heads=1, head_dim=8)
    with pytest.raises(ValueError, match="groups: wanted the number of groups for storage 'average'"):
        storage_bytes("average", tokens=1, heads=1, head_dim=8)
    with pytest.raises(ValueError, match="groups: wanted TokenGroups for storage 'average', got None"):
        store(residual, "average")
    with pytest.raises(ValueError, match="groups: wanted None for storage 'fp8'"):
        store(residual, "fp8", groups=groups)
    with pytest.raises(ValueError, match=f"groups: wanted groups of 9 tokens, .*got {LAYOUT.tokens}"):
        store(residual[:, :9], "average", groups=groups)
    with pytest.raises(ValueError, match="rank: wanted None for storage 'full', got 4"):
        store(residual, "full", rank=4)
    with pytest.raises(ValueError, match=r"rank: wanted 1 to 16 .*got 17"):
        store(residual, "low-rank", rank=17)
    with pytest.raises(ValueError, match=r"residual: wanted \[batch, tokens, heads, head_dim\], got \[2, "):
        store(residual[..., 0], "full")
    with pytest.raises(TypeError, match=r"residual: wanted fp16, .*got torch\.int64"):
        store(residual.long(), "full")
    with pytest.raises(ValueError, match=r"out: wanted shape \[2, 292, 3, 16\], .*got \[1, 292, 3, 16\]"):
        store(residual, "full").add_to(residual[:1])
    with pytest.raises(TypeError, match=r"out: wanted torch\.float32, .*got torch\.float16"):
        store(residual, "full").add_to(residual.half())


def test_wrong_groups_are_refused() -> None:
    with pytest.raises(TypeError, match=r"members: wanted integers, got torch\.float32"):
        TokenGroups.from_members(torch.zeros(1, 1), 4)
    with pytest.raises(ValueError, match=r"members: wanted \[groups, tokens of a group\], got \[3\]"):
        TokenGroups.from_members(torch.arange(3), 4)
    with pytest.raises(ValueError, match="members: wanted tokens below 4, got 4"):
        TokenGroups.from_members(torch.tensor([[0, 4]]), 4)
    with pytest.raises(ValueError, match="members: wanted every token in one group, got token 2 twice"):
        TokenGroups.from_members(torch.tensor([[0, 2], [2, 1]]), 4)
    with pytest.raises(ValueError, match="members: wanted groups with a token, got none in group 1"):
        TokenGroups.from_members(torch.tensor([[0, 2], [-1, -1]]), 4)
    with pytest.raises(ValueError, match=r"tile: wanted .*at least 1, got \(1, 0, 2\)"):
        TokenGroups.from_tiles(LAYOUT, (1, 0, 2))


@pytest.mark.gpu
def test_host_storage_is_bitwise_and_overlaps_safely() -> None:
    shape = (1, 20_000, 8, 64)
    layers = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    wanted = [layer.cpu() for layer in layers]
    kept = [store(layer, "host") for layer in layers]
    layers.clear()
    # the freed memory is used again while the copies may still run
    noise = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    for index, one in enumerate(kept):
        assert one.host_nbytes == wanted[index].nbytes
        assert one.nbytes == (wanted[index].nbytes if index else 0)  # the round before has fetched it
        kept[(index + 1) % 4].prefetch()
        out = one.add_to(noise[index])
        assert torch.equal(out.cpu(), noise[index].cpu() + wanted[index])
    assert torch.equal(kept[2].to("cpu").add_to(torch.zeros(shape, dtype=torch.bfloat16)), wanted[2])
    assert torch.equal(kept[1].to("cuda").add_to(torch.zeros_like(noise[0])).cpu(), wanted[1])


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["full", "fp8", "average", "average-fp8", "low-rank"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_gpu_gives_what_the_cpu_gives(storage, dtype) -> None:
    residual, out = random(dtype), random(dtype, seed=1)
    wanted = stored(residual, storage).add_to(out).float()
    kept = stored(residual.cuda(), storage)
    got = kept.add_to(out.cuda())
    assert got.is_cuda
    assert torch.allclose(
        got.cpu().float(), wanted, rtol=0, atol=8 * torch.finfo(dtype).eps * float(wanted.abs().max())
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept.add_to(got)
    finally:
        torch.cuda.set_sync_debug_mode("default")
