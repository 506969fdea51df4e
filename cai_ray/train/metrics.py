"""Metrics of a stage: kept by rank 0, told to the driver, written as JSON lines and TensorBoard events."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cai_ray import storage
from cai_ray.storage import Run
from cai_ray.train.ranks import rank


class Log:
    """A stage's metrics, one row per step: kept on every rank, written and told by rank 0 only."""

    def __init__(self, run: Run, stage: str, total: int, rows: list[dict[str, Any]] | None = None):
        self.run, self.stage, self.total = run, stage, total
        self.rows: list[dict[str, Any]] = list(rows or [])
        self._written = time.monotonic()

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds a row; `step` counts from 1."""
        self.rows.append({"step": step, **metrics})
        progress(self.stage, step, self.total, metrics)
        if time.monotonic() - self._written > 30:  # whoever watches a long run sees it grow
            self.write()

    def write(self) -> None:
        if rank() == 0:
            self.run.write_metrics(self.stage, self.rows)
        self._written = time.monotonic()


def progress(stage: str, step: int, total: int, metrics: Mapping[str, Any]) -> None:
    """Tells the driver where rank 0 is; it prints the line on stderr now and then."""
    if rank() == 0 and _told:
        shown = ", ".join(f"{k} {v:.3g}" for k, v in metrics.items() if isinstance(v, int | float))
        put(_told, "progress", f"{stage}: step {step} of {total}, {shown}".encode())


def say(text: str) -> None:
    """Has the driver print a line on stderr, once: what a person should know, whatever the step."""
    if rank() == 0 and _told:
        put(_told, f"said/{time.time_ns()}", text.encode())


def write_events(run: Run, stage: str) -> None:
    """The numbers of metrics.jsonl as TensorBoard events, under RUN/<stage>/tensorboard."""
    uri = run.path(stage, "metrics.jsonl")
    if not storage.exists(uri):
        return
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder, write_to_disk=True) as writer:
            for line in storage.read_bytes(uri).decode().splitlines():
                row = json.loads(line)
                for name, value in row.items():
                    if name != "step" and isinstance(value, int | float):
                        writer.add_scalar(name, value, row["step"])
        storage.delete(run.path(stage, "tensorboard"))
        storage.upload_folder(folder, run.path(stage, "tensorboard"))


@contextmanager
def progress_lines(key: str) -> Iterator[None]:
    """Prints on stderr what rank 0 says: on a terminal in place, else a line every few seconds."""
    done = threading.Event()

    def watch() -> None:
        shown, last, every = b"", 0.0, 0.5 if sys.stderr.isatty() else 10.0
        while not done.wait(0.5):
            _print_said(key)
            line = get(key, "progress")
            if line and line != shown and time.monotonic() - last >= every:
                shown, last = line, time.monotonic()
                print(f"  {line.decode()}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _print_said(key)
        _delete(key)


def _print_said(key: str) -> None:
    from ray.experimental.internal_kv import _internal_kv_list

    for name in sorted(_internal_kv_list(f"{key}/said/".encode(), namespace=b"cai_ray")):
        what = name.decode().removeprefix(f"{key}/")
        if line := get(key, what):
            print(f"  {line.decode()}", file=sys.stderr, flush=True)
        _delete(f"{key}/{what}")


# Ray's own key-value store carries two short texts from a rank to the driver: no actor, no port, no shared disk.
_told = ""


def told_to(key: str) -> None:
    """Under which key this process tells its progress."""
    global _told
    _told = key


def put(key: str, what: str, value: bytes) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(f"{key}/{what}".encode(), value, overwrite=True, namespace=b"cai_ray")


def get(key: str, what: str) -> bytes | None:
    from ray.experimental.internal_kv import _internal_kv_get

    return _internal_kv_get(f"{key}/{what}".encode(), namespace=b"cai_ray")


def _delete(key: str) -> None:
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(key.encode(), del_by_prefix=True, namespace=b"cai_ray")
