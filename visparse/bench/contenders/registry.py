"""All contenders, in the order of the table."""

from __future__ import annotations

from collections.abc import Sequence

from visparse.bench.contenders.base import Contender
from visparse.bench.contenders.fastvideo import SlidingTile, VideoSparse
from visparse.bench.contenders.flash3 import Flash3
from visparse.bench.contenders.flash4 import Flash4, Flash4Sparse
from visparse.bench.contenders.flashinfer import FlashInfer
from visparse.bench.contenders.flex import Flex
from visparse.bench.contenders.natten import Natten
from visparse.bench.contenders.ours import all_ours
from visparse.bench.contenders.sdpa import all_sdpa
from visparse.errors import nearest

PEERS = ("fa3-fwd", "flash-attn-4", "fastvideo-kernel", "flashinfer-python", "natten")


def all_contenders() -> list[Contender]:
    """visparse first, then the peers."""
    return [
        *all_ours(),
        *all_sdpa(),
        Flash3(),
        Flash4(),
        Flash4Sparse(),
        Flex(),
        SlidingTile(),
        VideoSparse(),
        FlashInfer("fa3"),
        FlashInfer("fa2"),
        Natten(),
    ]


def choose_contenders(contenders: Sequence[Contender], names: Sequence[str]) -> list[Contender]:
    """Those that are named; `visparse` stands for all of its implementations.

    Raises:
        ValueError: a name is not known; names the nearest.
    """
    known = ["visparse", *(contender.name for contender in contenders)]
    for name in names:
        if name not in known:
            raise ValueError(f"contender: wanted some of {', '.join(known)}, got {name!r}{nearest(name, known)}")
    return [one for one in contenders if one.name in names or one.name.split(":")[0] in names]
