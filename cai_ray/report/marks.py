"""Marks that several charts share: dots with tooltips, ticks at round numbers, and texts short enough for a label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cai_ray.report.figures import colour, line
from cai_ray.report.text import percent as share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST = 28  # characters of a label; its tooltip has them all


def dots(
    axes: Axes,
    at: Sequence[tuple[float, float]],
    style: str,
    texts: Sequence[str],
    size: float | Sequence[float],
) -> None:
    """Dots with a tooltip each. `size` is the square of the diameter in pixels."""
    xs, ys = zip(*at, strict=True)
    axes.scatter(xs, ys, size, color=colour(style), linewidths=0, zorder=3, gid=tooltips(texts))


def tooltips(texts: Sequence[str]) -> str:
    """Tooltips of an artist's marks, in the one place that Matplotlib carries into the SVG: the artist's id."""
    return json.dumps(texts)


def set_ticks(
    axes: Axes, axis: str, values: Sequence[float], *, percent: bool = False, most: int = 4
) -> None:
    """Gives the axis x or y the round numbers that enclose the values, in `most` steps or fewer; it ends with them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = min(values), max(values)
    around = 0.05 * (abs(low) or 1.0) if low == high else 0.0
    ticks = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low - around, high + around)
    axes.set(**{f"{axis}ticks": ticks, f"{axis}lim": (ticks[0], ticks[-1])})
    if percent:
        (axes.xaxis if axis == "x" else axes.yaxis).set_major_formatter(
            FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}%")
        )


def exact(value: float, percent: bool) -> str:
    return share(value) if percent else f"{value:.4g}"


def shortened(text: str, most: int = _LONGEST) -> str:
    text = line(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"
