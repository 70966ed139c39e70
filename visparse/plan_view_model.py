"""The shape of a model from its configuration files: no weights are read, and none are made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from visparse.adapter import ADAPTERS, find_adapter
from visparse.rules import ModelFingerprint
from visparse.timm_models import is_timm, make_timm


def model_shapes(model: str | os.PathLike[str]) -> dict[str, ModelFingerprint]:
    """The shapes of a pipeline's denoisers.

    Args:
        model: folder of a diffusers pipeline, which never touches the network, or a hub id, of which only small
            configuration files are fetched; or ``"timm:NAME_OR_FOLDER"``, which never touches it either.

    Returns:
        Component name -> shape, for each denoiser that visparse knows; "model" for one of timm.

    Raises:
        ValueError: it is no pipeline, or has no denoiser that visparse knows.
    """
    name = os.fspath(model)
    if is_timm(name):
        with torch.device("meta"):
            module = make_timm(name, weights=False)
        return {"model": shape_of(module, name)}
    local = Path(name).is_dir()
    if local and not (Path(name) / "model_index.json").is_file():
        raise ValueError(f"model: {name} has no model_index.json; give the folder that save_pretrained wrote")
    if not local and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1):
        raise ValueError(f"model: wanted a folder or a hub id such as 'owner/name', and there is no folder {name!r}")
    import diffusers

    parts: dict[str, Any] = dict(diffusers.DiffusionPipeline.load_config(name, local_files_only=local))
    classes = {part: value[1] for part, value in parts.items() if isinstance(value, (list, tuple)) and len(value) == 2}
    known = {part: cls for part, cls in classes.items() if cls in ADAPTERS}
    if not known:
        have = ", ".join(f"{part}: {cls}" for part, cls in classes.items() if cls) or "nothing"
        raise ValueError(
            f"model: no denoiser that visparse knows; found {have}; known are {', '.join(sorted(ADAPTERS))}"
        )
    return {part: _shape(getattr(diffusers, cls), name, part, local) for part, cls in known.items()}


def _shape(cls: Any, name: str, part: str, local: bool) -> ModelFingerprint:
    config = cls.load_config(name, subfolder=part, local_files_only=local)
    with torch.device("meta"):
        module = cls.from_config(config)
    return shape_of(module, f"{part} of {name}")


def shape_of(module: Any, what: str) -> ModelFingerprint:
    """The shape of a model.

    Args:
        module: the model.
        what: it is, for the error text.

    Raises:
        ValueError: visparse does not know such models.
    """
    adapter = find_adapter(module)
    if adapter is None:
        raise ValueError(f"model: {what} is a {type(module).__name__}, for which visparse has no adapter")
    return adapter.fingerprint(module)
