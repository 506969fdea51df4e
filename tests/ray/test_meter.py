"""What a stage holds of the cluster is counted as long as it is held, and a budget ends a stage between two things."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle

from cai_ray.cluster import cost, meter
from cai_ray.cluster.holder import BEAT, Holder, count_paid, tell
from cai_ray.cluster.meter import Meter
from cai_ray.cluster.usage import Usage
from cai_ray.engine.protocol import Engine
from cai_ray.errors import OverBudget
from cai_ray.generate.rows import map_rows
from cai_ray.storage.records import Judgement, derive_id
from cai_ray.storage.run import Run
from cai_ray.train import sft
from tests.ray import training
from tests.ray.engines import town_config

for module in (sys.modules[__name__], training):
    cloudpickle.register_pickle_by_value(module)
pytestmark = pytest.mark.usefixtures("ray_cluster")

ROWS, QUICK, EACH = 400, 80, 1000
"""Rows; how many cost no time, whichever come first; tokens of one."""
ENDPOINT = {"endpoint": {"input_per_million_tokens": 1e6}}  # a token is one unit


class Paying:
    """Every row is answered by an endpoint. After so many rows each waits until its actor was told to stop."""

    def __init__(self, folder: Path):
        self.walked, self.again = folder / "walked", folder / "again"

    async def __call__(self, engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
        with self.walked.open("a") as f:
            f.write(row["id"] + "\n")
        count_paid(Usage(EACH, 0, 0, 1))
        if len(self.walked.read_text().split()) >= QUICK and not self.again.exists():
            (held,) = (o for o in gc.get_objects() if isinstance(o, Holder))
            while not held.stop_reason:
                await asyncio.sleep(0.05)
        return {**row, "response": "fine", "usage": Usage(EACH, 0, 0, 1)._asdict()}


class Telling:
    """Every row's endpoint refuses a field."""

    async def __call__(self, engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
        tell("endpoint http://x: leaves out seed", left_out={"seed": None})
        return {**row, "response": "fine", "usage": Usage(1, 0, 0, 1)._asdict()}


def test_what_workers_learn_of_an_endpoint_is_said_once_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": derive_id("row", i), "messages": [], "family": str(i)} for i in range(200)]
    engine = {"kind": "scripted", "max_num_seqs": 8, "min_actors": 2, "max_actors": 2}
    run = Run(town_config(out=str(tmp_path / "run"), engine=engine))
    with Meter(run, "revise", "inputs"):
        map_rows(run, "revise", iter(rows), Telling(), takes=Judgement, gives=Judgement, model="base")
    assert capsys.readouterr().err.count("revise: endpoint http://x: leaves out seed") == 1
    assert cost.left_out(run, "revise", "inputs") == {"seed": None}


def test_a_budget_ends_generation_with_every_row_that_was_begun(tmp_path: Path) -> None:
    rows = [{"id": derive_id("row", i), "messages": [], "family": str(i)} for i in range(ROWS)]
    chain = Paying(tmp_path)
    engine = {"kind": "scripted", "max_num_seqs": 8}

    def walk(**budget: float) -> dict[str, Any]:
        config = town_config(out=str(tmp_path / "run"), engine=engine, prices=ENDPOINT, budget=budget)
        run = Run(config)
        with Meter(run, "revise", "inputs"):
            return map_rows(run, "revise", iter(rows), chain, takes=Judgement, gives=Judgement, model="base")

    with pytest.raises(OverBudget, match="the budget is spent"):
        walk(money=QUICK // 2 * EACH)
    walked = chain.walked.read_text().split()
    in_flight = 8 + 8 // 4
    assert QUICK <= len(walked) <= QUICK + in_flight  # of 128 rows that the actor was given
    run = Run(town_config(out=str(tmp_path / "run")))
    assert set(finished(tmp_path / "run")) == set(walked), "what was begun is kept"

    chain.again.touch()
    assert walk()["rows_out"] == ROWS
    assert Counter(chain.walked.read_text().split()) == dict.fromkeys((r["id"] for r in rows), 1)
    found = cost.attempts(run)
    assert len(found) == 2 and cost.total(found).endpoint == Usage(ROWS * EACH, 0, 0, ROWS)
    assert all(a.spent.cpu_seconds > 0 and a.spent.work_seconds > 0 for a in found)


class Holding:
    def __init__(self) -> None:
        self.held = Holder()

    def there(self) -> bool:
        return True


def test_a_process_costs_what_it_lives(tmp_path: Path) -> None:
    run = Run(town_config(out=str(tmp_path)))
    with Meter(run, "label", "inputs") as counted:
        two, half = (ray.remote(Holding).options(num_cpus=n).remote() for n in (2, 0.5))
        ray.get([two.there.remote(), half.there.remote()])

        def held() -> float:
            return counted._attempt.spent.cpu_seconds

        until(lambda: held() > 4)
        ray.kill(two)
        time.sleep(2 * BEAT)
        before, began = held(), time.monotonic()
        until(lambda: held() > before + 1)  # by the other one alone
        assert time.monotonic() - began > 1
        ray.kill(half)
        until(lambda: list((tmp_path / "spent").glob("label-*.json")))
    (found,) = cost.attempts(run)
    assert found.spent.cpu_seconds <= 2.5 * (found.spent.wall_seconds + 2 * BEAT)
    assert found.made is None and meter.current() is None
    # Where nothing is counted, a holder does nothing.
    alone = ray.remote(Holding).remote()
    assert ray.get(alone.there.remote())
    ray.kill(alone)
    assert cost.attempts(run) == [found]


@pytest.mark.parametrize("workers", [2])
def test_a_budget_ends_training_on_all_ranks_with_a_checkpoint(tmp_path: Path, workers: int) -> None:
    section = {"workers": workers, "batch_size": 4, "epochs": 3, "learning_rate": 0.01}

    def train(**budget: float) -> dict[str, Any]:
        run = training.make_run(tmp_path, sft=section, budget=budget, sinks=[])
        if not (tmp_path / "run" / "revise").exists():
            training.write(run, "revise", training.revisions())
        with Meter(run, "sft", "inputs") if budget else Meter(run, "sft", "again"):
            return sft.run(run)

    with pytest.raises(OverBudget, match="CPU hours"):
        train(cpu_hours=1e-5)
    kept = list((tmp_path / "run").glob("sft/checkpoints/*/checkpoint*/loop-1.pt"))
    assert len(kept) == 1, "the step that was under way, and no further"
    assert not (tmp_path / "run" / "sft" / "model").exists()
    made = train()
    metrics = (tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, made["steps"] + 1))


def until(fine: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not fine():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finished(run: Path) -> list[str]:
    import pyarrow.parquet as pq

    files = run.glob("revise/journal/part/done-*.parquet")
    return [i for file in files for i in pq.read_table(file, columns=["id"])["id"].to_pylist()]
