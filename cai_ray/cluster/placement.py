"""Whether what a stage needs has room on the cluster: asked before the start, since Ray waits without a word.

Ray places bundles: so much of each resource, all on one node. So totals are not enough: four nodes with a GPU each have
no room for an actor of four. What counts is nodes that are up, and nodes that an autoscaler may add.
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
MARK = 0.001
"""What a bundle takes of a resource that only marks nodes (`ray.training_nodes`)."""

Resources = Mapping[str, float]


class Nodes(NamedTuple):
    """Nodes that are alike: up, or such as may be added."""

    resources: Resources
    number: int


class Need(NamedTuple):
    """Bundles that are alike, all of them at once."""

    bundle: Resources
    number: int


class Cluster(NamedTuple):
    up: list[Nodes]
    more: list[Nodes] | None
    """What an autoscaler may add to them; None where it does not say."""


def bundle(
    cpus: float, gpus: float, nodes: str | None, beside: Mapping[str, float] | None = None
) -> dict[str, float]:
    """What one actor or worker takes, on nodes with a mark where there is one."""
    return {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {}) | marks(nodes) | dict(beside or {})


def marks(nodes: str | None) -> dict[str, float]:
    return {nodes: MARK} if nodes else {}


def check(config: RunConfig, what: str, needs: Sequence[Need], remedy: str) -> None:
    """Says at once what would never start.

    Args:
        what: the settings that need it, with their values.
        remedy: which of them to change, and how.

    Raises:
        InputError: the cluster has no room for all of it, grown as far as it can grow.
    """
    cluster = look(config)
    if cluster.more is None:
        return
    found = room(needs, cluster)
    if all(n == need.number for n, need in zip(found, needs, strict=True)):
        return
    asked = {kind for need in needs for kind in need.bundle}
    lacking = next(i for i, need in enumerate(needs) if found[i] < need.number)
    wanted = " and ".join(f"{need.number} x {_show(need.bundle, asked)}" for need in needs)
    which = f" of {_show(needs[lacking].bundle, asked)}" if len(needs) > 1 else ""
    raise InputError(
        f"{what}: needs {wanted}, each on one node, and there is room for {found[lacking]}{which}; "
        f"the cluster has {_list(cluster.up, asked)} and {_may_add(cluster.more, asked)}; {remedy}"
    )


def room(needs: Sequence[Need], cluster: Cluster) -> list[int]:
    """How many of each need find a place, together: the largest first, where they leave least behind."""
    nodes = [*cluster.up, *(cluster.more or [])]
    found = [0] * len(needs)
    for i in sorted(range(len(needs)), key=lambda i: _size(needs[i].bundle), reverse=True):
        need, left = needs[i].bundle, needs[i].number
        # CPUs are taken from nodes without a GPU first. What is up comes before what may come.
        for place in sorted(range(len(nodes)), key=lambda n: _spares(nodes[n].resources, need)):
            resources, count = nodes[place]
            each = _fit(need, resources, left)
            if not each or not count:
                continue
            full, rest = divmod(min(left, each * count), each)
            nodes[place] = Nodes(resources, count - full - bool(rest))
            for bundles, times in ((each, full), (rest, bool(rest))):
                less = {k: v - need.get(k, 0) * bundles for k, v in resources.items()}
                nodes.append(Nodes(less, int(times)))
            left -= full * each + rest
        found[i] = needs[i].number - left
    return found


def look(config: RunConfig) -> Cluster:
    """The cluster that this process is connected to."""
    import ray

    # Ray's own order is by random ids.
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: _size(node["Resources"]))
    groups = [node["Labels"].get(_LABEL) for node in alive]
    kinds = _kinds(config)
    if kinds is None:
        more = None
    else:
        more = [Nodes(k.resources, k.number - groups.count(name)) for name, k in kinds.items()]
        more = [k for k in more if k.number > 0]
    return Cluster([Nodes(node["Resources"], 1) for node in alive], more)


def _kinds(config: RunConfig) -> dict[str, Nodes] | None:
    """Kinds of nodes that an autoscaler keeps, with its bounds, by name. None where it does not say.

    Ray has no interface for it: the autoscaler's own configuration is read where it has it from.
    """
    groups = reported_node_groups()
    if groups:  # a platform with an autoscaler of its own
        return {g.name: Nodes(g.resources, g.max_count if g.max_count >= 0 else 1 << 20) for g in groups}
    named = config.ray.autoscaling_config
    if not (named or config.ray.address or os.environ.get("RAY_ADDRESS")):
        return {}  # started here
    path = os.path.expanduser(named or BOOTSTRAP)
    if os.path.exists(path):
        import yaml

        with open(path, encoding="utf-8") as f:
            return kinds_of(yaml.safe_load(f))
    if named:
        raise InputError(f"ray.autoscaling_config={named}: there is no such file")
    name = os.environ.get("RAY_CLUSTER_NAME")  # the Kubernetes operator's
    return _kubernetes(name) if name and os.path.exists(_SECRETS) else {}


def kinds_of(autoscaling: Mapping[str, Any]) -> dict[str, Nodes]:
    """Of a configuration as `ray up` takes it."""
    most = int(autoscaling.get("max_workers", 1 << 20))
    return {
        name: Nodes(kind.get("resources", {}), min(most, int(kind.get("max_workers", most))))
        for name, kind in autoscaling["available_node_types"].items()
        if name != autoscaling["head_node_type"]
    }


def _kubernetes(name: str) -> dict[str, Nodes] | None:
    """Of the RayCluster that this pod belongs to. The operator lets a head read it where autoscaling is on."""
    with open(f"{_SECRETS}/namespace", encoding="utf-8") as f:
        config = kubernetes_config(name, f.read().strip())
    if not config:
        return None if config is None else {}
    return kinds_of(config)


def _fit(need: Resources, resources: Resources, most: int) -> int:
    # Rounded up by less than Ray's own precision: 0.3 / 0.1 is a little less than 3.
    return min([most, *(int(resources.get(k, 0) / v + 1e-6) for k, v in need.items() if v > 0)])


def _size(need: Resources) -> tuple[float, float]:
    return need.get("GPU", 0), need.get("CPU", 0)


def _spares(resources: Resources, need: Resources) -> bool:
    """Whether the node has a GPU that the bundle would leave idle."""
    return resources.get("GPU", 0) > 0 and not need.get("GPU")


def _show(resources: Resources, asked: Iterable[str]) -> str:
    shown = {k: resources.get(k, 0) for k in ("CPU", "GPU") if k in asked or resources.get(k)}
    marked = [k for k in sorted(asked) if k not in shown and k in resources]
    return "{" + ", ".join([*(f"{k}: {v:g}" for k, v in shown.items()), *marked]) + "}"


def _list(kinds: Iterable[Nodes], asked: Iterable[str]) -> str:
    counted: dict[str, int] = {}
    for kind in kinds:
        shown = _show(kind.resources, asked)
        counted[shown] = counted.get(shown, 0) + kind.number
    return ", ".join(f"{n} {'node' if n == 1 else 'nodes'} of {shown}" for shown, n in counted.items())


def _may_add(kinds: Sequence[Nodes], asked: Iterable[str]) -> str:
    return f"an autoscaler that may add {_list(kinds, asked)}" if kinds else "no autoscaler that adds more"
