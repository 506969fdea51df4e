"""Reads what Ray knows about its cluster and this process but does not offer in its public interface.

Written for Ray 2.60. An autoscaler's bounds are in the cluster's state (platforms with an autoscaler of their own) or
in the RayCluster resource that Kubernetes' operator reads; Ray translates the latter in a private module.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class NodeGroup(NamedTuple):
    """A kind of node that an autoscaler starts and stops."""

    name: str
    resources: dict[str, float]
    most: int | None
    """The largest number of nodes; None if there is no bound."""


def reported_node_groups() -> list[NodeGroup]:
    """The groups that a platform with an autoscaler of its own has told the cluster; empty where none did."""
    from ray._private.state import state

    reported = state.get_cluster_config()
    groups = reported.node_group_configs if reported is not None else ()
    return [NodeGroup(g.name, dict(g.resources), g.max_count if g.max_count >= 0 else None) for g in groups]


def kubernetes_autoscaling(cluster: str, namespace: str) -> dict[str, Any] | None:
    """The autoscaler's configuration for a RayCluster on Kubernetes, in the form that `ray up` takes.

    Returns:
        An empty dict if the cluster is not autoscaled; None if this pod may not read it. The operator lets the head
        read it where autoscaling is on.
    """
    import requests
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        AutoscalingConfigProducer,
        _derive_autoscaling_config_from_ray_cr,
    )

    producer = AutoscalingConfigProducer(cluster, namespace)
    try:
        resource = producer.kubernetes_api_client.get(producer._ray_cr_path)
    except requests.RequestException:
        return None
    if not resource["spec"].get("enableInTreeAutoscaling"):
        return {}
    derived: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(resource)
    return derived


def in_worker() -> bool:
    """Whether this process is a worker of Ray, which holds resources, rather than a driver."""
    import ray

    return bool(ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE)
