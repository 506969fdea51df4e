"""Pools that grow from nothing while a stage asks for them, and go when they are idle: Ray's autoscaler, whose nodes
are processes of this machine."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path

from cai_ray.storage.run import open_run
from tests.cluster.conftest import Grown
from tests.cluster.nodes import ROWS, wait_until
from tests.e2e.command import cai_ray, refused, settings


def test_pools_grow_from_zero_and_go_and_nothing_is_lost(grown: Grown) -> None:
    assert "revise: done in" in grown.said and "sft: done in" in grown.said

    def told(pattern: str) -> Counter[str]:
        """Nodes by their kind, as the autoscaler itself tells what it did."""
        found: Counter[str] = Counter()
        for number, kind in re.findall(pattern, grown.cluster.log("monitor.log")):
            found[kind] += int(number)
        return found

    added = told(r"Adding (\d) node\(s\) of type (\w+)")
    assert added["generation"] >= 2 and added["training"] >= 1
    wait_until(lambda: told(r"Removing (\d) nodes of type (\w+) \(idle\)") >= added, grown.cluster.said)
    wait_until(lambda: len(grown.cluster.ids()) == 1, grown.cluster.said)

    rows = open_run(str(grown.out)).rows("revise")
    assert set(Counter(row["id"] for row in rows).values()) == {1}
    assert len(rows) >= ROWS["revise.limit"] and not any(row["error"] for row in rows)


def test_what_the_autoscaler_could_never_place_is_refused_before_the_start(
    grown: Grown, tmp_path: Path
) -> None:
    words = ("revise", "errand-town", "--out", tmp_path / "run")
    large = {"engine.cpus_per_actor": 9, "engine.min_actors": 1}
    started = time.time()
    said = refused(cai_ray(*words, *settings({**grown.given, **large}), env=grown.cluster.env))
    assert "needs 1 x {CPU: 9, generation}, each on one node, and there is room for 0" in said
    assert "an autoscaler that may add 2 nodes of {CPU: 8, generation}, 1 node of {CPU: 4};" in said
    assert time.time() - started < 60
    grown.cluster.end()  # its processes would work on beside the tests that follow
