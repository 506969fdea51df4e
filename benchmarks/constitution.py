"""How long `lint` and `diff` take on a constitution of 500 principles.

    python benchmarks/constitution.py [--principles N] [--runs N]

The principles are made of random words, each unlike the others; one in ten is edited for the diff. Commands are
processes of their own, start included; medians. The last line is JSON: `lint_s` and `diff_s`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from cai_ray.provenance.versions import versions


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--principles", type=int, default=500)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="cai-ray-constitution-") as folder:
        before, after = Path(folder) / "before.yaml", Path(folder) / "after.yaml"
        before.write_text(yaml.safe_dump(document(args.principles, edited=False)), encoding="utf-8")
        after.write_text(yaml.safe_dump(document(args.principles, edited=True)), encoding="utf-8")
        commands = {"lint_s": ["lint", str(before)], "diff_s": ["diff", str(before), str(after)]}
        found = {
            key: statistics.median(seconds(command) for _ in range(args.runs))
            for key, command in commands.items()
        }
    print(
        json.dumps(
            {
                "benchmark": "constitution",
                **{key: round(value, 2) for key, value in found.items()},
                "principles": args.principles,
                "runs": args.runs,
                "load_before": round(load, 2),
                "versions": versions(),
            }
        )
    )
    return 0


def document(count: int, edited: bool) -> dict[str, Any]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(3000)]

    def text(length: int) -> str:
        return " ".join(draw.choices(words, k=length)) + "."

    principles = []
    for i in range(count):
        texts = {name: text(25) for name in ("text", "critique_request", "revision_request", "comparison")}
        if edited and i % 10 == 0:
            texts["text"] = texts["text"].replace(" ", " edited ", 1)
        principles.append({"id": f"p{i}", "title": text(3), **texts})
    return {"name": "large", "principles": principles}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "cai_ray", "constitution", *command], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr + done.stdout[-2000:])
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
