"""Progress of a set of rows: how many are done, how many failed, how long the rest takes, and when too many failed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from cai_ray.cluster import meter
from cai_ray.cluster.progress import POLL_S, Progress, ProgressDisplay, duration, short
from cai_ray.errors import InputError
from cai_ray.generate.row_counts import Totals, add_up, seconds_left

# If all of the first rows fail, and they are this many, that is no accident.
_ALL_FAIL = 64
_LINE_EVERY_S = 5


class SetProgress:
    """Counts the rows of a set that came back, and their errors. Ends a stage as soon as it is sure to fail.

    Args:
        label: names the set on stderr.
        max_error_rate: the share of the `total` rows that may fail.
        finished_before: rows that an earlier attempt finished.
    """

    def __init__(self, label: str, total: int, max_error_rate: float, finished_before: int = 0):
        self.label, self.total, self.max_error_rate = label, total, max_error_rate
        self.finished_before = self.rows = finished_before
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
    """Shows on stderr how many rows are done, of the set that is being processed.

    Rows come back in slices. The actors' own counts say more, and sooner.

    Args:
        sets: the progress of each set by name, in their order.
    """

    def __init__(self, sets: Mapping[str, SetProgress]):
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
                display.show(self._progress(time.time() - started, add_up(meter.current())))

    def _progress(self, elapsed: float, totals: Totals) -> Progress:
        done = {
            # A row may be walked twice: by an actor that died, and by another one.
            name: min(s.total, max(s.rows, s.finished_before + totals.finished.get(name, 0)))
            for name, s in self.sets.items()
        }
        name = next((n for n, s in self.sets.items() if done[n] < s.total), list(self.sets)[-1])
        current, left = self.sets[name], sum(s.total - done[n] for n, s in self.sets.items())
        back = sum(s.rows for s in self.sets.values())
        if totals.seconds:
            seconds = seconds_left(left, totals)
        else:  # rows that came back are all that is known
            seconds = elapsed * left / back if back else None
        failed = max(current.errors.total(), totals.failed.get(name, 0))
        known = [f"{totals.under_way} under way"] * (totals.under_way > 0)
        failures = [f"{failed} failed"] * (failed > 0)
        # Never 0 s while rows are left.
        time_left = [] if seconds is None else [f"{duration(max(seconds, float(left > 0)))} left"]
        speed = f"{back / elapsed:.1f} rows/s"
        if totals.tokens:
            speed = f"{short(totals.tokens / totals.seconds)} tokens/s"
        tokens = [f"{totals.tokens:,} tokens"] * (totals.tokens > 0)
        count = f"{current.label}: {done[name]} of {current.total} rows"
        return Progress(
            current.label,
            done[name],
            current.total,
            "rows",
            ", ".join([*known, speed, *failures, *time_left]),
            ", ".join([count, *known, *tokens, *failures, f"{elapsed:.0f} s", *time_left]),
        )
