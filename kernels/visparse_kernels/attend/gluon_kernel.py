"""The Hopper kernel of `attend`, in Gluon: tiles fetched by TMA, two or three consumer warpgroups of 64 queries each.

One block of threads per multiprocessor works through *tiles* (query block x head x batch row) that it draws from a
counter. Its warps have fixed parts:

- one **scheduler** warp draws tiles, looks up what they are, and mails it to the others, a tile or two ahead;
- one **producer** warp walks the lists and orders K, V and Q tiles by TMA into rings in shared memory;
- each **consumer** warpgroup owns 64 queries of the tile. While it computes the softmax of one key block, the tensor
  cores work on Q K^T of the next and P V of the one before; the other warpgroups fill what is left.

Every ring slot has a *full* barrier (TMA has written it) and an *empty* one (all readers have read it). The rings run
on across tiles, so the keys of the next tile arrive during the epilogue of this one. The output is staged in the Q slot
of its own tile and stored by TMA.

A list entry holds where its key block starts, packed in 64 bits, and the number of its mask; see `gluon_program`. The
masked entries of a row come last. Their masks, the bit tiles of `BlockLists`, arrive with the keys, and so does a
bias; each thread reads what belongs to the scores that it holds.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: SIM102  (a constexpr condition must stand alone)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from visparse_kernels.attend.gluon_schedule import LETTER, read_mail, schedule, step
from visparse_kernels.attend.gluon_softmax import (
    BLOCK_K,
    INFINITY,
    ROWS,
    hide,
    pack,
    unpack,
    weigh,
    words_of,
)

LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def fetch(
    runs, boxes, buffer, barrier, start, shift: gl.constexpr, batch, head, n_heads,
    HEAD_DIM: gl.constexpr, INNER: gl.constexpr, RUNS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """Order one tile by TMA: a box of the grid, or a run of tokens. ``shift`` moves it on, for later warpgroups.

    Bytes arrive whatever ``start`` says, since others wait for them: a row without entries reads the start of the next
    row, which may be of the other kind; what it gets then is not looked at.
    """
    frame = (start >> 48).to(gl.int32)
    row = ((start >> 32) & 0xFFFF).to(gl.int32)
    column = (start & 0x7FFFFFFF).to(gl.int32)
    outer = batch if INNER else batch * n_heads + head
    inner = head * HEAD_DIM if INNER else 0
    if RUNS:
        if frame < 0 or not BOXES:
            here = buffer._reinterpret(runs.dtype, runs.block_shape, runs.layout)
            tma.async_copy_global_to_shared(runs, (outer, column + shift[3], inner), barrier, here)
    if BOXES:
        if frame >= 0 or not RUNS:
            here = buffer._reinterpret(boxes.dtype, boxes.block_shape, boxes.layout)
            at = (outer, frame + shift[0], row + shift[1], column + shift[2], inner)
            tma.async_copy_global_to_shared(boxes, at, barrier, here)


@gluon.jit
def produce(
    tensors, rings, barriers, entries, bias_steps, n_heads, SHAPE: gl.constexpr, FEATURES: gl.constexpr,
):  # fmt: skip
    """The producer warp: keep the rings full."""
    q_runs, q_boxes, k_runs, k_boxes, v_runs, v_boxes, tiles, bias = tensors
    q_ring, k_ring, v_ring, mask_ring, bias_ring, mail = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, mail_full, mail_empty = barriers
    starts, masks, blocks = entries[0], entries[1], entries[2]
    bias_b, bias_h, bias_g, n_k = bias_steps
    GROUPS: gl.constexpr = SHAPE[0]
    HEAD_DIM: gl.constexpr = SHAPE[1]
    STAGES: gl.constexpr = SHAPE[2]
    Q_STEP: gl.constexpr = SHAPE[3]
    MASKED: gl.constexpr = FEATURES[0]
    HAS_BIAS: gl.constexpr = FEATURES[1]
    RUNS: gl.constexpr = FEATURES[2]
    BOXES: gl.constexpr = FEATURES[3]
    INNER: gl.constexpr = FEATURES[4]
    Q_BYTES: gl.constexpr = GROUPS * ROWS * HEAD_DIM * 2
    V_BYTES: gl.constexpr = BLOCK_K * HEAD_DIM * 2
    K_BYTES: gl.constexpr = V_BYTES + (BLOCK_K * 4 if HAS_BIAS else 0)
    MASK_BYTES: gl.constexpr = GROUPS * ROWS * 16
    stage = 0
    phase = 1
    slot = 0
    slot_phase = 1
    alive, batch, head, group, _block, first, count, plain, _whole, q_start = read_mail(
        mail, mail_full, mail_empty, slot, slot_phase ^ 1, 1
    )
    while alive:
        n = gl.maximum(count, 1)
        bias_row = batch * bias_b + head * bias_h + group * bias_g
        ahead = gl.load(starts + first)
        mask_ahead = 0
        if MASKED:
            mask_ahead = gl.load(masks + first)
        block_ahead = 0
        if HAS_BIAS:
            block_ahead = gl.load(blocks + first)
        mbarrier.wait(q_empty.index(slot), slot_phase)
        mbarrier.expect(q_full.index(slot), Q_BYTES)
        for i in gl.static_range(GROUPS):
            fetch(
                q_runs, q_boxes, q_ring.index(slot * GROUPS + i), q_full.index(slot), q_start,
                (Q_STEP[0] * i, Q_STEP[1] * i, Q_STEP[2] * i, ROWS * i),
                batch, head, n_heads, HEAD_DIM, INNER[0], RUNS[0], BOXES[0],
            )  # fmt: skip
        for i in range(n):
            start = ahead
            mask = mask_ahead
            ahead = gl.load(starts + first + gl.minimum(i + 1, n - 1))
            mbarrier.wait(k_empty.index(stage), phase)
            if MASKED:
                mask_ahead = gl.load(masks + first + gl.minimum(i + 1, n - 1))
                if i >= plain:
                    mbarrier.expect(k_full.index(stage), K_BYTES + MASK_BYTES)
                    for j in gl.static_range(GROUPS):
                        words = mask_ring.index(stage * GROUPS + j)
                        tma.async_copy_global_to_shared(tiles, (mask * GROUPS + j, 0), k_full.index(stage), words)
                else:
                    mbarrier.expect(k_full.index(stage), K_BYTES)
            else:
                mbarrier.expect(k_full.index(stage), K_BYTES)
            if HAS_BIAS:
                at = bias_row * n_k + block_ahead
                tma.async_copy_global_to_shared(bias, (at, 0), k_full.index(stage), bias_ring.index(stage))
                block_ahead = gl.load(blocks + first + gl.minimum(i + 1, n - 1))
            fetch(
                k_runs, k_boxes, k_ring.index(stage), k_full.index(stage), start, (0, 0, 0, 0),
                batch, head, n_heads, HEAD_DIM, INNER[1], RUNS[1], BOXES[1],
            )  # fmt: skip
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), V_BYTES)
            fetch(
                v_runs, v_boxes, v_ring.index(stage), v_full.index(stage), start, (0, 0, 0, 0),
                batch, head, n_heads, HEAD_DIM, INNER[2], RUNS[1], BOXES[1],
            )  # fmt: skip
            stage, phase = step(stage, phase, STAGES)
        slot, slot_phase = step(slot, slot_phase, 2)
        alive, batch, head, group, _block, first, count, plain, _whole, q_start = read_mail(
            mail, mail_full, mail_empty, slot, slot_phase ^ 1, 1
        )


@gluon.jit
def visit(
    q, rings, barriers, stage, phase, top, total, sums, packed, scale, zeros,
    GROUP: gl.constexpr, SHAPE: gl.constexpr, MASKED: gl.constexpr, HAS_BIAS: gl.constexpr, PINNED: gl.constexpr,
):  # fmt: skip
    """One key block: Q K^T of this one beside P V of the one before, which ``packed`` holds; then the softmax.

    The assembler waits for P V before the exponentials, whatever the order here. ``PINNED`` keeps it behind them, by a
    wait for a barrier that is open already. It gains 4 to 6 % where heads of 64 have masks, and loses elsewhere.
    """
    k_ring, v_ring, mask_ring, bias_ring = rings[1], rings[2], rings[3], rings[4]
    k_full, k_empty, v_full, v_empty = barriers[2], barriers[3], barriers[4], barriers[5]
    DTYPE: gl.constexpr = k_ring.dtype
    SUMS: gl.constexpr = sums.type.layout
    v_stage = stage
    v_phase = phase
    stage, phase = step(stage, phase, SHAPE[2])
    p = unpack(packed, DTYPE, SUMS)
    mbarrier.wait(k_full.index(stage), phase)
    scores = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_stage), v_phase)
    sums = warpgroup_mma(p, v_ring.index(v_stage), sums, is_async=True)
    scores = warpgroup_mma_wait(1, [scores])
    words = 0
    if MASKED:
        words = words_of(mask_ring.index(stage * SHAPE[0] + GROUP))
    if not HAS_BIAS:
        mbarrier.arrive(k_empty.index(stage), count=1)
    before = top
    bias = bias_ring.index(stage)
    weights, more, top, pivot = weigh(scores, top, words, bias, scale, MASKED, MASKED or HAS_BIAS, HAS_BIAS)
    if HAS_BIAS:  # which has been read by now
        mbarrier.arrive(k_empty.index(stage), count=1)
    shrink = gl.exp2(before - pivot)
    total = total * shrink + more
    if PINNED:
        mbarrier.wait(v_full.index(v_stage), v_phase)
    sums = warpgroup_mma_wait(0, [sums])
    mbarrier.arrive(v_empty.index(v_stage), count=1)
    sums = sums * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS))[:, None]
    return stage, phase, top, total, sums, pack(weights, DTYPE)


@gluon.jit
def consume(
    outputs, rings, barriers, lengths, n_heads, scale,
    GROUP: gl.constexpr, SHAPE: gl.constexpr, FEATURES: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: 64 queries of every tile."""
    o_runs, o_boxes, out, lse = outputs
    q_ring, k_ring, v_ring, mask_ring, bias_ring, mail = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, mail_full, mail_empty = barriers
    q_order, q_order_step, q_len = lengths
    GROUPS: gl.constexpr = SHAPE[0]
    HEAD_DIM: gl.constexpr = SHAPE[1]
    STAGES: gl.constexpr = SHAPE[2]
    Q_STEP: gl.constexpr = SHAPE[3]
    MASKED: gl.constexpr = FEATURES[0]
    HAS_BIAS: gl.constexpr = FEATURES[1]
    PINNED: gl.constexpr = MASKED and HEAD_DIM == 64
    RUNS: gl.constexpr = FEATURES[2]
    BOXES: gl.constexpr = FEATURES[3]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, 16]
    )
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    SUM_ROWS: gl.constexpr = gl.SliceLayout(1, SUMS)
    BLOCK_Q: gl.constexpr = GROUPS * ROWS
    DTYPE: gl.constexpr = q_ring.dtype
    zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, SCORES)
    stage = 0
    phase = 0
    slot = 0
    slot_phase = 0
    alive, batch, head, group, block, _first, count, plain, whole, start = read_mail(
        mail, mail_full, mail_empty, slot, slot_phase, 4
    )
    started = False
    while alive:
        n = gl.maximum(count, 1)
        q = q_ring.index(slot * GROUPS + GROUP)
        mbarrier.wait(q_full.index(slot), slot_phase)
        mbarrier.wait(k_full.index(stage), phase)
        scores = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, [scores])
        if MASKED:
            if plain == 0:
                scores = hide(scores, words_of(mask_ring.index(stage * GROUPS + GROUP)))
        top = gl.full([ROWS], -INFINITY, gl.float32, SCORE_ROWS)
        softmax = weigh(scores, top, 0, bias_ring.index(stage), scale, False, MASKED or HAS_BIAS, HAS_BIAS)
        mbarrier.arrive(k_empty.index(stage), count=1)
        packed, total, top = pack(softmax[0], DTYPE), softmax[1], softmax[2]
        # the output of the tile before this one has left its slot of the Q ring by now
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(slot ^ 1), count=1, pred=started)
        started = True
        sums = gl.zeros([ROWS, HEAD_DIM], gl.float32, SUMS)
        masked_from = n
        if MASKED:
            masked_from = gl.maximum(plain, 1)
        for _i in range(1, masked_from):
            stage, phase, top, total, sums, packed = visit(
                q, rings, barriers, stage, phase, top, total, sums, packed, scale, zeros,
                GROUP, SHAPE, False, HAS_BIAS, PINNED,
            )  # fmt: skip
        if MASKED:
            for _i in range(masked_from, n):
                stage, phase, top, total, sums, packed = visit(
                    q, rings, barriers, stage, phase, top, total, sums, packed, scale, zeros,
                    GROUP, SHAPE, True, HAS_BIAS, PINNED,
                )  # fmt: skip
        order = q_order + group * q_order_step + block * BLOCK_Q + GROUP * ROWS
        token = gl.load(order + gl.arange(0, ROWS, SCORE_ROWS))
        mbarrier.wait(v_full.index(stage), phase)
        sums = warpgroup_mma(unpack(packed, DTYPE, SUMS), v_ring.index(stage), sums, is_async=True)
        sums = warpgroup_mma_wait(0, [sums])
        mbarrier.arrive(v_empty.index(stage), count=1)
        stage, phase = step(stage, phase, STAGES)

        empty = (total == 0.0) | (count == 0)
        inverse = gl.convert_layout(gl.where(empty, 0.0, 1.0 / total), SUM_ROWS)
        result = gl.where(inverse[:, None] == 0.0, 0.0, sums * inverse[:, None]).to(DTYPE)
        stat = gl.where(empty, -INFINITY, (top + gl.log2(total)) * LN_2)
        outer = batch.to(gl.int64) * n_heads + head
        gl.store(lse + outer * q_len + token, stat, mask=token >= 0)

        frame = (start >> 48).to(gl.int32)
        row = ((start >> 32) & 0xFFFF).to(gl.int32)
        column = (start & 0x7FFFFFFF).to(gl.int32)
        inner = head * HEAD_DIM
        q.store(result)
        fence_async_shared()
        if BOXES[0]:
            if frame >= 0:
                at = (batch, frame + Q_STEP[0] * GROUP, row + Q_STEP[1] * GROUP, column + Q_STEP[2] * GROUP, inner)
                tma.async_copy_shared_to_global(o_boxes, at, q._reinterpret(DTYPE, o_boxes.block_shape, o_boxes.layout))
        if RUNS[0]:
            if (frame < 0) & whole:
                run = (batch, column + ROWS * GROUP, inner)
                tma.async_copy_shared_to_global(o_runs, run, q._reinterpret(DTYPE, o_runs.block_shape, o_runs.layout))
            if (frame < 0) & (not whole):  # padding in the run: the rows behind it belong to other tiles
                row_token = gl.load(order + gl.arange(0, ROWS, SUM_ROWS))
                places = (batch.to(gl.int64) * q_len + row_token) * n_heads + head
                cells = places[:, None] * HEAD_DIM + gl.arange(0, HEAD_DIM, gl.SliceLayout(0, SUMS))[None, :]
                gl.store(out + cells, result, mask=(row_token >= 0)[:, None])
        slot, slot_phase = step(slot, slot_phase, 2)
        alive, batch, head, group, block, _first, count, plain, whole, start = read_mail(
            mail, mail_full, mail_empty, slot, slot_phase, 4
        )
    tma.store_wait(0)


@gluon.jit
def rings_of(DTYPE: gl.constexpr, GROUPS: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory of Q, K, V, masks and bias, and the mailbox through which the producer tells which tile is next."""
    SWIZZLE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q = gl.allocate_shared_memory(DTYPE, [2 * GROUPS, ROWS, HEAD_DIM], SWIZZLE)
    k = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, HEAD_DIM], SWIZZLE)
    v = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, HEAD_DIM], SWIZZLE)
    masks = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, 1, ROWS * 4], gl.NVMMASharedLayout(0, 32, 2))
    bias = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_K], gl.NVMMASharedLayout(0, 32, 2))
    mail = gl.allocate_shared_memory(gl.int32, [2 * LETTER, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return q, k, v, masks, bias, mail


@gluon.jit
def barriers_of(SLOTS: gl.constexpr, READERS: gl.constexpr):
    """A full and an empty barrier for each slot of one ring."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return full, empty


@gluon.jit(
    do_not_specialize=[
        "n_tiles", "n_q", "n_k", "n_served", "n_heads", "q_len", "q_starts_step", "q_order_step",
        "bias_b", "bias_h", "bias_g",
    ]
)  # fmt: skip
def attend_kernel(
    q_runs, q_boxes, k_runs, k_boxes, v_runs, v_boxes, o_runs, o_boxes, tiles, bias, out, lse,
    offsets, unmasked, heads, groups, starts, masks, blocks, q_starts, q_whole, q_starts_step, q_order, q_order_step,
    bias_b, bias_h, bias_g, n_k, counter, n_tiles, n_q, n_served, n_heads, q_len, scale,
    SHAPE: gl.constexpr, FEATURES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """All tiles of one launch; `gluon_impl.launch` says what the arguments are.

    ``SHAPE`` is (warpgroups, head size, slots of the K and V rings, step between the boxes of warpgroups).
    ``FEATURES`` is (masked, biased, (query runs, key runs), (query boxes, key boxes), heads inside a row of (q, k, v)).
    ``REGISTERS`` are those of a thread of a consumer and of the producer.
    """
    DTYPE: gl.constexpr = out.dtype.element_ty
    GROUPS: gl.constexpr = SHAPE[0]
    q_ring, k_ring, v_ring, mask_ring, bias_ring, mail = rings_of(DTYPE, GROUPS, SHAPE[1], SHAPE[2])
    q_full, q_empty = barriers_of(2, GROUPS)
    k_full, k_empty = barriers_of(SHAPE[2], GROUPS)
    v_full, v_empty = barriers_of(SHAPE[2], GROUPS)
    mail_full, mail_empty = barriers_of(2, GROUPS + 1)
    tensors = (q_runs, q_boxes, k_runs, k_boxes, v_runs, v_boxes, tiles, bias)
    outputs = (o_runs, o_boxes, out, lse)
    rings = (q_ring, k_ring, v_ring, mask_ring, bias_ring, mail)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, mail_full, mail_empty)
    work = (offsets, unmasked, heads, groups)
    entries = (starts, masks, blocks, q_starts, q_whole, q_starts_step)
    bias_steps = (bias_b, bias_h, bias_g, n_k)
    sizes = (n_tiles, n_q, n_served)
    lengths = (q_order, q_order_step, q_len)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (consume, (outputs, rings, barriers, lengths, n_heads, scale, 0, SHAPE, FEATURES)),
                (consume, (outputs, rings, barriers, lengths, n_heads, scale, 1, SHAPE, FEATURES)),
                (produce, (tensors, rings, barriers, entries, bias_steps, n_heads, SHAPE, FEATURES)),
                (schedule, (mail, mail_full, mail_empty, work, entries, sizes, counter)),
            ],
            [4, 1, 1],
            [REGISTERS[0], REGISTERS[1], REGISTERS[1]],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (outputs, rings, barriers, lengths, n_heads, scale, 0, SHAPE, FEATURES)),
                (consume, (outputs, rings, barriers, lengths, n_heads, scale, 1, SHAPE, FEATURES)),
                (consume, (outputs, rings, barriers, lengths, n_heads, scale, 2, SHAPE, FEATURES)),
                (produce, (tensors, rings, barriers, entries, bias_steps, n_heads, SHAPE, FEATURES)),
                (schedule, (mail, mail_full, mail_empty, work, entries, sizes, counter)),
            ],
            [4, 4, 1, 1],
            [REGISTERS[0], REGISTERS[0], REGISTERS[1], REGISTERS[1]],
        )
