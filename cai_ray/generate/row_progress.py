"""Progress of a set of rows: how many came back, how many failed, and when too many did."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence

from cai_ray.cluster.progress import POLL_S, Progress, ProgressDisplay
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


class RowProgress:
    """Shows on stderr how many rows are done, of the set that is being processed."""

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
        with ProgressDisplay() as display:
            while not self.stop.wait(POLL_S if display.drawn else _LINE_EVERY_S):
                display.show(self._progress(time.time() - started))

    def _progress(self, elapsed: float) -> Progress:
        current = next((s for s in self.sets if s.rows < s.total), self.sets[-1])
        rows, total = (sum(n) for n in zip(*((s.rows, s.total) for s in self.sets), strict=True))
        failed = [f"{current.errors.total()} failed"] if current.errors else []
        left = [f"{elapsed * (total - rows) / rows:.0f} s left"] if rows else []
        return Progress(
            current.label,
            current.rows,
            current.total,
            "rows",
            ", ".join([f"{rows / elapsed:.1f} rows/s", *failed, *left]),
            ", ".join(
                [
                    f"{current.label}: {current.rows} of {current.total} rows",
                    *failed,
                    f"{elapsed:.0f} s",
                    *left,
                ]
            ),
        )
