"""Pictures to calibrate a search of a vision transformer: tensors, PIL pictures, files or a folder of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from visparse.adapter import find_adapter

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def find_pictures(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures of a folder, by name.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it has none.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"images: no folder {path}; wanted one with pictures ({', '.join(SUFFIXES)})")
    found = sorted(one for one in path.iterdir() if one.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"images: {path} holds no picture; wanted files that end in {', '.join(SUFFIXES)}")
    return found


def runs_of(model: Any, images: Any, size: tuple[int, int] | None = None) -> list[list[dict[str, Tensor]]]:
    """The inputs of a search: for each picture or batch a run of one call.

    Args:
        model: a timm vision transformer; its `pretrained_cfg` says how pictures are scaled and normalised.
        images: folder of pictures; or tensors [B, 3, H, W] or [3, H, W] as the model takes them, PIL pictures, and
            paths of files.
        size: (height, width) in pixels that pictures and files are scaled to; None: that of the model.

    Returns:
        For `Searcher`: ``[[{"x": tensor}], ...]`` on the model's device and in its dtype.

    Raises:
        FileNotFoundError: no such folder or file.
        TypeError: something that is no picture.
        ValueError: no vision transformer, no picture, pictures of different sizes, or a file that cannot be read.
    """
    adapter = find_adapter(model) if isinstance(model, nn.Module) else None
    if adapter is None or adapter.timestep is not None:
        raise ValueError(
            f"images: wanted a vision transformer of timm, got {type(model).__name__}; a pipeline gets prompts, and a "
            "denoiser gets inputs"
        )
    if isinstance(images, (str, os.PathLike)):
        images = find_pictures(images)
    if isinstance(images, Tensor):
        images = [images]
    weights = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    transform: Any = None
    runs: list[list[dict[str, Tensor]]] = []
    for number, image in enumerate(images):
        if isinstance(image, Tensor):
            batch = _batch(image, number)
        else:
            transform = transform or _transform(model, size)
            batch = transform(_opened(image, number))[None]
        runs.append([{"x": batch.to(weights.device, weights.dtype)}])
    if not runs:
        raise ValueError("images: wanted at least one picture, got none; 4 are usual")
    sizes = {tuple(run[0]["x"].shape[-2:]) for run in runs}
    if len(sizes) > 1:
        raise ValueError(
            f"images: wanted pictures of one size, got {', '.join(f'{h} x {w}' for h, w in sorted(sizes))}; a plan is "
            "searched for one grid (and rescaled to others)"
        )
    return runs


def _batch(image: Tensor, number: int) -> Tensor:
    if image.ndim not in (3, 4) or not image.is_floating_point():
        raise ValueError(
            f"images: wanted float tensors [batch, channels, height, width], normalised as the model takes them, got "
            f"{str(image.dtype).removeprefix('torch.')} {list(image.shape)} in place {number}; give a PIL picture or a "
            "file to have it scaled and normalised"
        )
    return image if image.ndim == 4 else image[None]


def _opened(image: Any, number: int) -> Image.Image:
    from PIL import Image

    if isinstance(image, (str, os.PathLike)):
        try:
            with Image.open(image) as opened:
                return opened.convert("RGB")
        except FileNotFoundError:
            raise FileNotFoundError(f"images: no file {os.fspath(image)}") from None
        except OSError as error:
            raise ValueError(f"images: {os.fspath(image)} cannot be read as a picture: {error}") from error
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    raise TypeError(
        f"images: wanted tensors, PIL pictures or paths, got {type(image).__name__} in place {number}; "
        "torch.from_numpy(...) makes a tensor of an array"
    )


def _transform(model: nn.Module, size: tuple[int, int] | None) -> Any:
    """How timm scales and normalises for a model; the size is what the model takes, not what it was trained with."""
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = size or own or config["input_size"][1:]
    return timm.data.create_transform(**{**config, "input_size": (config["input_size"][0], height, width)})
