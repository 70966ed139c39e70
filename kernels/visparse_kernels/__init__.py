"""The operator of visparse: attention over block lists, with its log-sum-exp, and block lists chosen by content."""

from visparse_kernels.attend.api import attend, choose, explain, preferred_blocks, prefers_boxes
from visparse_kernels.block_scores.api import block_scores
from visparse_kernels.block_scores.choosing import choose_per_head, choose_top_k, choose_top_p
from visparse_kernels.boxes import Boxes
from visparse_kernels.lay_out.api import InOrder, lay_out
from visparse_kernels.lists import BlockLists
from visparse_kernels.lists_map import lists_from_map
from visparse_kernels.merge import merge
from visparse_kernels.proxies.api import attend_proxies, pool_tokens

__all__ = [
    "BlockLists",
    "Boxes",
    "InOrder",
    "attend",
    "attend_proxies",
    "block_scores",
    "choose",
    "choose_per_head",
    "choose_top_k",
    "choose_top_p",
    "explain",
    "lay_out",
    "lists_from_map",
    "merge",
    "pool_tokens",
    "preferred_blocks",
    "prefers_boxes",
]
