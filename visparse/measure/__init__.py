"""Measuring: time, quality, and the one form in which results are kept."""

from visparse.measure.results import Record

__all__ = ["Record"]
