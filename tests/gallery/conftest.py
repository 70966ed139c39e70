"""The gallery's scripts are no packages: their folders go on the path for a test, and their modules leave with it."""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

TRAINING = Path(__file__).parents[2] / "gallery" / "training"
SIDE = 32  # of the tests' pictures, in place of 128
Load = Callable[[str], ModuleType]


def _loading(folders: Sequence[Path]) -> Iterator[Load]:
    """Modules of other folders that have the same names are put back afterwards."""
    names = {path.stem for folder in folders for path in folder.glob("*.py")}
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.syspath_prepend(str(folder))
        yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


@pytest.fixture
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    """Imports a script by name, from the test file's `FOLDERS`."""
    yield from _loading(request.module.FOLDERS)


@pytest.fixture(scope="module")
def load_once(request: pytest.FixtureRequest) -> Iterator[Load]:
    """The same for what the tests of a file share."""
    yield from _loading(request.module.FOLDERS)


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
