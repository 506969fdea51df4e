"""Marks tests by their folder, and skips those that need a GPU where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# One thread per process: engines and trainers share few cores here, and spinning threads starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FOLDERS = {"ray", "e2e", "gpu"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for folder in FOLDERS & set(Path(item.path).parts):
            item.add_marker(folder)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs CUDA, and this machine has none"))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
