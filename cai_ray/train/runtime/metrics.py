"""Metrics of a stage: written as JSON lines and to the configured sinks, with progress shown by the driver."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cai_ray.cluster.progress import POLL_S, Progress, ProgressDisplay, duration, short
from cai_ray.compat.ray_kv import forget, get, put
from cai_ray.storage.records import derive_id
from cai_ray.storage.run import Run
from cai_ray.train.runtime import sinks
from cai_ray.train.runtime.ranks import rank

# Metrics that the progress line shows, and their names there.
_SHOWN = {
    "reward/mean": "reward",
    "kl/reference": "KL",
    "sft/loss": "loss",
    "rm/ai_loss": "loss",
    "rm/ai_accuracy": "accuracy",
    "rm/human_loss": "human loss",
    "rm/human_accuracy": "human accuracy",
    "dpo/loss": "loss",
    "dpo/ai_accuracy": "accuracy",
}
RECENT = 20
"""Last steps that the time left is estimated from: the first steps of a stage take longer than the others."""


class Log:
    """A stage's metrics, one row per step: every rank has them, rank 0 writes them.

    Args:
        total: steps of the stage.
        rows: the rows of the checkpoint that the stage goes on from.
    """

    def __init__(self, run: Run, stage: str, total: int, rows: list[dict[str, Any]] | None = None):
        self.run, self.stage, self.total = run, stage, total
        self.rows: list[dict[str, Any]] = list(rows or [])
        self._written = time.monotonic()
        self._ends: deque[float] = deque(maxlen=RECENT + 1)
        self._feeds: list[sinks.Feed] = []
        if rank() == 0:
            # The part of the key before the time is the same for every attempt.
            attempt = derive_id(run.root, stage, _driver_key.rpartition("-")[0])
            self._feeds = sinks.open_all(sinks.DashboardRun(run, stage, attempt, tuple(self.rows)), warn)

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds a row; `step` counts from 1."""
        self.rows.append({"step": step, **metrics})
        self._ends.append(time.monotonic())
        if rank() != 0:
            return
        seconds = step_seconds(self._ends)
        details = ", ".join(_details(step, self.total, metrics, seconds))
        line = progress(self.stage, step, self.total, metrics, seconds)
        report_progress(Progress(self.stage, step, self.total, "steps", details, line))
        for feed in self._feeds:
            feed.log(self.rows[-1])
        if time.monotonic() - self._written > 30:  # the file of a long run grows while it trains
            self.write()

    def close(self) -> None:
        """Writes the metrics and closes the sinks; no row may follow."""
        self.write()
        if rank() == 0:
            sinks.close_all(self._feeds)

    def write(self) -> None:
        """Writes metrics.jsonl anew with all rows; rank 0 does it."""
        if rank() == 0:
            self.run.write_metrics(self.stage, self.rows)
        self._written = time.monotonic()


def progress(
    stage: str, step: int, total: int, metrics: Mapping[str, Any], seconds: float | None = None
) -> str:
    """The progress line of a stage.

    Args:
        seconds: duration of a step now; None while it is not known.
    """
    return ", ".join([f"{stage}: step {step} of {total}", *_details(step, total, metrics, seconds)])


def _details(step: int, total: int, metrics: Mapping[str, Any], seconds: float | None) -> list[str]:
    """What is shown beside the number of the step: metrics, speed and the time left."""
    parts = [f"{name} {metrics[key]:.3g}" for key, name in _SHOWN.items() if key in metrics]
    if (speed := metrics.get("tokens/per_s")) is not None:
        parts.append(f"{short(speed)} tokens/s")
    if seconds is not None and step < total:
        parts.append(f"{duration(seconds * (total - step))} left")
    return parts


def step_seconds(ends: Sequence[float]) -> float | None:
    """Mean duration of the steps that end at these times; None for one step, whose start is not known."""
    return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else None


@contextmanager
def progress_lines(key: str) -> Iterator[None]:
    """Shows rank 0's progress (as lines: every ten seconds) and its warnings on stderr."""
    done = threading.Event()

    def watch() -> None:
        warned: set[str] = set()
        ended = False
        with ProgressDisplay(every=10) as display:
            while not ended:
                ended = done.wait(POLL_S)  # the last report is read after the end
                for text in json.loads(get(key, "warnings") or b"[]"):
                    if text not in warned:  # a restarted group may warn again
                        display.print(f"warning: {text}")
                    warned.add(text)
                if not ended and (progress := get(key, "progress")):
                    display.show(Progress(*json.loads(progress)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        forget(key)


_driver_key = ""
_warnings: list[str] = []


def report_to(key: str) -> None:
    """Lets this process report to the driver that waits under this key (`progress_lines`).

    Args:
        key: the training run's name, a dash, and the time of its start.
    """
    global _driver_key
    _driver_key = key
    _warnings.clear()


def report_progress(progress: Progress) -> None:
    """Sends progress to the driver, which shows the latest now and then."""
    if _driver_key:
        put(_driver_key, "progress", json.dumps(progress).encode())


def warn(text: str) -> None:
    """Sends a warning to the driver, which prints each text once."""
    _warnings.append(text)
    if _driver_key:
        put(_driver_key, "warnings", json.dumps(_warnings).encode())
