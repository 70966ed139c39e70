"""visparse: sparse attention for visual generation."""

from visparse.api import report, restore, sparsify
from visparse.handle import Handle
from visparse.plan import SparsePlan
from visparse.report import Report

__version__ = "0.1.0"

__all__ = ["Handle", "Report", "SparsePlan", "__version__", "report", "restore", "sparsify"]
