"""Counts what a stage holds of the cluster while it runs, and tells it when its budget is spent.

Whoever is given CPUs or GPUs (actors of Ray Data, training workers, rollout engines) says every second for how long it
has had them. So an autoscaled pool costs what came up, and a process that died costs what it lived. The driver adds
this up, keeps it in the run directory (cost.py), and puts a word where all of them look when a limit is reached.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from cai_ray.cluster import cost
from cai_ray.cluster.cost import Attempt, Spent
from cai_ray.cluster.usage import Usage
from cai_ray.compat.ray_core import is_worker
from cai_ray.compat.ray_kv import forget, get, names, put
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import Run

BEAT = 1.0
"""Seconds between two words of a holder, and between two looks of the driver."""
KEEP = 5.0
"""Seconds between two records: what a kill of the driver leaves uncounted, at most."""
SILENT = 10.0
"""A holder that says nothing for so long is gone."""

_STATE, _ON, _HELD = "state", "on", "held-"


# ------------------------------------------------------------------------------------------------ who holds something

_paid = Usage()


def paid(usage: Usage) -> None:
    """An endpoint answered this process, whatever becomes of the answer."""
    global _paid
    _paid = _paid + usage


class Holder:
    """This process's share of a stage, from now on, or since the process is there where that is later than the stage.

    It does nothing where no stage is counted: what is served or tried out has no run to be counted for.
    """

    def __init__(self) -> None:
        self.told: str | None = None
        """Why to begin nothing more, once the stage's budget is spent."""
        self.working = 0
        self._began = self._worked = time.monotonic()
        self._starting = 0.0
        self._name = f"{_HELD}{uuid.uuid4().hex[:12]}"
        self._attempt, self._resources = _attempt(), _resources()
        self._left, self._over = threading.Event(), False
        if self._attempt:
            self._began -= _age(self._attempt)
            self.look()
            threading.Thread(target=self._beat, daemon=True).start()

    def ready(self, since: float | None = None) -> None:
        """The engine answers now; `since` (of time.monotonic): it was made anew from then on."""
        now = time.monotonic()
        self._starting += now - (self._began if since is None else since)
        self._worked = now

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around what should be finished before the stage ends; `told` is looked at within."""
        self.working += 1
        try:
            yield
        finally:
            self.working -= 1
            self._worked = time.monotonic()

    def look(self) -> str | None:
        """Asks at once whether the budget is spent; returns `told`."""
        state = get(self._attempt, _STATE) if self._attempt else None
        self._over = state is None
        self.told = None if state is None or state.decode() == _ON else state.decode()
        return self.told

    def close(self) -> None:
        """It has given back what it held."""
        if self._attempt and not self._left.is_set():
            self._left.set()
            self._say()

    def tell(self) -> None:
        """Says at once where it is: perhaps nothing comes after this."""
        if self._attempt and not self._over:
            with suppress(Exception):
                self._say()

    def _beat(self) -> None:
        while not (self._left.is_set() or self._over):
            with suppress(Exception):  # a store that does not answer is asked again
                self.look()
                if not self._over:
                    self._say()
            self._left.wait(BEAT)

    def _say(self) -> None:
        now = time.monotonic()
        said = {
            "seconds": now - self._began,
            "start": self._starting,
            "work": max(0.0, self._worked - self._began - self._starting) if self._starting else 0.0,
            "idle": self.told is not None and not self.working,
            "endpoint": _paid,
            **self._resources,
        }
        put(self._attempt, self._name, json.dumps(said).encode())


@contextmanager
def holding() -> Iterator[None]:
    """Around a task that holds what Ray gave it for as long as this takes."""
    holder = Holder()
    try:
        yield
    finally:
        holder.close()


def _attempt() -> str:
    """The attempt at a stage that this process's job makes now; empty where it makes none."""
    import ray

    if not ray.is_initialized():
        return ""
    return (get(_job(), "attempt") or b"").decode()


def _resources() -> dict[str, float]:
    import ray

    if not is_worker():
        return {"cpus": 0.0, "gpus": 0.0}
    held = ray.get_runtime_context().get_assigned_resources()
    return {"cpus": float(held.get("CPU", 0)), "gpus": float(held.get("GPU", 0))}


def _age(attempt: str) -> float:
    """Seconds that this process has been there, if it was made for the attempt: importing takes seconds, too."""
    import psutil

    made, began = psutil.Process().create_time(), float(attempt.rpartition("-")[2])
    return max(0.0, time.time() - made) if made >= began else 0.0


def _job() -> str:
    import ray

    return f"job-{ray.get_runtime_context().get_job_id()}"


# ---------------------------------------------------------------------------------------------- the driver's side


class Meter:
    """Of one attempt at a stage; a context. The record is complete when it is left."""

    def __init__(self, run: Run, stage: str, inputs: str):
        self._run = run
        self._began, now = time.monotonic(), time.time()
        self._key = f"{derive_id(run.root, stage, uuid.uuid4().hex)}-{now:.3f}"
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        name = f"{stage}-{started.replace(':', '').replace('-', '')}-{uuid.uuid4().hex[:6]}"
        self._attempt = Attempt(name, stage, inputs, started, None, Spent())
        self._before = cost.attempts(run) if run.config.budget.given else None
        self._heard: dict[str, tuple[float, bytes]] = {}
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.told: str | None = None
        """Which limit was reached, and how to go on."""

    def __enter__(self) -> Meter:
        global _meter
        put(self._key, _STATE, _ON.encode())
        put(_job(), "attempt", self._key.encode())
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
            forget(_job())
            self._look()
            self._attempt.write(self._run)
            forget(self._key)

    def at_rest(self) -> bool:
        """Whether the limit is reached and whoever holds something has finished what it had begun."""
        if self.told is None:
            return False
        now = time.monotonic()
        lately = [json.loads(said) for heard, said in list(self._heard.values()) if now - heard < SILENT]
        return all(holder["idle"] for holder in lately)

    def _watch(self) -> None:
        kept = time.monotonic()
        while not self._left.wait(BEAT):
            try:
                self._look()
                if time.monotonic() - kept >= KEEP:
                    self._attempt.write(self._run)
                    kept = time.monotonic()
                if told := self._over():
                    put(self._key, _STATE, told.encode())
                    self.told = told
                    line = f"  {self._attempt.stage}: stopping, the budget is spent"
                    print(line, file=sys.stderr, flush=True)
            except Exception:  # storage or store failed: the stage may get on, and this is tried again
                kept = time.monotonic()

    def _over(self) -> str | None:
        if self._before is None or self.told is not None:
            return None
        return cost.over_budget(self._run.config, [*self._before, self._attempt])

    def _look(self) -> None:
        now = time.monotonic()
        for name in names(self._key, _HELD):
            said = get(self._key, name)
            if said and said != self._heard.get(name, (0.0, b""))[1]:
                self._heard[name] = now, said
        spent = Spent(wall_seconds=now - self._began)
        for _, said in self._heard.values():
            spent = spent + _spent(json.loads(said))
        self._attempt = self._attempt._replace(spent=spent)


_meter: Meter | None = None


def current() -> Meter | None:
    """This process's, where it is the driver of a stage that is counted."""
    return _meter


def _spent(said: Mapping[str, Any]) -> Spent:
    return Spent(
        cpu_seconds=said["cpus"] * said["seconds"],
        gpu_seconds=said["gpus"] * said["seconds"],
        start_seconds=said["start"],
        work_seconds=said["work"],
        endpoint=Usage(*said["endpoint"]),
    )
