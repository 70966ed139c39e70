"""Load a diffusers pipeline and make one timed video with it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visparse.measure.timing import StepClock

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate; everything that a pipeline call needs besides the step count.

    Args:
        prompt, negative_prompt: text.
        height, width: pixels. num_frames: frames. None: the pipeline's own default.
        guidance_scale: 1 turns guidance off; None: the pipeline's own default.
        seed: of the CPU generator that draws the noise, so that it does not depend on the device.
    """

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    guidance_scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("height", "width", "num_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: wanted at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One video and the time it took.

    Args:
        frames: `[frames, height, width, 3]`, uint8, on the CPU.
        latents: what the decoder was given, float32, on the CPU.
        steps: denoiser steps made.
        seconds: end to end; seconds_text, seconds_denoise, seconds_decode are its parts.
    """

    frames: torch.Tensor
    latents: torch.Tensor
    steps: int
    seconds: float
    seconds_text: float
    seconds_denoise: float
    seconds_decode: float

    @property
    def seconds_per_step(self) -> float:
        """Mean time of a denoiser step, scheduler included."""
        return self.seconds_denoise / self.steps


def load_pipeline(model: str | os.PathLike[str], *, device: str = "auto", dtype: str = "auto") -> tuple[Any, str]:
    """Load a diffusers pipeline.

    Args:
        model: a folder, which never touches the network, or a hub id.
        device: `"auto"` (CUDA where there is one), or a torch device name.
        dtype: `"auto"` (float32 on a CPU, bfloat16 on CUDA) or a key of `DTYPES`. The decoder stays in float32.

    Returns:
        The pipeline on its device, and the name of the dtype.

    Raises:
        ValueError: an argument is not understood, the folder is missing or holds no pipeline.
    """
    target = pick_device(device)
    if dtype == "auto":
        dtype = "float32" if target.type == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"dtype: wanted auto, {', '.join(DTYPES)}, got {dtype!r}")
    name = os.fspath(model)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"model: {name} has no model_index.json; give the folder that save_pretrained wrote")
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ValueError(f"model: wanted a folder or a hub id such as 'owner/name', and there is no folder {name!r}")
    from diffusers import DiffusionPipeline

    local = folder.is_dir()
    pipe = DiffusionPipeline.from_pretrained(
        str(folder) if local else name,
        local_files_only=local,
        dtype={"default": DTYPES[dtype], "vae": torch.float32},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(target), dtype


def pick_device(device: str) -> torch.device:
    """The torch device that a name stands for.

    Raises:
        ValueError: it is not a CPU or CUDA device, or CUDA is asked for where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: wanted auto, cpu or cuda, got {device!r}") from None
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device: wanted auto, cpu or cuda, got {device!r}")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: wanted {device}, but torch sees no CUDA device; use cpu")
    return target


def find_denoisers(pipe: Any) -> list[nn.Module]:
    """The modules that a pipeline calls once or twice a step: `transformer`, `transformer_2`, `unet`.

    Raises:
        ValueError: it has none of them.
    """
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet")]
    modules = [module for module in found if isinstance(module, nn.Module)]
    if not modules:
        raise ValueError(f"model: {type(pipe).__name__} has no transformer and no unet, so there is nothing to measure")
    return modules


def generate(pipe: Any, request: Request, *, steps: int, tick: Callable[[], None] | None = None) -> Generation:
    """Make one video and time it.

    Args:
        pipe: a diffusers pipeline that takes a prompt and `callback_on_step_end`.
        request: what to make.
        steps: denoiser steps.
        tick: called after every step.

    Returns:
        The video with its times.

    Raises:
        ValueError: the pipeline does not take something that was asked for.
    """
    arguments = _call_arguments(pipe, request)
    clock = StepClock(find_denoisers(pipe), torch.device(pipe._execution_device), tick)
    with clock:
        output = pipe(
            **arguments,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            callback_on_step_end=clock.on_step_end,
            output_type="np",
        )
    if clock.latents is None:
        raise RuntimeError(f"{type(pipe).__name__} made no step")
    return Generation(
        frames=_to_frames(output),
        latents=clock.latents.float().cpu(),
        steps=clock.steps,
        seconds=clock.seconds,
        seconds_text=clock.seconds_text,
        seconds_denoise=clock.seconds_denoise,
        seconds_decode=clock.seconds_decode,
    )


def default_arguments(pipe: Any) -> dict[str, Any]:
    """The defaults of a pipeline's call: argument name -> value."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _call_arguments(pipe: Any, request: Request) -> dict[str, Any]:
    known = inspect.signature(type(pipe).__call__).parameters
    for name in ("prompt", "callback_on_step_end"):
        if name not in known:
            raise ValueError(
                f"model: {type(pipe).__name__} takes no {name!r}; `visparse run` measures pipelines that make"
                " pictures or videos from a prompt; use visparse.sparsify on others"
            )
    arguments = {}
    for name in ("prompt", "negative_prompt", "height", "width", "num_frames", "guidance_scale"):
        value = getattr(request, name)
        if value is None:
            continue
        if name not in known:
            raise ValueError(f"{name}: {type(pipe).__name__} takes no such argument; leave it out")
        arguments[name] = value
    return arguments


def _to_frames(output: Any) -> torch.Tensor:
    made = output.frames[0] if hasattr(output, "frames") else output.images[:1]
    frames = torch.as_tensor(made)
    if not torch.isfinite(frames).all():
        raise RuntimeError("the pipeline made frames with NaN or infinity; try --dtype float32 or another plan")
    return frames.mul(255).round_().clamp_(0, 255).to(torch.uint8)
