"""One local Ray cluster for all tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Ray as the pipeline starts it (`cluster.connect`)."""
    from cai_ray.cluster.connect import connect, disconnect
    from cai_ray.config.run import RunConfig

    config = RunConfig(
        name="tests", model="town", constitution="errand-town", prompts=({"path": "town:revise"},)
    )
    connect(config)
    yield
    disconnect()
