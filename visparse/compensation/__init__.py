"""Compensation: what stands in for the keys that a query does not see."""

from visparse.compensation.config import Proxies, ReuseResidual, ReuseStatistics

__all__ = ["Proxies", "ReuseResidual", "ReuseStatistics"]
