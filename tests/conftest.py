"""Marks tests by their folder, and skips those that need a GPU where there is none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# One thread per process: engines and trainers share few cores here, and spinning threads starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FOLDERS = {"ray", "e2e", "cluster", "gpu"}
# What one process runs where there are several (`make test`): tests that share a run or a cluster. The longest first.
SHARED = {
    "tests/e2e/test_kill.py": "run",
    "tests/e2e/test_town.py": "run",
    "tests/e2e/test_cost.py": "run",
    "tests/ray": "ray",
    "tests/e2e/test_any_model.py": "any model",
    "tests/e2e/test_serve": "serve",
    "tests/cluster/test_jobs.py": "run of a cluster",
    "tests/cluster/test_s3.py": "run of a cluster",
    "tests/cluster/test_autoscaling.py": "nodes",
    "tests/cluster/test_nodes.py": "nodes",
}


# What `make test` leaves out and `make test-rest` runs: kills and resumes, servers, other models than the town's.
REST = (
    "tests/e2e/test_kill.py",
    "tests/e2e/test_cost.py",
    "tests/e2e/test_any_model.py",
    "tests/e2e/test_serve",
    "tests/e2e/test_wheel.py",
    "tests/e2e/test_paths.py::test_stages",
    "tests/ray/test_meter.py",
    "tests/ray/test_group.py",
    "tests/ray/test_dpo.py::test_item_36",
    "tests/ray/test_sft.py::test_item_36",
    "tests/ray/test_ppo.py::test_item_36",
    "tests/ray/test_ppo.py::test_item_21",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for folder in FOLDERS & set(Path(item.path).parts):
            item.add_marker(folder)
        if item.nodeid.startswith(REST):
            item.add_marker("rest")
    if hasattr(config, "workerinput"):  # one of several processes
        order = list(dict.fromkeys(SHARED.values()))
        items.sort(key=lambda item: order.index(g) if (g := _group(item.nodeid)) in order else len(order))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs CUDA, and this machine has none"))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """pytest-xdist's own groups (`xdist_group`) are lost with pytest 9.2, which keeps a test's id elsewhere."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return ByGroup(config, log)


def _group(nodeid: str) -> str:
    """What the test shares, or its file."""
    return next(
        (group for path, group in SHARED.items() if nodeid.startswith(path)), nodeid.partition("::")[0]
    )


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
