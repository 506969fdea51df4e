"""What the tests of clusters share: a run made by jobs, a run that pools grew for, and a run to serve."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cluster.jobs import SETTINGS, Jobs
from tests.cluster.nodes import ROWS, Cluster, running, wait_until
from tests.e2e.command import settings, succeed
from tests.e2e.conftest import served_run

__all__ = ["served_run"]

POOLS = {
    "generation": ({"CPU": 8, "generation": 1}, 2),
    "training": ({"CPU": 4, "training": 1}, 1),
}


class Grown(NamedTuple):
    cluster: Cluster
    given: dict[str, Any]
    """Settings of the run."""
    out: Path
    said: str


@pytest.fixture(scope="session")
def jobs() -> Iterator[Jobs]:
    with running("--num-cpus 0 --num-gpus 0", workers=1, cpus=16) as cluster:
        made = Jobs(cluster)
        wait_until(lambda: made("list").returncode == 0, cluster.said)
        yield made


@pytest.fixture(scope="session")
def jobs_run(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
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


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grown]:
    """Two stages of a run, on a cluster that is nothing but a head before."""
    with running("--num-cpus 0", pools=POOLS) as cluster:
        assert len(cluster.ids()) == 1
        out = tmp_path_factory.mktemp("pools") / "run"
        given = {
            **ROWS,
            "sft.epochs": 1,
            "ray.training_nodes": "training",
            "ray.generation_nodes": "generation",
            "ray.address": cluster.address,
            "ray.autoscaling_config": cluster.config,
            "engine.cpus_per_actor": 8,
            "engine.min_actors": 2,
            "engine.max_actors": 2,
        }
        words = ("run", "errand-town", "--until", "sft", "--out", out, *settings(given))
        yield Grown(cluster, given, out, succeed(*words, env=cluster.env).stderr)
