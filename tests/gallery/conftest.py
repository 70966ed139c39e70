"""The training scripts are no package: their folder goes on the path for a test, and their modules leave with it."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

TRAINING = Path(__file__).parents[2] / "gallery" / "training"
SIDE = 32  # of the tests' pictures, in place of 128


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a training script by name, with frames of 32 x 32 pixels."""
    names = {path.stem for path in TRAINING.glob("*.py")}
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(str(TRAINING))
    monkeypatch.setattr(importlib.import_module("data"), "SIDE", SIDE)  # before the others take it over
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(kept)
