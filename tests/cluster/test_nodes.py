"""Stages over several nodes of a cluster: one goes in the middle, another joins, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cai_ray.storage import open_run
from tests.e2e.command import BIN, ROOT, SMALL, Driver, environment, free_port, settings, succeed
from tests.ray import training

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

    def drain(self, node: str, seconds: int) -> None:
        """As a spot market does: a notice, with the time that is left."""
        reason = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message test"
        words = f"{BIN}/ray drain-node --address {self.address} --node-id {node} {reason}"
        subprocess.run(
            [*words.split(), "--deadline-remaining-seconds", str(seconds)],
            env=self.env,
            check=True,
            capture_output=True,
        )

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


TRAIN = """
import pathlib, sys, time
import ray
from cai_ray import cluster
from cai_ray.config import RunConfig
from cai_ray.storage import Run
from cai_ray.train import sft

def loop(config):
    from cai_ray.train import fit
    restore, began = fit.restore, pathlib.Path(config["run"].path("began"))
    def noted(engines):
        state = restore(engines)
        with began.open("a") as f:
            f.write(f"{ray.get_runtime_context().get_node_id()} {state['step'] if state else 0}\\n")
        if not state:  # slow enough that the end does not come before the notice
            step = fit.Trained.step
            fit.Trained.step = lambda self: (time.sleep(0.1), step(self))[1]
        return state
    fit.restore = noted
    return original(config)

original, sft.loop = sft.loop, loop
run = Run(RunConfig.model_validate_json(sys.argv[1]))
cluster.connect(run.config)
sft.run(run)
"""


def test_a_notice_of_a_spot_market_leads_to_a_checkpoint_in_time(cluster: Cluster, tmp_path: Path) -> None:
    """The run has no other checkpoint; when its node is gone it goes on from there on another node."""
    cluster.add_worker()
    cluster.wait_for(2)
    sections = {
        "init": "base",
        "epochs": 150,
        "batch_size": 8,
        "checkpoint_every": 100_000,
        "cpus_per_worker": 8,
    }
    run = training.make_run(tmp_path, sft=sections, ray={"address": cluster.address})
    training.write(run, "revise", training.revisions())
    began, log = tmp_path / "run" / "began", tmp_path / "log"
    with log.open("wb") as out:
        driver = subprocess.Popen(
            [sys.executable, "-c", TRAIN, run.config.model_dump_json()],
            env={**cluster.env, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"},
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(driver, log, lambda: began.exists() and "sft: step" in log.read_text())
        doomed = cluster.nodes[-1]
        cluster.add_worker()
        cluster.wait_for(3)
        cluster.drain(began.read_text().split()[0], 30)
        _wait(driver, log, lambda: bool(list(tmp_path.glob("run/sft/checkpoints/*/checkpoint_*.json"))))
        cluster.kill(doomed)
        assert driver.wait(240) == 0, log.read_text()[-4000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    (first, zero), (second, step) = [line.split() for line in began.read_text().splitlines()]
    assert first != second and int(zero) == 0 < int(step)
    rows = [json.loads(x) for x in (tmp_path / "run/sft/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) > int(step)


def _wait(driver: subprocess.Popen[bytes], log: Path, there: Callable[[], bool]) -> None:
    deadline = time.time() + 120
    while not there():
        assert driver.poll() is None and time.time() < deadline, log.read_text()[-4000:]
        time.sleep(0.1)


def _said(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By id, all but what depends on what the engine's cache held."""
    return {row["id"]: {k: v for k, v in row.items() if k != "usage"} for row in rows}
