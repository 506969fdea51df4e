"""Measures the effect of a principle: a run beside the same run without it (`cai-ray ablate`).

The effect on a family of prompts is a difference in differences: the change of harm from the base model to the final
policy without the principle, minus that change with it. The base model answers the same prompts in both runs, so chance
in its answers cancels out. The policies are trained again. Responses, revisions and votes that the principle does not
affect are taken from the full run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cai_ray import pipeline
from cai_ray.config.run import RunConfig
from cai_ray.errors import InputError
from cai_ray.generate import reuse
from cai_ray.judging.statistics import rate
from cai_ray.prompts.load import load_templates
from cai_ray.report.bootstrap import bootstrap
from cai_ray.report.text import columns, interval, percent
from cai_ray.stages import stages_of
from cai_ray.storage import files
from cai_ray.storage.run import Run

DRAWS = 4000


def ablate(
    config: RunConfig,
    without: Sequence[str],
    seeds: int = 1,
    *,
    overwrite: bool = False,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Runs a configuration with and without some principles, and compares the results.

    Stages that are done are skipped. With one seed, the run directory is the configuration's; with several, each has a
    folder `seed-K` in it. The run without the principles is in RUN/without/ID.

    Returns:
        `did`: the effect on each family, as value (mean over seeds), low, high (95%, bootstrap over prompts) and n.
        `harm`: for each family, with and without the principles. `turned`: the share of the final policy's refusals
        naming one of the principles that are not refusals without it; `turned_others`: the same for its other refusals.
        `calls`: engine calls by stage.

    Raises:
        InputError: there is no such principle, or nothing says what is harmful; see also `pipeline.run_stages`.
    """
    config.document.without(without)
    if config.evaluate.gold is None and not load_templates(config.templates).refusals:
        raise InputError(
            f"templates {config.templates}: has no `refusals`, which recognise answers that decline, and "
            "a judge does not say what is harmful; add rules to the template set "
            "(see cai_ray/templates/general.yaml)"
        )
    pairs = []
    for seed in range(config.seed, config.seed + seeds):
        out = files.join(config.out, f"seed-{seed}") if seeds > 1 else config.out
        settings = config.model_copy(update={"out": out, "seed": seed})
        full = _run(settings, overwrite, say)
        # What it takes from the hub is named by commit, for this run without the principles and for the next seeds.
        config = full.config.model_copy(update={"out": config.out, "seed": config.seed})
        ablated = full.config.model_copy(
            update={
                "out": full.path("without", "+".join(sorted(without))),
                "without": tuple(sorted({*config.without, *without})),
            }
        )
        for stage in reuse.STAGES:
            reuse.borrow(Run(ablated), full, stage)
        pairs.append((full, _run(ablated, overwrite, say)))
    return compare(pairs, without)


def _run(config: RunConfig, overwrite: bool, say: Callable[[str], None]) -> Run:
    stages = stages_of(config.method)
    say(f"run {config.out}" + (f" without {', '.join(config.without)}" if config.without else ""))
    return pipeline.run_stages(config, stages, overwrite=overwrite, say=say)


def compare(pairs: Sequence[tuple[Run, Run]], without: Sequence[str]) -> dict[str, Any]:
    """What `ablate` returns, from completed runs: for each seed one with and one without the principles."""
    judged = [(full.rows("evaluate"), ablated.rows("evaluate")) for full, ablated in pairs]
    changes = [(_changes(full), _changes(ablated)) for full, ablated in judged]
    families = sorted({family for full, _ in changes for family in full})
    return {
        "without": list(without),
        "seeds": [full.config.seed for full, _ in pairs],
        "runs": [{"full": full.root, "without": ablated.root} for full, ablated in pairs],
        "did": {f: _did([(full[f], ablated[f]) for full, ablated in changes]) for f in families},
        "harm": {
            f: {
                name: float(np.mean([np.mean(list(_harm(both[side], "rl")[f].values())) for both in judged]))
                for side, name in enumerate(("full", "without"))
            }
            for f in families
        },
        "turned": rate([x for full, ablated in judged for x in _turned(full, ablated, without, named=True)]),
        "turned_others": rate(
            [x for full, ablated in judged for x in _turned(full, ablated, without, named=False)]
        ),
        "calls": {
            stage: {
                name: sum((pair[side].manifest(stage) or {})["calls"] for pair in pairs)
                for side, name in enumerate(("full", "without"))
            }
            for stage in reuse.STAGES
        },
    }


def _harm(rows: Sequence[dict[str, Any]], model: str) -> dict[str, dict[str, bool]]:
    """By family and prompt: whether a policy's answer is harmful. Without a judge, whether it does not decline."""
    families: dict[str, dict[str, bool]] = defaultdict(dict)
    for row in rows:
        if row["model"] != model or row["error"] is not None:
            continue
        harmful, refused = row["harmful"], row["refused"]
        if harmful is None and refused is not None:
            harmful = not refused
        if row["kind"] == "red_team" and row["family"] is not None and harmful is not None:
            families[row["family"]][row["prompt_id"]] = harmful
        if row["insult"] is not None:  # in Errand Town: over all prompts
            families["respect"][row["prompt_id"]] = row["insult"]
    return dict(families)


def _changes(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By family and prompt: harm by the final policy minus harm by the base model."""
    base, final = _harm(rows, "base"), _harm(rows, "rl")
    return {
        family: {
            p: int(harm) - int(base[family][p]) for p, harm in prompts.items() if p in base.get(family, {})
        }
        for family, prompts in final.items()
    }


def _did(changes: Sequence[tuple[dict[str, int], dict[str, int]]]) -> dict[str, Any]:
    """Mean over seeds of the change without the principle minus the change with it, on prompts that both runs have."""
    seeds = [[(p, ablated[p] - full[p]) for p in full if p in ablated] for full, ablated in changes]
    low, high, n = bootstrap(seeds, DRAWS, np.random.default_rng(0))
    value = float(np.mean([np.mean([d for _, d in pairs]) for pairs in seeds]))
    return {"value": value, "low": low, "high": high, "n": n}


def _turned(
    full: Sequence[dict[str, Any]], ablated: Sequence[dict[str, Any]], without: Sequence[str], named: bool
) -> list[bool]:
    """For each refusal of a red-team prompt with the principles: whether the answer without them is not a refusal."""
    after = {r["prompt_id"]: r for r in ablated if r["model"] == "rl"}
    return [
        not after[r["prompt_id"]]["refused"]
        for r in full
        if r["model"] == "rl"
        and r["kind"] == "red_team"
        and r["refused"]
        and r["prompt_id"] in after
        and (r["principle_named"] in without) == named
    ]


def lines(result: dict[str, Any]) -> list[str]:
    """What `ablate` returns, for a terminal."""
    table = [["family", "harm with", "without", "difference in differences", ""]]
    for family, did in result["did"].items():
        harm = result["harm"][family]
        effect = f"{100 * did['value']:+.1f}"
        table.append([family, percent(harm["full"]), percent(harm["without"]), effect, interval(did)])
    turned, others = result["turned"], result["turned_others"]
    return [
        *columns(table),
        f"refusals that named {', '.join(result['without'])} and are not refusals without: "
        f"{percent(turned['value'])} of {turned['n']}; other refusals: {percent(others['value'])} of {others['n']}",
        *(
            f"{stage}: {calls['without']} engine calls, and {calls['full']} in the full run"
            for stage, calls in result["calls"].items()
        ),
    ]
