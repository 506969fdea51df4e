"""What the cards of a run tell of it: rows, settings and results, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cai_ray.config.run import RunConfig
from cai_ray.constitution import Constitution
from cai_ray.export.roles import ROWS
from cai_ray.judging.statistics import wilson
from cai_ray.report import main_table
from cai_ray.report.roles import title_of
from cai_ray.report.text import interval, percent
from cai_ray.storage.hub import parse_model

# Where things lie on the machine that made them, and how the work was shared out, are nobody else's matter.
_PRIVATE = {
    "prompts", "human", "gold", "gold_limit", "gates", "engine", "workers", "cpus_per_worker",
    "checkpoint_every", "keep_checkpoints", "offload_optimizer", "micro_batch_tokens", "rollout_engines",
    "deadline_s", "save_rollouts", "rewards", "watch",
}  # fmt: skip
_NAMES = ("init", "model", "templates", "constitution")
"""Settings that may be paths, of which a card shows the last part."""
_SOURCES = {"ai": "AI labels", "human": "human comparisons"}


class RunFacts(NamedTuple):
    """What a run's models and datasets were made from, and how good they are."""

    config: RunConfig
    constitution: Constitution
    manifests: dict[str, dict[str, Any]]
    """Of the stages that are complete and rest on one another."""
    report: dict[str, Any] | None
    certificate: dict[str, Any] | None
    example: list[dict[str, str]]
    """A conversation as the policy was trained to read it: with the messages that the template set puts around it."""


def row_counts(facts: RunFacts, stages: Sequence[str]) -> list[list[str]]:
    """Rows of each stage, how many of them failed, and how many of the labels are people's."""
    rows = []
    for stage in stages:
        manifest = facts.manifests.get(stage, {})
        if "rows_out" in manifest:
            errors = manifest.get("errors", 0)
            rows.append([ROWS[stage], f"{manifest['rows_out']:,}", f"{errors:,} errors" if errors else ""])
    for stage in ("rm", "dpo"):
        if stage in stages:
            human = facts.manifests[stage].get("human_labels") or {}
            for about in ("helpful", "harmless"):
                rows.append([f"human comparisons about what is {about}", f"{human.get(about, 0):,}", ""])
    return rows


def policy_results(facts: RunFacts) -> list[list[str]] | None:
    """The report's main table with its head as first row; None without a report."""
    if facts.report is None:
        return None
    head = ["", *(title_of(policy) for policy in facts.report["models"])]
    rows = main_table.rows(facts.report)
    return [head, *([row.label, *(_rate(rate) for rate in row.rates)] for row in rows)]


def reward_model_results(facts: RunFacts) -> list[list[str]]:
    """Accuracy and loss on comparisons that were held out; empty if none were."""
    metrics, rows = facts.manifests["rm"].get("metrics") or {}, []
    for source, what in _SOURCES.items():
        if n := metrics.get(f"n_{source}"):
            accuracy = {"n": round(n), **wilson(metrics[f"accuracy_{source}"], n)}
            rows.append([f"accuracy on held-out {what}", _rate(accuracy)])
            rows.append([f"loss on held-out {what}", f"{metrics[f'loss_{source}']:.3f}"])
    gold = ((facts.report or {}).get("rm") or {}).get("accuracy_gold")
    if gold is not None:
        rows.append(["pairs ordered as the exact judge does", percent(gold)])
    return rows


def settings(config: RunConfig, sections: Sequence[str]) -> dict[str, Any]:
    """Sections of the configuration without what is private, and with models by name alone."""
    return {name: _public_settings(getattr(config, name).model_dump(mode="json")) for name in sections}


def _public_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a section, and of the sections in it, without what is private."""
    public: dict[str, Any] = {}
    for key, value in values.items():
        if key in _PRIVATE:
            continue
        if isinstance(value, dict):
            value = _public_settings(value)
        elif isinstance(value, str) and key in _NAMES:
            value = public_name(value)
        public[key] = value
    return public


def hub_id(model: str) -> str | None:
    """A model's id on the Hub; None for what is a folder, or comes with this package."""
    repo = parse_model(model)
    return repo.name if repo and "/" in repo.name else None


def public_name(model: str) -> str:
    """A model's name without the place it lies in."""
    return hub_id(model) or model.rstrip("/").rpartition("/")[2]


def reviser_name(config: RunConfig) -> str | None:
    """The public name of the model that wrote critiques and revisions, if that was not the policy."""
    reviser = config.revise.reviser
    return public_name(reviser.model) if reviser and reviser.model not in ("base", config.model) else None


def _rate(rate: dict[str, Any]) -> str:
    value = percent(rate["value"])
    return value if rate["value"] is None else f"{value} ({interval(rate)}, n = {rate['n']})"
