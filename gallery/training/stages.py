"""Stages of the transformer's training, as the command line names them."""

from typing import NamedTuple


class Stage(NamedTuple):
    """Latent frames, whether guidance is distilled, and seconds."""

    frames: int
    guided: bool
    seconds: float


def parse_stages(text: str) -> list[Stage]:
    """Stages of `"1:600,9g:300"`."""
    stages = []
    for part in text.split(","):
        frames, seconds = part.split(":")
        stages.append(Stage(int(frames.removesuffix("g")), frames.endswith("g"), float(seconds)))
    return stages
