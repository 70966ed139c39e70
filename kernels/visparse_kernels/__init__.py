"""The operator of visparse: attention over block lists, with its log-sum-exp."""

from visparse_kernels.lists import BlockLists

__all__ = ["BlockLists"]
