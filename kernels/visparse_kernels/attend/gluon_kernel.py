"""The Hopper kernel of `attend`, in Gluon: tiles fetched by TMA, two or three consumer warpgroups of 64 queries each.

One block of threads per multiprocessor works through *tiles* (query block x head x batch row) that it draws from a
counter. Its warps have fixed parts:

- one **producer** warp draws tiles, walks their lists and orders K, V and Q tiles by TMA into rings in shared memory;
- each **consumer** warpgroup owns 64 queries of the tile. While it computes the softmax of one key block, the tensor
  cores work on Q K^T of the next and P V of the one before; the other warpgroups fill what is left.

Every ring slot has a *full* barrier (TMA has written it) and an *empty* one (all consumers have read it). The rings
run on across tiles, so the keys of the next tile arrive during the epilogue of this one. The output is staged in the
Q slot of its own tile and stored by TMA.

A list entry holds where its key block starts, packed in 64 bits, and the number of its mask; see `gluon_program`. The
masked entries of a row come last. Their masks, the bit tiles of `BlockLists`, arrive with the keys, and each thread
reads the bits of the scores that it holds.
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

BLOCK_K = gl.constexpr(128)
ROWS = gl.constexpr(64)  # queries of one consumer warpgroup
INFINITY = gl.constexpr(float("inf"))
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def fragment_layout():
    """Layout [64, 4, 4, 4, 2] of a 64 x 128 wgmma accumulator: query, word of 32 keys, and 8 j + 2 c + b in a word."""
    registers = [[0, 0, 0, 0, 1], [8, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 2, 0, 0], [0, 1, 0, 0, 0], [0, 2, 0, 0, 0]]
    lanes = [[0, 0, 0, 1, 0], [0, 0, 0, 2, 0], [1, 0, 0, 0, 0], [2, 0, 0, 0, 0], [4, 0, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0, 0, 0], [32, 0, 0, 0, 0]], [], [64, 4, 4, 4, 2])


@gluon.constexpr_function
def words_layout():
    """Layout [64, 4] in which a thread reads all words of its two queries at once, 16 bytes each."""
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0]], lanes, [[16, 0], [32, 0]], [], [64, 4])


@gluon.jit
def hide(scores, words):
    """Set scores [64, 128] to -inf where the bit of the words [64, 4] is 0; moves no data between threads."""
    FRAGMENT: gl.constexpr = fragment_layout()
    WORDS: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, FRAGMENT)))
    J: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, FRAGMENT))))
    C: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, FRAGMENT))))
    B: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, FRAGMENT))))
    j = gl.arange(0, 4, J)[None, None, :, None, None]
    c = gl.arange(0, 4, C)[None, None, None, :, None]
    b = gl.arange(0, 2, B)[None, None, None, None, :]
    words = gl.convert_layout(words, WORDS, assert_trivial=True)
    own = words[:, :, None, None, None] >> (2 * c)
    kept = ((own >> (8 * j + b)) & 1).reshape([ROWS, BLOCK_K])
    kept = gl.convert_layout(kept, scores.type.layout, assert_trivial=True)
    return gl.where(kept != 0, scores, -INFINITY)


@gluon.jit
def step(slot, phase, SLOTS: gl.constexpr):
    """Go to the next slot of a ring; the phase turns where the ring begins again."""
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def tile_at(number, work, sizes):
    """Where tile ``number`` is: batch row, head, group, query block; its first entry, how many, how many unmasked."""
    offsets, unmasked, heads, groups = work
    n_tiles, n_q, n_served, _ = sizes
    number = gl.minimum(number, n_tiles - 1)
    block = number % n_q
    rest = number // n_q
    head = gl.load(heads + rest % n_served)
    group = gl.load(groups + rest % n_served)
    first = gl.load(offsets + group * n_q + block)
    count = gl.load(offsets + group * n_q + block + 1) - first
    return rest // n_served, head, group, block, first, count, gl.load(unmasked + group * n_q + block)


@gluon.jit
def fetch(
    runs, boxes, buffer, barrier, start, shift: gl.constexpr, batch, head, n_heads,
    HEAD_DIM: gl.constexpr, INNER: gl.constexpr, RUNS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """Order one tile by TMA: a box of the grid, or a run of tokens. ``shift`` moves it on, for later warpgroups."""
    frame = (start >> 48).to(gl.int32)
    row = ((start >> 32) & 0xFFFF).to(gl.int32)
    column = (start & 0x7FFFFFFF).to(gl.int32)
    outer = batch if INNER else batch * n_heads + head
    inner = head * HEAD_DIM if INNER else 0
    if RUNS:
        if frame < 0:
            here = buffer._reinterpret(runs.dtype, runs.block_shape, runs.layout)
            tma.async_copy_global_to_shared(runs, (outer, column + shift[3], inner), barrier, here)
    if BOXES:
        if frame >= 0:
            here = buffer._reinterpret(boxes.dtype, boxes.block_shape, boxes.layout)
            at = (outer, frame + shift[0], row + shift[1], column + shift[2], inner)
            tma.async_copy_global_to_shared(boxes, at, barrier, here)


@gluon.jit
def produce(
    tensors, rings, barriers, work, entries, sizes, counter, SHAPE: gl.constexpr, FEATURES: gl.constexpr,
):  # fmt: skip
    """The producer warp: draw tiles from the counter, and keep the rings full."""
    q_runs, q_boxes, k_runs, k_boxes, v_runs, v_boxes, tiles = tensors
    q_ring, k_ring, v_ring, mask_ring, mail = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, mail_full, mail_empty = barriers
    starts, masks, q_starts, _, q_step = entries
    GROUPS: gl.constexpr = SHAPE[0]
    HEAD_DIM: gl.constexpr = SHAPE[1]
    STAGES: gl.constexpr = SHAPE[2]
    Q_STEP: gl.constexpr = SHAPE[3]
    MASKED: gl.constexpr = FEATURES[0]
    RUNS: gl.constexpr = FEATURES[2]
    BOXES: gl.constexpr = FEATURES[3]
    INNER: gl.constexpr = FEATURES[4]
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    Q_BYTES: gl.constexpr = GROUPS * ROWS * HEAD_DIM * 2
    K_BYTES: gl.constexpr = BLOCK_K * HEAD_DIM * 2
    MASK_BYTES: gl.constexpr = GROUPS * ROWS * 16
    stage = 0
    phase = 1
    slot = 0
    slot_phase = 1
    number = gl.program_id(0)
    batch, head, group, block, first, count, plain = tile_at(number, work, sizes)
    ahead = gl.load(starts + first)
    mask_ahead = gl.load(masks + first)
    q_ahead = gl.load(q_starts + group * q_step + block)
    while number < sizes[0]:
        n = gl.maximum(count, 1)
        here_first = first
        here_batch = batch
        here_head = head
        here_plain = plain
        q_start = q_ahead

        number = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
        mbarrier.wait(mail_empty.index(slot), slot_phase)
        mail.index(slot).store(gl.full([1], number, gl.int32, ONE))
        mbarrier.arrive(mail_full.index(slot), count=1)
        batch, head, group, block, first, count, plain = tile_at(number, work, sizes)

        mbarrier.wait(q_empty.index(slot), slot_phase)
        mbarrier.expect(q_full.index(slot), Q_BYTES)
        for i in gl.static_range(GROUPS):
            fetch(
                q_runs, q_boxes, q_ring.index(slot * GROUPS + i), q_full.index(slot), q_start,
                (Q_STEP[0] * i, Q_STEP[1] * i, Q_STEP[2] * i, ROWS * i),
                here_batch, here_head, sizes[3], HEAD_DIM, INNER[0], RUNS[0], BOXES[0],
            )  # fmt: skip
        for i in range(n):
            start = ahead
            mask = mask_ahead
            ahead = gl.load(starts + here_first + gl.minimum(i + 1, n - 1))
            mbarrier.wait(k_empty.index(stage), phase)
            if MASKED:
                mask_ahead = gl.load(masks + here_first + gl.minimum(i + 1, n - 1))
                if i >= here_plain:
                    mbarrier.expect(k_full.index(stage), K_BYTES + MASK_BYTES)
                    for j in gl.static_range(GROUPS):
                        at = (mask * GROUPS + j) * ROWS
                        words = mask_ring.index(stage * GROUPS + j)
                        tma.async_copy_global_to_shared(tiles, (at, 0), k_full.index(stage), words)
                else:
                    mbarrier.expect(k_full.index(stage), K_BYTES)
            else:
                mbarrier.expect(k_full.index(stage), K_BYTES)
            fetch(
                k_runs, k_boxes, k_ring.index(stage), k_full.index(stage), start, (0, 0, 0, 0),
                here_batch, here_head, sizes[3], HEAD_DIM, INNER[1], RUNS[1], BOXES[1],
            )  # fmt: skip
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), K_BYTES)
            fetch(
                v_runs, v_boxes, v_ring.index(stage), v_full.index(stage), start, (0, 0, 0, 0),
                here_batch, here_head, sizes[3], HEAD_DIM, INNER[2], RUNS[1], BOXES[1],
            )  # fmt: skip
            stage, phase = step(stage, phase, STAGES)
        ahead = gl.load(starts + first)
        mask_ahead = gl.load(masks + first)
        q_ahead = gl.load(q_starts + group * q_step + block)
        slot, slot_phase = step(slot, slot_phase, 2)


@gluon.jit
def weigh(scores, top, words, masked, bias, factor, MASKED: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Softmax of one key block: weights, their sums, and the largest logits of each query so far, to the base 2."""
    if HAS_BIAS:
        scores = scores * factor + bias[None, :]
        factor = 1.0
    if MASKED:
        if masked:
            scores = hide(scores, words)
    top = gl.maximum(top, gl.max(scores, 1) * factor)
    pivot = top
    if MASKED or HAS_BIAS:  # a query that has seen nothing so far
        pivot = gl.where(top == -INFINITY, 0.0, top)
    weights = gl.exp2(scores * factor - pivot[:, None])
    return weights, gl.sum(weights, 1), top, pivot


@gluon.jit
def key_bias(bias, blocks, entry, HAS_BIAS: gl.constexpr, COLUMNS: gl.constexpr):
    """Load the bias [128] of the key block of one entry."""
    if HAS_BIAS:
        value = gl.load(bias + gl.load(blocks + entry).to(gl.int64) * BLOCK_K + gl.arange(0, BLOCK_K, COLUMNS))
    else:
        value = 0.0
    return value


@gluon.jit
def consume(
    outputs, rings, barriers, work, lists, sizes, scale,
    GROUP: gl.constexpr, SHAPE: gl.constexpr, FEATURES: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: 64 queries of every tile."""
    o_runs, o_boxes, out, lse = outputs
    q_ring, k_ring, v_ring, mask_ring, mail = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, mail_full, mail_empty = barriers
    entries, biases, lengths = lists
    bias, bias_b, bias_h, bias_g, blocks = biases
    q_order, q_order_step, q_len = lengths
    _, _, q_starts, q_whole, q_step = entries
    n_heads = sizes[3]
    GROUPS: gl.constexpr = SHAPE[0]
    HEAD_DIM: gl.constexpr = SHAPE[1]
    STAGES: gl.constexpr = SHAPE[2]
    Q_STEP: gl.constexpr = SHAPE[3]
    MASKED: gl.constexpr = FEATURES[0]
    HAS_BIAS: gl.constexpr = FEATURES[1]
    RUNS: gl.constexpr = FEATURES[2]
    BOXES: gl.constexpr = FEATURES[3]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, 16]
    )
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    SCORE_ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    SUM_ROWS: gl.constexpr = gl.SliceLayout(1, SUMS)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    WORDS: gl.constexpr = words_layout()
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    BLOCK_Q: gl.constexpr = GROUPS * ROWS
    DTYPE: gl.constexpr = q_ring.dtype
    zeros = gl.zeros([ROWS, BLOCK_K], gl.float32, SCORES)
    stage = 0
    phase = 0
    slot = 0
    slot_phase = 0
    number = gl.program_id(0)
    batch, head, group, block, first, count, plain = tile_at(number, work, sizes)
    started = False
    while number < sizes[0]:
        here_batch = batch
        here_head = head
        here_group = group
        here_block = block
        here = first
        n_real = count
        n_plain = plain
        n = gl.maximum(count, 1)
        mbarrier.wait(mail_full.index(slot), slot_phase)
        number = gl.max(mail.index(slot).load(ONE), 0)
        mbarrier.arrive(mail_empty.index(slot), count=1)
        batch, head, group, block, first, count, plain = tile_at(number, work, sizes)

        own_bias = bias
        if HAS_BIAS:
            own_bias += here_batch.to(gl.int64) * bias_b + here_head.to(gl.int64) * bias_h
            own_bias += here_group.to(gl.int64) * bias_g
        added = key_bias(own_bias, blocks, here, HAS_BIAS, COLUMNS)
        q = q_ring.index(slot * GROUPS + GROUP)
        mbarrier.wait(q_full.index(slot), slot_phase)
        mbarrier.wait(k_full.index(stage), phase)
        scores = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        words = 0
        if MASKED:
            words = mask_ring.index(stage * GROUPS + GROUP).load(WORDS)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        top = gl.full([ROWS], -INFINITY, gl.float32, SCORE_ROWS)
        weights, total, top, pivot = weigh(scores, top, words, n_plain == 0, added, scale, MASKED, HAS_BIAS)
        packed = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
        # the output of the tile before this one has left its slot of the Q ring by now
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(slot ^ 1), count=1, pred=started)
        started = True
        sums = gl.zeros([ROWS, HEAD_DIM], gl.float32, SUMS)
        for i in range(1, n):
            v_stage = stage
            v_phase = phase
            stage, phase = step(stage, phase, STAGES)
            added = key_bias(own_bias, blocks, here + i, HAS_BIAS, COLUMNS)
            mbarrier.wait(k_full.index(stage), phase)
            scores = warpgroup_mma(q, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_stage), v_phase)
            sums = warpgroup_mma(packed, v_ring.index(v_stage), sums, is_async=True)
            if MASKED:
                words = mask_ring.index(stage * GROUPS + GROUP).load(WORDS)
            scores = warpgroup_mma_wait(1, [scores])
            mbarrier.arrive(k_empty.index(stage), count=1)
            before = top
            weights, more, top, pivot = weigh(scores, top, words, i >= n_plain, added, scale, MASKED, HAS_BIAS)
            shrink = gl.exp2(before - pivot)
            total = total * shrink + more
            sums = warpgroup_mma_wait(0, [sums])
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            sums = sums * gl.convert_layout(shrink, SUM_ROWS)[:, None]
            packed = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
        start = gl.load(q_starts + here_group * q_step + here_block)
        whole = gl.load(q_whole + here_group * q_step + here_block) != 0
        order = q_order + here_group * q_order_step + here_block * BLOCK_Q + GROUP * ROWS
        token = gl.load(order + gl.arange(0, ROWS, SCORE_ROWS))
        mbarrier.wait(v_full.index(stage), phase)
        sums = warpgroup_mma(packed, v_ring.index(stage), sums, is_async=True)
        sums = warpgroup_mma_wait(0, [sums])
        mbarrier.arrive(v_empty.index(stage), count=1)
        stage, phase = step(stage, phase, STAGES)

        empty = (total == 0.0) | (n_real == 0)
        inverse = gl.convert_layout(gl.where(empty, 0.0, 1.0 / total), SUM_ROWS)
        result = gl.where(inverse[:, None] == 0.0, 0.0, sums * inverse[:, None]).to(DTYPE)
        stat = gl.where(empty, -INFINITY, (top + gl.log2(total)) * LN_2)
        outer = here_batch.to(gl.int64) * n_heads + here_head
        gl.store(lse + outer * q_len + token, stat, mask=token >= 0)

        frame = (start >> 48).to(gl.int32)
        row = ((start >> 32) & 0xFFFF).to(gl.int32)
        column = (start & 0x7FFFFFFF).to(gl.int32)
        inner = here_head * HEAD_DIM
        q.store(result)
        fence_async_shared()
        if BOXES[0]:
            if frame >= 0:
                at = (here_batch, frame + Q_STEP[0] * GROUP, row + Q_STEP[1] * GROUP, column + Q_STEP[2] * GROUP, inner)
                tma.async_copy_shared_to_global(o_boxes, at, q._reinterpret(DTYPE, o_boxes.block_shape, o_boxes.layout))
        if RUNS[0]:
            if (frame < 0) & whole:
                at = (here_batch, column + ROWS * GROUP, inner)
                tma.async_copy_shared_to_global(o_runs, at, q._reinterpret(DTYPE, o_runs.block_shape, o_runs.layout))
            if (frame < 0) & (whole == 0):  # padding in the run: the rows behind it belong to other tiles
                row_token = gl.load(order + gl.arange(0, ROWS, SUM_ROWS))
                places = (here_batch.to(gl.int64) * q_len + row_token) * n_heads + here_head
                cells = places[:, None] * HEAD_DIM + gl.arange(0, HEAD_DIM, gl.SliceLayout(0, SUMS))[None, :]
                gl.store(out + cells, result, mask=(row_token >= 0)[:, None])
        slot, slot_phase = step(slot, slot_phase, 2)
    tma.store_wait(0)


@gluon.jit
def rings_of(DTYPE: gl.constexpr, GROUPS: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory of Q, K, V and masks, and the mailbox through which the producer tells which tile is next."""
    SWIZZLE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q = gl.allocate_shared_memory(DTYPE, [2 * GROUPS, ROWS, HEAD_DIM], SWIZZLE)
    k = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, HEAD_DIM], SWIZZLE)
    v = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_K, HEAD_DIM], SWIZZLE)
    masks = gl.allocate_shared_memory(gl.int32, [STAGES * GROUPS, ROWS, 4], gl.NVMMASharedLayout(0, 32, 2))
    mail = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return q, k, v, masks, mail


@gluon.jit
def barriers_of(SLOTS: gl.constexpr, GROUPS: gl.constexpr):
    """A full and an empty barrier for each slot of one ring."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    return full, empty


@gluon.jit(
    do_not_specialize=[
        "n_tiles", "n_q", "n_served", "n_heads", "q_len", "q_starts_step", "q_order_step", "bias_b", "bias_h", "bias_g",
    ]
)  # fmt: skip
def attend_kernel(
    q_runs, q_boxes, k_runs, k_boxes, v_runs, v_boxes, o_runs, o_boxes, tiles, out, lse, bias, bias_b, bias_h, bias_g,
    offsets, unmasked, heads, groups, starts, masks, blocks, q_starts, q_whole, q_starts_step, q_order, q_order_step,
    counter, n_tiles, n_q, n_served, n_heads, q_len, scale,
    SHAPE: gl.constexpr, FEATURES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """All tiles of one launch; `gluon_impl.launch` says what the arguments are.

    ``SHAPE`` is (warpgroups, head size, slots of the K and V rings, step between the boxes of warpgroups).
    ``FEATURES`` is (masked, biased, (query runs, key runs), (query boxes, key boxes), heads inside a row of (q, k, v)).
    ``REGISTERS`` are those of a thread of a consumer and of the producer.
    """
    DTYPE: gl.constexpr = out.dtype.element_ty
    GROUPS: gl.constexpr = SHAPE[0]
    q_ring, k_ring, v_ring, mask_ring, mail = rings_of(DTYPE, GROUPS, SHAPE[1], SHAPE[2])
    q_full, q_empty = barriers_of(2, GROUPS)
    k_full, k_empty = barriers_of(SHAPE[2], GROUPS)
    v_full, v_empty = barriers_of(SHAPE[2], GROUPS)
    mail_full, mail_empty = barriers_of(2, GROUPS)
    tensors = (q_runs, q_boxes, k_runs, k_boxes, v_runs, v_boxes, tiles)
    outputs = (o_runs, o_boxes, out, lse)
    rings = (q_ring, k_ring, v_ring, mask_ring, mail)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, mail_full, mail_empty)
    work = (offsets, unmasked, heads, groups)
    entries = (starts, masks, q_starts, q_whole, q_starts_step)
    biases = (bias, bias_b, bias_h, bias_g, blocks)
    sizes = (n_tiles, n_q, n_served, n_heads)
    lists = (entries, biases, (q_order, q_order_step, q_len))
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (consume, (outputs, rings, barriers, work, lists, sizes, scale, 0, SHAPE, FEATURES)),
                (consume, (outputs, rings, barriers, work, lists, sizes, scale, 1, SHAPE, FEATURES)),
                (produce, (tensors, rings, barriers, work, entries, sizes, counter, SHAPE, FEATURES)),
            ],
            [4, 1],
            [REGISTERS[0], REGISTERS[1]],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (outputs, rings, barriers, work, lists, sizes, scale, 0, SHAPE, FEATURES)),
                (consume, (outputs, rings, barriers, work, lists, sizes, scale, 1, SHAPE, FEATURES)),
                (consume, (outputs, rings, barriers, work, lists, sizes, scale, 2, SHAPE, FEATURES)),
                (produce, (tensors, rings, barriers, work, entries, sizes, counter, SHAPE, FEATURES)),
            ],
            [4, 4, 1],
            [REGISTERS[0], REGISTERS[0], REGISTERS[1]],
        )  # fmt: skip
