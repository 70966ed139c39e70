"""The Triton kernel of `lay_out`: one program copies a block of queries and one of keys and values, of one head."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _copy(source, target, order, places, slot, stride, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Copy the rows of some slots; returns their sum, fp32 [PADDED_DIM], and how many have a token."""
    dim = tl.arange(0, PADDED_DIM)
    token = tl.load(order + slot)
    place = tl.load(places + slot).to(tl.int64)
    real = (token >= 0)[:, None] & (dim < HEAD_DIM)[None, :]
    rows = tl.load(source + token.to(tl.int64)[:, None] * stride + dim[None, :], mask=real, other=0.0)
    tl.store(target + place[:, None] * HEAD_DIM + dim[None, :], rows, mask=real)
    return tl.sum(rows.to(tl.float32), 0), tl.sum((token >= 0).to(tl.float32), 0)


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
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Copy and average; grid (blocks * heads, batch), heads fastest.

    Neighbouring programs read neighbouring heads of the same tokens, so together they read whole rows of memory.
    """
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    head = (program % HEADS).to(tl.int64)
    block = program // HEADS
    row = batch * HEADS + head
    to = row * length * HEAD_DIM
    dim = tl.arange(0, PADDED_DIM)
    inside = dim < HEAD_DIM

    if block < n_q:
        CHUNK_Q: tl.constexpr = min(64, BLOCK_Q & -BLOCK_Q)
        source = q + batch * stride_qb + head * stride_qh
        total = tl.zeros([PADDED_DIM], tl.float32)
        count = 0.0
        for first in tl.static_range(0, BLOCK_Q, CHUNK_Q):
            slot = block * BLOCK_Q + first + tl.arange(0, CHUNK_Q)
            sums, number = _copy(source, q_rows + to, q_order, q_places, slot, stride_qs, HEAD_DIM, PADDED_DIM)
            total += sums
            count += number
        if PARTS:
            mean = total / tl.maximum(count, 1.0)
            tl.store(q_mean + (row * n_q + block) * HEAD_DIM + dim, mean, mask=inside)

    if block < n_k:
        PART: tl.constexpr = BLOCK_K // max(PARTS, 1)
        POOLED: tl.constexpr = BLOCK_K // max(POOL, 1)
        CHUNK: tl.constexpr = min(PART, POOLED, 64)
        k += batch * stride_kb + head * stride_kh
        v += batch * stride_vb + head * stride_vh
        part = tl.zeros([PADDED_DIM], tl.float32)
        part_count = 0.0
        keys = tl.zeros([PADDED_DIM], tl.float32)
        values = tl.zeros([PADDED_DIM], tl.float32)
        count = 0.0
        for first in tl.static_range(0, BLOCK_K, CHUNK):
            slot = block * BLOCK_K + first + tl.arange(0, CHUNK)
            k_sums, number = _copy(k, k_rows + to, k_order, k_places, slot, stride_ks, HEAD_DIM, PADDED_DIM)
            v_sums, _ = _copy(v, v_rows + to, k_order, k_places, slot, stride_vs, HEAD_DIM, PADDED_DIM)
            if PARTS:
                part += k_sums
                part_count += number
                if (first + CHUNK) % PART == 0:
                    at = (row * n_k + block) * PARTS + first // PART
                    mean = part / tl.maximum(part_count, 1.0)
                    tl.store(k_mean + at * HEAD_DIM + dim, mean, mask=inside)
                    part = tl.zeros([PADDED_DIM], tl.float32)
                    part_count = 0.0
            if POOL:
                keys += k_sums
                values += v_sums
                count += number
                if (first + CHUNK) % POOLED == 0:
                    at = ((batch * n_k + block) * POOL + first // POOLED) * HEADS + head
                    number = tl.maximum(count, 1.0)
                    mean = (keys / number).to(pooled_k.dtype.element_ty)
                    tl.store(pooled_k + at * HEAD_DIM + dim, mean, mask=inside)
                    mean = (values / number).to(pooled_v.dtype.element_ty)
                    tl.store(pooled_v + at * HEAD_DIM + dim, mean, mask=inside)
                    keys = tl.zeros([PADDED_DIM], tl.float32)
                    values = tl.zeros([PADDED_DIM], tl.float32)
                    count = 0.0
