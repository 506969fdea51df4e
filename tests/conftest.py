"""Marks tests by their folder, and skips those that need a GPU where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub import Hub

# One thread per process: engines and trainers share few cores here, and spinning threads starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FOLDERS = {"ray", "e2e", "cluster", "gpu", "families"}
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


# What `make test` leaves out and `make test-rest` runs: kills and resumes, servers, other models than the town's, and
# single tests of a minute and more.
REST = (
    "tests/e2e/test_kill.py",
    "tests/e2e/test_cost.py",
    "tests/e2e/test_any_model.py",
    "tests/e2e/test_init.py",
    "tests/e2e/test_serve",
    "tests/e2e/test_wheel.py",
    "tests/e2e/test_town.py::test_another_method",
    "tests/e2e/test_town.py::test_an_edited_principle",
    "tests/e2e/test_town.py::test_the_critic_finds",
    "tests/e2e/test_paths.py::test_stages",
    "tests/ray/test_meter.py",
    "tests/ray/test_group.py",
    "tests/ray/test_dpo.py::test_item_36",
    "tests/ray/test_sft.py::test_item_36",
    "tests/ray/test_ppo.py::test_item_36",
    "tests/ray/test_ppo.py::test_item_21",
    "tests/ray/test_ppo.py::test_item_24_weights_by_vllms",
    "tests/ray/test_ppo.py::test_the_best_snapshot",
    "tests/ray/test_ppo.py::test_an_alarm",
    "tests/ray/test_pool.py::test_an_engine_that_dies",
    "tests/ray/test_pool.py::test_item_23",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-table",
        action="store_true",
        help="tests/families: write the table of model families anew from what is found",
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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of the test's own with an empty cache, for this process and those that it starts."""
    from huggingface_hub import constants

    from cai_ray.storage import hub as ours

    served = Hub()
    home = tmp_path / "hf_home"
    for name, value in (("HF_ENDPOINT", served.url), ("HF_HOME", str(home))):
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    # The library has read its environment by now.
    for name, constant in (
        ("ENDPOINT", served.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(home / "hub")),
        ("HF_TOKEN_PATH", str(home / "token")),
        ("HF_HUB_OFFLINE", False),
    ):
        monkeypatch.setattr(constants, name, constant)
    ours.pin.cache_clear()
    yield served
    served.close()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """pytest-xdist's own groups (`xdist_group`) are lost with pytest 9.2, which keeps a test's id elsewhere."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return ByGroup(config, log)


def _group(nodeid: str) -> str:
    """What the test shares, or its file. Families share nothing."""
    if nodeid.startswith("tests/families"):
        return nodeid
    return next(
        (group for path, group in SHARED.items() if nodeid.startswith(path)), nodeid.partition("::")[0]
    )


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
