"""Wall time and peak memory of `cai-ray demo`, all its processes counted.

    python benchmarks/demo.py [--out DIR] [-- further options of cai-ray demo]

What counts as the demo's memory stands in watch.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.watch import measure


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="run directory (default: a temporary one)")
    parser.add_argument("--report", help="also write the demo's report (JSON) to this file")
    parser.add_argument("rest", nargs="*", help="options of cai-ray demo, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cai-ray-benchmark-") as temporary:
        command = [
            sys.executable,
            "-m",
            "cai_ray",
            "demo",
            "--json",
            "--out",
            args.out or temporary,
            *args.rest,
        ]
        started = time.monotonic()
        with open(Path(temporary) / "stdout", "w+") as stdout:
            code, watch = measure(command, stdout.fileno())
            seconds = time.monotonic() - started
            stdout.seek(0)
            lines = stdout.read().splitlines()
    if args.report and code == 0:
        Path(args.report).write_text(lines[-1] + "\n")
    peak, at_peak = watch.peak
    print(
        json.dumps(
            {
                "benchmark": "demo",
                "seconds": round(seconds, 1),
                "peak_gib": round(peak / 2**30, 2),
                "at_peak": {name: round(size / 2**30, 2) for name, size in at_peak[:8]},
                "stages": _stages(lines) if code == 0 else {},
                "cores": len(os.sched_getaffinity(0)),
                "load_before": round(watch.load, 2),
                "exit_code": code,
            }
        )
    )
    return code


def _stages(lines: list[str]) -> dict[str, float]:
    return {name: cost["seconds"] for name, cost in json.loads(lines[-1])["stages"].items()}


if __name__ == "__main__":
    sys.exit(main())
