"""Shared by all tests: GPU tests are skipped, with the reason, where there is no CUDA device."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; see CONTRIBUTING.md for the command")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
