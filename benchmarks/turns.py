"""Ways to do the same work, measured in turns: each measurement is a process of its own.

A benchmark's script calls itself once for each with `--part WAY --model DIR --rows N`, and prints what it found as JSON
on its last line. Turns (A B C A B C), because what else the machine does comes and goes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cai_ray.cluster.connect import WORKER_ENV
from cai_ray.provenance.versions import versions
from tests import tiny

Found = dict[str, list[dict[str, Any]]]
"""By way, what each of its measurements printed."""


@dataclass(frozen=True)
class Turns:
    script: str
    doc: str | None
    ways: Iterable[str]
    rows: int
    """Rows by default."""
    hidden: int
    layers: int
    """Size of the random model (tests/tiny.py)."""
    kinds: Iterable[str] = ()
    """First words of ways; `--only` measures the ways of one."""
    env: Mapping[str, Callable[[], dict[str, str]]] = field(default_factory=dict)
    """By way, what makes the environment variables that it needs (baseline.py)."""

    def main(
        self,
        measure: Callable[[str, str, int, str], dict[str, Any]],
        summary: Callable[[Found, int], dict[str, Any]],
    ) -> int:
        """`measure(way, model, rows, folder)` once, or every way in turns and the JSON line of `summary`."""
        parser = argparse.ArgumentParser(
            description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--rows", type=int, default=self.rows, help=f"default {self.rows}")
        parser.add_argument("--runs", type=int, default=3, help="measurements of each way (default 3)")
        if self.kinds:
            parser.add_argument("--only", choices=list(self.kinds), default="", help="this kind alone")
        parser.add_argument("--part", choices=list(self.ways), help=argparse.SUPPRESS)
        parser.add_argument("--model", help=argparse.SUPPRESS)
        args = parser.parse_args()
        if args.part:
            with tempfile.TemporaryDirectory(prefix="cai-ray-benchmark-") as folder:
                print(json.dumps(measure(args.part, args.model, args.rows, folder)))
            return 0
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory(prefix="cai-ray-benchmark-model-") as folder:
            model = str(tiny.save_model(Path(folder), hidden=self.hidden, layers=self.layers))
            ways = [way for way in self.ways if way.startswith(getattr(args, "only", ""))]
            found = self._in_turns(model, ways, args.rows, args.runs)
        settings = {
            "seconds": {way: [round(f["seconds"], 1) for f in fs] for way, fs in found.items()},
            "start_seconds": {way: [round(f["start"], 1) for f in fs] for way, fs in found.items()},
            "rows": args.rows,
            "model": {"hidden": self.hidden, "layers": self.layers},
            "cores": len(os.sched_getaffinity(0)),
            "environment": WORKER_ENV,
            "load_before": round(load, 2),
            "versions": versions(),
        }
        print(json.dumps({"benchmark": Path(self.script).stem, **summary(found, args.rows), **settings}))
        return 0

    def _in_turns(self, model: str, ways: list[str], rows: int, runs: int) -> Found:
        found: Found = {way: [] for way in ways}
        for _ in range(runs):
            for way in ways:
                command = [sys.executable, self.script, "--part", way, "--model", model, "--rows", str(rows)]
                # A bare engine gets the settings of our workers, or it would compile at its first request.
                env = {**os.environ, **WORKER_ENV, **self.env.get(way, dict)()}
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{way}: {found[way][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
        return found


def median_of(found: Found, key: str) -> dict[str, float]:
    """By way."""
    return {way: statistics.median(f[key] for f in fs) for way, fs in found.items()}


@dataclass(frozen=True)
class Timed:
    """A chain that notes when it began and ended with each row."""

    chain: Any
    folder: str

    async def __call__(self, engine: Any, row: Any) -> Any:
        began = time.time()
        out = await self.chain(engine, row)
        note(self.folder, began, 1)
        return out


def note(folder: str, began: float, amount: int) -> None:
    """What began then has ended now and was so much; in a file of this process."""
    with open(os.path.join(folder, f"times-{os.getpid()}"), "a") as f:
        f.write(f"{began} {time.time()} {amount}\n")


def worked(folder: str, started: float) -> dict[str, float]:
    """What was noted: how much in all, the seconds it took and those before it, and the rate in steady state.

    That is between a tenth of the amount and nine tenths of it. A pool of many more rows than a benchmark has is in
    that state nearly always; with a few hundred, filling it and emptying it is a good part of the time.
    """
    lines = [line.split() for p in Path(folder).glob("times-*") for line in p.read_text().splitlines()]
    first = min(float(began) for began, _, _ in lines)
    curve, total = [(first, 0)], 0
    for ended, amount in sorted((float(ended), int(amount)) for _, ended, amount in lines):
        total += amount
        curve.append((ended, total))

    def when(amount: float) -> float:
        at = next(i for i, (_, done) in enumerate(curve) if done >= amount)
        (t0, n0), (t1, n1) = curve[at - 1], curve[at]
        return t0 + (t1 - t0) * (amount - n0) / (n1 - n0)

    return {
        "amount": total,
        "seconds": curve[-1][0] - first,
        "start": first - started,
        "rate": 0.8 * total / (when(0.9 * total) - when(0.1 * total)),
    }
