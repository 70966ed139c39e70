"""The check of sampled rows finds what is wrong, and lets through what is right."""

import pytest
import torch

from visparse.bench.cases import Case
from visparse.bench.check import sample_rows
from visparse.bench.problem import Inputs, Problem
from visparse_kernels import attend
from visparse_kernels.testing import BROKEN, eager

CASE = Case(
    name="c",
    grid=(3, 8, 10),
    heads=2,
    head_dim=16,
    batch=2,
    before=7,
    window=(3, 4, 5),
    stride=(1, 2, 5),
    patterns=("dense",),
)


def problem(pattern: str, dtype: torch.dtype = torch.float32) -> Problem:
    return Problem(Inputs.random(CASE, "cpu", dtype, 0), pattern, (32, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["dense", "random_25", "partial_25", "gna", "gna_strided"])
def test_rows_are_those_of_the_whole_result(pattern, dtype):
    one = problem(pattern, dtype)
    inputs = one.inputs
    sample = sample_rows(one, rows=16)
    mask = one.plain.lists.to_mask()
    whole, _ = eager(inputs.q.double(), inputs.k.double(), inputs.v.double(), mask, CASE.head_dim**-0.5)
    heads = torch.arange(CASE.heads)
    torch.testing.assert_close(sample.wanted, whole[:, sample.tokens.T, heads])
    assert sample.tokens.shape == (2, 16)
    assert sample.verdict(attend(inputs.q, inputs.k, inputs.v, one.plain.lists)) is None


def test_first_and_last_block_are_sampled():
    one = problem("gna")
    order = one.plain.lists.q_order[0]
    blocks = [set(order[part].tolist()) for part in (slice(0, 32), slice(-32, None))]
    for seed in range(5):
        tokens = set(sample_rows(one, seed=seed).tokens[0].tolist())
        assert all(tokens & block for block in blocks)


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_kernels_are_red(broken):
    one = problem("partial_50")
    inputs = one.inputs
    lists, scale = BROKEN[broken](one.plain.lists, CASE.head_dim**-0.5)
    out = attend(inputs.q, inputs.k, inputs.v, lists, scale=scale)
    sample = sample_rows(one, rows=512)
    assert "out [batch, sampled row, head, channel]: worst at" in sample.verdict(out)


def test_wrong_forms_are_red():
    one = problem("dense")
    sample = sample_rows(one)
    out = attend(one.inputs.q, one.inputs.k, one.inputs.v, one.plain.lists)
    assert "wanted torch.float32, got torch.float64" in sample.verdict(out.double())
    assert "wanted batch, heads and size of" in sample.verdict(out.transpose(1, 2))
    assert sample.verdict(torch.full_like(out, torch.nan)) is not None
