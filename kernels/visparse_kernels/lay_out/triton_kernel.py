"""The Triton kernel of `lay_out`: one program copies a block of queries, of keys or of values, of one head."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _means(sums, counts, SUMS: tl.constexpr, WANTED: tl.constexpr, DIM: tl.constexpr):
    """Means of WANTED parts, fp32 [WANTED, DIM], from the sums [SUMS, DIM] and counts [SUMS] of finer ones."""
    number = tl.sum(tl.reshape(counts, [WANTED, SUMS // WANTED]), 1)
    total = tl.sum(tl.reshape(sums, [WANTED, SUMS // WANTED, DIM]), 1)
    return total / tl.maximum(number, 1.0)[:, None]


@triton.jit
def _store(to, first, step, means, WANTED: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Write means [WANTED, PADDED_DIM] to rows first, first + step, ... of ``to``."""
    dim = tl.arange(0, PADDED_DIM)[None, :]
    row = first + tl.arange(0, WANTED)[:, None] * step
    tl.store(to + row * HEAD_DIM + dim, means.to(to.dtype.element_ty), mask=dim < HEAD_DIM)


@triton.jit
def _copy_block(
    source, target, order, places, stride, fine, fine_first, pooled, pooled_first, pooled_step, block,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, POOL: tl.constexpr, CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """Copy the rows of a block, and write the means of its PARTS parts and of its POOL parts; 0: none.

    All rows of a chunk are on their way before the first of them is written. A part that is longer than a chunk is
    summed up over several.
    """
    PART: tl.constexpr = BLOCK // max(PARTS, 1)
    POOLED: tl.constexpr = BLOCK // max(POOL, 1)
    EACH: tl.constexpr = min(PART, POOLED, CHUNK)
    SUMS: tl.constexpr = CHUNK // EACH
    dim = tl.arange(0, PADDED_DIM)[None, None, :]
    part = tl.zeros([1, PADDED_DIM], tl.float32)
    part_count = tl.zeros([1], tl.float32)
    pool = tl.zeros([1, PADDED_DIM], tl.float32)
    pool_count = tl.zeros([1], tl.float32)
    for first in tl.static_range(0, BLOCK, CHUNK):
        slot = block * BLOCK + first + tl.arange(0, SUMS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
        token = tl.load(order + slot)
        place = tl.load(places + slot).to(tl.int64)
        real = (token >= 0)[:, :, None] & (dim < HEAD_DIM)
        rows = tl.load(source + token.to(tl.int64)[:, :, None] * stride + dim, mask=real, other=0.0)
        tl.store(target + place[:, :, None] * HEAD_DIM + dim, rows, mask=real)
        if PARTS or POOL:
            sums = tl.sum(rows.to(tl.float32), 1)
            counts = tl.sum((token >= 0).to(tl.float32), 1)
        if PARTS:
            if PART <= CHUNK:
                means = _means(sums, counts, SUMS, CHUNK // PART, PADDED_DIM)
                _store(fine, fine_first + first // PART, 1, means, CHUNK // PART, HEAD_DIM, PADDED_DIM)
            else:
                part += tl.sum(sums, 0)[None, :]
                part_count += tl.sum(counts, 0)
                if (first + CHUNK) % PART == 0:
                    means = part / tl.maximum(part_count, 1.0)[:, None]
                    _store(fine, fine_first + first // PART, 1, means, 1, HEAD_DIM, PADDED_DIM)
                    part = tl.zeros([1, PADDED_DIM], tl.float32)
                    part_count = tl.zeros([1], tl.float32)
        if POOL:
            if POOLED <= CHUNK:
                means = _means(sums, counts, SUMS, CHUNK // POOLED, PADDED_DIM)
                to = pooled_first + first // POOLED * pooled_step
                _store(pooled, to, pooled_step, means, CHUNK // POOLED, HEAD_DIM, PADDED_DIM)
            else:
                pool += tl.sum(sums, 0)[None, :]
                pool_count += tl.sum(counts, 0)
                if (first + CHUNK) % POOLED == 0:
                    means = pool / tl.maximum(pool_count, 1.0)[:, None]
                    to = pooled_first + first // POOLED * pooled_step
                    _store(pooled, to, pooled_step, means, 1, HEAD_DIM, PADDED_DIM)
                    pool = tl.zeros([1, PADDED_DIM], tl.float32)
                    pool_count = tl.zeros([1], tl.float32)


@triton.jit(do_not_specialize=["length", "n_q", "n_k"])
def lay_out_kernel(
    q,
    k,
    v,
    q_rows,
    k_rows,
    v_rows,
    q_mean,
    k_mean,
    pooled_k,
    pooled_v,
    q_order,
    q_places,
    k_order,
    k_places,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    length,
    n_q,
    n_k,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    POOL: tl.constexpr,
    CHUNK_Q: tl.constexpr,
    CHUNK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Copy and average; grid (blocks * heads, batch, 3), heads fastest; the last axis is queries, keys, values.

    Neighbouring programs read neighbouring heads of the same tokens, so together they read whole rows of memory.
    """
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    what = tl.program_id(2)
    head = (program % HEADS).to(tl.int64)
    block = program // HEADS
    row = batch * HEADS + head
    to = row * length * HEAD_DIM
    if what == 0:
        if block < n_q:
            _copy_block(
                q + batch * stride_qb + head * stride_qh, q_rows + to, q_order, q_places, stride_qs,
                q_mean, row * n_q + block, q_mean, 0, 0, block, BLOCK_Q, 1 if PARTS else 0, 0, CHUNK_Q,
                HEAD_DIM, PADDED_DIM,
            )  # fmt: skip
    elif block < n_k:
        fine = (row * n_k + block) * PARTS
        pooled = (batch * n_k + block) * POOL * HEADS + head
        if what == 1:
            _copy_block(
                k + batch * stride_kb + head * stride_kh, k_rows + to, k_order, k_places, stride_ks,
                k_mean, fine, pooled_k, pooled, HEADS, block, BLOCK_K, PARTS, POOL, CHUNK_K,
                HEAD_DIM, PADDED_DIM,
            )  # fmt: skip
        else:
            _copy_block(
                v + batch * stride_vb + head * stride_vh, v_rows + to, k_order, k_places, stride_vs,
                v_rows, 0, pooled_v, pooled, HEADS, block, BLOCK_K, 0, POOL, CHUNK_K,
                HEAD_DIM, PADDED_DIM,
            )  # fmt: skip
