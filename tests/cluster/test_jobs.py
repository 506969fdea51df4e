"""The scripts under jobs/, submitted with `ray job submit` as docs/clusters.md says, to a head that runs no work."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import yaml

from cai_ray.storage.run import open_run
from tests.cluster.jobs import SETTINGS, Jobs
from tests.e2e.command import ROOT, settings, succeed


def test_a_stopped_job_submitted_again_goes_on_and_loses_and_doubles_nothing(jobs_run: Path) -> None:
    manifest = json.loads((jobs_run / "revise/manifest.json").read_text())
    rows = open_run(str(jobs_run)).rows("revise")
    assert set(Counter(row["id"] for row in rows).values()) == {1}
    assert len(rows) == manifest["rows_in"] == manifest["rows_out"] >= SETTINGS["revise.limit"]
    steps = [json.loads(line)["step"] for line in (jobs_run / "sft/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 4


def test_the_whole_run_as_one_job_finds_every_stage_done(jobs: Jobs, jobs_run: Path) -> None:
    before = {p: p.read_text() for p in jobs_run.glob("*/manifest.json")}
    said = jobs.submit("python", "jobs/run.py", "errand-town", "--out", jobs_run, *settings(SETTINGS))
    assert said.count("done before") >= 7 and "done in" not in said
    assert before == {p: p.read_text() for p in jobs_run.glob("*/manifest.json")}
    assert (jobs_run / "report/index.html").exists()
    said = succeed("status", jobs_run).stdout
    assert "missing" not in said and said.count(" done ") >= 8


def test_dpo_as_a_job(jobs: Jobs, jobs_run: Path) -> None:
    few = {"method": "dpo", "dpo.epochs": 1, "dpo.human": SETTINGS["rm.human"]}
    words = ("errand-town", "--out", jobs_run, *settings({**SETTINGS, **few}))
    assert "dpo: done in" in jobs.submit("python", "jobs/dpo.py", *words)


def test_every_script_has_run(jobs_run: Path) -> None:
    """All that there are: a new one is to be added above."""
    done = {"revise", "sft", "compare", "label", "rm", "ppo", "evaluate", "report", "dpo", "run"}
    assert {p.stem for p in (ROOT / "jobs").glob("*.py")} == done


def test_a_job_that_has_no_room_fails_with_what_the_cluster_has(jobs: Jobs, tmp_path: Path) -> None:
    large = settings({**SETTINGS, "engine.cpus_per_actor": 17})
    out = jobs.submit("python", "jobs/run.py", "errand-town", "--out", tmp_path / "run", *large, fails=True)
    assert "engine.min_actors=1: needs 1 x {CPU: 17}, each on one node, and there is room for 0" in out
    assert "1 node of {CPU: 16} and no autoscaler that adds more" in out
    assert "revise:" not in out and "Traceback" not in out.split("needs 1 x")[0]


def test_a_driver_sees_the_environment_and_needs_no_gpu(jobs: Jobs) -> None:
    """It runs on the head, which has none to give: nothing that it imports before the work may look for one."""
    code = (
        "import os, cai_ray.cli, cai_ray.pipeline, cai_ray.train.ppo.stage, cai_ray.generate.rows, torch;"
        "print('waits', os.environ['RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S']);"
        "print('cuda', torch.cuda.is_initialized())"
    )
    said = jobs.submit("python", "-c", code)
    given = yaml.safe_load((ROOT / "jobs/runtime-env.yaml").read_text())["env_vars"]
    assert f"waits {given['RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S']}" in said
    assert "cuda False" in said
    jobs.cluster.end()  # its processes would work on beside the tests that follow
