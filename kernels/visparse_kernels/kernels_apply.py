"""Whether the small Triton kernels of lists, choices and hidden proxies take a tensor; else torch operations do."""

import torch
from torch import Tensor

try:
    from visparse_kernels.attend.triton_kernel import INTERPRET
except ImportError:  # no Triton for this system
    _HAS_TRITON, INTERPRET = False, False
else:
    _HAS_TRITON = True


def kernels_apply(x: Tensor) -> bool:
    """Return whether a kernel can be launched on a tensor: it lies on a GPU, or Triton interprets, and has elements.

    A compiler gets torch operations, which it can fuse with others; so does whatever only stands for a tensor.

    Args:
        x: any tensor.
    """
    return (
        _HAS_TRITON
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and (x.is_cuda or INTERPRET)
        and x.numel() > 0
    )


def power(n: int) -> int:
    """Return the least power of two that is not below ``n``."""
    return 1 << (n - 1).bit_length()
