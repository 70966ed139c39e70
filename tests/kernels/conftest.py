"""Inputs and cases that the tests of every implementation share."""

from collections.abc import Callable

import pytest
import torch

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def make_qkv() -> Callable[..., Inputs]:
    """Return a function that draws q, k and v for some lists."""

    def make(
        lists: "object",
        *,
        batch: int = 1,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> Inputs:
        generator = torch.Generator().manual_seed(seed)

        def draw(length: int) -> torch.Tensor:
            shape = (batch, length, lists.heads, head_dim)  # type: ignore[attr-defined]
            return torch.randn(shape, generator=generator).to(device, dtype)

        q_len, k_len = lists.q_len, lists.k_len  # type: ignore[attr-defined]
        return draw(q_len), draw(k_len), draw(k_len)

    return make
