"""Cases, patterns and random blocks of the kernel benchmark."""

import math

import pytest
import torch

from visparse.bench.cases import CASES, DEFAULT, PATTERNS, QUICK, Case, find_case
from visparse.bench.patterns import build_lists, check_pattern, describe, obstacle
from visparse.bench.problem import Built, Inputs, Problem
from visparse.bench.random_blocks import Mix, random_blocks
from visparse_kernels import BlockLists


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("wan14b_720p", 75_600),
        ("wan14b_480p", 32_760),
        ("wan1.3b_480p", 32_760),
        ("hunyuan_720p", 119_056),
        ("hunyuan_sta", 115_200),
        ("flux_1k", 4_608),
        ("flux_2k", 16_896),
        ("flux_4k", 66_048),
        ("cogvideox_5b", 17_776),
        ("vit_l_1024", 4_101),
        ("vit_l_2048", 16_389),
        ("s32768", 32_768),
        ("s16384_d64", 16_384),
    ],
)
def test_tokens_of_real_models(name, tokens):
    assert find_case(name).tokens == tokens


def test_work_of_dense_attention():
    assert find_case("wan14b_720p").dense_flops == pytest.approx(117.0e12, rel=1e-3)
    assert find_case("vit_l_1024").dense_flops == pytest.approx(8 * 0.069e12, rel=1e-2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_can_build_what_it_names(case):
    for name in case.patterns:
        assert obstacle(check_pattern(name), case) is None
        assert describe(name, case, (128, 128))
    for axis in range(3 if case.window else 0):
        assert case.stride[axis] <= case.window[axis] <= case.grid[axis]
        assert case.tile is None or case.grid[axis] % case.tile[axis] == 0
    assert set(case.compiled) <= set(PATTERNS)


def test_default_cases_exist():
    assert all(find_case(name) for names in (*DEFAULT.values(), *QUICK.values()) for name in names)


def test_names_are_checked():
    with pytest.raises(ValueError, match=r"case: wanted one of .*, got 'flux2k'; did you mean 'flux_2k'"):
        find_case("flux2k")
    with pytest.raises(ValueError, match=r"pattern: wanted one of .*, got 'gna_stride'; did you mean 'gna_strided'"):
        check_pattern("gna_stride")
    with pytest.raises(ValueError, match="pattern: gna is not for case s32768: a plain sequence has no window"):
        build_lists("gna", find_case("s32768"), block_q=64, block_k=64, boxes=False, grain=(64, 64), device="cpu")


def cut(block_q: int, block_k: int, mix: Mix, tokens: int = 1000) -> BlockLists:
    return random_blocks(tokens, 3, mix, block_q=block_q, block_k=block_k, grain=(128, 128), device="cpu").validate()


@pytest.mark.parametrize("mix", [Mix(share=0.25), Mix(share=0.5, masked=0.4), Mix(share=0.25, uneven=True)])
def test_kept_pairs_do_not_depend_on_the_block_size(mix):
    coarse = cut(128, 128, mix)
    for blocks in ((64, 32), (128, 64), (32, 128)):
        assert torch.equal(cut(*blocks, mix).to_mask(), coarse.to_mask())


def test_every_row_visits_exactly_the_share():
    lists = cut(128, 64, Mix(share=0.25), tokens=1024)
    assert lists.block_density == 0.25
    assert lists.full_offsets.diff().unique().tolist() == [4]
    assert not torch.equal(lists.to_mask()[0], lists.to_mask()[1]), "heads differ"


def test_uneven_rows_have_lengths_around_the_share():
    lists = random_blocks(
        16384, 8, Mix(share=0.25, uneven=True), block_q=128, block_k=128, grain=(128, 128), device="cpu"
    )
    lengths = lists.full_offsets.diff()
    assert int(lengths.min()) >= 1
    assert int(lengths.max()) <= 64
    assert int(lengths.max()) > 60
    assert float(lengths.double().mean()) == pytest.approx(32.5, rel=0.05)


def test_a_share_of_the_visited_blocks_is_masked():
    lists = cut(128, 128, Mix(share=0.5, masked=0.2), tokens=16384)
    masked = lists.partial_indices.numel() / (lists.partial_indices.numel() + lists.full_indices.numel())
    assert masked == pytest.approx(0.2, abs=0.02)
    assert float(lists.tile_masks().double().mean()) == pytest.approx(0.5, abs=0.01)


def test_blocks_must_divide_the_grain():
    with pytest.raises(ValueError, match="block_q: wanted a divisor of 128, in which the blocks are drawn, got 192"):
        cut(192, 32, Mix(share=0.5))


def test_sliding_tiles_are_whole_tiles_around_the_own_one():
    """From the definition: own tile in the middle, moved inward at the border; here along frames only."""
    case = Case(name="c", grid=(10, 2, 4), heads=1, head_dim=8, tile=(2, 2, 4), tiles=(3, 1, 1), patterns=("sta",))
    mask = build_lists("sta", case, block_q=16, block_k=32, boxes=False, grain=(16, 32), device="cpu").to_mask()[0]
    tile = torch.arange(80) // 16
    middle = tile.clamp(1, 3)
    assert torch.equal(mask, (tile[None] - middle[:, None]).abs() <= 1)


def test_block_density_is_of_the_blocks_that_dense_attention_visits():
    twice = BlockLists.dense(q_len=100, k_len=100, heads=1, block_q=32, block_k=32)
    assert Built(lists=twice, seconds=0).block_density == 1.0
    assert Built(lists=twice, seconds=0).bytes == 4 * (1 + 2 * 128 + 2 * 5 + 16)


def test_a_problem_builds_each_form_once_and_keeps_the_same_pairs():
    problem = Problem(Inputs.random(find_case("tiny"), "cpu", torch.float32, 0), "random_25")
    assert problem.plain is problem.best
    assert problem.grain == (192, 32)
    other = problem.built(64, 32)
    assert other is problem.built(64, 32)
    assert torch.equal(other.lists.to_mask(), problem.plain.lists.to_mask())
    assert math.isclose(problem.density, float(problem.plain.lists.to_mask().double().mean()))
