"""How many threads a process computes with: its share of the cores of the node that it runs on.

Each process of a stage gets the node's cores divided by the processes that compute there at the same time. All of them
wait passively (WORKER_ENV): threads that spin while they wait take the cores from other processes.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from cai_ray.cluster.placement import ResourceNeed, Resources, fit
from cai_ray.config.section import Threads

_QUOTA = "/sys/fs/cgroup/cpu.max"


class Crowd(NamedTuple):
    """The processes that compute at the same time in a stage. Plain data: it travels to them."""

    needs: tuple[ResourceNeed, ...]
    """What each kind of process takes of a node, and how many of the kind there are."""
    spread: bool = False
    """Whether the processes are spread over all nodes (Ray Data's actors), or packed on few (placement groups)."""


def use_threads(setting: Threads, crowd: Crowd | None = None, processes: int = 1) -> int:
    """Sets the threads of this process and of those that it starts. Call it before vllm or torch is imported, or in
    the thread that computes.

    Args:
        setting: the number, or `auto` for this process's share of its node.
        crowd: who computes on the node; None if this process has it to itself.
        processes: how many processes compute for this one.

    Returns:
        The number of threads.
    """
    number = _share(crowd, processes) if setting == "auto" else setting
    os.environ["OMP_NUM_THREADS"] = str(number)
    if torch := sys.modules.get("torch"):  # it has read the variable by now
        torch.set_num_threads(number)
    return number


def _share(crowd: Crowd | None, processes: int) -> int:
    return max(1, cores() // (processes * (_neighbours(crowd) if crowd else 1)))


def cores() -> int:
    """Cores that this process may use: of this machine, of a container's limit, of its affinity."""
    usable = len(os.sched_getaffinity(0))
    try:
        with open(_QUOTA, encoding="utf-8") as f:
            quota, period = f.read().split()
        return max(1, min(usable, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no control group, or no limit in it (`max`)
        return usable


def count_on_node(crowd: Crowd, node: Resources, nodes: Sequence[Resources]) -> int:
    """How many processes of a crowd run on a node, at least 1.

    Args:
        node: the resources of the node.
        nodes: the resources of all nodes, this one included.
    """
    count = 0
    for need in crowd.needs:
        hosts = sum(fit(need.bundle, resources, 1) for resources in nodes)
        most = -(-need.number // max(1, hosts)) if crowd.spread else need.number
        count += fit(need.bundle, node, most)
    return max(1, count)


def _neighbours(crowd: Crowd) -> int:
    """How many processes of the crowd run on this process's node."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return count_on_node(crowd, nodes[here], list(nodes.values()))
