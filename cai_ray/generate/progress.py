"""Progress of a set of rows: how many came back, how many failed, and when too many did."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence

from cai_ray.errors import InputError

# If all of the first rows fail, and they are this many, that is no accident.
_ALL_FAIL = 64
_LINE_EVERY_S = 5


class SetProgress:
    """Counts the rows of a set that came back, and their errors. Ends a stage as soon as it is sure to fail.

    Args:
        label: names the set on stderr.
        max_error_rate: the share of the `total` rows that may fail.
    """

    def __init__(self, label: str, total: int, max_error_rate: float):
        self.label, self.total, self.max_error_rate = label, total, max_error_rate
        self.rows = 0
        self.errors: Counter[str] = Counter()

    def add(self, errors: Sequence[str | None]) -> None:
        """Counts rows by their error, or None.

        Raises:
            InputError: too many rows failed.
        """
        self.rows += len(errors)
        self.errors.update(e for e in errors if e is not None)
        failed, bound = self.errors.total(), self.max_error_rate
        if failed > bound * self.total or failed == self.rows >= _ALL_FAIL > bound * _ALL_FAIL:
            worst, count = self.errors.most_common(1)[0]
            of = (
                f"{self.total} rows"
                if self.rows == self.total
                else f"the first {self.rows} rows of {self.total}"
            )
            raise InputError(
                f"{failed} of {of} failed, more than max_error_rate={bound}; most often: {worst} ({count} rows)"
            )


class ProgressLines:
    """Prints a line to stderr every few seconds: rows done so far, of the set that is being processed."""

    def __init__(self, sets: list[SetProgress]):
        self.sets = sets
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        started = time.time()
        while not self.stop.wait(_LINE_EVERY_S):
            current = next((s for s in self.sets if s.rows < s.total), self.sets[-1])
            rows, total = (sum(n) for n in zip(*((s.rows, s.total) for s in self.sets), strict=True))
            elapsed = time.time() - started
            left = f", {elapsed * (total - rows) / rows:.0f} s left" if rows else ""
            failed = f", {current.errors.total()} failed" if current.errors else ""
            line = f"  {current.label}: {current.rows} of {current.total} rows{failed}, {elapsed:.0f} s{left}"
            print(line, file=sys.stderr, flush=True)
