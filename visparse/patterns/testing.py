"""What the tests of patterns share: a pattern against a definition written token by token."""

from collections.abc import Container, Iterator, Mapping
from itertools import product
from math import prod
from random import Random

import torch

from visparse.compile import compile_lists
from visparse.layout import Grid, Layout
from visparse.patterns.base import Pattern

Token = tuple[int, int, int]


def sweep(cases: int, *, most: int = 150) -> Iterator[tuple[Random, Grid]]:
    """Yield seeded random small grids: videos, pictures, lines of tokens, often with prime sides.

    Args:
        cases: how many.
        most: tokens of a grid, at most.

    Yields:
        A generator for the parameters of the case, and the grid.
    """
    for case in range(cases):
        random = Random(case)
        sides = [random.choice((1, 2, 3, 4, 5, 7, 8, 11, 13)) for _ in range(3)]
        if case % 5 == 0:
            sides[0] = 1
        if case % 15 == 0:
            sides[1:] = 1, random.randint(1, most)
        while prod(sides) > most:
            sides[sides.index(max(sides))] //= 2
        yield random, (sides[0], sides[1], sides[2])


def check_pattern(
    pattern: Pattern, grid: Grid, keys: Mapping[Token, Container[Token]], *, compiled: bool = True
) -> None:
    """Raise where a pattern is not its definition, as a mask or as block lists.

    Args:
        pattern: what is judged.
        grid: (frames, height, width), in tokens; small.
        keys: the definition: the keys of every query, both as (frame, row, column).
        compiled: whether block lists are judged too, with and without boxes, in the order that is chosen.

    Raises:
        AssertionError: names pattern and grid, and how many pairs differ.
    """
    tokens: list[Token] = list(product(range(grid[0]), range(grid[1]), range(grid[2])))
    wanted = torch.tensor([[k in keys[q] for k in tokens] for q in tokens])
    at = Layout(grid).coordinates()
    masks = {"keep": pattern.keep(at, at, grid)}
    if compiled:
        for boxes in (False, True):
            lists = compile_lists([pattern], Layout(grid), block_q=16, block_k=32, boxes=boxes)
            masks[f"compile_lists(boxes={boxes})"] = lists.to_mask()[0]
            if round(lists.density * len(tokens) ** 2) != int(wanted.sum()):
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
