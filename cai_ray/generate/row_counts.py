"""What has become of a stage's rows so far: each actor counts its own, and the driver adds them up.

The counts travel with the actor's other reports (cluster/holder.py), once a second and by set, whatever the number of
rows is.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from cai_ray.cluster.meter import Meter
from cai_ray.engine.protocol import Engine

_LEAST = 0.1
"""What a row under way takes yet, at least, in means of finished rows."""


class RowCounts:
    """The counts of one actor, whose event loop counts and another of whose threads reports."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._most_tokens = self._tokens_before = 0
        self._finished, self._failed = Counter[str](), Counter[str]()
        self._under_way = self._most_under_way = self._finished_tokens = self._finished_squares = 0
        self._first: float | None = None

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Surrounds the walk of a row through its chain."""
        if self._first is None:
            self._first = time.monotonic()
        self._under_way += 1
        self._most_under_way = max(self._most_under_way, self._under_way)
        try:
            yield
        finally:
            self._under_way -= 1

    def finish(self, name: str, failed: bool, tokens: int) -> None:
        """Counts a row of the set `name` that is safe, and the tokens that were generated for it here."""
        self._finished[name] += 1
        self._failed[name] += failed
        self._finished_tokens += tokens
        self._finished_squares += tokens**2

    def engine_starts(self, engine: Engine) -> None:
        """Counts the tokens of this engine from now on."""
        self._engine = engine

    def engine_ends(self) -> None:
        """Keeps the tokens of an engine that is about to be closed."""
        engine, self._engine = self._engine, None
        self._tokens_before += engine.tokens() if engine else 0

    def report(self) -> dict[str, Any]:
        """The counts, as plain data."""
        # What a call has generated is out of the engine's count for a moment when it ends.
        engine = self._engine
        self._most_tokens = max(self._most_tokens, self._tokens_before + (engine.tokens() if engine else 0))
        return {
            "finished": self._finished,
            "failed": self._failed,
            "under_way": self._under_way,
            "most_under_way": self._most_under_way,
            "tokens": self._most_tokens,
            "finished_tokens": self._finished_tokens,
            "finished_squares": self._finished_squares,
            "seconds": 0.0 if self._first is None else time.monotonic() - self._first,
        }


class Totals(NamedTuple):
    """The counts of all actors of a stage."""

    finished: Mapping[str, int]
    """Rows of each set that this attempt has finished."""
    failed: Mapping[str, int]
    """Those of them that failed."""
    under_way: int = 0
    most_under_way: int = 0
    """The most that were under way at once."""
    tokens: int = 0
    """Tokens generated so far, those of rows under way included."""
    finished_tokens: int = 0
    """Those of finished rows."""
    finished_squares: int = 0
    """The sum of the squares of each finished row's tokens."""
    seconds: float = 0.0
    """Since the first request."""


def add_up(meter: Meter | None) -> Totals:
    """The counts that the actors of a stage reported last; nothing without a meter."""
    finished, failed = Counter[str](), Counter[str]()
    under_way = most_under_way = tokens = finished_tokens = finished_squares = 0
    seconds = 0.0
    for counts, alive in meter.row_counts() if meter else ():
        finished.update(counts["finished"])
        failed.update(counts["failed"])
        under_way += counts["under_way"] * alive
        most_under_way += counts["most_under_way"] * alive
        tokens += counts["tokens"]
        finished_tokens += counts["finished_tokens"]
        finished_squares += counts["finished_squares"]
        seconds = max(seconds, counts["seconds"])
    return Totals(
        finished, failed, under_way, most_under_way, tokens, finished_tokens, finished_squares, seconds
    )


def seconds_left(rows: int, totals: Totals) -> float | None:
    """Estimates the time for the rows that are left, those under way included; None before a row is finished.

    It is by tokens. What a row that waits takes is at least the mean of those that are finished. What a row under way
    still takes is the rest of that mean, or about the standard deviation where it has had more; the longest of them
    takes longer, and fewer and fewer rows share the engine until it ends.

    At first short rows finish, and this is too little. The rate of rows is then too much, since what rows under way
    have had counts for nothing. So at first it is the geometric mean of both.
    """
    done, running = sum(totals.finished.values()), min(rows, totals.under_way)
    if not done or not totals.seconds:
        return None
    by_rows = rows * totals.seconds / done
    if not totals.finished_tokens:
        return by_rows
    rate = totals.tokens / totals.seconds
    mean = totals.finished_tokens / done
    deviation = max(0.0, totals.finished_squares / done - mean**2) ** 0.5
    least = max(mean, totals.tokens / (done + totals.under_way))
    # Where lengths vary much, short rows are most of those that are finished, and what those under way have had counts.
    per_row = least * (totals.tokens / done / least) ** min(1.0, (deviation / mean) ** 2)
    each_has = (totals.tokens - totals.finished_tokens) / max(1, totals.under_way)
    # A row that has had more than all others takes longer yet, nobody knows how much.
    each_needs = max(_LEAST * per_row, math.hypot(max(0.0, per_row - each_has), deviation))
    # For rows whose lengths are exponential, the longest needs as many means as the harmonic number of rows, which is
    # near 1 + log. A row is faster beside fewer others, but not as much as they are fewer: between both is the root.
    longest = math.sqrt(each_needs * (each_needs + deviation * math.log(max(1, running))))
    drain = longest * math.sqrt(running * max(running, totals.most_under_way)) / rate
    by_tokens = (rows - running) * per_row / rate + drain
    trust = 0.5 + 0.5 * min(1.0, done / (2 * max(1, running)))
    return float(by_rows ** (1 - trust) * by_tokens**trust)
