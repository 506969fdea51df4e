"""Runs the sample, reckons from it, and puts the result into a table."""

from __future__ import annotations

import math
import posixpath
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from cai_ray import pipeline
from cai_ray.cluster import cost
from cai_ray.cluster.cost import Spent
from cai_ray.cluster.usage import Usage
from cai_ray.config.cost import PricesConfig
from cai_ray.config.run import RunConfig
from cai_ray.data.sources import read_comparisons
from cai_ray.errors import InputError
from cai_ray.estimate.sample import prompts_of, rows_by_kind, sampled
from cai_ray.estimate.scale import Stage, Totals, ppo_seconds, rate, scaled, whole_usage
from cai_ray.evaluate import formats
from cai_ray.evaluate.stage import POLICIES
from cai_ray.generate.label import gold_rows
from cai_ray.report.text import columns, duration, price, token_counts
from cai_ray.storage import files
from cai_ray.storage.run import Run

MODELS = ("sft", "rm")
"""Stages whose model the sample takes from the run, where the run has it."""


def estimate(
    config: RunConfig, stages: Sequence[str], count: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Runs a sample beside the run's directory, which is left as it is, and says what the stages would take.

    Args:
        count: prompts of the sample.

    Raises:
        InputError: an input is at fault (`pipeline.check_inputs`), or a stage of the sample is.
    """
    pipeline.check_inputs(config, stages)
    run = Run(config)
    todo = [name for name in stages if name != "report" and not _done(run, name)]
    folder, own = posixpath.split(run.root)
    place = files.join(folder, f".{own}-estimate-{uuid.uuid4().hex[:8]}")
    made: list[Stage] = []
    shares: dict[str, str] = {}
    try:
        small = sampled(config, place, count)
        sample = Run(small)
        shares = _shares(config, small)
        kept = [n for n in MODELS if n not in todo and run.manifest(n) and todo]
        pipeline.fork(run, small, kept)
        needed = _needed(config, todo, kept)
        pipeline.run_stages(small, needed, keep=kept, say=say)
        made = [_stage(run, sample, name, "sft" in kept) for name in todo]
    finally:
        with suppress(OSError):
            files.delete(place)
    rows = [_row(stage, config.prices) for stage in made]
    return {
        "sample": {"prompts": count, "of": shares, "models": kept},
        "currency": config.prices.currency if config.prices else None,
        "done": [name for name in stages if name != "report" and name not in todo],
        "stages": rows,
        "total": {
            key: sum(row[key] for row in rows) for key in ("wall_seconds", "cpu_seconds", "gpu_seconds")
        }
        | {"money": sum(row["money"] for row in rows) if config.prices else None},
        "notes": _notes(config, count, kept, todo),
    }


def _done(run: Run, name: str) -> bool:
    manifest = run.manifest(name)
    with suppress(InputError):  # what it reads is not made yet
        return manifest is not None and manifest["inputs"] == pipeline.inputs(run, name)
    return False


def _needed(config: RunConfig, todo: Sequence[str], kept: Sequence[str]) -> list[str]:
    """The stages to run: these, and what they rest on."""
    wanted, found = list(todo), set(todo)
    while wanted:
        more = set(pipeline.needs(config, wanted.pop())) - found
        found |= more
        wanted += more
    return [name for name in pipeline.stages_of(config) if name in found and name not in kept]


def _stage(run: Run, sample: Run, name: str, own_policy: bool) -> Stage:
    made = sample.manifest(name)
    assert made is not None
    spent = Spent.of(made["resources"])
    if name not in cost.TRAINING:
        return _generation(run, sample, name, made, spent, own_policy)
    reckon = {"sft": _sft, "ppo": _ppo}.get(name, _preference)
    return reckon(run, sample, name, made, spent)


def _generation(
    run: Run, sample: Run, name: str, made: dict[str, Any], spent: Spent, own_policy: bool
) -> Stage:
    work = spent.work_seconds
    if name == "evaluate":
        rows = _evaluated(run)
        more = times = rows / _evaluated(sample)
        used = Usage(**{kind: round(n * times) for kind, n in made["tokens"].items()})
    else:
        counts = rows_by_kind(run, "compare" if name == "label" else name)
        rows, found = sum(counts.values()), _used(sample, name)
        before, asked = _tokens(found), found
        if name == "label" and not own_policy:
            # A policy that is hardly trained often says the same twice, and nothing is asked then.
            asked = _used(sample, name, asked_alone=True) or found
        used = whole_usage(asked, counts)
        times = (used.prompt + used.generated) / max(1, before)
        more = times
        if name == "label" and (gold := _used(sample, name, "gold") if sample.config.label.gold else {}):
            n, few = len(gold_rows(run)), sum(n for n, _ in gold.values())
            more = (times * before + _tokens(gold) * n / few) / max(1, before + _tokens(gold))
    engine = (run.feedback() if name == "label" else run).config.engine
    at_once = max(1, min(max(engine.min_actors, engine.max_actors), math.ceil(rows / 64)))
    whole = scaled(spent, work, work * more, endpoint=times, at_once=at_once)
    tokens = {kind: n for kind, n in used._asdict().items() if kind != "calls"}
    how = f"{made['rows_in']} rows in {work:.1f} s" + (f", by {at_once} actors" if at_once > 1 else "")
    return Stage(name, rows, tokens, whole, spent.wall_seconds - work, how)


def _used(sample: Run, stage: str, name: str = "part", asked_alone: bool = False) -> Totals:
    found: dict[str, tuple[int, Usage]] = {}
    for row in sample.each_row(stage, ["kind", "usage"], name):
        more = Usage(**(row["usage"] or {}))
        if more.calls or not asked_alone:
            n, used = found.get(row["kind"], (0, Usage()))
            found[row["kind"]] = n + 1, used + more
    return found


def _tokens(found: Totals) -> int:
    return sum(used.prompt + used.generated for _, used in found.values())


def _evaluated(run: Run) -> int:
    """Answers and weighings that a run's policies are asked for."""
    config = run.config.evaluate
    prompts = len(prompts_of(run.config)["evaluate"])
    asked = [row for s in config.sets for row in formats.read(s, run.config.seed)]
    sets = sum(row["kind"] != "comparisons" for row in asked)
    return len(POLICIES) * (prompts * (1 + config.greedy) + sets) + config.best_of * prompts


def _sft(run: Run, sample: Run, name: str, made: dict[str, Any], spent: Spent) -> Stage:
    counts, few = rows_by_kind(run, "revise"), rows_by_kind(sample, "revise")
    kinds = {"revision": "red_team", "helpful": "helpful"}
    rows = dict.fromkeys(kinds, 0.0)
    for row in sample.each_row("sft", ["kind"]):
        asked = kinds[row["kind"]]
        rows[row["kind"]] += counts.get(asked, 0) / few[asked]
    if rows["revision"]:
        rows["helpful"] = min(rows["helpful"], run.config.sft.helpful_per_revision * rows["revision"])
    return _trained(run, sample, name, made, spent, round(sum(rows.values())))


def _preference(run: Run, sample: Run, name: str, made: dict[str, Any], spent: Spent) -> Stage:
    labels = sum(rows_by_kind(run, "compare").values()) / sum(rows_by_kind(sample, "compare").values())
    human = [
        sum(len(read_comparisons(s, r.config.seed)) for s in getattr(r.config, name).human)
        for r in (run, sample)
    ]
    rows = made["rows_ai"] * labels + made["rows_human"] * (human[0] / human[1] if human[1] else 0)
    return _trained(run, sample, name, made, spent, round(rows))


def _trained(run: Run, sample: Run, name: str, made: dict[str, Any], spent: Spent, rows: int) -> Stage:
    config, few = (getattr(r.config, name) for r in (run, sample))
    steps = sample.metrics(name)
    speed, each = rate(steps), made["tokens"]["trained"] / few.epochs / made["rows_out"]
    # A pass forward is a third of a step: DPO has one over all rows for the reference before its first.
    passes, few_passes = (c.epochs + (1 / 3 if name == "dpo" else 0) for c in (config, few))
    work, whole = few_passes * each * made["rows_out"] / speed, passes * each * rows / speed
    tokens = {"trained": round(config.epochs * each * rows)}
    start = max(0.0, spent.wall_seconds - work)
    how = f"{speed:,.0f} tokens/s in {len(steps)} steps"
    return Stage(name, rows, tokens, scaled(spent, work, whole), start, how)


def _ppo(run: Run, sample: Run, name: str, made: dict[str, Any], spent: Spent) -> Stage:
    config, few = run.config.ppo, sample.config.ppo
    steps = sample.metrics("ppo")
    work, alone, both = ppo_seconds(steps, few.value_warmup_steps)
    whole = alone * config.value_warmup_steps + both * config.steps
    total = config.value_warmup_steps + config.steps
    tokens = {"generated": round(made["tokens"]["generated"] * total / len(steps))}
    start = max(0.0, spent.wall_seconds - work)
    how = f"{both:.1f} s a step, in {len(steps)} steps"
    return Stage(name, total * config.rollout_batch, tokens, scaled(spent, work, whole), start, how)


def _row(stage: Stage, prices: PricesConfig | None) -> dict[str, Any]:
    spent = stage.spent
    return {
        "stage": stage.stage,
        "rows": stage.rows,
        "tokens": stage.tokens,
        "wall_seconds": spent.wall_seconds,
        "start_seconds": stage.start_seconds,
        "cpu_seconds": spent.cpu_seconds,
        "gpu_seconds": spent.gpu_seconds,
        "endpoint": spent.endpoint._asdict(),
        "money": cost.money(spent, stage.stage, prices),
        "how": stage.how,
    }


def _shares(config: RunConfig, small: RunConfig) -> dict[str, str]:
    whole, few = prompts_of(config), prompts_of(small)
    return {name: f"{len(few[name])} of {len(whole[name])}" for name in whole if whole[name]}


def _notes(config: RunConfig, count: int, kept: Sequence[str], todo: Sequence[str]) -> list[str]:
    notes = []
    if "sft" not in kept and {"compare", "label", "evaluate"} & set(todo):
        notes.append(
            "policies of the sample are hardly trained: trained ones may answer longer or shorter; comparisons are "
            "reckoned as if no two answers were alike, for which nothing is asked"
        )
    if config.engine.max_num_seqs > count and {"revise", "compare", "label"} & set(todo):
        notes.append(
            f"an engine takes {config.engine.max_num_seqs} rows at once, more than the {count} prompts of the sample: "
            "the run's engines may be fuller, and faster, than this"
        )
    if config.evaluate.harness and "evaluate" in todo:
        notes.append("evaluate.harness is left out")
    if config.watched and "ppo" in todo:
        notes.append("ppo.watch: snapshots after the first two are left out")
    return notes


def lines(found: dict[str, Any]) -> list[str]:
    """For a terminal."""
    if not found["stages"]:
        return ["nothing to estimate: all stages are done"]
    table = [
        ["estimate", "wall time", "to start", "CPU", "GPU", "money", "rows", "tokens", "from the sample"]
    ]
    for row in [*found["stages"], {"stage": "all", **found["total"]}]:
        times = [row.get(f"{kind}_seconds") for kind in ("wall", "start", "cpu", "gpu")]
        told = [duration(t) if t else "" for t in times]
        rows = f"{row['rows']:,}" if "rows" in row else ""
        table.append(
            [
                row["stage"],
                *told,
                price(row["money"], found["currency"]),
                rows,
                token_counts(row.get("tokens")),
                row.get("how", ""),
            ]
        )
    kept = [i for i in range(len(table[0])) if any(row[i] for row in table[1:])]
    sample = found["sample"]
    own = f", with the run's own {' and '.join(sample['models'])}" if sample["models"] else ""
    told = [f"{name} {share}" for name, share in sample["of"].items()]
    return [
        *columns([[row[i] for i in kept] for row in table]),
        "",
        f"an estimate, from a sample that was run (prompts: {', '.join(told)}){own}",
        *([f"done before, and not in it: {', '.join(found['done'])}"] if found["done"] else []),
        *found["notes"],
    ]
