"""The progress bar: on a terminal only, and never with VISPARSE_PROGRESS=0."""

from __future__ import annotations

import os
import sys

from visparse.run import Progress


def wants_bar() -> bool:
    """Whether to show a bar.

    Raises:
        ValueError: VISPARSE_PROGRESS is neither 0 nor 1.
    """
    setting = os.environ.get("VISPARSE_PROGRESS", "1")
    if setting not in ("0", "1"):
        raise ValueError(f"VISPARSE_PROGRESS: wanted 0 or 1, got {setting!r}")
    return setting == "1" and sys.stderr.isatty()


class Bar(Progress):
    """A tqdm bar on standard error that counts denoiser steps."""

    def __init__(self) -> None:
        """Show an empty bar."""
        from tqdm.auto import tqdm

        self._bar = tqdm(total=0, unit="step", file=sys.stderr, dynamic_ncols=True, leave=False)

    def expect(self, steps: int) -> None:
        """More steps will come."""
        self._bar.total += steps
        self._bar.refresh()

    def start(self, label: str) -> None:
        """A variant begins."""
        self._bar.set_description(label)

    def tick(self) -> None:
        """One step is done."""
        self._bar.update()

    def close(self) -> None:
        """Take the bar off the screen."""
        self._bar.close()
