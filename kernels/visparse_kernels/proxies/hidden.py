"""Which proxies a block of queries does not attend to: those whose tile it sees exactly."""

import torch
from torch import Tensor

from visparse_kernels.bits import pack_bits
from visparse_kernels.kernels_apply import kernels_apply


def hidden_proxies(kept: Tensor, tile: Tensor) -> Tensor:
    """Tell for each block of queries which proxies are hidden, as `attend_proxies` takes it.

    Args:
        kept: bool [..., n_q, n_k], tiles that are seen exactly.
        tile: int32 or int64 [P], tile of each proxy, 0 to n_k - 1.

    Returns:
        int32 [..., n_q, words]: bit p % 32 of word p // 32 belongs to proxy p; bits behind the last proxy are 1.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if kept.dtype != torch.bool or kept.ndim < 2:
        raise ValueError(
            f"kept: wanted bool [..., n_q, n_k], got {kept.dtype} {list(kept.shape)}; give a flag per block of queries "
            "and tile"
        )
    if tile.dtype not in (torch.int32, torch.int64) or tile.ndim != 1:
        raise ValueError(
            f"tile: wanted int32 or int64 [proxies], got {tile.dtype} {list(tile.shape)}; give the tile of each proxy"
        )
    if kernels_apply(kept) and kernels_apply(tile):
        from visparse_kernels.proxies.hidden_triton import pack_hidden

        return pack_hidden(kept, tile)
    seen = kept.index_select(-1, tile)
    return pack_bits(torch.nn.functional.pad(seen, (0, -len(tile) % 32), value=True))
