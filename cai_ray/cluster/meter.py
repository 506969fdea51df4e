"""Adds up what a stage takes of the cluster while it runs, and stops it when its budget is spent.

The processes of a stage report what they hold (holder.py). The driver reads their reports, keeps the sum in the run
directory (cost.py), and publishes the reason to stop where all of them look.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any

from cai_ray.cluster import cost
from cai_ray.cluster.cost import Attempt, Spent
from cai_ray.cluster.holder import BEAT, REPORT, RUNNING, STATE, job_key
from cai_ray.cluster.usage import Usage
from cai_ray.compat.ray_kv import forget, get, names, put
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import Run

RECORD_EVERY = 5.0
"""Seconds between two records: the most that stays uncounted if the driver is killed."""
SILENT = 10.0
"""Seconds without a report after which a process counts as gone."""


class Meter:
    """Counts one attempt at a stage. A context manager: the record is complete when the context is left."""

    def __init__(self, run: Run, stage: str, inputs: str):
        self._run = run
        self._began, now = time.monotonic(), time.time()
        self._key = f"{derive_id(run.root, stage, uuid.uuid4().hex)}-{now:.3f}"
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        name = f"{stage}-{started.replace(':', '').replace('-', '')}-{uuid.uuid4().hex[:6]}"
        self._attempt = Attempt(name, stage, inputs, started, None, Spent())
        self._before = cost.attempts(run) if run.config.budget.given else None
        self._reports: dict[str, tuple[float, bytes]] = {}
        """The last report of each process, and when it came."""
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._said: set[str] = set()
        self.stop_reason: str | None = None
        """Which limit was reached, and how to go on."""

    def __enter__(self) -> Meter:
        global _meter
        put(self._key, STATE, RUNNING.encode())
        put(job_key(), "attempt", self._key.encode())
        self._attempt.write(self._run)
        self._thread.start()
        _meter = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        global _meter
        _meter = None
        self._left.set()
        self._thread.join()
        with suppress(Exception) if kind else nullcontext():  # what the stage raises comes first
            forget(job_key())
            self._read_reports()
            self._attempt.write(self._run)
            forget(self._key)

    def idle(self) -> bool:
        """Whether the budget is spent and every process has finished what it had begun."""
        return self.stop_reason is not None and all(report["idle"] for report, alive in self._last() if alive)

    def row_counts(self) -> list[tuple[dict[str, Any], bool]]:
        """What processes last said about their rows (`Holder`), each with whether it still reports."""
        return [(report["rows"], alive) for report, alive in self._last() if "rows" in report]

    def _last(self) -> list[tuple[dict[str, Any], bool]]:
        """The last report of each process, and whether it is recent."""
        now = time.monotonic()
        return [(json.loads(report), now - at < SILENT) for at, report in list(self._reports.values())]

    def _watch(self) -> None:
        recorded = time.monotonic()
        while not self._left.wait(BEAT):
            try:
                self._read_reports()
                if time.monotonic() - recorded >= RECORD_EVERY:
                    self._attempt.write(self._run)
                    recorded = time.monotonic()
                if reason := self._over_budget():
                    put(self._key, STATE, reason.encode())
                    self.stop_reason = reason
                    line = f"  {self._attempt.stage}: stopping, the budget is spent"
                    print(line, file=sys.stderr, flush=True)
            except Exception:  # storage or store failed: the stage may go on, and this is tried again
                recorded = time.monotonic()

    def _over_budget(self) -> str | None:
        if self._before is None or self.stop_reason is not None:
            return None
        return cost.over_budget(self._run.config, [*self._before, self._attempt])

    def _read_reports(self) -> None:
        now = time.monotonic()
        for name in names(self._key, REPORT):
            latest = get(self._key, name)
            if latest and latest != self._reports.get(name, (0.0, b""))[1]:
                self._reports[name] = now, latest
        spent, left_out = Spent(wall_seconds=now - self._began), dict[str, Any]()
        for _, text in self._reports.values():
            report = json.loads(text)
            spent = spent + _spent(report)
            left_out |= report["left_out"]
            self._say(report["lines"])
        self._attempt = self._attempt._replace(spent=spent, left_out=left_out)

    def _say(self, lines: list[str]) -> None:
        for line in lines:
            if line not in self._said:
                self._said.add(line)
                print(f"  {self._attempt.stage}: {line}", file=sys.stderr, flush=True)


_meter: Meter | None = None


def current() -> Meter | None:
    """The meter of the stage that this process drives, if it drives one."""
    return _meter


def _spent(report: Mapping[str, Any]) -> Spent:
    return Spent(
        cpu_seconds=report["cpus"] * report["seconds"],
        gpu_seconds=report["gpus"] * report["seconds"],
        start_seconds=report["start"],
        work_seconds=report["work"],
        endpoint=Usage(*report["endpoint"]),
    )
