"""Pools that grow from nothing while a stage asks for them, and go when they are idle: Ray's autoscaler, whose nodes
are processes of this machine."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cai_ray.storage import open_run
from tests.cluster.nodes import ROWS, Cluster, by_id, running, wait_until
from tests.e2e.command import cai_ray, refused, settings, succeed

SETTINGS = {**ROWS, "sft.epochs": 1}
POOLS = {
    "generation": ({"CPU": 8, "generation": 1}, 2),
    "training": ({"CPU": 4, "training": 1}, 1),
}
MARKS = {"ray.training_nodes": "training", "ray.generation_nodes": "generation"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running("--num-cpus 0", pools=POOLS) as made:
        yield made


def given(cluster: Cluster, **more: object) -> list[str]:
    joined = {"ray.address": cluster.address, "ray.autoscaling_config": cluster.config}
    return settings({**SETTINGS, **MARKS, **joined, **more})


def test_pools_grow_from_zero_and_go_and_the_rows_are_the_same(
    cluster: Cluster, lone_rows: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert len(cluster.ids()) == 1
    engines = {"engine.cpus_per_actor": 8, "engine.min_actors": 2, "engine.max_actors": 2}
    words = ("run", "errand-town", "--until", "sft", "--out", out)
    said = succeed(*words, *given(cluster, **engines), env=cluster.env).stderr
    assert "revise: done in" in said and "sft: done in" in said
    wait_until(lambda: len(cluster.ids()) == 1, cluster.said)
    # As the autoscaler itself tells what it did.
    log = cluster.log("monitor.log")
    added = [(int(n), kind) for n, kind in re.findall(r"Adding (\d) node\(s\) of type (\w+)", log)]
    removed = [(int(n), kind) for n, kind in re.findall(r"Removing (\d) nodes of type (\w+) \(idle\)", log)]
    for changes in (added, removed):
        assert sum(n for n, kind in changes if kind == "generation") >= 2
        assert sum(n for n, kind in changes if kind == "training") >= 1

    rows = open_run(str(out)).rows("revise")
    assert set(Counter(row["id"] for row in rows).values()) == {1}
    assert by_id(rows) == lone_rows


def test_what_the_autoscaler_could_never_place_is_refused_before_the_start(
    cluster: Cluster, tmp_path: Path
) -> None:
    words = ("revise", "errand-town", "--out", tmp_path / "run")
    started = time.time()
    done = cai_ray(*words, *given(cluster, **{"engine.cpus_per_actor": 9}), env=cluster.env)
    said = refused(done)
    assert "needs 1 x {CPU: 9, generation}, each on one node, and there is room for 0" in said
    assert "an autoscaler that may add 2 nodes of {CPU: 8, generation}, 1 node of {CPU: 4};" in said
    assert time.time() - started < 60
