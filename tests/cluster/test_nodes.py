"""Stages over several nodes of a cluster: one goes in the middle, another joins, and nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cai_ray.storage.run import Run, open_run
from tests.cluster.conftest import Grown
from tests.cluster.nodes import ROWS, Cluster, by_id, running, wait_until
from tests.e2e.command import ROOT, environment
from tests.ray import training

# A node has room for one engine, the head for none. Small blocks are written often, so that a kill finds work done.
SETTINGS = {**ROWS, "engine.cpus_per_actor": 8, "engine.min_actors": 3, "engine.max_actors": 3}
# After so many rows a node waits until a fourth one has done a row: the stage cannot end before that.
REVISE = """
import asyncio, pathlib, sys
import ray
from cai_ray import pipeline
from cai_ray.config.load import load_config
from cai_ray.generate import revise, rows

class Noted:
    def __init__(self, chain, file):
        self.chain, self.file = chain, file

    async def __call__(self, engine, row):
        done = await self.chain(engine, row)
        node, file = ray.get_runtime_context().get_node_id(), pathlib.Path(self.file)
        with file.open("a") as f:
            f.write(f"{node} {row['id']}\\n")
        while True:
            lines = [line.split()[0] for line in file.read_text().splitlines()]
            if len(set(lines)) > 3 or lines.count(node) < 24:
                return done
            await asyncio.sleep(0.5)

out, *given = sys.argv[1:]
rows.SLICE_ROWS = 8  # so few that the first actor to come does not take all that there are
original = revise.map_rows
def map_rows(run, stage, given, chain, **more):
    return original(run, stage, given, Noted(chain, out + "-done"), **more)
revise.map_rows = map_rows
pipeline.run_stages(load_config("errand-town", given, out=out), ["revise"])
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Ray Data's own actors run on the head."""
    with running("--num-cpus 0 --include-dashboard=false") as made:
        yield made


def start(cluster: Cluster, log: Path, *words: object, **env: str) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**cluster.env, **env},
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def test_three_nodes_share_a_stage_of_which_one_is_killed_and_another_comes(
    cluster: Cluster, grown: Grown, tmp_path: Path
) -> None:
    """The rows are those that two nodes made, on which nothing went wrong."""
    workers = [cluster.add_worker() for _ in range(3)]
    out, log, done = tmp_path / "run", tmp_path / "log", tmp_path / "run-done"
    given = [f"{k}={v}" for k, v in {**SETTINGS, "ray.address": cluster.address}.items()]
    driver = start(cluster, log, "-c", REVISE, out, *given)

    def by_node() -> Counter[str]:
        return (
            Counter(line.split()[0] for line in done.read_text().splitlines()) if done.exists() else Counter()
        )

    try:
        # Each of the three has done rows, and some of them are kept.
        wait(
            driver, log, lambda: len(by_node()) == 3 and len(list(out.glob("revise/journal/part/done-*"))) > 3
        )
        cluster.kill(workers[0])
        cluster.add_worker()
        assert driver.wait(600) == 0, log.read_text()[-4000:]
    finally:
        end(driver)
    assert len(by_node()) == 4
    found = open_run(str(out)).rows("revise")
    assert set(Counter(row["id"] for row in found).values()) == {1}
    assert by_id(found) == by_id(open_run(str(grown.out)).rows("revise"))


# Which nodes a group's ranks began on, and from which step. The first start is so slow that it does not end by itself.
TRAIN = """
import pathlib, sys, time
import ray
from cai_ray.cluster.connect import connect
from cai_ray.config.run import RunConfig
from cai_ray.storage.run import Run
from cai_ray.train import sft

def loop(config):
    from cai_ray.train.runtime.engine import Trained
    restore, began = sft.restore, pathlib.Path(config["run"].path("began"))
    def noted(engines):
        state = restore(engines)
        with began.open("a") as f:
            f.write(f"{ray.get_runtime_context().get_node_id()} {state['step'] if state else 0}\\n")
        if not state:
            step = Trained.step
            Trained.step = lambda self: (time.sleep(0.5), step(self))[1]
        return state
    sft.restore = noted
    return sft.loop(config)  # in a worker, the module's own

sft.loop = loop
run = Run(RunConfig.model_validate_json(sys.argv[1]))
connect(run.config)
sft.run(run)
"""
QUICK = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}


def sft_run(folder: Path, sections: dict[str, object], **more: object) -> Run:
    run = training.make_run(folder, sft={"init": "base", "batch_size": 8, **sections}, **more)
    training.write(run, "revise", training.revisions())
    return run


def began(run: Run) -> list[tuple[str, int]]:
    path = Path(run.path("began"))
    lines = path.read_text().splitlines() if path.exists() else []
    return [(node, int(step)) for node, step in map(str.split, lines)]


def steps(run: Run) -> list[int]:
    return [json.loads(line)["step"] for line in Path(run.path("sft/metrics.jsonl")).read_text().splitlines()]


def test_a_notice_of_a_spot_market_leads_to_a_checkpoint_in_time(cluster: Cluster, tmp_path: Path) -> None:
    """The run has no other checkpoint; when its node is gone it goes on from there on another node."""
    doomed = cluster.add_worker()
    sections = {"epochs": 40, "checkpoint_every": 100_000, "cpus_per_worker": 8}
    run, log = sft_run(tmp_path, sections, ray={"address": cluster.address}), tmp_path / "log"
    driver = start(cluster, log, "-c", TRAIN, run.config.model_dump_json(), **QUICK)
    try:
        wait(driver, log, lambda: bool(began(run)) and "sft: step" in log.read_text())
        cluster.add_worker()
        cluster.drain(began(run)[0][0], 30)
        wait(driver, log, lambda: bool(list(tmp_path.glob("run/sft/checkpoints/*/checkpoint_*.json"))))
        cluster.kill(doomed)
        assert driver.wait(600) == 0, log.read_text()[-4000:]
    finally:
        end(driver)
    (first, zero), (second, step) = began(run)
    assert first != second and zero == 0 < step
    assert steps(run) == list(range(1, len(steps(run)) + 1)) and len(steps(run)) > step


def test_a_group_over_two_nodes_of_which_one_is_killed_comes_to_the_same_weights(
    cluster: Cluster, tmp_path: Path
) -> None:
    doomed, _ = cluster.add_worker(), cluster.add_worker()
    sections = {"epochs": 15, "checkpoint_every": 5, "cpus_per_worker": 8, "workers": 2}
    run, log = sft_run(tmp_path, sections, ray={"address": cluster.address}), tmp_path / "log"
    driver = start(cluster, log, "-c", TRAIN, run.config.model_dump_json(), **QUICK)
    try:
        wait(driver, log, lambda: bool(list(tmp_path.glob("run/sft/checkpoints/*/checkpoint_*.json"))))
        cluster.kill(doomed)
        cluster.add_worker()
        assert driver.wait(600) == 0, log.read_text()[-4000:]
    finally:
        end(driver)
    starts = began(run)
    assert len({node for node, _ in starts[:2]}) == 2 and [step for _, step in starts[:2]] == [0, 0]
    assert starts[-1][1] >= 5 and len({node for node, _ in starts}) == 3
    assert steps(run) == list(range(1, len(steps(run)) + 1))

    alone = sft_run(tmp_path / "alone", {**sections, "cpus_per_worker": 1})
    done = subprocess.run(
        [sys.executable, "-c", TRAIN.replace("0.5", "0"), alone.config.model_dump_json()],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    weights, same = (training.weights(r.path("sft/model")) for r in (run, alone))
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def wait(driver: subprocess.Popen[bytes], log: Path, there: Callable[[], bool]) -> None:
    wait_until(lambda: driver.poll() is not None or there(), log.read_text, 600)
    assert driver.poll() is None, log.read_text()[-4000:]


def end(driver: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
