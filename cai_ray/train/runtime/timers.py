"""Times of the parts of a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timers:
    """Adds up the seconds of each named part of a step: `with timers("sample_s"): …`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    def metrics(self) -> dict[str, float]:
        """Each part under its name in the metrics, `time/sample_s`."""
        return {f"time/{name}": seconds for name, seconds in self.seconds.items()}
