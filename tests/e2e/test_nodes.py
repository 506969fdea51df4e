"""A stage over several nodes of a cluster: one is killed in the middle, another joins, and nothing is lost."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cai_ray.storage import open_run
from tests.e2e.command import SMALL, Driver, settings, succeed

# A node has room for one engine, the head for none. Small blocks are written often, so that a kill finds work done.
SETTINGS = {
    **SMALL,
    "revise.limit": 256,
    "engine.max_num_seqs": 16,
    "engine.cpus_per_actor": 8,
    "engine.min_actors": 2,
    "engine.max_actors": 2,
}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head node that Ray Data's own actors run on."""
    from ray.cluster_utils import Cluster

    # Ray asks for a token unless told otherwise; a cluster's nodes and drivers have the same one.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    made = Cluster(initialize_head=True, head_node_args=node(6))
    yield made
    made.shutdown()


def node(cpus: int) -> dict[str, int]:
    return {"num_cpus": cpus, "object_store_memory": 100 << 20}


def test_a_killed_node_costs_no_row_and_changes_none(cluster: Any, tmp_path: Path) -> None:
    doomed, _ = cluster.add_node(**node(8)), cluster.add_node(**node(8))
    out = tmp_path / "run"
    given = settings({**SETTINGS, "ray.address": cluster.address})
    driver = Driver(tmp_path / "log", "run", "errand-town", "--until", "revise", "--out", out, *given)
    try:
        while len(list(out.glob("revise/journal/part/done-*"))) < 4:
            driver.run_for(0.2)
        cluster.remove_node(doomed, allow_graceful=False)
        cluster.add_node(**node(8))
        assert driver.process.wait(240) == 0, driver.said()[-4000:]
    finally:
        driver.end()
    found = open_run(str(out)).rows("revise")
    assert set(Counter(row["id"] for row in found).values()) == {1}

    alone, one = (
        tmp_path / "alone",
        {"engine.cpus_per_actor": 1, "engine.min_actors": 1, "engine.max_actors": 1},
    )
    succeed("run", "errand-town", "--until", "revise", "--out", alone, *settings({**SETTINGS, **one}))
    assert _said(found) == _said(open_run(str(alone)).rows("revise"))


def _said(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By id, all but what depends on what the engine's cache held."""
    return {row["id"]: {k: v for k, v in row.items() if k != "usage"} for row in rows}
