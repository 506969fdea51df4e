"""Checks that a stage's resources fit on the cluster before it starts, since Ray waits silently for what never comes.

Ray places bundles: an amount of each resource, all on one node. Totals are not enough: four nodes with one GPU each
have no room for an actor with four. Nodes that are up count, and nodes that an autoscaler may add.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cai_ray.compat.ray_autoscaler import kubernetes_config, reported_node_groups
from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError

BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""Where `ray up` puts the autoscaler's configuration on the head, which is where a submitted job's driver runs."""
_SECRETS = "/var/run/secrets/kubernetes.io/serviceaccount"
_LABEL = "ray.io/node-group"
_UNBOUNDED = 1 << 20
MARK = 0.001
"""What a bundle takes of a resource that only marks nodes (`ray.training_nodes`)."""

Resources = Mapping[str, float]


class Nodes(NamedTuple):
    """A number of nodes with the same resources: up, or ones that may be added."""

    resources: Resources
    number: int


class ResourceNeed(NamedTuple):
    """A number of equal bundles that are needed at the same time."""

    bundle: Resources
    number: int


class Cluster(NamedTuple):
    up: list[Nodes]
    addable: list[Nodes] | None
    """What an autoscaler may add. None if it does not say."""


def bundle(
    cpus: float, gpus: float, nodes: str | None, beside: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The resources of one actor or worker, restricted to marked nodes if `nodes` names a mark."""
    return {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {}) | marks(nodes) | dict(beside or {})


def marks(nodes: str | None) -> dict[str, float]:
    """The resource that keeps a bundle on the nodes with a mark; empty without one."""
    return {nodes: MARK} if nodes else {}


def check(config: RunConfig, what: str, needs: Sequence[ResourceNeed], remedy: str) -> None:
    """Stops a stage that could never start.

    Args:
        what: the settings that need it, with their values.
        remedy: which of them to change, and how.

    Raises:
        InputError: the cluster has no room for all of it, even grown as far as it can grow.
    """
    cluster = read_cluster(config)
    if cluster.addable is None:
        return
    placed = count_placed(needs, cluster)
    if all(n == need.number for n, need in zip(placed, needs, strict=True)):
        return
    kinds = {kind for need in needs for kind in need.bundle}
    short = next(i for i, need in enumerate(needs) if placed[i] < need.number)
    needed = " and ".join(f"{need.number} x {_show(need.bundle, kinds)}" for need in needs)
    which = f" of {_show(needs[short].bundle, kinds)}" if len(needs) > 1 else ""
    raise InputError(
        f"{what}: needs {needed}, each on one node, and there is room for {placed[short]}{which}; "
        f"the cluster has {_list(cluster.up, kinds)} and {_may_add(cluster.addable, kinds)}; {remedy}"
    )


def count_placed(needs: Sequence[ResourceNeed], cluster: Cluster) -> list[int]:
    """How many bundles of each need find room if all are placed together.

    The largest bundles are placed first, each where it leaves the least behind.
    """
    nodes = [*cluster.up, *(cluster.addable or [])]
    placed = [0] * len(needs)
    for i in sorted(range(len(needs)), key=lambda i: _size(needs[i].bundle), reverse=True):
        need, left = needs[i].bundle, needs[i].number
        # Nodes without a GPU give their CPUs first. Nodes that are up come before those that may be added.
        for place in sorted(range(len(nodes)), key=lambda n: _wastes_gpu(nodes[n].resources, need)):
            resources, count = nodes[place]
            each = fit(need, resources, left)
            if not each or not count:
                continue
            full, rest = divmod(min(left, each * count), each)
            nodes[place] = Nodes(resources, count - full - bool(rest))
            for bundles, times in ((each, full), (rest, bool(rest))):
                rest_of_node = {k: v - need.get(k, 0) * bundles for k, v in resources.items()}
                nodes.append(Nodes(rest_of_node, int(times)))
            left -= full * each + rest
        placed[i] = needs[i].number - left
    return placed


def read_cluster(config: RunConfig) -> Cluster:
    """The cluster that this process is connected to."""
    import ray

    # Ray's own order is by random ids.
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: _size(node["Resources"]))
    groups = [node["Labels"].get(_LABEL) for node in alive]
    kinds = _autoscaled_kinds(config)
    if kinds is None:
        addable = None
    else:
        addable = [Nodes(k.resources, k.number - groups.count(name)) for name, k in kinds.items()]
        addable = [k for k in addable if k.number > 0]
    return Cluster([Nodes(node["Resources"], 1) for node in alive], addable)


def _autoscaled_kinds(config: RunConfig) -> dict[str, Nodes] | None:
    """Kinds of nodes that an autoscaler keeps, by name, with its bounds. None if it does not say.

    Ray has no interface for this, so the autoscaler's configuration is read from where the autoscaler has it.
    """
    if groups := reported_node_groups():
        return {g.name: Nodes(g.resources, g.max_count if g.max_count >= 0 else _UNBOUNDED) for g in groups}
    named = config.ray.autoscaling_config
    if not (named or config.ray.address or os.environ.get("RAY_ADDRESS")):
        return {}  # a local cluster has no autoscaler
    path = os.path.expanduser(named or BOOTSTRAP)
    if os.path.exists(path):
        import yaml

        with open(path, encoding="utf-8") as f:
            return worker_kinds(yaml.safe_load(f))
    if named:
        raise InputError(f"ray.autoscaling_config={named}: there is no such file")
    name = os.environ.get("RAY_CLUSTER_NAME")  # set by the Kubernetes operator
    if not (name and os.path.exists(_SECRETS)):
        return {}
    with open(f"{_SECRETS}/namespace", encoding="utf-8") as f:
        autoscaling = kubernetes_config(name, f.read().strip())
    if autoscaling is None:
        return None
    return worker_kinds(autoscaling) if autoscaling else {}


def worker_kinds(autoscaling: Mapping[str, Any]) -> dict[str, Nodes]:
    """Kinds of worker nodes, by name, in a configuration as `ray up` takes it."""
    most = int(autoscaling.get("max_workers", _UNBOUNDED))
    return {
        name: Nodes(kind.get("resources", {}), min(most, int(kind.get("max_workers", most))))
        for name, kind in autoscaling["available_node_types"].items()
        if name != autoscaling["head_node_type"]
    }


def fit(need: Resources, resources: Resources, most: int) -> int:
    """How many bundles, at most `most`, a node with these resources has room for."""
    # Rounded up by less than Ray's own precision: 0.3 / 0.1 is a little less than 3.
    return min([most, *(int(resources.get(k, 0) / v + 1e-6) for k, v in need.items() if v > 0)])


def _size(need: Resources) -> tuple[float, float]:
    return need.get("GPU", 0), need.get("CPU", 0)


def _wastes_gpu(resources: Resources, need: Resources) -> bool:
    """Whether the node has a GPU that the bundle would leave idle."""
    return resources.get("GPU", 0) > 0 and not need.get("GPU")


def _show(resources: Resources, kinds: Iterable[str]) -> str:
    shown = {k: resources.get(k, 0) for k in ("CPU", "GPU") if k in kinds or resources.get(k)}
    marked = [k for k in sorted(kinds) if k not in shown and k in resources]
    return "{" + ", ".join([*(f"{k}: {v:g}" for k, v in shown.items()), *marked]) + "}"


def _list(nodes: Iterable[Nodes], kinds: Iterable[str]) -> str:
    numbers: dict[str, int] = {}
    for group in nodes:
        shown = _show(group.resources, kinds)
        numbers[shown] = numbers.get(shown, 0) + group.number
    return ", ".join(f"{n} {'node' if n == 1 else 'nodes'} of {shown}" for shown, n in numbers.items())


def _may_add(nodes: Sequence[Nodes], kinds: Iterable[str]) -> str:
    return f"an autoscaler that may add {_list(nodes, kinds)}" if nodes else "no autoscaler that adds more"
