"""What a reader should know before the figures: alarms of the stages, and signs that the reward was learned alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cai_ray.report import snapshots
from cai_ray.report.roles import MEASURED, title_of
from cai_ray.report.text import percent
from cai_ray.storage.run import Run

BOILERPLATE = 0.3
"""Alarm if the share of answers that have one phrase in common is higher than SL-CAI's by more than this."""


def alarms(run: Run, report: dict[str, Any]) -> list[str]:
    """Every alarm in a line."""
    return [
        *((run.manifest("ppo") or {}).get("alarms") or ()),
        *snapshots.overoptimised(report["snapshots"]),
        *_of_stages({name: run.manifest(name) or {} for name in MEASURED}),
        *_common_phrases(report["wording"]),
        *_families_without_principle(report["attribution"]),
    ]


def _of_stages(manifests: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Rows that failed, and stages that were kept although their inputs had changed."""
    made_after: dict[tuple[str, str], list[str]] = {}
    for name, manifest in manifests.items():
        if manifest.get("errors"):
            yield f"{name}: {manifest['errors']} of {manifest['rows_in']} rows failed"
        for stage, changed in (manifest.get("kept") or {}).items():
            made_after.setdefault((stage, ", ".join(changed)), []).append(name)
    for (stage, changed), names in made_after.items():
        yield f"{stage} was kept though {changed} had changed; made after it: {', '.join(names)}"


def _common_phrases(wording: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    before = (wording.get("sl") or {}).get("boilerplate")
    for policy, measured in wording.items():
        after = measured["boilerplate"]
        if after is not None and before is not None and after - before > BOILERPLATE:
            yield f"{title_of(policy)}: {percent(after, 0)} of its answers say {measured['phrase']!r}"


def _families_without_principle(attribution: Mapping[str, Any] | None) -> Iterator[str]:
    families = attribution["coverage"]["families_without_principle"] if attribution else []
    if families:
        yield f"no principle names these families of prompts: {', '.join(families)}"
