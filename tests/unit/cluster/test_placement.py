"""What has room where: bundles on nodes, not totals."""

from __future__ import annotations

from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from cai_ray.cluster import placement
from cai_ray.cluster.placement import Cluster, Nodes, ResourceNeed, bundle, count_placed

ROOT = Path(__file__).parents[3]


def test_four_nodes_with_a_gpu_each_have_no_room_for_an_actor_of_four() -> None:
    cluster = Cluster([Nodes({"CPU": 8, "GPU": 1}, 4)], [])
    assert count_placed([ResourceNeed({"CPU": 1, "GPU": 4}, 1)], cluster) == [0]
    assert count_placed([ResourceNeed({"CPU": 1, "GPU": 1}, 5)], cluster) == [4]


def test_what_an_autoscaler_may_add_counts() -> None:
    cluster = Cluster([Nodes({"CPU": 0}, 1)], [Nodes({"CPU": 96, "GPU": 8}, 1)])
    assert count_placed([ResourceNeed({"CPU": 8, "GPU": 4}, 3)], cluster) == [2]


def test_needs_share_the_nodes() -> None:
    cluster = Cluster([Nodes({"CPU": 16, "GPU": 8}, 1)], [])
    engines, workers = ResourceNeed({"CPU": 1, "GPU": 2}, 2), ResourceNeed({"CPU": 1, "GPU": 1}, 5)
    assert count_placed([engines, workers], cluster) == [2, 4]
    # CPUs are first taken where no GPU would then lie idle.
    beside = Cluster([Nodes({"CPU": 4, "GPU": 4}, 1), Nodes({"CPU": 8}, 1)], [])
    assert count_placed([ResourceNeed({"CPU": 1}, 8), ResourceNeed({"CPU": 1, "GPU": 1}, 4)], beside) == [
        8,
        4,
    ]


def test_a_mark_keeps_a_bundle_to_its_nodes() -> None:
    spot, fixed = (
        Nodes({"CPU": 8, "GPU": 1, "generation": 1}, 8),
        Nodes({"CPU": 96, "GPU": 8, "training": 1}, 1),
    )
    worker = ResourceNeed(bundle(1, 1, "training"), 9)
    assert count_placed([worker], Cluster([spot, fixed], [])) == [8]
    assert count_placed([worker._replace(bundle=bundle(1, 1, None))], Cluster([spot, fixed], [])) == [9]


@given(
    st.lists(
        st.builds(lambda c, g, n: Nodes({"CPU": c, "GPU": g}, n), *map(st.integers, (0, 0, 1), (8, 4, 3))),
        max_size=4,
    ),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 30),
)
def test_bundles_that_are_alike_find_every_place_there_is(
    nodes: list[Nodes], cpus: int, gpus: int, wanted: int
) -> None:
    places = sum(
        min(int(n.resources["CPU"] // cpus), int(n.resources["GPU"] // gpus) if gpus else 99) * n.number
        for n in nodes
    )
    up, more = nodes[::2], nodes[1::2]
    assert count_placed([ResourceNeed(bundle(cpus, gpus, None), wanted)], Cluster(up, more)) == [
        min(wanted, places)
    ]


def test_the_bounds_of_a_cluster_file_are_its_workers() -> None:
    kinds = placement.worker_kinds(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    assert "head" not in kinds
    assert kinds["generation"].number == 6 and kinds["generation"].resources["GPU"] == 1
    assert kinds["training"] == Nodes({"CPU": 96, "GPU": 8, "training": 1}, 1)
