"""What the report knows of stages and policies: their order, their names and their colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

from cai_ray.stages import POLICIES, ROLES, Method, stages_that

METHODS: tuple[str, ...] = get_args(Method)
MEASURED = tuple(stages_that("generates", "trains"))
"""The stages that a report tells of: those of both methods, in order, without the report itself."""
TITLES: dict[str, str] = {
    **{policy: ROLES[policy].title for policy in POLICIES},
    "shuffled": "shuffled labels",
    "respect_only": "respect alone",
}
"""Policies by their name in the report, in the order in which they are shown: the run's own, then controls."""


def in_order(policies: Iterable[str]) -> list[str]:
    """Sorts policies by when they are made: base, SL-CAI, RL-CAI, then the controls."""
    place = {policy: i for i, policy in enumerate(TITLES)}
    return sorted(policies, key=lambda policy: (place.get(policy, len(place)), policy))


def title_of(policy: str) -> str:
    return TITLES.get(policy, policy.replace("_", " "))


def colour_of(policy: str, policies: Sequence[str] = ()) -> str:
    """The style class of a policy. Controls take turns if the policies they are shown with are given."""
    if policy in POLICIES:
        return policy
    controls = [p for p in policies if p not in POLICIES]
    return f"control c{controls.index(policy) % 3}" if policy in controls else "control"
