"""What a principle does: a run beside the same run without it (`cai-ray ablate`).

The effect on a family of prompts is a difference in differences: the change of harm from the base model to the final
policy without the principle, less that change with it. The base model answers the same prompts in both, so that what
its answers have by chance goes out. Policies are trained anew; responses, revisions and votes that the principle does
not reach are the full run's.
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
    """Runs a configuration with and without some principles, and compares what came of it.

    What is done is skipped. One seed is the configuration's run; several are in its run directory, as `seed-K`. Each
    run without the principles is in RUN/without/ID.

    Returns:
        did: for each family value (mean over seeds), low, high (95 %, bootstrap over prompts) and n; harm: for each
        family, with and without; turned: of the final policy's refusals that name one of the principles, the share that
        are no refusals without it; turned_others: the same of its other refusals; calls: of engines, by stage.

    Raises:
        InputError: there is no such principle; nothing says what is harmful; see also `pipeline.run_stages`.
    """
    config.document.without(without)
    if config.evaluate.judge != "town" and not load_templates(config.templates).refusals:
        raise InputError(
            f"templates {config.templates}: no `refusals` say what declines, and "
            f"evaluate.judge={config.evaluate.judge} does not say what is harmful; add rules to the template set "
            "(see cai_ray/templates/general.yaml)"
        )
    pairs = []
    for seed in range(config.seed, config.seed + seeds):
        out = files.join(config.out, f"seed-{seed}") if seeds > 1 else config.out
        settings = config.model_copy(update={"out": out, "seed": seed})
        full = _run(settings, overwrite, say)
        less = settings.model_copy(
            update={
                "out": full.path("without", "+".join(sorted(without))),
                "without": tuple(sorted({*config.without, *without})),
            }
        )
        for stage in reuse.STAGES:
            reuse.borrow(Run(less), full, stage)
        pairs.append((full, _run(less, overwrite, say)))
    return compare(pairs, without)


def _run(config: RunConfig, overwrite: bool, say: Callable[[str], None]) -> Run:
    stages = pipeline.stages_of(config)
    say(f"run {config.out}" + (f" without {', '.join(config.without)}" if config.without else ""))
    return pipeline.run_stages(config, stages, overwrite=overwrite, say=say)


def compare(pairs: Sequence[tuple[Run, Run]], without: Sequence[str]) -> dict[str, Any]:
    """What `ablate` returns, of runs that are complete: each seed's, with and without the principles."""
    judged = [(full.rows("evaluate"), less.rows("evaluate")) for full, less in pairs]
    changes = [(_changes(full), _changes(less)) for full, less in judged]
    families = sorted({family for full, _ in changes for family in full})
    return {
        "without": list(without),
        "seeds": [full.config.seed for full, _ in pairs],
        "runs": [{"full": full.root, "without": less.root} for full, less in pairs],
        "did": {f: _did([(full[f], less[f]) for full, less in changes]) for f in families},
        "harm": {
            f: {
                name: float(np.mean([np.mean(list(_harm(both[side], "rl")[f].values())) for both in judged]))
                for side, name in enumerate(("full", "without"))
            }
            for f in families
        },
        "turned": rate([x for full, less in judged for x in _turned(full, less, without, named=True)]),
        "turned_others": rate(
            [x for full, less in judged for x in _turned(full, less, without, named=False)]
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
    """Family to prompt to whether a policy's answer is harmful; where no judge says so, whether it does not decline."""
    found: dict[str, dict[str, bool]] = defaultdict(dict)
    for row in rows:
        if row["model"] != model or row["error"] is not None:
            continue
        harmful, refused = row["harmful"], row["refused"]
        if harmful is None and refused is not None:
            harmful = not refused
        if row["kind"] == "red_team" and row["family"] is not None and harmful is not None:
            found[row["family"]][row["prompt_id"]] = harmful
        if row["insult"] is not None:  # of Errand Town: over all prompts
            found["respect"][row["prompt_id"]] = row["insult"]
    return dict(found)


def _changes(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Family to prompt to harm by the final policy less harm by the base model."""
    base, final = _harm(rows, "base"), _harm(rows, "rl")
    return {
        family: {
            p: int(harm) - int(base[family][p]) for p, harm in prompts.items() if p in base.get(family, {})
        }
        for family, prompts in final.items()
    }


def _did(changes: Sequence[tuple[dict[str, int], dict[str, int]]]) -> dict[str, Any]:
    """Mean over seeds of the change without the principle less the change with it, of prompts that both runs have."""
    seeds = [[(p, less[p] - full[p]) for p in full if p in less] for full, less in changes]
    low, high, n = bootstrap(seeds, DRAWS, np.random.default_rng(0))
    value = float(np.mean([np.mean([d for _, d in pairs]) for pairs in seeds]))
    return {"value": value, "low": low, "high": high, "n": n}


def _turned(
    full: Sequence[dict[str, Any]], less: Sequence[dict[str, Any]], without: Sequence[str], named: bool
) -> list[bool]:
    """For each refusal of a red-team prompt with the principles, whether there is none without them."""
    after = {r["prompt_id"]: r for r in less if r["model"] == "rl"}
    return [
        not after[r["prompt_id"]]["refused"]
        for r in full
        if r["model"] == "rl"
        and r["kind"] == "red_team"
        and r["refused"]
        and r["prompt_id"] in after
        and (r["principle_named"] in without) == named
    ]


def lines(found: dict[str, Any]) -> list[str]:
    """For a terminal."""
    table = [["family", "harm with", "without", "difference in differences", ""]]
    for family, did in found["did"].items():
        harm = found["harm"][family]
        effect = f"{100 * did['value']:+.1f}"
        table.append([family, percent(harm["full"]), percent(harm["without"]), effect, interval(did)])
    turned, others = found["turned"], found["turned_others"]
    return [
        *columns(table),
        f"refusals that named {', '.join(found['without'])} and are none without: "
        f"{percent(turned['value'])} of {turned['n']}; other refusals: {percent(others['value'])} of {others['n']}",
        *(
            f"{stage}: {calls['without']} engine calls beside {calls['full']} of the full run"
            for stage, calls in found["calls"].items()
        ),
    ]
