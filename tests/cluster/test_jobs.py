"""The scripts under jobs/, submitted with `ray job submit` as the README says: to a cluster whose head runs no work."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from cai_ray.storage import open_run
from tests.cluster.nodes import Cluster, running, wait_until
from tests.e2e.command import BIN, ROOT, SMALL, settings

# Small blocks are written often, and checkpoints too, so that a stop finds work done.
SETTINGS = {
    **SMALL,
    "revise.limit": 160,
    "engine.max_num_seqs": 8,
    "sft.epochs": 6,
    "sft.checkpoint_every": 4,
    "compare.limit": 16,
    "label.gold_limit": 8,
    "rm.human": '[{path: "town:human", limit: 32}]',
    "ppo.steps": 1,
    "evaluate.limit": 8,
}


class Jobs:
    """`ray job`, with the runtime environment that the README names."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self.env = {**cluster.env, "RAY_API_SERVER_ADDRESS": cluster.dashboard}

    def __call__(self, *words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [f"{BIN}/ray", "job", *map(str, words)],
            cwd=ROOT,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def submit(self, *entrypoint: object, options: tuple[str, ...] = (), fails: bool = False) -> str:
        """Waits for the job's end, unless told not to; what it said."""
        brought = ("--runtime-env", "jobs/runtime-env.yaml", "--working-dir", ".")
        done = self("submit", *brought, *options, "--", *entrypoint)
        assert bool(done.returncode) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    def stop_when(self, there: Callable[[], bool], *entrypoint: object) -> None:
        said = self.submit(*entrypoint, options=("--no-wait",))
        name = re.search(r"ray job stop (\w+)", said)
        assert name is not None, said
        wait_until(there, lambda: self("logs", name[1]).stdout)
        # Its workers hold still until it is stopped: however fast the machine, that is in the middle.
        with frozen(self.cluster.nodes[1].pid, "ray::MapWorker", "ray::RayTrainWorker"):
            assert "RUNNING" in self.status(name[1]).upper()
            assert self("stop", name[1]).returncode == 0
        assert "was stopped" in self.status(name[1]), self("logs", name[1]).stdout

    def status(self, name: str) -> str:
        done = self("status", name)
        return done.stdout + done.stderr


@contextlib.contextmanager
def frozen(parent: int, *names: str) -> Iterator[None]:
    found = [
        p for p in psutil.Process(parent).children(recursive=True) if " ".join(p.cmdline()).startswith(names)
    ]
    assert found
    for process in found:
        process.suspend()
    yield
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    with running("--num-cpus 0 --num-gpus 0", workers=1, cpus=16) as cluster:
        made = Jobs(cluster)
        wait_until(lambda: made("list").returncode == 0, cluster.said)
        yield made


@pytest.fixture(scope="module")
def run(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage of a run by its own job; two of them are stopped half way, and submitted again as they were."""
    out = tmp_path_factory.mktemp("jobs") / "run"
    words = ("errand-town", "--out", out, *settings(SETTINGS))

    def job(stage: str) -> tuple[object, ...]:
        return ("python", f"jobs/{stage}.py", *words)

    jobs.stop_when(lambda: len(list(out.glob("revise/journal/part/done-*"))) >= 4, *job("revise"))
    assert not (out / "revise/manifest.json").exists()
    said = jobs.submit(*job("revise"))
    kept = re.search(r"revise: (\d+) of \d+ rows were finished before", said)
    assert kept is not None and int(kept[1]) > 0, said
    assert "revise: done in" in said

    jobs.stop_when(lambda: bool(list(out.glob("sft/checkpoints/*/checkpoint_*.json"))), *job("sft"))
    assert not (out / "sft/manifest.json").exists()
    assert "sft: done in" in jobs.submit(*job("sft"))
    for stage in ("compare", "label", "rm", "ppo", "evaluate", "report"):
        assert f"{stage}: done in" in jobs.submit(*job(stage)), stage
    return out


def test_a_stopped_job_submitted_again_goes_on_and_loses_and_doubles_nothing(run: Path) -> None:
    manifest = json.loads((run / "revise/manifest.json").read_text())
    rows = open_run(str(run)).rows("revise")
    assert set(Counter(row["id"] for row in rows).values()) == {1}
    assert len(rows) == manifest["rows_in"] == manifest["rows_out"] >= 160
    steps = [json.loads(line)["step"] for line in (run / "sft/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 4


def test_the_whole_run_as_one_job_finds_every_stage_done(jobs: Jobs, run: Path) -> None:
    before = {p: p.read_text() for p in run.glob("*/manifest.json")}
    said = jobs.submit("python", "jobs/run.py", "errand-town", "--out", run, *settings(SETTINGS))
    assert said.count("done before") >= 7 and "done in" not in said
    assert before == {p: p.read_text() for p in run.glob("*/manifest.json")}
    assert (run / "report/index.html").exists()
    said = jobs.submit("python", "-m", "cai_ray", "status", run)
    assert "missing" not in said and said.count(" done ") >= 8


def test_dpo_as_a_job(jobs: Jobs, run: Path) -> None:
    words = ("errand-town", "--out", run, *settings({**SETTINGS, "method": "dpo", "dpo.epochs": 1}))
    assert "dpo: done in" in jobs.submit("python", "jobs/dpo.py", *words)


def test_every_script_has_run(run: Path) -> None:
    """All that there are: a new one is to be added above."""
    done = {"revise", "sft", "compare", "label", "rm", "ppo", "evaluate", "report", "dpo", "run"}
    assert {p.stem for p in (ROOT / "jobs").glob("*.py")} == done


def test_a_job_with_a_wrong_setting_fails_with_one_line(jobs: Jobs, tmp_path: Path) -> None:
    wrong = settings({"revise.round": 2})
    out = jobs.submit("python", "jobs/run.py", "errand-town", "--out", tmp_path / "run", *wrong, fails=True)
    assert "did you mean 'rounds'?" in out
    assert "Traceback" not in out.split("did you mean")[0]


def test_a_job_that_has_no_room_is_refused_with_what_the_cluster_has(jobs: Jobs, tmp_path: Path) -> None:
    large = settings({**SETTINGS, "engine.cpus_per_actor": 17})
    out = jobs.submit("python", "jobs/run.py", "errand-town", "--out", tmp_path / "run", *large, fails=True)
    assert "engine.min_actors=1: needs 1 x {CPU: 17}, each on one node, and there is room for 0" in out
    assert "1 node of {CPU: 16} and no autoscaler that adds more" in out
    assert "revise:" not in out


def test_a_driver_sees_the_environment_and_needs_no_gpu(jobs: Jobs) -> None:
    """It runs on the head, which has none to give: nothing that it imports before the work may look for one."""
    code = (
        "import os, cai_ray.cli, cai_ray.pipeline, cai_ray.train.ppo, cai_ray.generate.rows, torch;"
        "print('waits', os.environ['RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S']);"
        "print('cuda', torch.cuda.is_initialized())"
    )
    said = jobs.submit("python", "-c", f'"{code}"')
    given = yaml.safe_load((ROOT / "jobs/runtime-env.yaml").read_text())["env_vars"]
    assert f"waits {given['RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S']}" in said
    assert "cuda False" in said
