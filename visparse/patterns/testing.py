"""What the tests of patterns share: a pattern against a definition written token by token."""

from collections.abc import Callable
from itertools import product
from math import prod

import torch
from torch import Tensor

from visparse.compile import compile_lists
from visparse.layout import Grid, Layout
from visparse.patterns.base import Pattern

Token = tuple[int, int, int]


def whole_mask(keeps: Callable[[Token, Token], bool], grid: Grid) -> Tensor:
    """Ask a plain function of every pair of tokens.

    Args:
        keeps: says of two tokens (frame, row, column), query and key, whether the pair is kept.
        grid: (frames, height, width), in tokens.

    Returns:
        bool [tokens, tokens], query by key, in row-major order.
    """
    tokens: list[Token] = list(product(range(grid[0]), range(grid[1]), range(grid[2])))
    return torch.tensor([[keeps(q, k) for k in tokens] for q in tokens])


def check_pattern(
    pattern: Pattern, grid: Grid, keeps: Callable[[Token, Token], bool], *, compiled: bool = True
) -> None:
    """Raise where a pattern is not its definition, as a mask or as block lists.

    Args:
        pattern: what is judged.
        grid: (frames, height, width), in tokens; small.
        keeps: the definition, see `whole_mask`.
        compiled: whether block lists are judged too, with and without boxes, in the order that is chosen.

    Raises:
        AssertionError: names pattern and grid, and how many pairs differ.
    """
    wanted = whole_mask(keeps, grid)
    at = Layout(grid).coordinates()
    masks = {"keep": pattern.keep(at, at, grid)}
    if compiled:
        for boxes in (False, True):
            lists = compile_lists([pattern], Layout(grid), block_q=16, block_k=32, boxes=boxes)
            masks[f"compile_lists(boxes={boxes})"] = lists.to_mask()[0]
            if round(lists.density * prod(grid) ** 2) != int(wanted.sum()):
                raise AssertionError(f"{pattern} on {grid}: density {lists.density}, counted {wanted.sum()} pairs")
    for way, mask in masks.items():
        if not torch.equal(mask, wanted):
            raise AssertionError(f"{pattern} on {grid}: {way} differs in {int((mask ^ wanted).sum())} pairs")


def check_flex(pattern: Pattern, layout: Layout) -> None:
    """Raise where FlexAttention, led by `Pattern.mask_mod`, gives another result than the mask of `Pattern.keep`.

    Args:
        pattern: what is judged; it keeps a key for every query.
        layout: grid and extra tokens; small.

    Raises:
        AssertionError: the results differ.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, layout.tokens, 16, generator=generator) for _ in range(3))
    block_mask = create_block_mask(
        pattern.mask_mod(layout), None, None, layout.tokens, layout.tokens, device="cpu", BLOCK_SIZE=32
    )
    out = flex_attention(q, k, v, block_mask=block_mask)
    mask = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    visual, at = slice(layout.before, layout.before + layout.visual), layout.coordinates()
    mask[visual, visual] = pattern.keep(at, at, layout.grid)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5, msg=lambda text: f"{pattern} on {layout}: {text}")
