"""The choice of tiles: lists of every step lie on the same tables."""

import torch

from visparse.compensation.choice import choose_tiles
from visparse.compensation.tiles import tiles_for
from visparse.layout import Layout
from visparse.patterns import Skip, TopK
from visparse_kernels.attend.gluon_tables import parts_of, tables_of


def test_every_choice_lies_on_the_same_tables() -> None:
    tiles = tiles_for(Layout((3, 10, 12), after=20), 64, 64, torch.device("cpu"))
    patterns = (TopK(share=0.5), Skip(), TopK(share=0.5))
    maps = torch.rand(2, 1, 2, tiles.visual_q, tiles.visual_k, generator=torch.Generator().manual_seed(0)) < 0.4
    one, two = (choose_tiles(tiles, patterns, chosen, {}, None).lists[0] for chosen in maps)
    assert not torch.equal(one.full_offsets, two.full_offsets)
    assert one.head_group is two.head_group
    assert one.head_group.tolist() == [0, -1, 1]
    assert tables_of(one) is tables_of(two)  # else the Hopper kernel would wait for the device at every step
    assert parts_of(one, tables_of(one)) is parts_of(two, tables_of(two))
