"""Stage `report`: what the other stages wrote, as report.json and one page to read."""

from __future__ import annotations

import math
from typing import Any

import yaml

from cai_ray import constitution as constitutions
from cai_ray.data.sources import read_comparisons
from cai_ray.evaluate.attribution import attribution
from cai_ray.report import conversations, costs, explorer, html, snapshots
from cai_ray.report.roles import METHODS, STAGES, in_order, stages_of, title_of
from cai_ray.report.text import percent
from cai_ray.storage import files
from cai_ray.storage.run import Run

BOILERPLATE = 0.3
"""Rise over SL-CAI's of the share of answers that have one phrase in common: more is an alarm."""


def run(run: Run) -> dict[str, Any]:
    report = build(run)
    write(run.path("report"), report)
    return {"models": report["models"]}


def write(folder: str, report: dict[str, Any]) -> None:
    """Writes report.json and index.html into a folder (any URI)."""
    files.write_json(files.join(folder, "report.json"), report)
    files.write_bytes(files.join(folder, "index.html"), html.page(report).encode())


def build(run: Run) -> dict[str, Any]:
    """The report as one object.

    `models` names the policies, each of which is a key of its own: harm, harm_by_family, helpful, over_refusal,
    malformed, principle_named, each {value, low, high, n}; a value is None where nothing was judged.
    """
    constitution = run.constitution()
    measured = run.facts("evaluate", "metrics.json")
    opened = files.read_json(run.path("run.json"))
    models = measured["models"]
    # A directory may hold what another method left: it is no part of this run.
    steps = {m: run.metrics(m) if m == run.config.method else [] for m in METHODS}
    found = _finite(
        {
            "name": run.config.name,
            "model": run.config.model,
            "seed": run.config.seed,
            "models": in_order(models),
            **models,
            "revision_harm": measured.get("revision_harm") or [],
            "revision_harm_selective": measured.get("revision_harm_selective") or [],
            "label": measured.get("label") or {},
            "certificate": run.facts("label", "certificate.json") if run.manifest("label") else None,
            "method": run.config.method,
            "rm": {**_reward_model(run), **(measured.get("rm") or {})},
            **{method: {"steps": rows} for method, rows in steps.items()},
            "snapshots": snapshots.read(run, steps["ppo"], measured.get("snapshots") or {}),
            "stages": stage_costs(run),
            "versions": opened["versions"],
            "constitution_sha": opened["constitution_sha"],
            "constitution": _summary(constitution),
            "human_harmlessness_labels": human_harmlessness_labels(run),
            "transcripts": conversations.read(run, constitution),
            **{
                name: measured.get(name) or {}
                for name in ("ratings", "wording", "critic", "judge", "sets", "harness")
            },
            "attribution": attribution(run, constitution),
            "explorer": explorer.read(run, constitution),
            "cost": costs.read(run),
            "configuration": _configuration(run),
        }
    )
    return {**found, "alarms": alarms(run, found)}


def alarms(run: Run, report: dict[str, Any]) -> list[str]:
    """What a reader should know before the figures, each in a line."""
    found = list((run.manifest("ppo") or {}).get("alarms") or ())
    found += snapshots.overoptimised(report["snapshots"])
    kept: dict[tuple[str, str], list[str]] = {}
    for name in STAGES:
        manifest = run.manifest(name) or {}
        for stage, changed in (manifest.get("kept") or {}).items():
            kept.setdefault((stage, ", ".join(changed)), []).append(name)
        if manifest.get("errors"):
            found.append(f"{name}: {manifest['errors']} of {manifest['rows_in']} rows failed")
    for (stage, what), names in kept.items():
        found.append(f"{stage} was kept though {what} had changed; made after it: {', '.join(names)}")
    before = (report["wording"].get("sl") or {}).get("boilerplate")
    for model, wording in report["wording"].items():
        rose = wording["boilerplate"] is not None and before is not None and wording["boilerplate"] - before
        if rose and rose > BOILERPLATE:
            share = percent(wording["boilerplate"], 0)
            found.append(f"{title_of(model)}: {share} of its answers say {wording['phrase']!r}")
    if report["attribution"]:
        coverage = report["attribution"]["coverage"]
        if families := coverage["families_without_principle"]:
            found.append(f"no principle names these families of prompts: {', '.join(families)}")
    return found


def _configuration(run: Run) -> str:
    """What of the configuration is not the default, as YAML."""
    given = run.config.model_dump(mode="json", exclude_defaults=True, exclude={"out"})
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)


def human_harmlessness_labels(run: Run) -> int:
    """Human comparisons about harm that were trained on: counted in their sources."""
    return sum(
        len(read_comparisons(source, run.config.seed))
        for source in run.config.preference.human
        if source.about == "harmless"
    )


def stage_costs(run: Run) -> dict[str, dict[str, Any]]:
    """Wall seconds and tokens of each completed stage, from its manifest."""
    found = {}
    for name in stages_of(run.config.method):
        if manifest := run.manifest(name):
            found[name] = {"seconds": manifest["seconds"], "tokens": manifest.get("tokens")}
            for key in ("rows_in", "rows_out", "errors", "engine_seconds"):
                if key in manifest:
                    found[name][key] = manifest[key]
    return found


def _reward_model(run: Run) -> dict[str, Any]:
    manifest = (run.manifest("rm") if run.config.method == "ppo" else None) or {}
    metrics = manifest.get("metrics") or {}
    return {"accuracy_ai": None, **metrics}


def _summary(constitution: constitutions.Constitution) -> dict[str, Any]:
    principles = [
        {**p.model_dump(mode="json", exclude={"examples"}), "sha": p.sha} for p in constitution.principles
    ]
    return {"name": constitution.name, "version": constitution.version, "principles": principles}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
