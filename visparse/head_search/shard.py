"""Shard: several processes, as `accelerate launch` starts them, each with some of the calibration runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from visparse.head_search.work import Key


def processes() -> tuple[int, int]:
    """Number of this process and how many there are; (0, 1) where nothing launched several."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return 0, 1
    import torch
    from accelerate import PartialState  # type: ignore[import-untyped]

    state = PartialState(cpu=not torch.cuda.is_available())
    return state.process_index, state.num_processes


def gather_scores(scores: Mapping[Key, dict[str, Any]], world: int) -> dict[Key, dict[str, Any]]:
    """The scores of all processes, the same in each.

    Args:
        scores: of this one.
        world: how many there are.
    """
    if world < 2:
        return dict(scores)
    parts: list[Any] = [None] * world
    import torch.distributed

    torch.distributed.all_gather_object(parts, dict(scores))
    return {key: value for part in parts for key, value in part.items()}
