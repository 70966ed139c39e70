"""Merging parts by log-sum-exp equals attention over all keys."""

import pytest
import torch

from visparse_kernels import BlockLists, attend, merge
from visparse_kernels.testing import check_attend


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_merge_to_the_whole(parts, make_qkv) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 70, 90, generator=generator) < 0.3
    mask[:, 5] = False
    owner = torch.randint(0, parts, (90,), generator=generator)
    whole = BlockLists.from_mask(mask, 32, 32)
    q, k, v = make_qkv(whole, batch=2)
    results = [
        attend(q, k, v, BlockLists.from_mask(mask & (owner == part), 32, 32), return_lse=True) for part in range(parts)
    ]
    out, lse = merge([r[0] for r in results], [r[1] for r in results])
    check_attend(out, lse, q, k, v, whole)
    assert (out[:, 5] == 0).all()
    assert (lse[:, :, 5] == -torch.inf).all()


def test_dtype_is_kept_and_large_logits_do_not_overflow() -> None:
    out = torch.ones(1, 2, 1, 8, dtype=torch.bfloat16)
    lse = torch.full((1, 1, 2), 1e4)
    merged, merged_lse = merge([out, 3 * out], [lse, lse])
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, 2 * out)
    assert torch.allclose(merged_lse, lse + torch.tensor(2.0).log())


def test_what_does_not_fit_is_refused() -> None:
    out, lse = torch.zeros(1, 4, 2, 8), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        merge([], [])
    with pytest.raises(ValueError, match="got 1 and 2"):
        merge([out], [lse, lse])
    with pytest.raises(ValueError, match=r"lses\[0\]: wanted shape \[1, 2, 4\], got \[1, 4, 2\]"):
        merge([out], [lse.transpose(1, 2)])
    with pytest.raises(ValueError, match=r"outs\[1\]: wanted shape \[1, 4, 2, 8\], got \[1, 3, 2, 8\]"):
        merge([out, out[:, :3]], [lse, lse])
