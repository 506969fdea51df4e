"""Reports what this process holds of the cluster for a stage, and learns here when the stage's budget is spent.

Every process that is given CPUs or GPUs (actors of Ray Data, training workers, rollout engines) has a `Holder`, which
reports once a second for how long the process has had them. So an autoscaled pool costs what came up, and a process
that died costs what it lived. The driver adds the reports up (meter.py).
"""

from __future__ import annotations

import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from cai_ray.cluster.usage import Usage
from cai_ray.compat.ray_core import is_worker
from cai_ray.compat.ray_kv import get, put

BEAT = 1.0
"""Seconds between two reports of a holder, and between two readings of the driver."""

STATE, RUNNING, REPORT = "state", "on", "held-"
"""Names under an attempt's key: its state, that state while the stage may go on, and the prefix of the reports."""

_paid = Usage()
_lines: list[str] = []
_left_out: dict[str, Any] = {}
_reports = False
"""Whether a holder of this process reports to a driver."""


def count_paid(usage: Usage) -> None:
    """Counts an endpoint's answer to this process, whatever becomes of the answer."""
    global _paid
    _paid = _paid + usage


def tell(line: str, left_out: dict[str, Any] | None = None) -> None:
    """Says a line on the stderr of the stage's driver, once however many processes say it; outside a stage, here.

    Args:
        left_out: what an endpoint is sent in place of fields that it refuses, for the stage's manifest.
    """
    _left_out.update(left_out or {})
    if line not in _lines:
        _lines.append(line)
        if not _reports:
            print(f"  {line}", file=sys.stderr, flush=True)


class Holder:
    """This process's share of a stage.

    It counts from its creation, or from the start of the process if the process was started for the stage. Outside a
    stage (a server, an engine that is tried out) it does nothing, since there is no run to count for.

    Args:
        row_counts: says what has become of the rows that the process was given; it is called in another thread.
    """

    def __init__(self, row_counts: Callable[[], Mapping[str, Any]] | None = None) -> None:
        self._row_counts = row_counts
        self.stop_reason: str | None = None
        """Why nothing more may begin, once the stage's budget is spent."""
        self.working = 0
        self._began = self._worked = time.monotonic()
        self._starting = 0.0
        self._name = f"{REPORT}{uuid.uuid4().hex[:12]}"
        self._attempt, self._resources = _current_attempt(), _assigned_resources()
        self._left, self._over = threading.Event(), False
        if self._attempt:
            global _reports
            _reports = True
            self._began -= _process_age(self._attempt)
            self.read_budget()
            threading.Thread(target=self._beat, daemon=True).start()

    def ready(self, since: float | None = None) -> None:
        """The engine answers from now on.

        Args:
            since: the value of `time.monotonic` when the engine began to start again; None for its first start.
        """
        now = time.monotonic()
        self._starting += now - (self._began if since is None else since)
        self._worked = now

    @contextmanager
    def work(self) -> Iterator[None]:
        """Surrounds work that should be finished before the stage ends; it watches `stop_reason` itself."""
        self.working += 1
        try:
            yield
        finally:
            self.working -= 1
            self._worked = time.monotonic()

    def read_budget(self) -> str | None:
        """Asks at once whether the budget is spent, and returns `stop_reason`."""
        state = get(self._attempt, STATE) if self._attempt else None
        self._over = state is None
        self.stop_reason = None if state is None or state.decode() == RUNNING else state.decode()
        return self.stop_reason

    def close(self) -> None:
        """Ends the count: the process has given back what it held."""
        if self._attempt and not self._left.is_set():
            self._left.set()
            self._report()

    def report_now(self) -> None:
        """Reports at once, because the process may end before the next report."""
        if self._attempt and not self._over:
            with suppress(Exception):
                self._report()

    def _beat(self) -> None:
        while not (self._left.is_set() or self._over):
            with suppress(Exception):  # a store that does not answer is asked again
                self.read_budget()
                if not self._over:
                    self._report()
            self._left.wait(BEAT)

    def _report(self) -> None:
        now = time.monotonic()
        report = {
            "seconds": now - self._began,
            "start": self._starting,
            "work": max(0.0, self._worked - self._began - self._starting) if self._starting else 0.0,
            "idle": self.stop_reason is not None and not self.working,
            "endpoint": _paid,
            "lines": list(_lines),
            "left_out": dict(_left_out),
            **self._resources,
            **({"rows": self._row_counts()} if self._row_counts else {}),
        }
        put(self._attempt, self._name, json.dumps(report).encode())


@contextmanager
def holding() -> Iterator[None]:
    """Counts what a Ray task holds while it runs."""
    holder = Holder()
    try:
        yield
    finally:
        holder.close()


def job_key() -> str:
    """The key under which a driver names the attempt that its job makes now."""
    import ray

    return f"job-{ray.get_runtime_context().get_job_id()}"


def _current_attempt() -> str:
    """The key of the attempt at a stage that this process's job makes now; empty if it makes none."""
    import ray

    if not ray.is_initialized():
        return ""
    return (get(job_key(), "attempt") or b"").decode()


def _assigned_resources() -> dict[str, float]:
    import ray

    if not is_worker():
        return {"cpus": 0.0, "gpus": 0.0}
    assigned = ray.get_runtime_context().get_assigned_resources()
    return {"cpus": float(assigned.get("CPU", 0)), "gpus": float(assigned.get("GPU", 0))}


def _process_age(attempt: str) -> float:
    """Seconds since this process started, if it was started for the attempt (imports take seconds, too); else 0."""
    import psutil

    started, began = psutil.Process().create_time(), float(attempt.rpartition("-")[2])
    return max(0.0, time.time() - started) if started >= began else 0.0
