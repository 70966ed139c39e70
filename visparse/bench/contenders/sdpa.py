"""PyTorch's own dense attention: FlashAttention-2, cuDNN, and what PyTorch takes by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from visparse.bench.contenders.base import Contender, not_cuda, not_dense
from visparse.bench.problem import Problem


class Sdpa(Contender):
    """`scaled_dot_product_attention` with one backend.

    Args:
        name: of the contender.
        backend: None lets PyTorch choose.
    """

    dense = True

    def __init__(self, name: str, backend: SDPBackend | None) -> None:
        """Name it."""
        self.name = name
        self.backend = backend

    def can_run(self, problem: Problem) -> str | None:
        """Dense only; a forced backend needs CUDA."""
        return not_dense(problem) or (None if self.backend is None else not_cuda(problem))

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        """Heads in front of tokens, as copies made before."""
        q, k, v = problem.inputs.heads_first
        backend = self.backend

        def call() -> Tensor:
            if backend is None:
                return scaled_dot_product_attention(q, k, v).transpose(1, 2)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v).transpose(1, 2)

        return call


def all_sdpa() -> list[Contender]:
    """The three."""
    return [
        Sdpa("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
        Sdpa("sdpa_flash", SDPBackend.FLASH_ATTENTION),
        Sdpa("sdpa_default", None),
    ]


def cudnn_version() -> int | None:
    """Version of cuDNN that PyTorch uses; None without one."""
    return torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
