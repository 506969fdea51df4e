"""What the report knows of stages and policies: their order, their names and their colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

STAGES = ("revise", "sft", "compare", "label", "rm", "ppo", "dpo", "evaluate")
"""The stages that a report tells of, in the order in which they run."""
METHODS = ("ppo", "dpo")
_STAGES_OF_THE_OTHER_METHOD = {"ppo": ("dpo",), "dpo": ("rm", "ppo")}
TITLES = {
    "base": "base",
    "sl": "SL-CAI",
    "rl": "RL-CAI",
    "shuffled": "shuffled labels",
    "respect_only": "respect alone",
}
"""Policies by the name that they have in the report, in the order in which they are shown."""
TRAINED = ("base", "sl", "rl")
"""The policies of a run; every other one is a control."""


def stages_of(method: str) -> list[str]:
    """The stages of a run of this method."""
    return [stage for stage in STAGES if stage not in _STAGES_OF_THE_OTHER_METHOD[method]]


def in_order(policies: Iterable[str]) -> list[str]:
    """Sorts policies by when they are made: base, SL-CAI, RL-CAI, then the controls."""
    place = {policy: i for i, policy in enumerate(TITLES)}
    return sorted(policies, key=lambda policy: (place.get(policy, len(place)), policy))


def title_of(policy: str) -> str:
    return TITLES.get(policy, policy.replace("_", " "))


def colour_of(policy: str, policies: Sequence[str] = ()) -> str:
    """The style class of a policy. Controls take turns if the policies they are shown with are given."""
    if policy in TRAINED:
        return policy
    controls = [p for p in policies if p not in TRAINED]
    return f"control c{controls.index(policy) % 3}" if policy in controls else "control"
