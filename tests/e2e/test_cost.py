"""What a run costs: counted over its attempts, stopped at a limit, and foretold."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cai_ray.cluster import cost
from cai_ray.storage.run import open_run
from tests.e2e.command import SMALL, Driver, cai_ray, settings, succeed

# Few rows at a time, so that the engine's work takes longer than a look at the budget. Neither is an input of a stage.
SLOW = {**SMALL, "engine.max_num_seqs": 3, "prices": "{cpu_hour: 0.04}"}
SECONDS = 10
"""That a killed driver may leave uncounted, with a slow machine's own delays."""


@pytest.fixture
def drivers() -> Iterator[list[Driver]]:
    started: list[Driver] = []
    yield started
    for driver in started:
        driver.end()


def test_killed_and_stopped_a_run_is_the_same_and_every_attempt_counts(
    town_run: Path, tmp_path: Path, drivers: list[Driver]
) -> None:
    out = tmp_path / "run"
    words = ("errand-town", "--out", out, *settings(SLOW))

    # Killed while it generates: what was held until then is on record.
    driver = Driver(tmp_path / "log", "run", *words, "--until", "sft")
    drivers.append(driver)
    driver.wait_for("revise: started")
    began = time.time()
    _wait_for_rows(driver, out)
    driver.signal_group(signal.SIGKILL)
    lasted = time.time() - began
    assert driver.leftovers() == []
    (killed,) = cost.attempts(open_run(str(out)))
    assert (killed.stage, killed.made) == ("revise", None)
    assert lasted - SECONDS < killed.spent.wall_seconds <= lasted + 1
    assert 0 < killed.spent.cpu_seconds <= killed.spent.wall_seconds + SECONDS
    assert "partial" in succeed("status", out).stdout.splitlines()[0]

    # Stopped while it generates, with what was begun kept.
    kept = _finished(out)
    hours = (killed.spent.wall_seconds + 1) / 3600
    said = _stopped("run", *words, "--until", "sft", "--set", f"budget.wall_hours={hours}")
    assert "revise: the budget is spent" in said and "--set budget.wall_hours=" in said
    assert not (out / "revise" / "manifest.json").exists()
    assert kept <= _finished(out)
    # Over it already: before anything starts.
    began = time.time()
    assert "before revise: the budget is spent" in _stopped(
        "revise", *words, "--set", f"budget.wall_hours={hours}"
    )
    assert len(cost.attempts(open_run(str(out)))) == 2

    # Stopped while it trains, after the step that was under way.
    succeed("revise", *words)
    money = sum(row.get("money") or 0 for row in _status(out)) + 1e-5  # a second
    said = _stopped("sft", *words, "--set", f"budget.money={money}")
    assert "sft: the budget is spent" in said and "USD (budget.money)" in said
    assert not (out / "sft" / "manifest.json").exists()
    assert list(out.glob("sft/checkpoints/*/checkpoint*/loop-0.pt"))

    # On to the end: the same as the run that was never stopped.
    succeed("sft", *words)
    run, whole = open_run(str(out)), open_run(str(town_run))
    assert _said(run.rows("revise")) == _said(whole.rows("revise"))
    made = {stage: run.manifest(stage) for stage in ("revise", "sft")}
    assert made["sft"]["model_sha"] == whole.manifest("sft")["model_sha"]
    steps = [json.loads(line)["step"] for line in (out / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, made["sft"]["steps"] + 1))
    found = cost.attempts(run)
    for stage, count in (("revise", 3), ("sft", 2)):
        own = [a for a in found if a.stage == stage]
        assert {a.made for a in own} == {made[stage]["id"]}
        held = made[stage]["resources"]
        assert held["attempts"] == len(own) == count
        for name in ("wall_seconds", "cpu_seconds"):
            assert held[name] == pytest.approx(sum(getattr(a.spent, name) for a in own), abs=0.1)
        assert held["wall_seconds"] > made[stage]["seconds"]
        assert 0 < held["cpu_seconds"] <= held["wall_seconds"] + SECONDS


def test_the_report_says_what_each_stage_held(town_run: Path, tmp_path: Path) -> None:
    """With prices, which came later: no stage is made again for them."""
    out = Path(shutil.copytree(town_run, tmp_path / "run", ignore=shutil.ignore_patterns("report")))
    prices = {"prices": "{currency: EUR, cpu_hour: 0.04, gpu_hour: 2.5}"}
    assert (
        "evaluate: done before"
        in succeed("run", "errand-town", "--out", out, *settings({**SMALL, **prices})).stderr
    )
    report = json.loads((out / "report" / "report.json").read_text())
    found = report["cost"]
    assert list(found["stages"]) and found["currency"] == "EUR"
    for name, held in found["stages"].items():
        assert held["wall_seconds"] > 0 and held["gpu_seconds"] == 0, name
        assert held["money"] == pytest.approx(held["cpu_seconds"] * 0.04 / 3600)
    # A trainer and a rollout engine at once.
    assert found["stages"]["ppo"]["cpu_seconds"] > found["stages"]["ppo"]["wall_seconds"]
    assert found["set_aside"]["wall_seconds"] == 0
    total = sum(held["money"] for held in found["stages"].values())
    assert found["total"]["money"] == pytest.approx(total)
    label = found["label"]
    assert label["money"] == pytest.approx(found["stages"]["label"]["money"] / label["accepted"])
    page = (out / "report" / "index.html").read_text()
    assert "An accepted label" in page and "EUR" in page
    rows = {row["stage"]: row for row in _status(out)}
    assert rows["ppo"]["money"] == pytest.approx(found["stages"]["ppo"]["money"])


def test_a_sample_foretells_the_tokens(town_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("run", "errand-town", "--out", out, *settings(SMALL), "--estimate", 16, "--json")
    told = json.loads(succeed(*words, timeout=900).stdout)
    assert list(tmp_path.iterdir()) == []  # neither the run nor the sample
    run = open_run(str(town_run))
    assert [row["stage"] for row in told["stages"]] == [row["stage"] for row in _status(town_run)][:-1]
    for row in told["stages"]:
        made = run.manifest(row["stage"])
        for kind in ("prompt", "generated", "trained"):
            if real := made["tokens"].get(kind):
                assert real / 2 <= row["tokens"][kind] <= 2 * real, (row["stage"], kind)
        if row["stage"] not in ("ppo", "evaluate"):
            assert made["rows_out"] * 0.6 <= row["rows"] <= made["rows_out"] * 1.4, row["stage"]
        assert 0 < row["start_seconds"] < row["wall_seconds"]
        assert row["cpu_seconds"] > 0


def _stopped(*words: object) -> str:
    """The one line of a command that the budget has ended."""
    done = cai_ray(*words)
    assert done.returncode == 3, (done.returncode, done.stderr[-4000:])
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("cai-ray: ")]
    assert line.startswith("cai-ray: stopped: ")
    return line


def _wait_for_rows(driver: Driver, out: Path) -> None:
    deadline = time.time() + 300
    while not list(out.glob("revise/journal/part/done-*.parquet")):
        assert time.time() < deadline, driver.said()[-4000:]
        driver.run_for(0.1)


def _finished(out: Path) -> set[str]:
    import pyarrow.parquet as pq

    files = out.glob("revise/journal/part/done-*.parquet")
    return {i for file in files for i in pq.read_table(file, columns=["id"])["id"].to_pylist()}


def _said(rows: list[dict[str, Any]]) -> list[Any]:
    return [(row["id"], row["response"], row["revision"], row["error"]) for row in rows]


def _status(out: Path) -> list[dict[str, Any]]:
    return json.loads(succeed("status", out, "--json").stdout)
