"""Labelling by many principles: labels a second beside the bare engine, and beside a prompt that shares nothing.

    python benchmarks/label.py [--rows N] [--runs N]

Sixteen principles of about 25 tokens, both orders, on comparisons whose conversation and responses have about 300
tokens in all, by a random model (its answers mean nothing, its work is real). A label is one comparison by all.

- `ours`: stage `label` as it runs, through Ray Data, with the standard last and prefix caching.
- `engine`: the same prompts and the same engine, as coroutines in one process.
- `unshared`: the engine alone, the standard before the responses as in the paper (templates/paper-layout.yaml), no
  prefix caching.

Labels a second are those of steady state (turns.py); starting an engine is timed apart. Each measurement is a process
of its own; they take turns, and medians are compared. The last line is JSON: `vs_unshared` and `vs_engine` are ours
over theirs, `agreement` is the share of comparisons that both layouts label alike.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from benchmarks.turns import Found, Timed, Turns, median_of, worked
from cai_ray import constitution as constitutions
from cai_ray.cluster.connect import connect
from cai_ray.config.run import RunConfig
from cai_ray.engine.make import make_engine
from cai_ray.generate.actor import rows_in_flight
from cai_ray.generate.label import LabelChain, LabelTask
from cai_ray.generate.rows import map_rows
from cai_ray.prompts.load import load_templates
from cai_ray.storage.records import Label
from cai_ray.storage.run import Run

KINDS = ("ours", "engine", "unshared")


def main() -> int:
    turns = Turns(__file__, __doc__, KINDS, rows=48, hidden=256, layers=4)
    return turns.main(measure, summary)


def summary(found: Found, rows: int) -> dict[str, Any]:
    rates = median_of(found, "rate")
    labels = {kind: found[kind][0]["labels"] for kind in KINDS}
    alike = [(labels["ours"][i] > 0.5) == (p > 0.5) for i, p in labels["unshared"].items()]
    first = {kind: found[kind][0] for kind in KINDS}
    return {
        "vs_unshared": round(rates["ours"] / rates["unshared"], 2),
        "vs_engine": round(rates["ours"] / rates["engine"], 3),
        "agreement": round(sum(alike) / len(alike), 3),
        "labels_per_s": {kind: round(rate, 3) for kind, rate in rates.items()},
        "cached_share": {kind: round(f["cached"] / f["prompt"], 3) for kind, f in first.items()},
        "prompt_tokens_per_call": round(first["ours"]["prompt"] / rows / first["ours"]["calls"], 1),
        "engine": _config("none", "", "ours").engine.model_dump(exclude_defaults=True),
    }


def measure(kind: str, model: str, rows: int, folder: str) -> dict[str, Any]:
    """Labels once: seconds of work, seconds before it, tokens, and the labels by id."""
    run = Run(_config(model, folder, kind))
    config = run.config
    document = constitutions.load(config.constitution)
    chain = Timed(
        LabelChain(document, load_templates(config.templates), config.label.judge, config.seed), folder
    )
    asked, started = comparisons(rows), time.time()
    if kind == "ours":
        connect(config)
        map_rows(run, "label", asked, chain, takes=LabelTask, gives=Label, model="base")
        labelled = run.rows("label")
    else:
        labelled = asyncio.run(_bare(run, asked, chain))
    return {
        **worked(folder, started),
        "prompt": sum(r["usage"]["prompt"] for r in labelled),
        "cached": sum(r["usage"]["cached"] for r in labelled),
        "calls": 2 * len(document.enabled),
        "labels": {r["id"]: r["p_a_raw"] for r in labelled},
    }


async def _bare(run: Run, rows: list[dict[str, Any]], chain: Timed) -> list[dict[str, Any]]:
    engine = make_engine(run.resolve_model("base"), gpu=False)
    slots = asyncio.Semaphore(rows_in_flight(run.config.engine))

    async def one(row: dict[str, Any]) -> dict[str, Any]:
        async with slots:
            return await chain(engine, row)

    try:
        return list(await asyncio.gather(*(one(row) for row in rows)))
    finally:
        await engine.close()


def comparisons(rows: int) -> list[dict[str, Any]]:
    """Texts of the shipped constitution's words: for this tokenizer 168 of them are about 300 tokens."""
    words = " ".join(p.text for p in constitutions.load("harmless").principles).split()

    def text(start: int, length: int) -> str:
        return " ".join(words[(start + i) % len(words)] for i in range(length))

    return [
        {
            "id": f"{n:06x}",
            "messages": [{"role": "user", "content": text(37 * n, 50)}],
            "response_a": text(41 * n + 5, 59),
            "response_b": text(43 * n + 9, 59),
        }
        for n in range(rows)
    ]


def _config(model: str, out: str, kind: str) -> RunConfig:
    shared = kind != "unshared"
    engine = {"threads": 1, "max_model_len": 2048, "max_num_seqs": 64, "kv_cache_mb": 512, "block_size": 32}
    return RunConfig.model_validate(
        {
            "name": "label",
            "out": out or "none",
            "model": model,
            "constitution": "harmless",
            "templates": "general" if shared else "paper-layout",
            "prompts": [{"path": "none.jsonl", "kind": "red_team"}],
            "label": {"judge": {"principles": "all"}},
            "engine": engine | ({} if shared else {"extra": {"enable_prefix_caching": False}}),
        }
    )


if __name__ == "__main__":
    sys.exit(main())
