"""The result page: one HTML file with animated pictures, stills, differences and the numbers."""

from visparse.page.build import build_page, write_outputs

__all__ = ["build_page", "write_outputs"]
