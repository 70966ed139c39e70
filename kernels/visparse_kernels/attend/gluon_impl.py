"""`attend` on Hopper: when the Gluon kernel can serve, its descriptors, and its launch."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from visparse_kernels.attend.gluon_program import Program, program_of
from visparse_kernels.attend.gluon_tables import Part
from visparse_kernels.boxes import Box
from visparse_kernels.lists import BlockLists

# Gluon is experimental and changes with Triton's minor releases; these were tried.
TRITON_VERSIONS = ((3, 6), (3, 8))
BLOCKS = {64: (192, 128), 128: (128, 128)}  # head size -> block sizes that are fastest
_GROUPS = {64: (2, 3), 128: (2,)}  # head size -> numbers of consumer warpgroups, 64 queries each
_BLOCK_K = 128
_DTYPES = (torch.bfloat16, torch.float16)


@cache
def missing() -> str | None:
    """Return why Gluon cannot be used here, whatever the GPU, or None."""
    try:
        import triton
    except ImportError as error:
        return f"needs the triton package, which could not be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not TRITON_VERSIONS[0] <= version <= TRITON_VERSIONS[-1]:
        tried = " to ".join(".".join(map(str, v)) for v in TRITON_VERSIONS)
        return f"needs Triton {tried} (Gluon changes with every release), got {triton.__version__}"
    from visparse_kernels.attend.triton_kernel import INTERPRET

    if INTERPRET:
        return "Triton's interpreter (TRITON_INTERPRET=1) cannot run Gluon"
    try:
        import visparse_kernels.attend.gluon_kernel  # noqa: F401
    except Exception as error:
        return f"its Gluon kernel could not be imported ({type(error).__name__}: {error})"
    return None


def can_run(device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int, block_k: int) -> str | None:
    """Return why this implementation cannot serve a case, or None."""
    if device.type != "cuda":
        return f"needs tensors on a CUDA device, got {device.type}"
    if (why := missing()) is not None:
        return why
    if not torch.cuda.is_available():
        return "needs a GPU, and PyTorch finds none"
    if _capability(device) != (9, 0):
        major, minor = _capability(device)
        return f"needs a Hopper GPU (compute capability 9.0), got {major}.{minor}"
    if dtype not in _DTYPES:
        return f"needs bf16 or fp16, got {dtype}"
    if head_dim not in _GROUPS:
        return f"needs a head_dim of 64 or 128, got {head_dim}"
    sizes = [64 * groups for groups in _GROUPS[head_dim]]
    if block_q not in sizes or block_k != _BLOCK_K:
        return f"needs block_q in {sizes} and block_k {_BLOCK_K} for this head_dim, got {block_q} and {block_k}"
    return None


def cannot_fetch(lists: BlockLists) -> str | None:
    """Return why the blocks of some lists cannot be fetched by TMA, or None; slow only at the first call, if at all."""
    if lists.boxes is not None:
        return None
    program = program_of(lists)
    return program if isinstance(program, str) else None


def run(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, key_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel, once for each pair of box shapes; see `visparse_kernels.attend` for the arguments.

    Returns:
        ``out [B, Sq, H, D]`` in the dtype of q, and ``lse [B, H, Sq]`` fp32.

    Raises:
        ValueError: a block of the lists is neither a run nor a box.
    """
    program = program_of(lists)
    if isinstance(program, str):
        raise ValueError(f"lists: {program}")
    batch, q_len, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if program.skipped:
        out.zero_()
        lse.fill_(-torch.inf)
    bias = None if key_bias is None else bias_by_slot(key_bias, lists)
    q, k, v = (fetchable(x) for x in (q, k, v))
    with torch.cuda.device_of(q):
        for part in program.parts:
            launch(q, k, v, out, lse, lists, program, part, scale, bias)
    return out, lse


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: BlockLists,
    program: Program,
    part: Part,
    scale: float,
    bias: Tensor | None,
    *,
    stages: int | None = None,
    warm_up: bool = False,
) -> Any:
    """Launch the kernel for the heads of one part.

    Args:
        q: [B, Sq, H, D], as `fetchable` gives it; so are k and v.
        k: [B, Sk, H, D].
        v: [B, Sk, H, D].
        out: [B, Sq, H, D], contiguous, written for these heads.
        lse: [B, H, Sq], contiguous, written for these heads.
        lists: the block lists.
        program: their program.
        part: the heads, and the shapes of their boxes.
        scale: factor of the logits.
        bias: what `bias_by_slot` returns, or None.
        stages: slots of the rings of K and V; None: as many as fit.
        warm_up: only compile, for the tensors' types; nothing runs, so no GPU is needed.

    Returns:
        What Triton returns: the compiled kernel.
    """
    from visparse_kernels.attend.gluon_kernel import attend_kernel

    batch, q_len, heads, head_dim = q.shape
    groups = lists.block_q // 64
    grid, first = (lists.boxes.grid, lists.boxes.first) if lists.boxes is not None else ((1, 1, 1), 0)
    q_part, q_step = split(part.q_box, groups)
    n_tiles = batch * len(part.heads) * lists.n_q
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    arguments = (
        *descriptors(q, 64 if part.q_runs else None, q_part, grid, first),
        *descriptors(k, _BLOCK_K if part.k_runs else None, part.k_box, grid, first),
        *descriptors(v, _BLOCK_K if part.k_runs else None, part.k_box, grid, first),
        *descriptors(out, 64 if part.q_runs else None, q_part, grid, first),
        words_descriptor(program.tiles, 256) if part.masked else None,
        None if bias is None else words_descriptor(bias, _BLOCK_K),
        out,
        lse,
        program.offsets,
        program.unmasked,
        part.heads,
        part.groups,
        program.starts,
        program.masks,
        program.blocks,
        program.q_starts,
        program.q_whole,
        program.q_starts.shape[1] if len(program.q_starts) > 1 else 0,
        lists.q_order,
        lists.q_order.shape[1] if len(lists.q_order) > 1 else 0,
        *((0, 0, 0) if bias is None else bias_steps(bias)),
        lists.n_k,
        counter,
        n_tiles,
        lists.n_q,
        len(part.heads),
        heads,
        q_len,
        scale * math.log2(math.e),
    )
    constants = {
        "SHAPE": (groups, head_dim, stages or (2 if head_dim == 128 else 4), q_step),
        "FEATURES": (
            part.masked,
            bias is not None,
            (part.q_runs, part.k_runs),
            (part.q_box is not None, part.k_box is not None),
            tuple(heads_inside(x) for x in (q, k, v)),
        ),
        "REGISTERS": (240, 24) if groups == 2 else (160, 24),
        "num_warps": 4,
    }
    size = (min(n_tiles, _multiprocessors(q.device)),)
    if warm_up:
        return attend_kernel.warmup(*arguments, grid=size, **constants)
    return attend_kernel[size](*arguments, **constants)


def fetchable(x: Tensor) -> Tensor:
    """Return a tensor [B, S, H, D] that TMA can read: itself, or a contiguous copy where its strides forbid it."""
    size = x.element_size()
    batch, _, heads, head_dim = x.shape
    row, head = x.stride(1), x.stride(2)
    aligned = x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in (x.stride(0), row, head))
    joined = head == head_dim or batch == 1 or x.stride(0) == heads * head
    return x if x.stride(3) == 1 and aligned and joined and row > 0 else x.contiguous()


def heads_inside(x: Tensor) -> bool:
    """Say whether the heads of a tensor [B, S, H, D] lie side by side in a row, not row by row in a head."""
    return x.shape[2] == 1 or x.stride(2) == x.shape[3]


def descriptors(x: Tensor, rows: int | None, box: Box | None, grid: Box, first: int) -> tuple[Any, Any]:
    """Describe a tensor to TMA as rows of tokens, and as a grid.

    Args:
        x: [B, S, H, D], as `fetchable` gives it.
        rows: tokens of a run; None: there are no runs.
        box: (frames, height, width) of a box; None: there are no boxes.
        grid: (frames, height, width), in tokens.
        first: token at which the grid begins.

    Returns:
        Descriptors of ``[outer, S, inner]`` and ``[outer, frames, height, width, inner]``, or None: outer and inner
        are batch and heads * head_dim, or batch * heads and head_dim.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    batch, length, heads, head_dim = x.shape
    inside = heads_inside(x)
    outer, inner = (batch, heads * head_dim) if inside else (batch * heads, head_dim)
    outer_step, step = x.stride(0) if inside else x.stride(2), x.stride(1)
    if outer == 1:
        outer_step = step * length
    runs = boxes = None
    if rows is not None:
        strides = [outer_step, step, 1]
        runs = TensorDescriptor(x, [outer, length, inner], strides, [1, rows, head_dim], _layout(3))
    if box is not None:
        _, height, width = grid
        strides = [outer_step, height * width * step, width * step, step, 1]
        boxes = TensorDescriptor(x[:, first:], [outer, *grid, inner], strides, [1, *box, head_dim], _layout(5))
    return runs, boxes


@cache
def _layout(rank: int, swizzle: int = 128, bits: int = 16) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=rank)


def words_descriptor(words: Tensor, length: int) -> Any:
    """Describe contiguous 32-bit words (masks, or a bias) to TMA as rows of some length, fetched one by one."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    words = words.view(-1, length)
    return TensorDescriptor(words, list(words.shape), [length, 1], [1, length], _layout(2, swizzle=0, bits=32))


def split(box: Box | None, groups: int) -> tuple[Box | None, Box]:
    """Cut a query box into the boxes of the warpgroups, along its slowest axis that is longer than 1.

    Args:
        box: (frames, height, width), 64 * groups tokens; None for runs.
        groups: number of warpgroups.

    Returns:
        The box of one warpgroup, and the step from one to the next.

    Raises:
        ValueError: the axis cannot be cut so, or a side is no power of two.
    """
    if box is None:
        return None, (0, 0, 0)
    axis = next(i for i, side in enumerate(box) if side > 1)
    part = tuple(side // groups if i == axis else side for i, side in enumerate(box))
    if box[axis] % groups or any(side & (side - 1) for side in part):
        raise ValueError(
            f"boxes: wanted a query box of {groups} equal boxes, one behind the other along its slowest axis, with "
            f"powers of two as sides, got {box}; use for example {(groups, 8, 8)}"
        )
    return (part[0], part[1], part[2]), tuple(side if i == axis else 0 for i, side in enumerate(part))  # type: ignore[return-value]


def bias_by_slot(key_bias: Tensor, lists: BlockLists) -> Tensor:
    """Lay a bias [B or 1, H or 1, Sk] out by key slots, in logarithms to the base 2.

    Returns:
        fp32 [B or 1, H or 1, G or 1, slots], contiguous; padding is -inf.
    """
    order = lists.k_order.long()
    bias = key_bias.float()[:, :, order.clamp(min=0)] * math.log2(math.e)
    return bias.masked_fill(order < 0, -torch.inf).contiguous()


def bias_steps(bias: Tensor) -> tuple[int, int, int]:
    """Rows from one batch row, head and group to the next in what `bias_by_slot` returns; 0 where they share a row."""
    batch, heads, groups, _ = bias.shape
    return (heads * groups if batch > 1 else 0, groups if heads > 1 else 0, 1 if groups > 1 else 0)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # compiling without a GPU, for the one whose kernel this is
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
