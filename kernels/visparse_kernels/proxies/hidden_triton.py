"""Hidden proxies in one launch: flags are looked up by tile, and packed into words."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, WORDS = 16, 4  # blocks of queries, and words of 32 proxies, of a program of four warps


@triton.jit(do_not_specialize=["n_rows", "n_k", "n_proxies", "n_words"])
def hidden_kernel(
    kept, tile, hidden, n_rows, n_k, n_proxies, n_words, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Pack the flags of some proxies for some blocks of queries."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    real = (first + row < n_rows)[:, None]
    proxy = tl.program_id(1) * (WORDS * 32) + tl.arange(0, WORDS * 32)
    column = tl.load(tile + proxy, mask=proxy < n_proxies, other=0).to(tl.int32)
    flags = kept + first * n_k + row[:, None] * n_k + column[None, :]
    seen = tl.load(flags, mask=real & (proxy < n_proxies)[None, :], other=1).to(tl.int32)
    bits = tl.reshape(seen << (proxy % 32)[None, :], [ROWS, WORDS, 32])
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    to = hidden + first * n_words + row[:, None] * n_words + word[None, :]
    tl.store(to, tl.xor_sum(bits, 2), mask=real & (word < n_words)[None, :])


def pack_hidden(kept: Tensor, tile: Tensor) -> Tensor:
    """Launch the kernel; see `hidden.hidden_proxies`.

    Args:
        kept: bool [..., n_q, n_k], not empty, on a GPU.
        tile: int32 or int64 [P], not empty.
    """
    kept, n_k, n_proxies = kept.contiguous(), kept.shape[-1], tile.shape[0]
    n_rows, n_words = kept.numel() // n_k, -(-n_proxies // 32)
    hidden = torch.empty(*kept.shape[:-1], n_words, dtype=torch.int32, device=kept.device)
    grid = (-(-n_rows // ROWS), -(-n_words // WORDS))
    with torch.cuda.device_of(kept):
        hidden_kernel[grid](
            kept, tile.contiguous(), hidden, n_rows, n_k, n_proxies, n_words, ROWS=ROWS, WORDS=WORDS, num_warps=4
        )
    return hidden
