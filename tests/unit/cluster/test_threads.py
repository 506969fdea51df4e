"""A process computes with its share of its node's cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cai_ray.cluster import threads
from cai_ray.cluster.connect import WORKER_ENV, prepare_engine
from cai_ray.cluster.placement import ResourceNeed
from cai_ray.cluster.threads import Crowd, cores, count_on_node, use_threads
from cai_ray.config.engine import EngineConfig

LAPTOP = {"CPU": 16.0}
CPU_NODE = {"CPU": 32.0, "generation": 1.0}
GPU_NODE = {"CPU": 96.0, "GPU": 8.0}
ONE_CPU = {"CPU": 1.0}
ONE_GPU = {"CPU": 1.0, "GPU": 1.0}


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


@pytest.mark.parametrize(
    ("crowd", "node", "nodes", "count"),
    [
        (Crowd((ResourceNeed(ONE_CPU, 1),), spread=True), LAPTOP, [LAPTOP], 1),
        (Crowd((ResourceNeed(ONE_CPU, 4),), spread=True), LAPTOP, [LAPTOP], 4),
        # PPO: two engines, two workers and a judge share the machine.
        (Crowd((ResourceNeed(ONE_CPU, 2), ResourceNeed(ONE_CPU, 2), ResourceNeed(ONE_CPU, 1))), LAPTOP, [LAPTOP], 5),
        # Ray Data spreads six actors over four nodes: two of these have two.
        (Crowd((ResourceNeed(ONE_CPU, 6),), spread=True), CPU_NODE, [CPU_NODE] * 4, 2),
        # A placement group packs what fits.
        (Crowd((ResourceNeed(ONE_CPU, 6),)), CPU_NODE, [CPU_NODE] * 4, 6),
        (Crowd((ResourceNeed({"CPU": 16.0}, 6),)), CPU_NODE, [CPU_NODE] * 4, 2),
        # Only marked nodes have room.
        (Crowd((ResourceNeed({"CPU": 1.0, "generation": 0.001}, 3),), spread=True), CPU_NODE, [LAPTOP, CPU_NODE], 3),
        (Crowd((ResourceNeed(ONE_GPU, 64),)), GPU_NODE, [GPU_NODE] * 8, 8),
        # An autoscaler has yet to add the node that has room for it.
        (Crowd((ResourceNeed({"CPU": 64.0}, 1),)), LAPTOP, [LAPTOP], 1),
    ],
)  # fmt: skip
def test_processes_of_a_node_are_those_that_it_has_room_for(crowd, node, nodes, count):  # type: ignore[no-untyped-def]
    assert count_on_node(crowd, node, nodes) == count


@pytest.mark.parametrize(
    ("of", "neighbours", "processes", "number"), [(64, 1, 1, 64), (64, 6, 1, 10), (64, 2, 4, 8), (2, 3, 1, 1)]
)
def test_cores_are_divided_by_the_processes_and_each_has_one(
    monkeypatch: pytest.MonkeyPatch, of: int, neighbours: int, processes: int, number: int
) -> None:
    monkeypatch.setattr(threads, "cores", lambda: of)
    monkeypatch.setattr(threads, "_neighbours", lambda crowd: neighbours)
    assert use_threads("auto", Crowd(()), processes) == number
    assert os.environ["OMP_NUM_THREADS"] == str(number)
    assert use_threads("auto") == of, "alone on its node"
    assert use_threads(3, Crowd(()), processes) == 3, "what is set is used as it is"


def test_a_gpu_does_the_work_of_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 64)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    prepare_engine(EngineConfig(), gpu=True)
    assert os.environ["OMP_NUM_THREADS"] == "1" and "TORCH_COMPILE_DISABLE" not in os.environ
    prepare_engine(EngineConfig(threads=7), gpu=True)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    prepare_engine(EngineConfig(tensor_parallel=2), gpu=False)
    assert os.environ["OMP_NUM_THREADS"] == "32" and os.environ["TORCH_COMPILE_DISABLE"] == "1"


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(threads, "_QUOTA", str(quota))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert cores() == 64
    for text, number in (
        ("max 100000", 64),
        ("250000 100000", 3),
        ("50000 100000", 1),
        ("9900000 100000", 64),
    ):
        quota.write_text(text)
        assert cores() == number, text


def test_torchs_threads_wait_passively_and_are_as_many_as_asked_for() -> None:
    """As workers do it: the environment is set before torch is loaded, the number before or after."""
    number = min(2, len(os.sched_getaffinity(0)))  # MKL takes no more than there are cores
    for before in (True, False):
        code = "\n".join([
            "from cai_ray.cluster.threads import use_threads",
            "" if before else "import torch",
            f"use_threads({number})",
            "import torch",
            "print(torch.get_num_threads())",
        ])  # fmt: skip
        env = {**os.environ, **WORKER_ENV, "OMP_DISPLAY_ENV": "verbose"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == str(number)
        assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
        assert "GOMP_SPINCOUNT = '0'" in done.stderr
