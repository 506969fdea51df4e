"""A server's metrics for Prometheus, at the metrics port of each Ray node, beside Serve's and vLLM's own."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import cache
from typing import Any


@cache
def _requests() -> tuple[Any, Any]:
    from ray.util.metrics import Counter, Histogram

    tags = ("route", "status")
    return (
        Counter("cai_ray_serve_requests", "Requests answered", tag_keys=tags),
        Histogram(
            "cai_ray_serve_seconds", "Seconds until a request's answer was complete",
            boundaries=[0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 600], tag_keys=tags,
        ),
    )  # fmt: skip


@cache
def _at_stake() -> Any:
    from ray.util.metrics import Counter

    tags = ("principle", "constitution")
    return Counter("cai_ray_serve_at_stake", "Answers in which a principle was at stake", tag_keys=tags)


def observe(scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
    """Counts a request by its route. Counted by its path, clients could invent tags."""
    tags = {"route": getattr(scope.get("route"), "path", "none"), "status": str(status)}
    counter, histogram = _requests()
    counter.inc(1, tags)
    histogram.observe(seconds, tags)


def at_stake(answer: dict[str, Any], sha: str) -> None:
    """Counts the principle that an answer of the critic names."""
    if answer.get("principle"):
        _at_stake().inc(1, {"principle": answer["principle"]["id"], "constitution": sha})
