"""Who works on which tile in the Hopper kernel: the scheduler warp, and the letters in which it tells the others."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

LETTER = gl.constexpr(11)  # numbers that the scheduler mails about a tile


@gluon.jit
def step(slot, phase, SLOTS: gl.constexpr):
    """Go to the next slot of a ring; the phase turns where the ring begins again."""
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def schedule(mail, mail_full, mail_empty, work, entries, sizes, counter):
    """The scheduler warp: draw tiles from the counter and mail them; `read_mail` lists what a letter holds."""
    offsets, unmasked, heads, groups = work
    q_starts, q_whole, q_step = entries[3], entries[4], entries[5]
    n_tiles, n_q, n_served = sizes[0], sizes[1], sizes[2]
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    slot = 0
    phase = 1
    number = gl.program_id(0)
    alive = True
    while alive:
        alive = number < n_tiles
        tile = gl.minimum(number, n_tiles - 1)
        block = tile % n_q
        rest = tile // n_q
        head = gl.load(heads + rest % n_served)
        group = gl.load(groups + rest % n_served)
        row = group * n_q + block
        first = gl.load(offsets + row)
        last = gl.load(offsets + row + 1)
        plain = gl.load(unmasked + row)
        start = gl.load(q_starts + group * q_step + block)
        whole = gl.load(q_whole + group * q_step + block)
        number = gl.atomic_add(counter, 1, sem="relaxed") + gl.num_programs(0)
        mbarrier.wait(mail_empty.index(slot), phase)
        letter = (
            alive.to(gl.int32), rest // n_served, head, group, block, first, last - first, plain, whole,
            (start >> 32).to(gl.int32), start.to(gl.int32),
        )  # fmt: skip
        for i in gl.static_range(LETTER):
            mail.index(slot * LETTER + i).store(gl.full([1], letter[i], gl.int32, ONE))
        mbarrier.arrive(mail_full.index(slot), count=1)
        slot, phase = step(slot, phase, 2)


@gluon.jit
def read_mail(mail, mail_full, mail_empty, slot, phase, WARPS: gl.constexpr):
    """Wait for the letter about the next tile, and open it.

    Returns:
        Whether there is such a tile; its batch row, head, group and query block; its first entry, how many entries it
        has, how many of them unmasked; whether its query block has no padding; where that starts.
    """
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    mbarrier.wait(mail_full.index(slot), phase)
    alive = gl.max(mail.index(slot * LETTER).load(ONE), 0) != 0
    batch = gl.max(mail.index(slot * LETTER + 1).load(ONE), 0)
    head = gl.max(mail.index(slot * LETTER + 2).load(ONE), 0)
    group = gl.max(mail.index(slot * LETTER + 3).load(ONE), 0)
    block = gl.max(mail.index(slot * LETTER + 4).load(ONE), 0)
    first = gl.max(mail.index(slot * LETTER + 5).load(ONE), 0)
    count = gl.max(mail.index(slot * LETTER + 6).load(ONE), 0)
    plain = gl.max(mail.index(slot * LETTER + 7).load(ONE), 0)
    whole = gl.max(mail.index(slot * LETTER + 8).load(ONE), 0) != 0
    high = gl.max(mail.index(slot * LETTER + 9).load(ONE), 0)
    low = gl.max(mail.index(slot * LETTER + 10).load(ONE), 0)
    mbarrier.arrive(mail_empty.index(slot), count=1)
    return alive, batch, head, group, block, first, count, plain, whole, (high.to(gl.int64) << 32) | low
