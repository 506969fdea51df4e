"""Estimates each whole stage from what it took in the sample."""

from __future__ import annotations

import math
from typing import Any

from cai_ray.cluster.cost import Spent
from cai_ray.cluster.usage import Usage
from cai_ray.data import set_formats
from cai_ray.data.gold_comparisons import read_gold_comparisons
from cai_ray.data.sources import read_comparisons
from cai_ray.estimate.sample import prompts_of, rows_by_kind
from cai_ray.estimate.scale import StageEstimate, Totals, ppo_seconds, rate, scaled, whole_usage
from cai_ray.stages import POLICIES, STAGES
from cai_ray.storage.run import Run


def estimate_stage(run: Run, sample: Run, name: str, own_policy: bool) -> StageEstimate:
    """
    Args:
        name: the stage, which the sample has completed.
        own_policy: whether the sample has the run's own SL-CAI policy.
    """
    manifest = sample.manifest(name)
    assert manifest is not None
    spent = Spent.from_dict(manifest["resources"])
    if STAGES[name].kind != "trains":
        return _generation(run, sample, name, manifest, spent, own_policy)
    estimate = {"sft": _sft, "ppo": _ppo}.get(name, _preference)
    return estimate(run, sample, name, manifest, spent)


def _generation(
    run: Run, sample: Run, name: str, manifest: dict[str, Any], spent: Spent, own_policy: bool
) -> StageEstimate:
    work = spent.work_seconds
    if name == "evaluate":
        rows = _evaluation_calls(run)
        work_times = times = rows / _evaluation_calls(sample)
        used = Usage(**{kind: round(n * times) for kind, n in manifest["tokens"].items()})
    else:
        counts = rows_by_kind(run, "compare" if name == "label" else name)
        rows, totals = sum(counts.values()), _usage_by_kind(sample, name)
        before, typical = _tokens(totals), totals
        if name == "label" and not own_policy:
            # A policy that is hardly trained often gives the same answer twice, and then the judge is not asked.
            typical = _usage_by_kind(sample, name, only_asked=True) or totals
        used = whole_usage(typical, counts)
        times = (used.prompt + used.generated) / max(1, before)
        work_times = times
        if name == "label" and (
            gold := _usage_by_kind(sample, name, "gold") if sample.config.label.gold else {}
        ):
            n, few = len(read_gold_comparisons(run.config)), sum(n for n, _ in gold.values())
            work_times = (times * before + _tokens(gold) * n / few) / max(1, before + _tokens(gold))
    engine = run.resolve_model(run.config.label.judge if name == "label" else "base").engine
    at_once = max(1, min(max(engine.min_actors, engine.max_actors), math.ceil(rows / 64)))
    whole = scaled(spent, work, work * work_times, endpoint=times, at_once=at_once)
    tokens = {kind: n for kind, n in used._asdict().items() if kind != "calls"}
    how = f"{manifest['rows_in']} rows in {work:.1f} s" + (f", by {at_once} actors" if at_once > 1 else "")
    return StageEstimate(name, rows, tokens, whole, spent.wall_seconds - work, how)


def _usage_by_kind(sample: Run, stage: str, name: str = "part", only_asked: bool = False) -> Totals:
    totals: dict[str, tuple[int, Usage]] = {}
    for row in sample.each_row(stage, ["kind", "usage"], name):
        usage = Usage(**(row["usage"] or {}))
        if usage.calls or not only_asked:
            n, used = totals.get(row["kind"], (0, Usage()))
            totals[row["kind"]] = n + 1, used + usage
    return totals


def _tokens(totals: Totals) -> int:
    return sum(used.prompt + used.generated for _, used in totals.values())


def _evaluation_calls(run: Run) -> int:
    """How often stage `evaluate` asks the run's policies, for an answer or to weigh options."""
    config = run.config.evaluate
    prompts = len(prompts_of(run.config)["evaluate"])
    rows = [row for s in config.sets for row in set_formats.read(s, run.config.seed)]
    sets = sum(row["kind"] != "comparisons" for row in rows)
    return len(POLICIES) * (prompts * (1 + config.greedy) + sets) + config.best_of * prompts


def _sft(run: Run, sample: Run, name: str, manifest: dict[str, Any], spent: Spent) -> StageEstimate:
    counts, few = rows_by_kind(run, "revise"), rows_by_kind(sample, "revise")
    kinds = {"revision": "red_team", "helpful": "helpful"}
    rows = dict.fromkeys(kinds, 0.0)
    for row in sample.each_row("sft", ["kind"]):
        source = kinds[row["kind"]]
        rows[row["kind"]] += counts.get(source, 0) / few[source]
    if rows["revision"]:
        rows["helpful"] = min(rows["helpful"], run.config.sft.helpful_per_revision * rows["revision"])
    return _trained(run, sample, name, manifest, spent, round(sum(rows.values())))


def _preference(run: Run, sample: Run, name: str, manifest: dict[str, Any], spent: Spent) -> StageEstimate:
    labels = sum(rows_by_kind(run, "compare").values()) / sum(rows_by_kind(sample, "compare").values())
    human = [
        sum(len(read_comparisons(s, r.config.seed)) for s in getattr(r.config, name).human)
        for r in (run, sample)
    ]
    rows = manifest["rows_ai"] * labels + manifest["rows_human"] * (human[0] / human[1] if human[1] else 0)
    return _trained(run, sample, name, manifest, spent, round(rows))


def _trained(
    run: Run, sample: Run, name: str, manifest: dict[str, Any], spent: Spent, rows: int
) -> StageEstimate:
    config, few = (getattr(r.config, name) for r in (run, sample))
    steps = sample.metrics(name)
    speed, each = rate(steps), manifest["tokens"]["trained"] / few.epochs / manifest["rows_out"]
    # A forward pass is a third of a step. DPO makes one over all rows for the reference before its first step.
    passes, few_passes = (c.epochs + (1 / 3 if name == "dpo" else 0) for c in (config, few))
    work, whole = few_passes * each * manifest["rows_out"] / speed, passes * each * rows / speed
    tokens = {"trained": round(config.epochs * each * rows)}
    start = max(0.0, spent.wall_seconds - work)
    how = f"{speed:,.0f} tokens/s in {len(steps)} steps"
    return StageEstimate(name, rows, tokens, scaled(spent, work, whole), start, how)


def _ppo(run: Run, sample: Run, name: str, manifest: dict[str, Any], spent: Spent) -> StageEstimate:
    config, few = run.config.ppo, sample.config.ppo
    steps = sample.metrics("ppo")
    work, value_step, full_step = ppo_seconds(steps, few.value_warmup_steps)
    whole = value_step * config.value_warmup_steps + full_step * config.steps
    total = config.value_warmup_steps + config.steps
    tokens = {"generated": round(manifest["tokens"]["generated"] * total / len(steps))}
    start = max(0.0, spent.wall_seconds - work)
    how = f"{full_step:.1f} s a step, in {len(steps)} steps"
    return StageEstimate(name, total * config.rollout_batch, tokens, scaled(spent, work, whole), start, how)
