"""How far a stage is, on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

POLL_S = 0.5
"""How often whoever follows a stage looks where it is, at least on a terminal."""


class Progress(NamedTuple):
    """How far a stage is."""

    label: str
    done: int
    total: int
    unit: str
    """What is counted: rows or steps."""
    details: str
    """What stands beside the bar."""
    line: str
    """All of it as a plain line."""


def is_terminal(stream: TextIO) -> bool:
    """True where a stream is a terminal that bars and tables can be drawn on."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class ProgressDisplay:
    """Shows progress on stderr while its `with` block runs. A bar disappears at the end; lines stay.

    Args:
        every: seconds between two plain lines, at least. A bar follows at once.
    """

    def __init__(self, every: float = 0.0):
        self.every = every
        self.drawn = is_terminal(sys.stderr)
        self._bar: RichProgress | None = None
        self._last_line, self._last_time = "", float("-inf")

    def __enter__(self) -> ProgressDisplay:
        if self.drawn:
            self._bar = _new_bar()
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Moves the bar, or prints the plain line if it is new and the last one is old enough."""
        if self._bar:
            if not self._bar.tasks:
                self._bar.add_task("", total=None, unit="", details="")
            self._bar.update(
                self._bar.tasks[0].id,
                description=progress.label,
                completed=progress.done,
                total=progress.total,
                unit=progress.unit,
                details=progress.details,
            )
            return
        now = time.monotonic()
        if progress.line != self._last_line and now - self._last_time >= self.every:
            self._last_line, self._last_time = progress.line, now
            self.print(progress.line)

    def print(self, line: str) -> None:
        """Prints a line that stays, above the bar if there is one."""
        print(f"  {line}", file=sys.stderr, flush=True)


def short(number: float) -> str:
    """A count in a few characters, such as 5.2k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Seconds in units that people use."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _new_bar() -> RichProgress:
    """A bar that other output to stderr (and to stdout, if that is the same terminal) does not tear apart."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("  {task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.completed}/{task.total} {task.fields[unit]}", markup=False),
        TextColumn("{task.fields[details]}", markup=False),
        console=Console(stderr=True, markup=False, emoji=False, highlight=False),
        refresh_per_second=1 / POLL_S,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )
