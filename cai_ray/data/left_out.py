"""Rows of people's files that cannot be used: they are left out and counted, and one of them never ends a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from cai_ray.errors import InputError, RowError

T = TypeVar("T")

SHOWN = 3
"""Rows of each reason that are named."""


class OddRow(RowError):
    """A row whose meaning is not plain.

    Args:
        reason: what is wrong, in the same words for every row of its kind.
        detail: what is special about this row, or what would help.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


class SourceRow(NamedTuple):
    """A row of a source, and where it stands."""

    file: str
    number: int
    """From 1; in a file of JSON lines, the number of the line."""
    values: dict[str, Any] | OddRow
    """The cells by column, or why there are none."""

    @property
    def place(self) -> str:
        return f"{self.file}: row {self.number}"


class OddRows:
    """The odd rows of one source, counted by reason.

    Args:
        path: the source, as the user wrote it.
    """

    def __init__(self, path: str):
        self.path, self.rows = path, 0
        self.counts: Counter[str] = Counter()
        self._first: dict[str, list[tuple[str, OddRow]]] = {}

    def add(self, row: SourceRow, odd: OddRow) -> None:
        self.counts[odd.reason] += 1
        first = self._first.setdefault(odd.reason, [])
        if len(first) < SHOWN:
            first.append((row.place, odd))

    def check(self, max_error_rate: float) -> None:
        """Checks that enough of the source's rows are left.

        One odd row alone is never too many, unless `max_error_rate` is 0.

        Raises:
            InputError: there are more odd rows than `max_error_rate` allows, or no others.
        """
        odd = self.counts.total()
        allowed = max(1.0, max_error_rate * self.rows) if max_error_rate else 0
        if odd == 0 or (odd < self.rows and odd <= allowed):
            return
        reason = self.counts.most_common(1)[0][0]
        place, first = self._first[reason][0]
        if odd == self.rows:
            raise InputError(f"{place}: {first}; none of the {odd} rows of {self.path} can be used")
        cannot = f"{place}: {first}; {odd} of the {self.rows} rows of {self.path} cannot be used"
        if not max_error_rate:
            raise InputError(f"{cannot}, and none may be left out; mend or remove them")
        raise InputError(
            f"{cannot}, more than max_error_rate={max_error_rate:g}; mend or remove them, or raise max_error_rate"
        )

    def lines(self) -> Iterator[str]:
        """One line for each reason, the most frequent first."""
        for reason, count in self.counts.most_common():
            first = self._first[reason]
            places = ", ".join(place.removeprefix(f"{self.path}: ") for place, _ in first)
            detail = f" ({first[0][1].detail})" if first[0][1].detail else ""
            more = ", …" if count > len(first) else ""
            yield f"{self.path}: {count} of {self.rows} rows left out, {reason}{detail}: {places}{more}"


class LeftOut(Counter[str]):
    """How many rows of some sources were left out, by reason.

    Args:
        max_error_rate: the share of a source's rows that may be odd. By default one good row is enough.
    """

    def __init__(self, max_error_rate: float = 1.0):
        super().__init__()
        self.max_error_rate = max_error_rate
        self.lines: list[str] = []
        """What is to be told about odd rows: a line for each source and reason."""


def read_source(
    path: str, rows: Iterable[SourceRow], read: Callable[[Mapping[str, Any]], T | None], left_out: LeftOut
) -> Iterator[T]:
    """What `read` makes of each row of a source. It returns None for a row that says nothing.

    Args:
        read: raises OddRow for a row that cannot be used.
        left_out: counts these rows.

    Raises:
        InputError: too many rows are odd (`OddRows.check`).
    """
    odd = OddRows(path)
    for row in rows:
        odd.rows += 1
        try:
            if isinstance(row.values, OddRow):
                raise row.values
            made = read(row.values)
        except OddRow as e:
            odd.add(row, e)
            continue
        if made is not None:
            yield made
    odd.check(left_out.max_error_rate)
    left_out.update(odd.counts)
    left_out.lines += odd.lines()


def short(value: Any) -> str:
    """A value of a user's row as part of a message: one line, and not long."""
    return repr(value)[:80]


def short_list(names: Iterable[str]) -> str:
    """Names of columns as part of a message."""
    text = ", ".join(map(str, names))
    return text if len(text) <= 120 else f"{text[:120]}…"
