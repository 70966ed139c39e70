"""The operator of visparse: attention over block lists, with its log-sum-exp."""

from visparse_kernels.attend.api import attend, choose, explain, preferred_blocks, prefers_boxes
from visparse_kernels.boxes import Boxes
from visparse_kernels.lists import BlockLists
from visparse_kernels.merge import merge

__all__ = ["BlockLists", "Boxes", "attend", "choose", "explain", "merge", "preferred_blocks", "prefers_boxes"]
