"""Training under fire: kills of a rank, the driver and a rollout engine, and what becomes of the weights.

    python -m benchmarks.faults [--kills N] [--stages sft ppo] [--seed N] [--out DIR]

The stages are commands of the embedded world, `cai-ray sft` with two workers and `cai-ray ppo` with one worker and one
rollout engine, on a small run that is made first. Each is done once undisturbed, and once under fire: at moments
drawn beforehand one of its processes, drawn as well, gets SIGKILL. A rank and an engine are replaced by the command
itself; where it was the driver, the same command is given again.

The last line is JSON. `same_weights`: whether the final weights of every stage are bit for bit those of the undisturbed
pass. `seconds_lost`, by what was killed: the time between the checkpoints before and after the kill, less the usual
time between two of the undisturbed pass.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.kill import kill, wait_until_gone
from benchmarks.watch import MARK
from cai_ray.provenance.versions import versions
from cai_ray.stages import upstream_of
from cai_ray.storage.models import folder_sha
from cai_ray.storage.run import open_run

# A small run of the packaged configuration, as the tests have it.
SMALL = {
    "revise.limit": 64,
    "sft.epochs": 4,
    "compare.limit": 48,
    "label.gold_limit": 24,
    "rm.human": '[{path: "town:human", limit: 64}]',
    "rm.epochs": 1,
    "ppo.value_warmup_steps": 1,
    "ppo.rollout_batch": 32,
    "ppo.minibatch": 16,
    "ppo.save_rollouts": 4,
}
VICTIMS = {"sft": ("rank", "driver"), "ppo": ("rank", "driver", "engine")}
PROCESS = {"rank": "ray::RayTrainWorker", "engine": "ray::RolloutEngine"}
STEPS_PER_CHECKPOINT = {"sft": 8, "ppo": 1}


class Fault(NamedTuple):
    victim: str
    after: int
    """It comes some time after this checkpoint."""
    late: float
    """How long after it, in intervals between two checkpoints."""
    which: float


class Pass(NamedTuple):
    seconds: float
    saved: list[float]
    """When each checkpoint was seen first, in seconds from the start."""
    killed: list[tuple[str, float, float]]
    """Who, when, and when the next checkpoint was seen."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="in all stages together (default 20)")
    parser.add_argument("--stages", nargs="+", choices=list(VICTIMS), default=list(VICTIMS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--out", help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cai-ray-faults-") as temporary:
        print(json.dumps(benchmark(Path(args.out or temporary), args.stages, args.kills, args.seed)))
    return 0


def benchmark(folder: Path, stages: list[str], kills: int, seed: int) -> dict[str, Any]:
    load, started = os.getloadavg()[0], time.monotonic()
    command(folder / "made", "run", {}, "--until", "rm").check_returncode()
    out: dict[str, Any] = {"benchmark": "faults", "kills": 0, "same_weights": True, "seconds_lost": {}}
    lost: dict[str, list[float]] = defaultdict(list)
    for number, stage in enumerate(stages):
        share = kills // len(stages) + (number < kills % len(stages))
        alone, killed, same = both(folder, stage, share, seed)
        interval = statistics.median(b - a for a, b in zip(alone.saved, alone.saved[1:], strict=False))
        for victim, before, after in killed.killed:
            lost[f"{stage} {victim}"].append(after - before - interval)
        out["kills"] += len(killed.killed)
        out["same_weights"] &= same
        out[stage] = {
            "kills": len(killed.killed),
            "same_weights": same,
            "seconds_alone": round(alone.seconds, 1),
            "seconds_killed": round(killed.seconds, 1),
            "checkpoints": len(alone.saved),
            "steps_per_checkpoint": STEPS_PER_CHECKPOINT[stage],
            "seconds_per_checkpoint": round(interval, 2),
        }
    everything = [s for found in lost.values() for s in found]
    for name, found in [*sorted(lost.items()), ("all", everything)]:
        median, most = round(statistics.median(found), 1), round(max(found), 1)
        out["seconds_lost"][name] = {"n": len(found), "median": median, "max": most}
    return out | {
        "seed": seed,
        "settings": SMALL,
        "seconds": round(time.monotonic() - started, 1),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(load, 2),
        "versions": versions(),
    }


def both(folder: Path, stage: str, kills: int, seed: int) -> tuple[Pass, Pass, bool]:
    """The undisturbed pass, the one under fire, and whether their weights are the same."""
    checkpoints = 2 * kills + 2
    steps = checkpoints * STEPS_PER_CHECKPOINT[stage]
    made = open_run(str(folder / "made"))
    per_epoch = -(-len(made.rows("sft")) // made.config.sft.batch_size)
    settings: dict[str, Any] = {f"{stage}.checkpoint_every": STEPS_PER_CHECKPOINT[stage]}
    if stage == "sft":
        settings |= {"sft.epochs": -(-steps // per_epoch), "sft.workers": 2}
    else:
        settings |= {"ppo.steps": steps}
    alone = under_fire(fresh(folder, stage, "alone"), stage, settings, [], 0.0)
    interval = statistics.median(b - a for a, b in zip(alone.saved, alone.saved[1:], strict=False))
    drawn = random.Random(f"{seed} {stage}")
    last = len(alone.saved) - 2  # what is killed after the last one has nothing left to do
    moments = sorted(drawn.sample(range(1, last), kills))
    faults = [
        Fault(drawn.choice(VICTIMS[stage]), moment, drawn.random(), drawn.random()) for moment in moments
    ]
    killed = under_fire(fresh(folder, stage, "killed"), stage, settings, faults, interval)
    shas = [folder_sha(folder / f"{stage}-{name}" / stage / "model") for name in ("alone", "killed")]
    return alone, killed, shas[0] == shas[1]


def under_fire(out: Path, stage: str, settings: dict[str, Any], faults: list[Fault], interval: float) -> Pass:
    """The command, killed at the drawn moments and given again as often as it takes."""
    mark = f"faults-{os.getpid()}-{out.name}"
    started = time.monotonic()
    driver = start(out, stage, settings, mark)
    saved: list[float] = []
    killed: list[tuple[str, float, float]] = []
    left, step = list(faults), 0
    waiting: tuple[str, float] | None = None
    due = 0.0
    while driver.poll() is None:
        time.sleep(0.02)
        now = time.monotonic() - started
        if (found := last_step(out, stage)) > step:
            step = found
            if waiting:
                killed.append((waiting[0], waiting[1], now))
                waiting = None
            saved.append(now)
            due = now + left[0].late * interval if left else 0.0
        if not left or waiting or now < due or step < left[0].after * STEPS_PER_CHECKPOINT[stage]:
            continue
        fault = left[0]
        if fault.victim == "driver":
            driver.kill()
            driver.wait()
            wait_until_gone(mark)
            driver = start(out, stage, settings, mark)
        elif not kill(mark, PROCESS[fault.victim], fault.which):
            continue  # it is on its way
        left.pop(0)
        waiting = (fault.victim, saved[-1])
        print(f"{stage}: {fault.victim} killed after step {step}", file=sys.stderr, flush=True)
    if driver.returncode or left:
        raise SystemExit(f"{stage} ended with {driver.returncode}, {len(left)} kills to come; see {out}/log")
    wait_until_gone(mark)
    return Pass(time.monotonic() - started, saved, killed)


def last_step(out: Path, stage: str) -> int:
    """Of the last checkpoint that counts."""
    for record in out.glob(f"{stage}/checkpoints/*/checkpoint_manager_snapshot.json"):
        try:
            found = json.loads(record.read_text())["latest_checkpoint_result"]
        except ValueError:  # it is being written
            continue
        return int(found["metrics"]["step"]) if found else 0
    return 0


def fresh(folder: Path, stage: str, name: str) -> Path:
    """A copy of the run that was made, without the stage."""
    out = folder / f"{stage}-{name}"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder / "made", out)
    for later in upstream_of("ppo", "ppo")[1:] if stage == "sft" else ():
        shutil.rmtree(out / later)
    return out


def words(out: Path, stage: str, settings: dict[str, Any]) -> list[str]:
    given = [w for key, value in (SMALL | settings).items() for w in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "cai_ray", stage, "errand-town", "--out", str(out), *given]


def command(
    out: Path, stage: str, settings: dict[str, Any], *more: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*words(out, stage, settings), *more], stdout=sys.stderr)


def start(out: Path, stage: str, settings: dict[str, Any], mark: str) -> subprocess.Popen[bytes]:
    with open(out / "log", "ab") as log:
        return subprocess.Popen(
            words(out, stage, settings),
            stdout=log,
            stderr=log,
            env={**os.environ, MARK: mark},
            start_new_session=True,
        )


if __name__ == "__main__":
    sys.exit(main())
