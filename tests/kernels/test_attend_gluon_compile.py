"""The Hopper kernel compiled for sm_90, without a GPU: registers, spills, tensor core and TMA instructions."""

from dataclasses import replace

import pytest
import torch

from visparse_kernels.attend import gluon_impl
from visparse_kernels.attend.gluon_program import program_of
from visparse_kernels.testing_boxes import random_boxed_lists
from visparse_kernels.testing_compile import Compiled, assemble, cannot_compile, hopper_driver

pytestmark = pytest.mark.skipif(bool(cannot_compile()), reason=cannot_compile() or "")


def compile_for_hopper(
    head_dim: int, block_q: int, *, masked=True, bias=False, runs=True, boxes=True, dtype
) -> Compiled:
    lists = random_boxed_lists(
        grid=(4, 16, 16), after=40, q_box=(block_q // 64, 8, 8), k_box=(2, 8, 8), head_group=[0, 1]
    )
    program = program_of(lists)
    part = replace(program.parts[0], masked=masked, q_runs=runs, k_runs=runs)
    if not boxes:
        part = replace(part, q_box=None, k_box=None)
    q = torch.zeros(2, lists.q_len, 2, head_dim, dtype=dtype)
    out, lse = torch.empty_like(q), torch.empty(2, 2, lists.q_len)
    slots = gluon_impl.bias_by_slot(torch.zeros(1, 1, lists.k_len), lists) if bias else None
    with hopper_driver():
        kernel = gluon_impl.launch(q, q, q, out, lse, lists, program, part, head_dim**-0.5, slots, warm_up=True)
    return assemble(kernel)


def matrix_instructions(head_dim: int, groups: int, loops: int) -> int:
    """Q K^T and P V of one block, in the first block, the loops, and the last product."""
    q_k, p_v = head_dim // 16, 128 // 16
    return groups * (q_k + p_v) * (loops + 1)


@pytest.mark.parametrize(("head_dim", "block_q", "warps"), [(128, 128, 12), (64, 192, 16), (64, 128, 12)])
@pytest.mark.parametrize(
    ("masked", "runs", "boxes", "dtype"),
    [
        (False, True, False, torch.bfloat16),
        (False, False, True, torch.float16),
        (True, True, True, torch.bfloat16),
    ],
)
def test_it_keeps_its_sums_in_registers(head_dim, block_q, warps, masked, runs, boxes, dtype) -> None:
    kernel = compile_for_hopper(head_dim, block_q, masked=masked, runs=runs, boxes=boxes, dtype=dtype)
    assert kernel.registers <= 65536 // (warps * 32)
    assert kernel.spilled == 0
    assert kernel.warnings == []  # ptxas says here where it had to run wgmma one by one
    assert kernel.warps == warps
    assert kernel.shared <= 232448
    assert kernel.count("HGMMA") == matrix_instructions(head_dim, block_q // 64, 2 if masked else 1)
    assert kernel.count("USETMAXREG") >= 2  # registers go from the producer to the consumers
    assert kernel.count("UTMALDG") > 0
    assert kernel.count("UTMASTG") > 0
    assert kernel.count("HMMA") == 0


@pytest.mark.parametrize(("head_dim", "block_q"), [(128, 128), (64, 192)])
def test_a_bias_spills_next_to_nothing(head_dim, block_q) -> None:
    kernel = compile_for_hopper(head_dim, block_q, bias=True, dtype=torch.bfloat16)
    assert kernel.spilled <= 128  # bytes, of all warpgroups together; scores that spill take hundreds in each
    assert kernel.warnings == []


@pytest.mark.parametrize(("head_dim", "block_q"), [(128, 128), (64, 192)])
def test_a_mask_costs_two_instructions_a_score_at_most(head_dim, block_q) -> None:
    plain = compile_for_hopper(head_dim, block_q, masked=False, runs=False, dtype=torch.bfloat16)
    masked = compile_for_hopper(head_dim, block_q, masked=True, runs=False, dtype=torch.bfloat16)
    groups, scores = block_q // 64, 64  # of a thread, in a block
    # the first block and the loop over masked blocks hide scores
    assert masked.count("FSEL") - plain.count("FSEL") <= groups * (2 * scores + 8)
    assert masked.count("SEL") - plain.count("SEL") <= groups * 8
    assert masked.count("LDS") - plain.count("LDS") == groups * 4
