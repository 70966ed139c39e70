"""Compensation: what stands in for the keys that a query does not see."""

from visparse.compensation.config import Proxies, ReuseResidual, ReuseStatistics
from visparse.compensation.refresh import Overlap

__all__ = ["Overlap", "Proxies", "ReuseResidual", "ReuseStatistics"]
