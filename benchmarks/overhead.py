"""What rows cost beside the engine, and whether the cost of a row depends on how many there are.

    python benchmarks/overhead.py [--scale 0.01] [--only revise,journal] [--actors N]

No model is run: a scripted engine answers at once, with 2 KB of words. Each measurement is a process of its own, for
few rows and for many:

    revise       20,000 and 100,000 rows of four rounds (nine calls a row), rendered and tokenised as for vLLM
    label        20,000 and 100,000 comparisons, sixteen principles in both orders (32 calls a row), likewise
    passthrough  100,000 and 1,000,000 short rows through a chain that does nothing
    journal      100,000 and 1,000,000 rows of 2 KB as an actor writes them, block by block, and their publication
    sft          the reading, rendering and packing of as many revised rows
    certificate  the certificate of as many labels with sixteen votes
    resume       1,000,000 rows of which all but 64 were finished before a kill

The last line is JSON. `growth` is the peak memory of many rows over that of few, all processes counted (watch.py), and
`time_growth` the seconds of a row among many over those among few, each the largest of all parts. `files` is the most
files that a stage's folder held, and `resume_s` the time from the start of `map_rows` until the first row that was not
finished is walked. `--scale` makes all numbers of rows smaller, to try the script: the bars hold at 1.

At full scale it takes about an hour and a half on two cores, 4 GiB of memory and 25 GB of disk under TMPDIR.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import overhead_rows as made
from benchmarks.watch import measure
from cai_ray.provenance.versions import versions


class Part(NamedTuple):
    few: int
    """Rows; 0 where only many are measured."""
    many: int
    run: Callable[[str, int, int], float]
    """Called with the folder, the rows and the number of actors; returns the seconds that count."""
    prepare: Callable[[str, int], None] | None = None
    """Makes the rows that `run` reads, in a process that is not measured."""
    calls: int = 0
    """Of the engine, by row."""


PARTS = {
    "revise": Part(20_000, 100_000, made.revise, calls=9),
    "label": Part(20_000, 100_000, made.label, calls=32),
    "passthrough": Part(100_000, 1_000_000, made.passthrough),
    "journal": Part(100_000, 1_000_000, made.journal),
    "sft": Part(100_000, 1_000_000, made.sft, made.prepare_revisions),
    "certificate": Part(100_000, 1_000_000, made.certificate, made.prepare_labels),
    "resume": Part(0, 1_000_000, made.resume, made.prepare_journal),
}


class Found(NamedTuple):
    """What one measurement gave."""

    rows: int
    seconds: float
    peak_gib: float
    files: int


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="times the numbers of rows (default 1)")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas (default: all)")
    parser.add_argument("--actors", type=int, default=len(os.sched_getaffinity(0)), help="default: the cores")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        name, _, step = args.part.partition(" ")
        print(json.dumps(_step(PARTS[name], step, args.folder, args.rows, args.actors)))
        return 0
    names = args.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only {unknown[0]}: is not one of {', '.join(PARTS)}")
    load = os.getloadavg()[0]
    found = {name: _both(name, args.scale, args.actors) for name in names}
    print(json.dumps({**_summary(found), "actors": args.actors, "scale": args.scale, "load_before": load}))
    return 0


def _summary(found: dict[str, list[Found]]) -> dict[str, Any]:
    pairs = {name: both for name, both in found.items() if len(both) == 2}
    growth = {name: few_many[1].peak_gib / few_many[0].peak_gib for name, few_many in pairs.items()}
    time_growth = {
        name: (many.seconds / many.rows) / (few.seconds / few.rows) for name, (few, many) in pairs.items()
    }
    many = {name: both[-1] for name, both in found.items()}
    return {
        "benchmark": "overhead",
        "growth": _largest(growth),
        "time_growth": _largest(time_growth),
        "files": max(m.files for m in many.values()),
        "resume_s": many["resume"].seconds if "resume" in many else None,
        "peak_gib": max(m.peak_gib for m in many.values()),
        "calls_per_s": {
            n: round(PARTS[n].calls * m.rows / m.seconds) for n, m in many.items() if PARTS[n].calls
        },
        "rows_per_s": {n: round(m.rows / m.seconds) for n, m in many.items() if n != "resume"},
        "growth_by_part": {name: round(x, 3) for name, x in growth.items()},
        "time_growth_by_part": {name: round(x, 3) for name, x in time_growth.items()},
        "measured": {name: [f._asdict() for f in both] for name, both in found.items()},
        "text_bytes": made.TEXT_BYTES,
        "max_num_seqs": made.IN_FLIGHT,
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions(),
    }


def _largest(by_part: dict[str, float]) -> float | None:
    return round(max(by_part.values()), 3) if by_part else None


def _both(name: str, scale: float, actors: int) -> list[Found]:
    return [
        _measured(name, max(1, round(rows * scale)), actors)
        for rows in (PARTS[name].few, PARTS[name].many)
        if rows
    ]


def _measured(name: str, rows: int, actors: int) -> Found:
    with tempfile.TemporaryDirectory(prefix="cai-ray-overhead-") as folder:
        if PARTS[name].prepare:
            _process(f"{name} prepare", rows, actors, folder)
        told, peak = _process(name, rows, actors, folder)
    found = Found(rows, round(told["seconds"], 2), round(peak / 2**30, 3), told["files"])
    print(
        f"{name}: {rows} rows in {found.seconds:.1f} s, {found.peak_gib:.2f} GiB, {found.files} files",
        file=sys.stderr,
        flush=True,
    )
    return found


def _process(part: str, rows: int, actors: int, folder: str) -> tuple[dict[str, Any], int]:
    """What a step printed at its end, and its peak memory in bytes."""
    with tempfile.TemporaryFile("w+") as stdout:
        given = {"part": part, "rows": rows, "actors": actors, "folder": folder}
        options = [text for key, value in given.items() for text in (f"--{key}", str(value))]
        code, watch = measure([sys.executable, __file__, *options], stdout.fileno())
        stdout.seek(0)
        lines = stdout.read().splitlines()
    if code:
        raise SystemExit(f"{part}: exit code {code}")
    return json.loads(lines[-1]), watch.peak[0]


def _step(part: Part, step: str, folder: str, rows: int, actors: int) -> dict[str, Any]:
    if step == "prepare":
        assert part.prepare
        part.prepare(folder, rows)
        return {}
    with Files(folder) as files:
        seconds = part.run(folder, rows, actors)
    return {"seconds": seconds, "files": files.most}


class Files:
    """The most files that a folder holds, counted each second."""

    def __init__(self, folder: str):
        self.folder, self.most = folder, 0
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Files:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        self.thread.join()
        self._count()

    def _watch(self) -> None:
        while not self.end.wait(1):
            self._count()

    def _count(self) -> None:
        self.most = max(self.most, sum(len(names) for _, _, names in os.walk(self.folder)))


if __name__ == "__main__":
    sys.exit(main())
