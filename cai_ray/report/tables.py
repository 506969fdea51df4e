"""The page's tables. Every text that is not ours is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cai_ray.report.text import interval, name_of, percent, rates, safe


def results(report: dict[str, Any]) -> str:
    """The main table: a row per rate, a column per policy, intervals beneath the values."""
    head = "".join(f'<th scope="col">{safe(name_of(m))}</th>' for m in report["models"])
    body = []
    for label, cells in rates(report):
        inner = label.startswith("  ")
        values = "".join(_rate(cell) for cell in cells)
        body.append(
            f'<tr{" class=inner" if inner else ""}><th scope="row">{safe(label.strip())}</th>{values}</tr>'
        )
    return _table(f"<tr><td></td>{head}</tr>", body, "results")


def facts(rows: Sequence[tuple[str, str, str]]) -> str:
    """What was measured, its value, and what it means."""
    body = []
    for name, value, why in rows:
        cells = f'<td class="n">{safe(value)}</td><td class="why">{safe(why)}</td>'
        body.append(f'<tr><th scope="row">{safe(name)}</th>{cells}</tr>')
    return _table("", body, "facts")


def plain(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts: the first cell of a row is its name."""
    top = "".join(f'<th scope="col">{safe(h)}</th>' for h in head)
    body = []
    for name, *cells in rows:
        values = "".join(f'<td class="n">{safe(c)}</td>' for c in cells)
        body.append(f'<tr><th scope="row">{safe(name)}</th>{values}</tr>')
    return _table(f"<tr>{top}</tr>", body, "plain")


def tokens(found: dict[str, int] | None) -> str:
    return ", ".join(f"{_short(v)} {k}" for k, v in (found or {}).items() if v)


def _rate(rate: dict[str, Any]) -> str:
    seeds = ", ".join(percent(v) for v in rate.get("seeds") or [] if v is not None)
    about = f"n = {rate['n']}" + (f"; seeds: {seeds}" if "," in seeds else "")
    return f'<td class="n" title="{safe(about)}">{percent(rate["value"])}<small>{interval(rate)}</small></td>'


def _short(n: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f}"


def _table(head: str, body: Sequence[str], style: str) -> str:
    top = f"<thead>{head}</thead>" if head else ""
    return f'<div class="scroll"><table class="{style}">{top}<tbody>{"".join(body)}</tbody></table></div>'
