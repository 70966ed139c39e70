"""TokenGroups: tokens that share one mean in an averaged residual."""

from dataclasses import dataclass

import torch
from torch import Tensor

from visparse.layout import Grid, Layout


@dataclass(frozen=True, eq=False)
class TokenGroups:
    """Say which tokens share a mean. Every token is in exactly one group; made once per layout, shared by all layers.

    Build it with `from_members` or `from_tiles`.

    Args:
        members: int32 [P, m], the tokens of each group, -1 padding.
        of_token: int32 [N], the group of each token.
    """

    members: Tensor
    of_token: Tensor

    @classmethod
    def from_members(cls, members: Tensor, tokens: int) -> "TokenGroups":
        """Make groups from lists of tokens; a token in no list becomes a group of its own, and is so kept exactly.

        Args:
            members: int [P, m], tokens of each group, -1 padding; no group is empty, no token is listed twice.
            tokens: N, number of tokens.

        Raises:
            TypeError: members holds no integers.
            ValueError: a wrong shape, an empty group, or a token that is out of range or listed twice.
        """
        if members.is_floating_point() or members.is_complex() or members.dtype == torch.bool:
            raise TypeError(f"members: wanted integers, got {members.dtype}; convert it with .to(torch.int32)")
        if members.ndim != 2:
            raise ValueError(f"members: wanted [groups, tokens of a group], got {list(members.shape)}; pad with -1")
        rows = members.to("cpu", torch.int64)
        listed = rows[rows >= 0]
        if listed.numel() and int(listed.max()) >= tokens:
            raise ValueError(
                f"members: wanted tokens below {tokens}, got {int(listed.max())}; build them for this layout"
            )
        count = listed.bincount(minlength=tokens)
        if bool((count > 1).any()):
            raise ValueError(f"members: wanted every token in one group, got token {int(count.argmax())} twice or more")
        empty = (rows < 0).all(1)
        if bool(empty.any()):
            raise ValueError(f"members: wanted groups with a token, got none in group {int(empty.int().argmax())}")
        alone = (count == 0).nonzero()
        width = max(1, rows.shape[1])
        singles = torch.cat([alone, alone.new_full((alone.shape[0], width - 1), -1)], 1)
        rows = torch.cat([rows.reshape(-1, width), singles])
        group, place = (rows >= 0).nonzero(as_tuple=True)
        of_token = torch.empty(tokens, dtype=torch.int64)
        of_token[rows[group, place]] = group
        return cls(rows.to(members.device, torch.int32), of_token.to(members.device, torch.int32))

    @classmethod
    def from_tiles(cls, layout: Layout, tile: Grid) -> "TokenGroups":
        """Group the tokens of each tile of a grid; tiles are cut at the end of an axis, extra tokens stay alone.

        Args:
            layout: grid and extra tokens.
            tile: (frames, height, width) of a tile, in tokens.

        Raises:
            ValueError: a length of the tile is below 1.
        """
        _, rows, columns = _tiles_per_axis(layout, tile)
        frame, row, column = (layout.coordinates() // torch.tensor(tile)).unbind(-1)
        number = (frame * rows + row) * columns + column
        order = number.argsort(stable=True)
        size = number.bincount()
        place = torch.arange(layout.visual) - (size.cumsum(0) - size).repeat_interleave(size)
        members = torch.full((size.shape[0], int(size.max())), -1)
        members[number[order], place] = order + layout.before
        return cls.from_members(members, layout.tokens)

    @property
    def count(self) -> int:
        """Number of groups, P."""
        return self.members.shape[0]

    @property
    def tokens(self) -> int:
        """Number of tokens, N."""
        return self.of_token.shape[0]

    def to(self, device: torch.device | str) -> "TokenGroups":
        """Return the groups on a device."""
        return TokenGroups(self.members.to(device), self.of_token.to(device))

    def means(self, x: Tensor) -> Tensor:
        """Return the mean of each group, summed in fp32 (fp64 for fp64), in a fixed order.

        Args:
            x: [B, N, H, D].

        Returns:
            [B, P, H, D] in fp32 or fp64.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros(x.shape[0], self.count, *x.shape[2:], dtype=wide, device=x.device)
        for column in self.members.unbind(1):
            part = x.index_select(1, column.clamp(min=0))
            total += part.masked_fill_((column < 0)[:, None, None], 0)
        return total / (self.members >= 0).sum(1)[:, None, None]

    def spread(self, means: Tensor) -> Tensor:
        """Give every token the row of its group: [B, P, H, D] to [B, N, H, D]."""
        return means.index_select(1, self.of_token)


def count_groups(layout: Layout, tile: Grid) -> int:
    """Return how many groups `TokenGroups.from_tiles` makes, without making them.

    Args:
        layout: grid and extra tokens.
        tile: (frames, height, width) of a tile, in tokens.

    Raises:
        ValueError: a length of the tile is below 1.
    """
    frames, rows, columns = _tiles_per_axis(layout, tile)
    return frames * rows * columns + layout.extra


def _tiles_per_axis(layout: Layout, tile: Grid) -> Grid:
    if len(tile) != 3 or min(tile) < 1:
        raise ValueError(f"tile: wanted (frames, height, width), each at least 1, got {tile}; count it in tokens")
    frames, height, width = (-(-length // side) for length, side in zip(layout.grid, tile, strict=True))
    return frames, height, width
