"""The Triton kernel of `attend`: one program per tile of queries, head and batch row.

A block of a list may be larger than a tile of the kernel: a program serves ``TILE_Q`` of the ``BLOCK_Q`` queries of a
block, and walks a key block in parts of ``TILE_K``. It walks the full list, then the partial list of its query block.
Rows are gathered by the order tables: slot -> token -> row. The tokens and the mask of the next part are loaded one
step ahead, so that K and V can be pipelined.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import os
from functools import cache

import triton
import triton.language as tl

INTERPRET: bool = (
    os.environ.get("TRITON_INTERPRET", "0") == "1"
)  # triton.knobs is younger than the oldest Triton served


@triton.jit
def _tokens(indices, step, k_order, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr):
    """Return the tokens [TILE_K] of one step through a list, -1 for padding; a block takes BLOCK_K / TILE_K steps."""
    PARTS: tl.constexpr = BLOCK_K // TILE_K
    block = tl.load(indices + step // PARTS)
    return tl.load(k_order + block * BLOCK_K + step % PARTS * TILE_K + tl.arange(0, TILE_K))


@triton.jit
def _part_mask(
    tiles,
    mask,
    q_slot,
    k_part,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """Return rows ``q_slot`` and part ``k_part`` of a mask, bool [TILE_Q, TILE_K]; a 32-bit word holds 32 keys."""
    WORDS: tl.constexpr = BLOCK_K // 32
    column = tl.arange(0, TILE_K)
    rows = tiles + mask.to(tl.int64) * (BLOCK_Q * WORDS) + q_slot * WORDS + k_part * (TILE_K // 32)
    words = tl.load(rows)[:, None]
    for word in tl.static_range(1, TILE_K // 32):
        words = tl.where((column >= 32 * word)[None, :], tl.load(rows + word)[:, None], words)
    return ((words >> (column % 32)[None, :]) & 1) != 0


@triton.jit
def _visit(
    q,
    acc,
    top,
    total,
    tokens,
    keep,
    k,
    v,
    bias,
    stride_ks,
    stride_vs,
    stride_bias_s,
    scale,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a tile of keys to the running softmax: ``acc`` weighted values, ``top`` largest logit, ``total`` weight."""
    dim = tl.arange(0, PADDED_DIM)
    rows = tokens.to(tl.int64)
    k_at = k + rows[:, None] * stride_ks + dim[None, :]
    v_at = v + rows[:, None] * stride_vs + dim[None, :]
    if HAS_PADDING or HEAD_DIM != PADDED_DIM:
        real = (tokens >= 0)[:, None] & (dim < HEAD_DIM)[None, :]
        keys = tl.load(k_at, mask=real, other=0.0)
        values = tl.load(v_at, mask=real, other=0.0)
    else:
        keys = tl.load(k_at)
        values = tl.load(v_at)
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if HAS_BIAS:
        # in units of log2 from here on, so the scale of the exponent is 1
        added = tl.load(bias + rows * stride_bias_s, mask=tokens >= 0, other=0.0) * 1.4426950408889634
        logits = logits * scale + added[None, :]
        factor = 1.0
    else:
        factor = scale
    if MASKED:
        logits = tl.where(keep, logits, float("-inf"))
    if HAS_PADDING:
        logits = tl.where((tokens >= 0)[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits * factor - (base * factor)[:, None])
    decay = tl.exp2((top - base) * factor)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, new_top, total


@triton.jit(do_not_specialize=["q_len", "q_order_step", "k_order_step"])
def attend_kernel(
    q,
    k,
    v,
    bias,
    out,
    lse,
    head_group,
    q_order,
    k_order,
    full_offsets,
    full_indices,
    partial_offsets,
    partial_indices,
    partial_tiles,
    tiles,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_bias_b,
    stride_bias_h,
    stride_bias_s,
    q_order_step,
    k_order_step,
    q_len,
    scale,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the output and the log-sum-exp of one tile of queries; grid (query tiles, heads, batch).

    ``scale`` includes log2(e). A skipped head (group -1) borrows the order of group 0 and walks no list; nor does
    a tile of padding.
    """
    Q_PARTS: tl.constexpr = BLOCK_Q // TILE_Q
    K_PARTS: tl.constexpr = BLOCK_K // TILE_K
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    group = tl.load(head_group + head)
    table = tl.maximum(group, 0).to(tl.int64)

    slot = tl.arange(0, TILE_Q)
    dim = tl.arange(0, PADDED_DIM)
    q_token = tl.load(q_order + table * q_order_step + tile * TILE_Q + slot)
    alive = (group >= 0) & (tl.max(q_token, 0) >= 0)
    q_row = q_token.to(tl.int64)
    q_real = (q_token >= 0)[:, None] & (dim < HEAD_DIM)[None, :]
    q_at = q + batch * stride_qb + head * stride_qh + q_row[:, None] * stride_qs + dim[None, :]
    queries = tl.load(q_at, mask=q_real, other=0.0)

    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    if HAS_BIAS:
        bias += batch * stride_bias_b + head * stride_bias_h
    k_order += table * k_order_step

    acc = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    row = table * (tl.num_programs(0) // Q_PARTS) + tile // Q_PARTS

    first = tl.load(full_offsets + row, mask=alive, other=0)
    last = tl.load(full_offsets + row + 1, mask=alive, other=0)
    if last > first:
        indices = full_indices + first
        steps = (last - first) * K_PARTS
        tokens = _tokens(indices, 0, k_order, BLOCK_K, TILE_K)
        for step in range(0, steps):
            here = tokens
            tokens = _tokens(indices, tl.minimum(step + 1, steps - 1), k_order, BLOCK_K, TILE_K)
            acc, top, total = _visit(
                queries, acc, top, total, here, True, k, v, bias, stride_ks, stride_vs, stride_bias_s, scale,
                False, HEAD_DIM, PADDED_DIM, HAS_BIAS, HAS_PADDING, PRECISION,
            )  # fmt: skip

    first = tl.load(partial_offsets + row, mask=alive, other=0)
    last = tl.load(partial_offsets + row + 1, mask=alive, other=0)
    if last > first:
        indices = partial_indices + first
        masks = partial_tiles + first
        steps = (last - first) * K_PARTS
        q_slot = tile % Q_PARTS * TILE_Q + slot
        tokens = _tokens(indices, 0, k_order, BLOCK_K, TILE_K)
        mask = tl.load(masks)
        for step in range(0, steps):
            here = tokens
            keep = _part_mask(tiles, mask, q_slot, step % K_PARTS, BLOCK_Q, BLOCK_K, TILE_K)
            following = tl.minimum(step + 1, steps - 1)
            tokens = _tokens(indices, following, k_order, BLOCK_K, TILE_K)
            mask = tl.load(masks + following // K_PARTS)
            acc, top, total = _visit(
                queries, acc, top, total, here, keep, k, v, bias, stride_ks, stride_vs, stride_bias_s, scale,
                True, HEAD_DIM, PADDED_DIM, HAS_BIAS, HAS_PADDING, PRECISION,
            )  # fmt: skip

    empty = total == 0.0
    result = acc / tl.where(empty, 1.0, total)[:, None]
    factor = 1.0 if HAS_BIAS else scale
    # 0.693...: ln 2, from log2 to the natural logarithm
    stat = (top * factor + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453
    stat = tl.where(empty, float("-inf"), stat)

    # out is contiguous [B, Sq, H, HEAD_DIM] and lse [B, H, Sq]
    out_at = out + ((batch * q_len + q_row) * HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=q_real)
    tl.store(lse + (batch * HEADS + head) * q_len + q_row, stat, mask=q_token >= 0)


@cache
def max_shared_memory(device_index: int) -> int:
    """Return the bytes of shared memory that one block of threads may use on a CUDA device."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device_index)["max_shared_mem"])
