"""The kinds of nodes that the autoscaler of a cluster may start.

ray 2.60.0: there is no public interface to the kinds of nodes that a cluster can grow by. Platforms with an autoscaler
of their own report them to the control service (`ray._private.state`); under Kubernetes the configuration is derived
from the RayCluster by the autoscaler's own code (`ray.autoscaler._private`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class NodeGroup(NamedTuple):
    name: str
    resources: dict[str, float]
    """Resources of one node, as Ray counts them."""
    max_count: int
    """Most nodes of this group; negative for no limit."""


def reported_node_groups() -> list[NodeGroup] | None:
    """The groups of nodes that the platform reported to the cluster; None if it reported none."""
    from ray._private.state import state

    reported = state.get_cluster_config()
    if reported is None or not reported.node_group_configs:
        return None
    return [NodeGroup(g.name, dict(g.resources), g.max_count) for g in reported.node_group_configs]


def kubernetes_config(cluster: str, namespace: str) -> Mapping[str, Any] | None:
    """The autoscaling configuration of a RayCluster, in the form that `ray up` takes.

    Returns:
        Nothing in it if the cluster does not scale; None if it cannot be read.
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
    config: Mapping[str, Any] = _derive_autoscaling_config_from_ray_cr(resource)
    return config
