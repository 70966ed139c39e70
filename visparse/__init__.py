"""visparse: sparse attention for visual generation.

The names below are imported when they are first used, so that `import visparse` and the command line start at once.
"""

from typing import TYPE_CHECKING

from visparse.lazy import names_from

if TYPE_CHECKING:
    from visparse.api import report, restore, sparsify
    from visparse.compensation import Overlap, Proxies, ReuseResidual, ReuseStatistics
    from visparse.estimates import Estimate, estimate
    from visparse.handle import Handle
    from visparse.head_search.api import search
    from visparse.plan import SparsePlan
    from visparse.reporting import Report

__version__ = "0.1.0"

__all__ = [
    "Estimate",
    "Handle",
    "Overlap",
    "Proxies",
    "Report",
    "ReuseResidual",
    "ReuseStatistics",
    "SparsePlan",
    "__version__",
    "estimate",
    "report",
    "restore",
    "search",
    "sparsify",
]

__getattr__ = names_from(
    __name__,
    {
        "Estimate": "visparse.estimates",
        "Handle": "visparse.handle",
        "Overlap": "visparse.compensation",
        "Proxies": "visparse.compensation",
        "Report": "visparse.reporting",
        "ReuseResidual": "visparse.compensation",
        "ReuseStatistics": "visparse.compensation",
        "SparsePlan": "visparse.plan",
        "estimate": "visparse.estimates",
        "report": "visparse.api",
        "restore": "visparse.api",
        "search": "visparse.head_search.api",
        "sparsify": "visparse.api",
    },
)


def __dir__() -> list[str]:
    return __all__
