"""Generation under fire: kills of driver, actor and engine, and what becomes of the rows.

    python benchmarks/kill.py [--kills N] [--rows N] [--out DIR]

The stage is `revise` of the embedded world, real model and real engine. One pass is left alone; another is killed
(SIGKILL) and, where it was the driver, started again. When and whom is drawn beforehand: moments uniformly over the
work, measured by the rows that are finished, and one of the three processes for each.

The last line is JSON: rows that are `lost` or `doubled`, rows whose text is not that of the undisturbed pass
(`text_changed`), and how many rows were begun once more for each kill (`redone_rows_per_kill`), beside the rows that an
actor has in flight.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.watch import MARK
from cai_ray.config.load import load_config
from cai_ray.data.town import PROMPTS
from cai_ray.generate.actor import rows_in_flight
from cai_ray.generate.journal import Journal
from cai_ray.generate.revise import RevisionTask
from cai_ray.generate.rows import map_rows
from cai_ray.provenance.versions import versions
from cai_ray.storage.records import Revision
from cai_ray.storage.run import Run

# By what a process is called: the driver is known by its id.
ACTOR, ENGINE = "ray::MapWorker", "VLLM::EngineCor"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4000, help="at least so many (default 4000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the targets")
    parser.add_argument("--out", help="where to work (default: a temporary folder)")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive:
        drive(_run(args.drive, args.rows))
        return 0
    with tempfile.TemporaryDirectory(prefix="cai-ray-kill-") as temporary:
        print(json.dumps(benchmark(Path(args.out or temporary), args.rows, args.kills, args.seed)))
    return 0


def benchmark(folder: Path, rows: int, kills: int, seed: int) -> dict[str, Any]:
    load = os.getloadavg()[0]
    alone, killed = (_run(str(folder / name), rows) for name in ("alone", "killed"))
    seconds = [undisturbed(folder / "alone", rows), under_fire(folder / "killed", rows, kills, seed)]

    wanted = {row["id"]: row for row in alone.rows("revise")}
    found = killed.rows("revise")
    times = Counter(row["id"] for row in found)
    begun = sum(len(p.read_text().splitlines()) for p in (folder / "killed" / "begun").iterdir())
    return {
        "benchmark": "kill",
        "rows": len(wanted),
        "kills": kills,
        "lost": len(wanted.keys() - times.keys()),
        "doubled": sum(n > 1 for n in times.values()),
        "text_changed": sum(_said(row) != _said(wanted[row["id"]]) for row in found),
        "redone_rows_per_kill": round((begun - len(wanted)) / kills, 1),
        "in_flight": rows_in_flight(killed.config.engine),
        "seconds": {"alone": round(seconds[0], 1), "killed": round(seconds[1], 1)},
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(load, 2),
        "versions": versions(),
    }


def undisturbed(out: Path, rows: int) -> float:
    started = time.monotonic()
    if code := _driver(out, rows, "").wait():
        raise SystemExit(f"the undisturbed pass ended with {code}; see {out}/log")
    return time.monotonic() - started


def under_fire(out: Path, rows: int, kills: int, seed: int) -> float:
    """Kills at the drawn moments, and starts the driver again until it is done."""
    drawn = random.Random(seed)
    total = len(_rows(_run(str(out), rows)))
    moments = sorted(drawn.uniform(0, total) for _ in range(kills))
    victims = [drawn.choice(("driver", "actor", "engine")) for _ in range(kills)]
    journal = Journal(_run(str(out), rows), "revise", RevisionTask, Revision, "part")
    mark = f"kill-{os.getpid()}-{seed}"
    started = time.monotonic()
    driver = _driver(out, rows, mark)
    for moment, victim in zip(moments, victims, strict=True):
        # Not before work has begun again after the kill before: a process that only starts has nothing to lose.
        working = _begun(out)
        while len(journal.finished_ids()) < moment or _begun(out) == working:
            time.sleep(0.1)
            if driver.poll() is not None:
                raise SystemExit(f"the pass under fire ended by itself ({driver.returncode}); see {out}/log")
        print(f"{len(journal.finished_ids())} of {total} rows: kill {victim}", file=sys.stderr, flush=True)
        if victim == "driver":
            driver.kill()
            driver.wait()
            wait_until_gone(mark)
            driver = _driver(out, rows, mark)
        else:
            # It may be on its way back: an actor whose engine was killed ends a moment later.
            while not kill(mark, ACTOR if victim == "actor" else ENGINE):
                time.sleep(0.1)
                if driver.poll() is not None:
                    raise SystemExit(
                        f"the pass under fire ended by itself ({driver.returncode}); see {out}/log"
                    )
    if code := driver.wait():
        raise SystemExit(f"the last pass ended with {code}; see {out}/log")
    return time.monotonic() - started


@dataclass(frozen=True)
class Counted:
    """A chain that notes, in a file of its process, each row that it begins."""

    chain: Any
    folder: str

    async def __call__(self, engine: Any, row: Any) -> Any:
        with open(os.path.join(self.folder, str(os.getpid())), "a") as f:
            f.write(row["id"] + "\n")
        return await self.chain(engine, row)


def drive(run: Run) -> None:
    """The stage as the pipeline runs it, with its chain counted, up to where its rows are written."""
    from cai_ray.cluster.connect import connect
    from cai_ray.generate.revise import make_chain

    folder = Path(run.path("begun"))
    folder.mkdir(parents=True, exist_ok=True)
    connect(run.config)
    counted = Counted(make_chain(run), str(folder))
    map_rows(run, "revise", _rows(run), counted, takes=RevisionTask, gives=Revision, model="base")


def _run(out: str, rows: int) -> Run:
    sources = ", ".join(
        f"{{path: 'town:{name}'}}" for name, (_, split, _) in PROMPTS.items() if split == "train"
    )
    given = [f"prompts=[{sources}]", f"revise.limit={rows}", "revise.helpful_samples=1"]
    return Run(load_config("errand-town", given, out=out))


def _rows(run: Run) -> list[RevisionTask]:
    from cai_ray.generate import revise

    return revise.tasks(run)


def _driver(out: Path, rows: int, mark: str) -> subprocess.Popen[bytes]:
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--drive", str(out), "--rows", str(rows)]
    with open(out / "log", "ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, MARK: mark}, start_new_session=True
        )


def _begun(out: Path) -> dict[str, int]:
    """Bytes of what each process noted."""
    folder = out / "begun"
    return {p.name: p.stat().st_size for p in folder.iterdir()} if folder.exists() else {}


def marked(mark: str) -> list[psutil.Process]:
    """Processes of this pass. Ray's workers overwrite their environment, their ancestors do not."""
    found = []
    for process in psutil.process_iter():
        try:
            line = [process, *process.parents()]
            if any(p.environ().get(MARK) == mark for p in line):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill(mark: str, name: str, which: float = 0.0) -> bool:
    """Whether there was such a process.

    Args:
        which: of several, from 0 for the first to just below 1 for the last.
    """
    found = []
    for process in marked(mark):
        with contextlib.suppress(psutil.Error, IndexError):
            if process.cmdline()[0].startswith(name):
                found.append(process)
    if found:
        with contextlib.suppress(psutil.Error):
            sorted(found, key=lambda p: p.pid)[int(which * len(found))].kill()
            return True
    return False


def wait_until_gone(mark: str) -> None:
    while any(p.status() != psutil.STATUS_ZOMBIE for p in marked(mark)):
        time.sleep(0.2)


def _said(row: dict[str, Any]) -> Any:
    return {k: v for k, v in row.items() if k != "usage"}


if __name__ == "__main__":
    sys.exit(main())
