"""Softmax of one key block in the Hopper kernel: scores 64 x 128 in the registers of a warpgroup.

Masks and a bias lie in shared memory beside the keys; each thread reads what belongs to the scores that it holds, and
nothing moves between threads.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BLOCK_K = gl.constexpr(128)
ROWS = gl.constexpr(64)  # queries of one consumer warpgroup
INFINITY = gl.constexpr(float("inf"))


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


@gluon.constexpr_function
def bias_layout():
    """Layout [32, 4] in which a thread reads the bias of the columns of a 64 x 128 accumulator that it holds."""
    registers = [[0, 1], [2, 0], [4, 0], [8, 0], [16, 0]]
    lanes = [[0, 2], [1, 0], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0], [0, 0]], [], [32, 4])


@gluon.jit
def words_of(mask):
    """Read the words [64, 4] of one mask [1, 256] for the queries of one warpgroup."""
    ROWWISE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return mask._reinterpret(gl.int32, [ROWS, 4], ROWWISE).load(words_layout())


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
    bit = 1 << (8 * j + b)
    own, bit = gl.broadcast(own, bit)
    own = gl.convert_layout(own.reshape([ROWS, BLOCK_K]), scores.type.layout, assert_trivial=True)
    bit = gl.convert_layout(bit.reshape([ROWS, BLOCK_K]), scores.type.layout, assert_trivial=True)
    # in assembly, because LLVM would gather the comparisons into vectors of bits first, at twice the cost
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; and.b32 t, $2, $3; setp.ne.b32 p, t, 0; selp.f32 $0, $1, 0fFF800000, p; }",
        "=f,f,r,r",
        [scores, own, bit],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def weigh(scores, top, words, bias, factor, MASKED: gl.constexpr, CAREFUL: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Softmax of one key block: weights, their sums, and the largest logits of each query so far, to the base 2."""
    if HAS_BIAS:
        ROWWISE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        added = bias._reinterpret(gl.float32, [BLOCK_K // 4, 4], ROWWISE).load(bias_layout()).reshape([BLOCK_K])
        added = gl.convert_layout(added, gl.SliceLayout(0, scores.type.layout), assert_trivial=True)
        scores = scores * factor + added[None, :]
        factor = 1.0
    if MASKED:
        scores = hide(scores, words)
    top = gl.maximum(top, gl.max(scores, 1) * factor)
    pivot = top
    if CAREFUL:  # a query may have seen nothing so far
        pivot = gl.where(top == -INFINITY, 0.0, top)
    weights = gl.exp2(scores * factor - pivot[:, None])
    return weights, gl.sum(weights, 1), top, pivot


@gluon.jit
def pack(weights, DTYPE: gl.constexpr):
    """Round weights [64, 128] to 16 bits, two in an int32 [64, 64]: loops cut 16-bit values in halves."""
    low, high = gl.split(weights.reshape([ROWS, BLOCK_K // 2, 2]))
    TYPE: gl.constexpr = "bf16x2" if gl.bfloat16 == DTYPE else "f16x2"
    CODE: gl.constexpr = "cvt.rn." + TYPE + ".f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(CODE, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack(packed, DTYPE: gl.constexpr, SUMS: gl.constexpr):
    """Undo `pack`, as the left side of a product with sums in a layout; moves no data."""
    low = packed.to(gl.int16).to(DTYPE, bitcast=True)
    high = (packed >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    return gl.convert_layout(gl.join(low, high).reshape([ROWS, BLOCK_K]), gl.DotOperandLayout(0, SUMS, 2))
