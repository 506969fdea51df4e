"""Charts as inline SVG, coloured by the page's style, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cai_ray.report.text import safe


class Line(NamedTuple):
    points: Sequence[tuple[float, float]]
    style: str
    """Class of the page's style: a colour, and `faint` or `dashed`."""
    name: str = ""


class Bar(NamedTuple):
    name: str
    value: float
    low: float | None
    high: float | None
    style: str


def lines(
    series: Sequence[Line],
    *,
    title: str,
    percent: bool = False,
    low: float | None = None,
    high: float | None = None,
    width: int = 320,
    height: int = 170,
) -> str:
    """Lines over whole-numbered steps. `low` and `high` widen the vertical axis to hold them."""
    points = [p for line in series for p in line.points]
    if not points:
        return ""
    xs = [x for x, _ in points]
    ys = [y for _, y in points] + [v for v in (low, high) if v is not None]
    ticks = nice_ticks(min(ys), max(ys))
    left, right, top, bottom = 46, 12, 8, 22
    x_low, x_span = min(xs), max(max(xs) - min(xs), 1e-9)
    y_low, y_span = ticks[0], ticks[-1] - ticks[0]

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x_low) / x_span * (width - left - right)
        return across, top + (1 - (y - y_low) / y_span) * (height - top - bottom)

    parts: list[str] = []
    for tick in ticks:
        _, y = at(x_low, tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_number(tick, percent)}</text>'
        )
    for whole in whole_ticks(min(xs), max(xs)):
        x = at(whole, y_low)[0]
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{whole}</text>')
    for line in series:
        placed = [at(x, y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if "faint" not in line.style:
            for (x, y), (step, value) in zip(placed, line.points, strict=True):
                tip = f"{line.name + ' ' if line.name else ''}{step:g}: {_number(value, percent, exact=True)}"
                dot = f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                parts.append(f"{dot}<title>{safe(tip)}</title></circle>")
    return _svg(parts, width, height, title)


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], *, title: str, width: int = 640) -> str:
    """Horizontal bars of shares with their intervals, in groups with a label each."""
    left, right, thick, gap, between = 110, 60, 13, 3, 14
    span = width - left - right
    parts: list[str] = []
    y = 4.0
    for label, members in groups:
        middle = y + (len(members) * (thick + gap) - gap) / 2
        parts.append(
            f'<text class="name" x="{left - 10}" y="{middle + 4:.1f}" text-anchor="end">{safe(label)}</text>'
        )
        for bar in members:
            tip = f"{label}, {bar.name}: {_number(bar.value, True, exact=True)}"
            length = max(bar.value * span, 1.5)
            parts.append(
                f'<rect class="bar {bar.style}" x="{left}" y="{y:.1f}" width="{length:.1f}" height="{thick}" rx="2">'
                f"<title>{safe(tip)}</title></rect>"
            )
            end = length
            if bar.low is not None and bar.high is not None:
                a, b, mid = left + bar.low * span, left + bar.high * span, y + thick / 2
                parts.append(f'<line class="error" x1="{a:.1f}" x2="{b:.1f}" y1="{mid:.1f}" y2="{mid:.1f}"/>')
                end = max(end, bar.high * span)
            text = _number(bar.value, True, exact=True)
            parts.append(f'<text class="tick" x="{left + end + 6:.1f}" y="{y + thick - 3:.1f}">{text}</text>')
            y += thick + gap
        y += between
    return _svg(parts, width, max(1, round(y - between + 4)), title)


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that enclose an interval."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def whole_ticks(low: float, high: float, most: int = 8) -> list[int]:
    first, last = math.ceil(low), math.floor(high)
    step = 1
    while (last - first) / step + 1 > most:
        step = step * 2 if str(step)[0] in "15" else step * 5 // 2
    return list(range(first, last + 1, step))


def _number(value: float, percent: bool, exact: bool = False) -> str:
    if percent:
        return f"{100 * value:.{1 if exact else 0}f} %"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        return f"{value:.{3 if exact else 2}g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}" if exact else f"{value:g}"


def _svg(parts: Sequence[str], width: int, height: int, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{safe(title)}">'
        f"<title>{safe(title)}</title>{''.join(parts)}</svg>"
    )
