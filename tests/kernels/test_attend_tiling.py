"""How the Triton kernel cuts blocks: the measured table, and the rule for what nobody measured."""

import json
from itertools import product

import pytest
import torch

from visparse_kernels.attend import triton_tuned
from visparse_kernels.attend.triton_tuned import HOPPER_SHARED_MEMORY, Tiling, find_tiling, fitting_stages, padded, rule

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("shared_memory", [HOPPER_SHARED_MEMORY, 166912, 101376])  # sm_90, sm_80, sm_89
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rule_serves_every_block(dtype, shared_memory) -> None:
    for head_dim, block_q, block_k in product([8, 64, 72, 128, 256], [16, 48, 64, 128, 192, 256], [32, 96, 128, 256]):
        cut = rule(head_dim, dtype, block_q, block_k, shared_memory)
        assert block_q % cut.tile_q == 0
        assert block_k % cut.tile_k == 0
        assert cut.tile_q & (cut.tile_q - 1) == 0
        assert cut.tile_k & (cut.tile_k - 1) == 0
        fits = fitting_stages(padded(head_dim), dtype, cut.tile_q, cut.tile_k, shared_memory)
        assert 1 <= cut.num_stages <= fits
        assert cut.source == "rule"


def test_the_rule_halves_tiles_until_two_buffers_fit() -> None:
    assert rule(128, torch.bfloat16, 128, 128, HOPPER_SHARED_MEMORY) == Tiling(128, 64, 8, 3, "rule")
    assert rule(128, torch.bfloat16, 128, 128, 101376) == Tiling(128, 32, 8, 3, "rule")
    assert rule(256, torch.float32, 64, 64, 101376) == Tiling(16, 32, 8, 1, "rule")
    assert rule(256, torch.float32, 64, 64, 65536) is None


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Put one row for D = 128, blocks of 192 x 128 and 16-bit dtypes into the table."""
    row = {"capability": [9, 0], "head_dim": 128, "itemsize": 2, "block_q": 192, "block_k": 128}
    row |= {"tile_q": 64, "tile_k": 128, "num_warps": 4, "num_stages": 2}
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"rows": [row]}))
    monkeypatch.setattr(triton_tuned, "TABLE", path)
    triton_tuned.table.cache_clear()
    yield Tiling(64, 128, 4, 2, "table")
    triton_tuned.table.cache_clear()


def test_the_table_comes_before_the_rule(measured) -> None:
    assert find_tiling(128, torch.bfloat16, 192, 128) == measured
    assert find_tiling(72, torch.float16, 192, 128) == measured  # padded to 128
    for case in [(64, torch.bfloat16, 192, 128), (128, torch.float32, 192, 128), (128, torch.bfloat16, 128, 128)]:
        assert find_tiling(*case).source == "rule"
    assert find_tiling(128, torch.bfloat16, 192, 128, capability=(10, 0)).source == "rule"
    assert find_tiling(128, torch.bfloat16, 192, 128, ragged=False).source == "rule"


def test_the_table_that_ships_fits() -> None:
    for (capability, dim, itemsize, block_q, block_k), cut in triton_tuned.table().items():
        assert itemsize == 2
        assert block_q % cut.tile_q == 0
        assert block_k % cut.tile_k == 0
        if capability == (9, 0):
            assert 1 <= cut.num_stages <= fitting_stages(dim, torch.bfloat16, cut.tile_q, cut.tile_k, 232448)
