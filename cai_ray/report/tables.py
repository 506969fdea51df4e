"""The forms of the page's tables; templates/macros.html draws them."""

from __future__ import annotations

from typing import NamedTuple


class Table(NamedTuple):
    """A table of texts. The first cell of a row is its name."""

    head: list[str]
    rows: list[list[str]]


class Fact(NamedTuple):
    """One measured number and its meaning."""

    name: str
    value: str
    meaning: str
