"""Stage `report`: what the other stages wrote, as report.json and one page to read."""

from __future__ import annotations

import math
from typing import Any

import yaml

from cai_ray import constitution as constitutions
from cai_ray.data.training import training_comparisons
from cai_ray.evaluate.attribution import attribution
from cai_ray.report import conversations, costs, explorer, html, snapshots
from cai_ray.report.alarms import alarms
from cai_ray.report.roles import MEASURED, METHODS, in_order
from cai_ray.stages import stages_of
from cai_ray.storage import files
from cai_ray.storage.run import Run

_COUNTS = ("rows_in", "rows_out", "errors", "engine_seconds")


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
    malformed, principle_named, each {value, low, high, n}; a value is None if nothing was judged.
    """
    report = _finite(
        {
            "name": run.config.name,
            "model": run.config.model,
            "reviser": reviser.model if (reviser := run.config.revise.reviser) else None,
            "seed": run.config.seed,
            "method": run.config.method,
            **_measured(run),
            **_of_labels(run),
            "stages": _stages(run),
            "cost": costs.read(run),
            **_of_conversations(run),
            **_how_to_reproduce(run),
        }
    )
    return {**report, "alarms": alarms(run, report)}


def _measured(run: Run) -> dict[str, Any]:
    """What `evaluate` measured, and what training recorded of itself."""
    measured = run.facts("evaluate", "metrics.json")
    # A directory may hold what another method left: it is no part of this run.
    steps = {m: run.metrics(m) if m == run.config.method else [] for m in METHODS}
    return {
        "models": in_order(measured["models"]),
        **measured["models"],
        **{name: measured.get(name) or [] for name in ("revision_harm", "revision_harm_selective")},
        "rm": {**_reward_model(run), **(measured.get("rm") or {})},
        **{method: {"steps": rows} for method, rows in steps.items()},
        "snapshots": snapshots.read(run, steps["ppo"], measured.get("snapshots") or {}),
        **{
            name: measured.get(name) or {}
            for name in ("label", "ratings", "wording", "critic", "judge", "sets", "harness")
        },
    }


def _of_labels(run: Run) -> dict[str, Any]:
    """How good the labels are, and how many are people's."""
    return {
        "certificate": run.facts("label", "certificate.json") if run.manifest("label") else None,
        "human_harmlessness_labels": human_harmlessness_labels(run),
    }


def _of_conversations(run: Run) -> dict[str, Any]:
    """What was said, and what each principle did to it."""
    constitution = run.constitution()
    return {
        "constitution": _summary(constitution),
        "transcripts": conversations.read(run, constitution),
        "attribution": attribution(run, constitution),
        "explorer": explorer.read(run, constitution),
    }


def _how_to_reproduce(run: Run) -> dict[str, Any]:
    """Versions, the hash of the constitution, and as YAML what of the configuration is not the default."""
    opened = files.read_json(run.path("run.json"))
    changed = run.config.model_dump(mode="json", exclude_defaults=True, exclude={"out"})
    return {
        "versions": opened["versions"],
        "constitution_sha": opened["constitution_sha"],
        "configuration": yaml.safe_dump(changed, sort_keys=False, allow_unicode=True),
    }


def human_harmlessness_labels(run: Run) -> int:
    """How many human comparisons about harm were trained on, counted in their sources."""
    return sum(
        len(training_comparisons(run.config, source))
        for source in run.config.preference.human
        if source.about == "harmless"
    )


def _stages(run: Run) -> dict[str, dict[str, Any]]:
    """Wall seconds, tokens and rows of each completed stage, from its manifest."""
    stages: dict[str, dict[str, Any]] = {}
    for name in stages_of(run.config.method):
        if name in MEASURED and (manifest := run.manifest(name)):
            stages[name] = {"seconds": manifest["seconds"], "tokens": manifest.get("tokens")}
            stages[name] |= {key: manifest[key] for key in _COUNTS if key in manifest}
    return stages


def _reward_model(run: Run) -> dict[str, Any]:
    manifest = (run.manifest("rm") if run.config.method == "ppo" else None) or {}
    return {"accuracy_ai": None, **(manifest.get("metrics") or {})}


def _summary(constitution: constitutions.Constitution) -> dict[str, Any]:
    principles = [
        {**p.model_dump(mode="json", exclude={"examples"}), "sha": p.sha} for p in constitution.principles
    ]
    return {"name": constitution.name, "version": constitution.version, "principles": principles}


def _finite(value: Any) -> Any:
    """Puts None in the place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
