"""Runs the sample, estimates the whole stages from it, and shows the result as a table."""

from __future__ import annotations

import posixpath
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from cai_ray import pipeline
from cai_ray.cluster import cost
from cai_ray.config.cost import PricesConfig
from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError
from cai_ray.estimate.by_stage import estimate_stage
from cai_ray.estimate.sample import prompts_of, sampled
from cai_ray.estimate.scale import StageEstimate
from cai_ray.provenance.copies import fork
from cai_ray.provenance.inputs import inputs
from cai_ray.provenance.precision import decide_precision
from cai_ray.report.text import columns, duration, price, token_counts
from cai_ray.stages import STAGES, stages_of, upstream_of
from cai_ray.storage import files
from cai_ray.storage.pins import pin
from cai_ray.storage.run import Run

MODELS = ("sft", "rm")
"""Stages whose model the sample takes from the run, if the run has it."""


def estimate(
    config: RunConfig, stages: Sequence[str], count: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Estimates what the stages would take, from a sample that is run.

    The sample has its own directory beside the run's, which stays as it is.

    Args:
        count: prompts in the sample.

    Raises:
        InputError: an input is at fault (`pipeline.check_inputs`), or a stage of the sample fails because of one.
    """
    config = decide_precision(pin(config).config).config
    pipeline.check_inputs(config, stages)
    run = Run(config)
    todo = [name for name in stages if name != "report" and not _done(run, name)]
    parent, name = posixpath.split(run.root)
    folder = files.join(parent, f".{name}-estimate-{uuid.uuid4().hex[:8]}")
    estimates: list[StageEstimate] = []
    shares: dict[str, str] = {}
    try:
        small = sampled(config, folder, count)
        sample = Run(small)
        shares = _sampled_prompts(config, small)
        reused = [n for n in MODELS if n not in todo and run.manifest(n) and todo]
        fork(run, small, reused)
        pipeline.run_stages(small, _needed(config, todo, reused), keep=reused, say=say)
        estimates = [estimate_stage(run, sample, name, "sft" in reused) for name in todo]
    finally:
        with suppress(OSError):
            files.delete(folder)
    rows = [_row(stage, config.prices) for stage in estimates]
    return {
        "sample": {"prompts": count, "of": shares, "models": reused},
        "currency": config.prices.currency if config.prices else None,
        "done": [name for name in stages if name != "report" and name not in todo],
        "stages": rows,
        "total": {
            key: sum(row[key] for row in rows) for key in ("wall_seconds", "cpu_seconds", "gpu_seconds")
        }
        | {"money": sum(row["money"] for row in rows) if config.prices else None},
        "notes": _notes(config, count, reused, todo),
    }


def _done(run: Run, name: str) -> bool:
    manifest = run.manifest(name)
    with suppress(InputError):  # its inputs do not exist yet
        return manifest is not None and manifest["inputs"] == inputs(run, name)
    return False


def _needed(config: RunConfig, todo: Sequence[str], reused: Sequence[str]) -> list[str]:
    """The stages to run: the given ones and all that they depend on, except those whose model is reused."""
    needed = {*todo, *(up for name in todo for up in upstream_of(name, config.method))}
    return [name for name in stages_of(config.method) if name in needed and name not in reused]


def _row(stage: StageEstimate, prices: PricesConfig | None) -> dict[str, Any]:
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


def _sampled_prompts(config: RunConfig, small: RunConfig) -> dict[str, str]:
    """By stage: how many of its prompts are in the sample."""
    whole, few = prompts_of(config), prompts_of(small)
    return {name: f"{len(few[name])} of {len(whole[name])}" for name in whole if whole[name]}


def _notes(config: RunConfig, count: int, reused: Sequence[str], todo: Sequence[str]) -> list[str]:
    notes = []
    generated = {name for name in todo if STAGES[name].kind == "generates"}
    if "sft" not in reused and any("sft" in upstream_of(name, config.method) for name in generated):
        notes.append(
            "the sample's policies are hardly trained: trained ones may give longer or shorter answers; the estimate "
            "takes all pairs of answers to differ, since the judge is not asked about equal ones"
        )
    if config.engine.max_num_seqs > count and generated - {"evaluate"}:
        notes.append(
            f"an engine works on {config.engine.max_num_seqs} rows at once, more than the sample's {count} prompts: "
            "the run's engines may be fuller, and so faster, than estimated"
        )
    if config.evaluate.harness and "evaluate" in todo:
        notes.append("evaluate.harness is not in the estimate")
    if config.watched and "ppo" in todo:
        notes.append("ppo.watch: snapshots after the first two are not in the estimate")
    return notes


def lines(result: dict[str, Any]) -> list[str]:
    """What `estimate` returns, as a table for a terminal."""
    if not result["stages"]:
        return ["nothing to estimate: all stages are done"]
    table = [
        ["estimate", "wall time", "to start", "CPU", "GPU", "money", "rows", "tokens", "from the sample"]
    ]
    for row in [*result["stages"], {"stage": "all", **result["total"]}]:
        times = [row.get(f"{kind}_seconds") for kind in ("wall", "start", "cpu", "gpu")]
        durations = [duration(t) if t else "" for t in times]
        rows = f"{row['rows']:,}" if "rows" in row else ""
        table.append(
            [
                row["stage"],
                *durations,
                price(row["money"], result["currency"]),
                rows,
                token_counts(row.get("tokens")),
                row.get("how", ""),
            ]
        )
    filled = [i for i in range(len(table[0])) if any(row[i] for row in table[1:])]
    sample = result["sample"]
    own = f", with the run's own {' and '.join(sample['models'])}" if sample["models"] else ""
    prompts = [f"{name} {share}" for name, share in sample["of"].items()]
    return [
        *columns([[row[i] for i in filled] for row in table]),
        "",
        f"estimated from a sample that was run (prompts: {', '.join(prompts)}){own}",
        *([f"already done, and not in the estimate: {', '.join(result['done'])}"] if result["done"] else []),
        *result["notes"],
    ]
