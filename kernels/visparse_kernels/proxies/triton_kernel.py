"""The Triton kernels of proxy tokens: pooling, and attention to proxies merged into a known output."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["shares_step_b", "shares_step_h", "n_proxies", "n_members"])
def pool_kernel(
    k,
    v,
    members,
    shares,
    pooled_k,
    pooled_v,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    shares_step_b,
    shares_step_h,
    n_proxies,
    n_members,
    HEADS: tl.constexpr,
    TILE_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HAS_SHARES: tl.constexpr,
):
    """Average the keys and the values of one proxy and head; grid (proxies * heads, batch), heads fastest.

    Neighbouring programs read neighbouring heads of the same tokens, so together they read whole rows of memory.
    """
    program = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    head = (program % HEADS).to(tl.int64)
    proxy = (program // HEADS).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    members += proxy * n_members
    if HAS_SHARES:
        shares += batch * shares_step_b + head * shares_step_h + proxy * n_members

    k_sum = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    v_sum = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    count = tl.zeros([TILE_M], tl.int32)
    for first in range(0, n_members, TILE_M):
        slot = first + tl.arange(0, TILE_M)
        token = tl.load(members + slot, mask=slot < n_members, other=-1)
        real = token >= 0
        if HAS_SHARES:
            share = tl.load(shares + slot, mask=real, other=0.0)
            real = share != 0.0
        at = real[:, None] & (dim < HEAD_DIM)[None, :]
        row = token.to(tl.int64)[:, None]
        keys = tl.load(k + row * stride_ks + dim[None, :], mask=at, other=0.0).to(tl.float32)
        values = tl.load(v + row * stride_vs + dim[None, :], mask=at, other=0.0).to(tl.float32)
        if HAS_SHARES:
            k_sum += keys * share[:, None]
            v_sum += values * share[:, None]
        else:
            k_sum += keys
            v_sum += values
            count += real.to(tl.int32)
    k_mean, v_mean = tl.sum(k_sum, 0), tl.sum(v_sum, 0)
    if not HAS_SHARES:
        number = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
        k_mean, v_mean = k_mean / number, v_mean / number
    to = ((batch * n_proxies + proxy) * HEADS + head) * HEAD_DIM + dim
    tl.store(pooled_k + to, k_mean.to(pooled_k.dtype.element_ty), mask=dim < HEAD_DIM)
    tl.store(pooled_v + to, v_mean.to(pooled_v.dtype.element_ty), mask=dim < HEAD_DIM)


@triton.jit
def _visible_chunks(hidden, n_proxies, n_words, CHUNKS: tl.constexpr, TILE_P: tl.constexpr):
    """Return which chunks of TILE_P proxies hold a proxy that is not hidden, bool [CHUNKS]."""
    WORDS: tl.constexpr = TILE_P // 32
    at = tl.arange(0, CHUNKS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    words = tl.load(hidden + at, mask=at < n_words, other=-1)
    left = n_proxies - 32 * at
    tail = (1 << tl.minimum(tl.maximum(left, 0), 31)) - 1
    real = tl.where(left >= 32, -1, tail)
    return tl.max(((words ^ -1) & real != 0).to(tl.int32), 1) != 0


@triton.jit
def _visit_chunk(
    queries,
    acc,
    top,
    total,
    chunk,
    k,
    v,
    weight,
    hidden,
    stride_kp,
    stride_vp,
    stride_weight_p,
    n_proxies,
    scale,
    TILE_P: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add a chunk of proxies to the running softmax; logits are in units of log2.

    Places behind the last proxy read that one again, and are hidden.
    """
    dim = tl.arange(0, PADDED_DIM)
    place = chunk * TILE_P + tl.arange(0, TILE_P)
    proxy = tl.minimum(place, n_proxies - 1)
    row = proxy.to(tl.int64)
    k_at = k + row[:, None] * stride_kp + dim[None, :]
    v_at = v + row[:, None] * stride_vp + dim[None, :]
    if HEAD_DIM == PADDED_DIM:
        keys = tl.load(k_at)
        values = tl.load(v_at)
    else:
        keys = tl.load(k_at, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        values = tl.load(v_at, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    bit = (tl.load(hidden + proxy // 32) >> (proxy % 32)) & 1
    added = tl.load(weight + row * stride_weight_p) * 1.4426950408889634
    added = tl.where((bit == 0) & (place < n_proxies), added, float("-inf"))
    logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale + added[None, :]
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit(do_not_specialize=["q_order_step", "hidden_step", "q_len", "n_proxies", "n_words"])
def attend_proxies_kernel(
    q,
    out,
    lse,
    k,
    v,
    weight,
    hidden,
    head_group,
    q_order,
    out_order,
    new_out,
    new_lse,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_kb,
    stride_kp,
    stride_kh,
    stride_vb,
    stride_vp,
    stride_vh,
    stride_weight_b,
    stride_weight_h,
    stride_weight_p,
    hidden_step,
    q_order_step,
    q_len,
    n_proxies,
    n_words,
    scale,
    HEADS: tl.constexpr,
    MOVED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_P: tl.constexpr,
    CHUNKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Merge the proxies into the output of one tile of queries; grid (query tiles, heads, batch).

    ``scale`` includes log2(e). Visible chunks of proxies are walked in runs, so hidden ones cost nothing and the loop
    over a run has no branch. A skipped head (group -1) borrows the order of group 0 and walks no run.
    """
    Q_PARTS: tl.constexpr = BLOCK_Q // TILE_Q
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    group = tl.load(head_group + head)
    table = tl.maximum(group, 0).to(tl.int64)

    dim = tl.arange(0, PADDED_DIM)
    token = tl.load(q_order + table * q_order_step + tile * TILE_Q + tl.arange(0, TILE_Q))
    row = token.to(tl.int64)
    real = (token >= 0)[:, None] & (dim < HEAD_DIM)[None, :]
    queries = tl.load(
        q + batch * stride_qb + head * stride_qh + row[:, None] * stride_qs + dim[None, :], mask=real, other=0.0
    )
    # asked for at once with the queries, so that one wait serves both
    known = tl.load(lse + (batch * HEADS + head) * q_len + row, mask=token >= 0, other=float("-inf"))
    known_at = out + batch * stride_ob + head * stride_oh + row[:, None] * stride_os + dim[None, :]
    known_out = tl.load(known_at, mask=real, other=0.0)
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    weight += batch * stride_weight_b + head * stride_weight_h
    blocks = tl.num_programs(0) // Q_PARTS
    hidden += batch * hidden_step + (table * blocks + tile // Q_PARTS) * n_words

    chunk = tl.arange(0, CHUNKS)
    visible = _visible_chunks(hidden, n_proxies, n_words, CHUNKS, TILE_P)
    visible = visible & (group >= 0) & (tl.max(token, 0) >= 0)
    acc = tl.zeros([TILE_Q, PADDED_DIM], tl.float32)
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    first = tl.min(tl.where(visible, chunk, CHUNKS), 0)
    while first < CHUNKS:
        last = tl.min(tl.where(visible | (chunk < first), CHUNKS, chunk), 0)
        for step in range(first, last):
            acc, top, total = _visit_chunk(
                queries, acc, top, total, step, k, v, weight, hidden, stride_kp, stride_vp, stride_weight_p, n_proxies,
                scale, TILE_P, HEAD_DIM, PADDED_DIM, PRECISION,
            )  # fmt: skip
        first = tl.min(tl.where(visible & (chunk >= last), chunk, CHUNKS), 0)

    # the exact part is one more key: its logit is the known log-sum-exp, its value the known output
    known_out = known_out.to(tl.float32)
    known_top = known * 1.4426950408889634
    base = tl.maximum(top, known_top)
    base = tl.where(base == float("-inf"), 0.0, base)
    mine, theirs = tl.exp2(top - base), tl.exp2(known_top - base)
    whole = total * mine + theirs
    divisor = tl.where(whole == 0.0, 1.0, whole)
    result = (acc * (mine / divisor)[:, None]) + known_out * (theirs / divisor)[:, None]
    # 0.693...: ln 2, from log2 to the natural logarithm
    stat = (base + tl.log2(divisor)) * 0.6931471805599453
    stat = tl.where(total == 0.0, known, stat)

    if MOVED:
        row = tl.load(out_order + tile * TILE_Q + tl.arange(0, TILE_Q)).to(tl.int64)
    to = new_out + ((batch * q_len + row) * HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(to, result.to(new_out.dtype.element_ty), mask=real)
    tl.store(new_lse + (batch * HEADS + head) * q_len + row, stat, mask=token >= 0)
