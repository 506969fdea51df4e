"""How long the report of a large run takes, and how much memory.

    python benchmarks/report.py [--rows N] [--words W]

A made-up run: N revised prompts of four rounds, N comparisons on which 16 principles vote in both orders, 3,000 judged
answers; texts of W words. The report is made in a process of its own, start included. The last line is JSON: `seconds`,
`gib` (most resident memory), `page_mb`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cai_ray import constitution as constitutions
from cai_ray.config.load import load_config
from cai_ray.judging import certificate
from cai_ray.provenance.versions import versions
from cai_ray.stages import POLICIES, stages_of
from cai_ray.storage import files
from cai_ray.storage.arrow import to_table
from cai_ray.storage.records import Judgement, Label, Revision
from cai_ray.storage.run import Run

PART = 8192
MAKE = """
import json, resource, sys
from cai_ray.report import stage
from cai_ray.storage.run import open_run
stage.run(open_run(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--words", type=int, default=60)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="cai-ray-report-") as folder:
        run = made(folder, args.rows, args.words)
        size = sum(f.stat().st_size for f in Path(folder).rglob("*.parquet"))
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", MAKE, run.root], stdout=subprocess.PIPE, text=True, check=True
        )
        seconds = time.perf_counter() - started
        page = Path(run.path("report", "index.html")).stat().st_size
    print(
        json.dumps(
            {
                "benchmark": "report",
                "seconds": round(seconds, 1),
                "gib": round(float(done.stdout.split()[-1]), 2),
                "page_mb": round(page / 1e6, 2),
                "rows": args.rows,
                "words": args.words,
                "parquet_mb": round(size / 1e6),
                "load_before": round(load, 2),
                "versions": versions(),
            }
        )
    )
    return 0


def made(folder: str, rows: int, words: int) -> Run:
    """A run directory as the stages leave it."""
    run = Run(load_config("errand-town", ["constitution=harmless", "evaluate.gold=null"], out=folder))
    document = constitutions.load("harmless")
    ids = [p.id for p in document.principles]
    rng = random.Random(0)
    pool = [" ".join(rng.choices([f"word{i}" for i in range(3000)], k=words)) for _ in range(2000)]
    families = ["privacy", "violence", "fraud", "self-harm", "neutral"]

    def common(number: int) -> dict[str, Any]:
        return {
            "id": f"{number * 2654435761 % 2**64:016x}", "prompt_id": f"{number * 40503 % 2**64:016x}",
            "messages": [{"role": "user", "content": rng.choice(pool)}], "kind": "red_team",
            "family": rng.choice(families), "error": None,
        }  # fmt: skip

    def revision(number: int) -> dict[str, Any]:
        steps = [
            {
                "round": i + 1, "principle_id": rng.choice(ids), "critique": rng.choice(pool),
                "revision": rng.choice(pool),
            }
            for i in range(4)
        ]  # fmt: skip
        return common(number) | {
            "response": rng.choice(pool),
            "steps": steps,
            "revision": steps[-1]["revision"],
        }

    def label(number: int) -> dict[str, Any]:
        votes: list[dict[str, Any]] = [
            {
                "principle_id": i, "logprob_a": -rng.random(), "logprob_b": -rng.random(),
                "logprob_a_swapped": -rng.random(), "logprob_b_swapped": -rng.random(), "p_a": rng.random(),
            }
            for i in ids
        ]  # fmt: skip
        p = sum(v["p_a"] for v in votes) / len(votes)
        responses = {f"response_{side}": rng.choice(pool) for side in "ab"}
        return common(number) | responses | {"votes": votes, "p_a": p, "p_a_raw": p}

    def judgement(number: int) -> dict[str, Any]:
        model = POLICIES[number % 3]
        told = {
            "model": model,
            "response": rng.choice(pool),
            "refused": rng.random() < 0.3,
            "malformed": False,
        }
        return common(number) | {"prompt_id": f"p{number // 3}"} | told

    for stage, row, record, count in (
        ("revise", revision, Revision, rows),
        ("label", label, Label, rows),
        ("evaluate", judgement, Judgement, 3000),
    ):
        for part, start in enumerate(range(0, count, PART)):
            table = to_table([row(i) for i in range(start, min(start + PART, count))], record)
            run.write_rows(stage, table, part)
            if stage == "label" and part == 0:  # of the first labels: the page shows as much of all of them
                proof = certificate.certificate(label for _, label in certificate.read([table]))
                files.write_json(run.path("label", "certificate.json"), proof)
    for stage in stages_of("ppo")[:-1]:
        tokens = {"prompt": 1000, "cached": 0, "generated": 1000}
        files.write_json(
            run.path(stage, "manifest.json"), {"seconds": 1.0, "tokens": tokens, "rows_in": rows}
        )
    none = {"value": None, "low": None, "high": None, "n": 0}
    rates = dict.fromkeys(("harm", "helpful", "over_refusal", "malformed", "principle_named"), none)
    models = {m: {**rates, "harm_by_family": {}} for m in POLICIES}
    files.write_json(run.path("evaluate", "metrics.json"), {"models": models})
    files.write_bytes(run.path("constitution.yaml"), document.to_yaml().encode())
    opened = {"config": run.config.model_dump(mode="json"), "versions": {}, "constitution_sha": document.sha}
    files.write_json(run.path("run.json"), opened)
    return run


if __name__ == "__main__":
    sys.exit(main())
