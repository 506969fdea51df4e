"""A run that is killed, interrupted or out of disk at any moment: nothing half done is taken for done, and the same
command goes on."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cai_ray.generate import revise
from cai_ray.storage.run import Run, open_run
from tests.e2e.command import ROOT, SMALL, Driver, cai_ray, environment, refused, settings, succeed

# Short steps with a checkpoint after each step, so that a kill lands between two of them.
SETTINGS = {**SMALL, "sft.batch_size": 16, "sft.checkpoint_every": 1}
SEED = 11


@pytest.fixture
def drivers(tmp_path: Path) -> Iterator[list[Driver]]:
    started: list[Driver] = []
    yield started
    for driver in started:
        driver.end()


def test_killed_while_generating_and_while_training(tmp_path: Path, drivers: list[Driver]) -> None:
    out, moments = tmp_path / "run", random.Random(SEED)

    def start() -> Driver:
        words = ("run", "errand-town", "--until", "sft", "--out", out, *settings(SETTINGS))
        drivers.append(Driver(tmp_path / f"{len(drivers)}.log", *words))
        return drivers[-1]

    first = start()
    first.wait_for("revise: started")
    first.run_for(moments.uniform(1, 10))  # Ray starts, the engine starts, rows are written
    first.signal_group(signal.SIGKILL)
    assert not (out / "revise" / "manifest.json").exists()
    assert first.leftovers() == []

    second = start()
    second.wait_for("sft: started")
    made = (out / "revise" / "manifest.json").read_text()
    _wait_for_checkpoints(second, out, moments.randint(2, 5))
    second.signal_group(signal.SIGKILL)
    assert not (out / "sft" / "manifest.json").exists()
    assert second.leftovers() == []
    kept = _checkpoint(out)

    # Another result, or another layout of the checkpoints, is one line, and nothing of them is lost.
    saved = sorted(path for path in (out / "sft").rglob("*"))
    for key, value in (("sft.learning_rate", 0.5), ("sft.zero_stage", 1)):
        changed = settings({**SETTINGS, key: value})
        line = refused(cai_ray("run", "errand-town", "--until", "sft", "--out", out, *changed))
        assert f"{key}: " in line and f" → {value}" in line and "--overwrite" in line
    assert sorted(path for path in (out / "sft").rglob("*")) == saved

    # How the stage runs may change: it goes on all the same.
    otherwise = {"sft.gradient_checkpointing": True, "engine.timeout_s": 99, "sinks": "[]"}
    words = settings({**SETTINGS, **otherwise})
    said = succeed("run", "errand-town", "--until", "sft", "--out", out, *words).stderr
    assert "revise: done before" in said
    assert (out / "revise" / "manifest.json").read_text() == made  # not made again
    run = open_run(str(out))
    _each_id_once(run, "revise")
    _each_id_once(run, "sft")
    assert {r["id"] for r in run.rows("revise")} == {r["id"] for r in revise.tasks(run)}
    steps = [json.loads(line) for line in (out / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(1, run.manifest("sft")["steps"] + 1))  # each once
    # Training went on from the checkpoint, or one after it: the steps before it were not made again.
    assert kept["step"] > 1
    assert steps[: kept["step"]] == kept["rows"]


def test_interrupted_ends_with_130_and_goes_on(tmp_path: Path, drivers: list[Driver]) -> None:
    """Ctrl-C, which reaches the whole process group."""
    out = tmp_path / "run"
    words = ("run", "errand-town", "--until", "revise", "--out", out, *settings(SMALL))
    driver = Driver(tmp_path / "log", *words)
    drivers.append(driver)
    driver.wait_for(" rows, ")  # the first line of progress
    driver.run_for(random.Random(SEED).uniform(0, 5))
    assert driver.signal_group(signal.SIGINT) == 130, driver.said()
    assert "interrupted; the same command goes on from here" in driver.said()
    assert "Traceback" not in driver.said()
    assert not (out / "revise" / "manifest.json").exists()
    assert driver.leftovers() == []
    rows = json.loads(succeed("status", out, "--json").stdout)
    assert rows[0]["state"] in ("partial", "missing")


def test_interrupted_while_training(town_run: Path, tmp_path: Path, drivers: list[Driver]) -> None:
    out = Path(shutil.copytree(town_run, tmp_path / "run", ignore=shutil.ignore_patterns("sft")))
    driver = Driver(tmp_path / "log", "sft", "errand-town", "--out", out, *settings(SETTINGS))
    drivers.append(driver)
    _wait_for_checkpoints(driver, out, 2)
    assert driver.signal_group(signal.SIGINT) == 130, driver.said()
    assert "Traceback" not in driver.said()
    assert not (out / "sft" / "manifest.json").exists()
    assert driver.leftovers() == []


@pytest.mark.parametrize(
    ("stage", "size"), [("revise", "24k"), ("sft", "7m")], ids=["generation", "training"]
)
def test_a_full_disk_is_one_line(
    request: pytest.FixtureRequest, tmp_path: Path, stage: str, size: str
) -> None:
    """The run directory on a file system that holds its beginning and no more."""
    place = tmp_path / "small"
    place.mkdir()
    # A private mount needs no privileges in a user namespace, where the machine allows one.
    mount = f"mount -t tmpfs -o size={size} none {place}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no private mounts on this machine")
    command = " ".join([sys.executable, "-m cai_ray", stage, "errand-town --out", f"{place}/run"])
    quoted = " ".join(f"'{word}'" for word in settings(SETTINGS))
    steps = [mount, f"{command} {quoted}"]
    if stage == "sft":
        before = request.getfixturevalue("town_run")
        steps.insert(1, f"mkdir {place}/run && cp -r {before}/*.* {before}/revise {place}/run/")
    left = f"test ! -e {place}/run/{stage}/manifest.json"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{' && '.join(steps)}; code=$?; {left} || exit 99; exit $code"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2, done.stderr[-6000:]
    assert "Traceback" not in done.stderr, done.stderr[-6000:]
    last = done.stderr.splitlines()[-1]
    assert last.startswith("cai-ray: ") and "No space left" in last


def _wait_for_checkpoints(driver: Driver, run: Path, n: int) -> None:
    """Until training has published its n-th checkpoint, or a later one."""
    seen: set[str] = set()
    deadline = time.time() + 300
    while len(seen) < n:
        assert time.time() < deadline, driver.said()[-4000:]
        driver.run_for(0.1)
        seen |= {p.parent.name for p in run.glob("sft/checkpoints/*/checkpoint*/loop-0.pt")}


def _checkpoint(run: Path) -> dict[str, Any]:
    """What the newest checkpoint that can be read holds of the loop's state."""
    import torch

    found = []
    for path in run.glob("sft/checkpoints/*/checkpoint*/loop-0.pt"):
        try:
            found.append(torch.load(path, weights_only=False)["state"])
        except (OSError, RuntimeError, EOFError):  # the kill came while it was written
            continue
    return max(found, key=lambda state: state["step"])


def _each_id_once(run: Run, stage: str) -> None:
    ids = [r["id"] for r in run.rows(stage)]
    assert len(set(ids)) == len(ids) > 0
