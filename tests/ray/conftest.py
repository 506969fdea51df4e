"""One local Ray cluster for all tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Ray as the pipeline starts it (`cluster.connect`)."""
    from cai_ray import cluster
    from cai_ray.config import RunConfig

    config = RunConfig(
        name="tests", model="town", constitution="errand-town", prompts=({"path": "town:revise"},)
    )
    cluster.connect(config)
    yield
    cluster.disconnect()
