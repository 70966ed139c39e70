"""visparse: sparse attention for visual generation.

The names below are imported when they are first used, so that `import visparse` and the command line start at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visparse.api import report, restore, sparsify
    from visparse.handle import Handle
    from visparse.plan import SparsePlan
    from visparse.reporting import Report

__version__ = "0.1.0"

__all__ = ["Handle", "Report", "SparsePlan", "__version__", "report", "restore", "sparsify"]

_HOME = {
    "Handle": "visparse.handle",
    "Report": "visparse.reporting",
    "SparsePlan": "visparse.plan",
    "report": "visparse.api",
    "restore": "visparse.api",
    "sparsify": "visparse.api",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'visparse' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
