"""How numbers and texts are written, on the page and on a terminal."""

from __future__ import annotations

import re
from typing import Any

# Control characters, marks that change the direction of writing, and surrogates that stand alone.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def interval(rate: dict[str, Any]) -> str:
    """The bounds of a rate in percent; empty if it has none."""
    if rate.get("low") is None or rate.get("high") is None:
        return ""
    return f"{100 * rate['low']:.1f}–{100 * rate['high']:.1f}"


def signed(value: float | None, digits: int = 2) -> str:
    """A number with its sign, such as a reward."""
    return "–" if value is None else f"{value:+.{digits}f}"


def duration(seconds: float | None) -> str:
    """A time in seconds, or in hours from 1,000 seconds on."""
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds < 1000 else f"{seconds / 3600:,.2f} h"


def price(amount: float | None, currency: str | None) -> str:
    if amount is None or currency is None:
        return ""
    return f"{amount:,.2f} {currency}" if amount >= 1 else f"{amount:.2g} {currency}"


def token_counts(counts: dict[str, int] | None) -> str:
    """Counts of tokens by kind; kinds without any are left out."""
    return ", ".join(f"{_rounded(count)} {kind}" for kind, count in (counts or {}).items() if count)


def _rounded(count: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f}"


def visible(text: str | None) -> str:
    """A text with � for every character that could steer a terminal or is not valid Unicode; line breaks stay."""
    return _CONTROL.sub("�", text or "")


def columns(rows: list[list[str]]) -> list[str]:
    """Rows of texts as lines, each column as wide as its widest text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
