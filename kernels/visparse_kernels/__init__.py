"""The operator of visparse: attention over block lists, with its log-sum-exp."""

from visparse_kernels.attend.api import attend, choose, explain, preferred_blocks
from visparse_kernels.lists import BlockLists
from visparse_kernels.merge import merge

__all__ = ["BlockLists", "attend", "choose", "explain", "merge", "preferred_blocks"]
