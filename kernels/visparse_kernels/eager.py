"""Whether an operator may be called as the plain function that it is."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_PLAIN = (Tensor, torch.nn.Parameter)
_T = TypeVar("_T")


def call(plain: Callable[..., _T], operator: Callable[..., _T], *arguments: Any) -> _T:
    """Call an operator, as the plain function that it was made of where nothing watches.

    Args:
        plain: the function.
        operator: what `torch.library.custom_op` made of it.
        arguments: of either.
    """
    if is_eager(*(x for x in arguments if isinstance(x, Tensor))):
        with torch.no_grad():
            return plain(*arguments)
    return operator(*arguments)


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
