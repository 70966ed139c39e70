"""Model families that visparse knows, one adapter a file, and the small trained pipeline that ships."""

from pathlib import Path

__all__ = ["tiny_video_path"]


def tiny_video_path() -> Path:
    """Folder of the trained text-to-video pipeline that ships with visparse.

    A stock `diffusers.WanPipeline`: `WanPipeline.from_pretrained(tiny_video_path())` loads it, without visparse too.

    Returns:
        The folder, inside the installed package; its README.md says how the model was trained and on what.
    """
    return Path(__file__).parent / "tiny_video"
