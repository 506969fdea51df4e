"""A stage over several nodes of a cluster: one is killed in the middle, another joins, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cai_ray.storage import open_run
from tests.e2e.command import BIN, SMALL, Driver, environment, free_port, settings, succeed

# A node has room for one engine, the head for none. Small blocks are written often, so that a kill finds work done.
SETTINGS = {
    **SMALL,
    "revise.limit": 256,
    "engine.max_num_seqs": 16,
    "engine.cpus_per_actor": 8,
    "engine.min_actors": 2,
    "engine.max_actors": 2,
}


class Cluster:
    """Nodes of this machine, each with a raylet of its own, as `ray start` makes them."""

    def __init__(self, folder: str):
        # Ray asks for a token unless told otherwise; nodes and drivers have the same one.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.env = environment(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", **token)
        self.address = f"127.0.0.1:{free_port()}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        # Ray Data's own actors run on the head, which has no room for an engine.
        self.head = f"--head --port {self.address.split(':')[1]} --num-cpus 6 --include-dashboard=false"
        self.folder = folder

    def add(self, words: str) -> subprocess.Popen[bytes]:
        command = f"""{BIN}/ray start --block --disable-usage-stats --node-ip-address 127.0.0.1
            --dashboard-agent-listen-port {free_port()} --object-store-memory 100000000 {words}"""
        if "--head" in words:
            command += f" --temp-dir {self.folder}"
        node = subprocess.Popen(
            command.split(),
            env=self.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.nodes.append(node)
        return node

    def add_worker(self) -> subprocess.Popen[bytes]:
        return self.add(f"--address {self.address} --num-cpus 8")

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """As when the machine is gone: raylet and all that it started, at once."""
        for process in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    def wait_for(self, nodes: int) -> None:
        script = f"import ray; ray.init('{self.address}', logging_level='ERROR'); print(len(ray.nodes()))"
        deadline = time.time() + 60
        while True:
            done = subprocess.run(
                [sys.executable, "-c", script], env=self.env, capture_output=True, text=True
            )
            if done.stdout.strip().endswith(str(nodes)):
                return
            assert time.time() < deadline, done.stderr[-2000:]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    # The name of a socket may have 107 bytes, so the folder is not pytest's.
    folder = tempfile.mkdtemp(prefix="ray")
    made = Cluster(folder)
    made.add(made.head)
    made.wait_for(1)
    yield made
    for node in reversed(made.nodes):
        if node.poll() is None:
            made.kill(node)
    shutil.rmtree(folder, ignore_errors=True)


def test_a_killed_node_costs_no_row_and_changes_none(cluster: Cluster, tmp_path: Path) -> None:
    doomed = cluster.add_worker()
    cluster.wait_for(2)  # two that join one machine at the same moment get in each other's way
    cluster.add_worker()
    cluster.wait_for(3)
    out = tmp_path / "run"
    given = settings({**SETTINGS, "ray.address": cluster.address})
    words = ("run", "errand-town", "--until", "revise", "--out", out, *given)
    driver = Driver(tmp_path / "log", *words, env=cluster.env)
    try:
        while len(list(out.glob("revise/journal/part/done-*"))) < 4:
            driver.run_for(0.2)
        cluster.kill(doomed)
        cluster.add_worker()
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
