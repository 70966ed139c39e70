import pytest
import torch

from visparse.compile import compile_lists
from visparse.layout import Grid, Layout
from visparse.order import Order
from visparse.patterns import Neighborhood

STRIDED = Neighborhood(window=(18, 24, 24), stride=(16, 8, 8))


def test_a_strided_window_is_perfectly_block_sparse() -> None:
    lists = compile_lists([STRIDED], Layout((30, 48, 80)), block_q=128, block_k=128, order=(2, 8, 8), boxes=True)
    assert lists.full_offsets.diff().tolist() == [81] * 900
    assert len(lists.partial_indices) == 0
    assert lists.block_density == lists.density
