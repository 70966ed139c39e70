"""FLUX.1: `FluxTransformer2DModel` (dev, schnell, Kontext, Fill, Control).

The model sees a list of packed patches and their positions, so the grid is read from the positions. That is done once
for each tensor of positions: a pipeline passes the same one at every step.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from visparse.adapter import Adapter
from visparse.layout import Grid, Layout

_TARGET, _ROW = 0, 1
# positions -> (their version, their grid)
_known: MutableMapping[Tensor, tuple[int, Grid]] = WeakIdKeyDictionary()


def layout(config: Any, arguments: Mapping[str, Any]) -> Layout:
    """The grid of packed patches with the text in front of it; tokens of reference pictures (Kontext) lie behind it.

    Args:
        config: the model's config; not used.
        arguments: of the model's forward; `hidden_states` is [batch, tokens, channels], `encoder_hidden_states`
            [batch, text tokens, channels], `img_ids` [tokens, 3] (0 for the target picture, row, column), with or
            without a batch axis in front.

    Returns:
        Layout of the target picture as one frame.

    Raises:
        ValueError: `img_ids` does not put a whole picture, row by row, in front.
        RuntimeError: torch.compile traces the whole model, so that the positions cannot be read.
    """
    ids: Tensor = arguments["img_ids"]
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "img_ids: FLUX's grid stands in the values of img_ids, which cannot be read while torch.compile traces the "
            "model; compile first and sparsify what torch.compile returned, or use compile_repeated_blocks()"
        )
    grid = _find_grid(ids)
    behind = arguments["hidden_states"].shape[1] - grid[1] * grid[2]
    return Layout(grid=grid, before=arguments["encoder_hidden_states"].shape[1], after=behind)


def _find_grid(ids: Tensor) -> Grid:
    """The grid of positions; read again where they were changed in place, or where torch does not track that."""
    if ids.is_inference():
        return _read_grid(ids)
    known = _known.get(ids)
    if known is None or known[0] != ids._version:
        known = _known[ids] = (ids._version, _read_grid(ids))
    return known[1]


def _read_grid(ids: Tensor) -> Grid:
    """The grid of the target picture, from positions [tokens, 3] or [batch, tokens, 3]."""
    ids = (ids if ids.ndim == 2 else ids[0]).detach().cpu()
    target = ids[: int((ids[:, _TARGET] == 0).sum())]
    width = int((target[:, _ROW] == 0).sum())
    height = len(target) // max(width, 1)
    # compared as rounded as they came: bfloat16 holds whole numbers up to 256
    wanted = torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
    if not len(target) or not torch.equal(target, wanted.to(target)):
        raise ValueError(
            f"img_ids: wanted a picture's positions (0, row, column) in front, row by row from (0, 0, 0), got "
            f"{len(target)} positions with a first 0, of them {width} in row 0; pass the positions as FluxPipeline "
            "makes them"
        )
    return 1, height, width


ADAPTER = Adapter(
    model_class="FluxTransformer2DModel",
    attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    layout=layout,
)
