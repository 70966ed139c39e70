"""Whether an operator may be called as the plain function that it is."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_PLAIN = (Tensor, torch.nn.Parameter)


def is_eager(*tensors: Tensor | None) -> bool:
    """Return whether nothing watches a call: no compiler, no dispatch mode, and tensors that are just that.

    A call through PyTorch's dispatcher takes half a millisecond more on the host of a GPU, mostly to look for outputs
    that share memory with inputs; at small sizes that is more than the kernel.

    Args:
        tensors: of the call.
    """
    return (
        not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and all(x is None or type(x) in _PLAIN for x in tensors)
    )
