"""timm's models by name or folder, as the command line gives them: `timm:vit_base_patch16_224`, `timm:FOLDER`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from visparse.errors import nearest

PREFIX = "timm:"


def is_timm(model: str | os.PathLike[str]) -> bool:
    """Whether the name of a model means one of timm's."""
    return os.fspath(model).startswith(PREFIX)


def make_timm(
    model: str,
    *,
    weights: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    size: tuple[int, int] | None = None,
) -> nn.Module:
    """Make a model of timm.

    Args:
        model: ``"timm:NAME"`` of timm's registry, whose weights timm fetches; or ``"timm:FOLDER"`` with config.json and
            weights, as timm's `save_for_hf` writes it, which never touches the network.
        weights: load them; False: none, only the shape is wanted.
        checkpoint: file with the weights of a model of the registry.
        size: (height, width) of its pictures in pixels; None: its own.

    Returns:
        The model, for inference.

    Raises:
        ValueError: no such model, or a folder without config.json.
        FileNotFoundError: no such checkpoint.
    """
    import timm

    name = model.removeprefix(PREFIX)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if checkpoint is not None:
            raise ValueError(f"checkpoint: wanted none beside the folder {name}, which has weights; leave it out")
        if not (folder / "config.json").is_file():
            raise ValueError(f"model: {name} has no config.json; give a folder that timm.models.save_for_hf wrote")
        return _ready(timm.create_model(f"local-dir:{folder}", pretrained=weights), size)
    if name.partition(".")[0] not in (known := timm.list_models()):
        raise ValueError(
            f"model: {name!r} is neither a folder nor a model of timm{nearest(name, known)}; timm.list_models() has all"
        )
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint: no file {os.fspath(checkpoint)}")
    path = "" if checkpoint is None or not weights else os.fspath(checkpoint)
    return _ready(timm.create_model(name, pretrained=weights and not path, checkpoint_path=path), size)


def _ready(model: Any, size: tuple[int, int] | None) -> nn.Module:
    """The model for inference, with its table of positions resampled for another size of pictures."""
    if size is not None:
        if not hasattr(model, "set_input_size"):
            raise ValueError(
                f"size: wanted none, since {type(model).__name__} of timm cannot change its own; leave it out"
            )
        model.set_input_size(img_size=size)
    return model.eval().requires_grad_(False)
