"""The Triton kernel of `block_scores`: one program per tile of sampled queries, head and batch row.

Queries and keys lie in slot order in memory, contiguous, padded with zeros to powers of two. A program walks all key
blocks: one product, weights, row sums, then a sum over the queries of each query block. It holds no values and no
output, so two programs fit on a multiprocessor. Key blocks without padding come first and need no mask.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _weights(
    queries,
    keys,
    lse,
    added,
    scale,
    TILE_K: tl.constexpr,
    MASKED: tl.constexpr,
    VARIANCE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the mass of a key block, or mass times variance, for each query: fp32 [TILE_Q], in units of log2."""
    logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if MASKED:
        logits = logits * scale + added[None, :]
        weight = tl.sum(tl.exp2(logits - lse[:, None]), 1)
        if VARIANCE:
            seen = added > float("-inf")
            share = 1.0 / tl.maximum(tl.sum(tl.where(seen, 1.0, 0.0), 0), 1.0)
            mean = tl.sum(tl.where(seen[None, :], logits, 0.0), 1) * share
            away = tl.where(seen[None, :], logits - mean[:, None], 0.0)
            weight *= tl.sum(away * away, 1) * share
    else:
        weight = tl.sum(tl.exp2(logits * scale - lse[:, None]), 1)
        if VARIANCE:
            mean = tl.sum(logits, 1) * (1.0 / TILE_K)
            away = logits - mean[:, None]
            weight *= tl.sum(away * away, 1) * (scale * scale / TILE_K)
    return weight


@triton.jit
def _load(keys, block, TILE_K: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr):
    """Return keys [TILE_K, DIM] of a block, by TMA or by pointers."""
    if TMA:
        return keys.load([block * TILE_K, 0])
    else:
        row = block.to(tl.int64) * TILE_K + tl.arange(0, TILE_K)
        return tl.load(keys + row[:, None] * DIM + tl.arange(0, DIM)[None, :])


@triton.jit(do_not_specialize=["n_q"])
def scores_kernel(
    queries,
    keys,
    lse,
    added,
    block_of,
    n_whole,
    scores,
    added_b,
    added_h,
    n_q,
    n_k,
    scale,
    ROWS: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    DIM: tl.constexpr,
    VARIANCE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the sums over the queries of each query block; grid (query tiles, heads, batch).

    ``queries [B, H, n_q * ROWS, DIM]``, ``keys [B, H, n_k * TILE_K, DIM]`` (a descriptor of all rows with TMA),
    ``lse [B, H, n_q * ROWS]`` in units of log2, ``scores [B, H, n_q, n_k]``. Key blocks lie in the order of
    ``block_of``; the first ``n_whole`` of them have neither padding nor a bias. ``scale`` includes log2(e).
    """
    head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    slot = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    inside = slot < n_q * ROWS
    row = head * (n_q * ROWS) + slot
    at = queries + row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    tile = tl.load(at, mask=inside[:, None], other=0.0)
    top = tl.load(lse + row, mask=inside, other=float("inf"))

    added += tl.program_id(2).to(tl.int64) * added_b + tl.program_id(1).to(tl.int64) * added_h
    if TMA:
        base = (head * n_k).to(tl.int32)
    else:
        base = 0
        keys += head * n_k * TILE_K * DIM
    q_block = tl.program_id(0) * (TILE_Q // ROWS) + tl.arange(0, TILE_Q // ROWS)
    out = scores + (head * n_q + q_block) * n_k
    alive = q_block < n_q

    whole = tl.load(n_whole)
    for block in range(0, whole):
        part = _load(keys, base + block, TILE_K, DIM, TMA)
        weight = _weights(tile, part, top, top, scale, TILE_K, False, VARIANCE, PRECISION)
        total = tl.sum(tl.reshape(weight, [TILE_Q // ROWS, ROWS]), 1)
        tl.store(out + tl.load(block_of + block), total, mask=alive)
    for block in range(whole, n_k):
        part = _load(keys, base + block, TILE_K, DIM, TMA)
        bias = tl.load(added + block * TILE_K + tl.arange(0, TILE_K))
        weight = _weights(tile, part, top, bias, scale, TILE_K, True, VARIANCE, PRECISION)
        total = tl.sum(tl.reshape(weight, [TILE_Q // ROWS, ROWS]), 1)
        tl.store(out + tl.load(block_of + block), total, mask=alive)
