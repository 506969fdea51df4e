"""Charts as inline SVG, drawn by Matplotlib and coloured by the page's style, so that they follow light and dark.

Each function gives one `<svg>`, or nothing where there is nothing to draw. The same data give the same text, whatever a
user has set Matplotlib to. It takes half a second to import, so it is imported by what draws. Sizes are CSS pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from markupsafe import Markup

from cai_ray.report.figures import INK, axes_of, colour, svg
from cai_ray.report.marks import dots, exact, set_ticks, shortened, tooltips
from cai_ray.report.text import percent as share


class Line(NamedTuple):
    points: Sequence[tuple[float, float]]
    style: str
    """A colour of the page's style (`rl`, `sl`, `base`, `control`, `c1`, `c2`), and `faint` or `dashed`."""
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
) -> Markup:
    """Lines over steps, which are whole numbers if all are. `low` and `high` widen the vertical axis to hold them."""
    # A value that diverged has no place on an axis.
    series = [line._replace(points=[p for p in line.points if all(map(math.isfinite, p))]) for line in series]
    series = [line for line in series if line.points]
    if not series:
        return Markup()
    xs, ys = zip(*[p for line in series for p in line.points], strict=True)
    with axes_of(width, height) as (figure, axes):
        from matplotlib.ticker import MaxNLocator

        for line in series:
            faint, dashed = "faint" in line.style, "dashed" in line.style
            axes.plot(
                *zip(*line.points, strict=True),
                color=colour(line.style),
                alpha=0.4 if faint else 0.8 if dashed else None,
                linewidth=1 if faint else 2,
                linestyle=(0, (2, 2)) if dashed else "-",
            )
            if not faint:
                name = f"{line.name} " if line.name else ""
                tips = [f"{name}{x:g}: {exact(y, percent)}" for x, y in line.points]
                dots(axes, line.points, line.style, tips, size=min(36.0, 2400 / len(tips)))
        set_ticks(axes, "y", [*ys, *(v for v in (low, high) if v is not None)], percent=percent)
        if low is not None and low <= min(ys):
            axes.set_ylim(bottom=low)  # also where all values are `low`: nothing lies below
        whole = all(float(x).is_integer() for x in xs)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=whole, min_n_ticks=1, steps=[1, 2, 5, 10]))
        alone = 0.5 if min(xs) == max(xs) else 0.0
        axes.set_xlim(min(xs) - alone, max(xs) + alone)
        axes.grid(visible=False, axis="x")
        return svg(figure, title)


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], *, title: str, width: int = 640) -> Markup:
    """Horizontal bars of shares with their intervals, in groups with a label each."""
    groups = [(label, members) for label, members in groups if members]
    if not groups:
        return Markup()
    thick, step, between = 13, 16, 14
    middles, y = [], 0.0
    with axes_of(width, sum(step * len(members) + between for _, members in groups)) as (figure, axes):
        for label, members in groups:
            middles.append(y + step * (len(members) - 1) / 2)
            for bar in members:
                tip = f"{label}, {bar.name}: {share(bar.value)}"
                # A bar of nothing still shows whose it is.
                axes.barh(y, max(bar.value, 0.003), thick, color=colour(bar.style), gid=tooltips([tip]))
                end = bar.value
                if bar.low is not None and bar.high is not None:
                    axes.hlines(y, bar.low, bar.high, color=INK["ink"], linewidth=1.2, alpha=0.65)
                    end = max(end, bar.high)
                axes.annotate(
                    share(bar.value),
                    (end, y),
                    (6, 0),
                    textcoords="offset points",
                    va="center",
                    color=INK["soft"],
                )
                y += step
            y += between
        axes.set(xlim=(0, 1), xticks=[], ylim=(y - between - step / 2, -step / 2))
        axes.set_yticks(middles, [shortened(label) for label, _ in groups], color=INK["ink"], fontsize=11.5)
        axes.grid(visible=False)
        return svg(figure, title)


def matrix(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    width: int = 640,
) -> Markup:
    """A heat map of shares, `values[i][j]` that of row i in column j; the cell of None has no colour.

    Up to 20 columns have their number in the cell; more than 60 are named by the tooltips alone.
    """
    cells = [
        (i, j, value)
        for i, line in enumerate(values)
        for j, value in enumerate(line)
        if value is not None and math.isfinite(value)
    ]
    if not cells:
        return Markup()
    few = len(columns) <= 20
    heads = [shortened(name) for name in columns] if len(columns) <= 60 else []
    # Names that would touch their neighbours stand upright.
    upright = max(map(len, heads), default=0) * 6.5 > (width - 120) / len(columns)
    high, tall = (24 if few else 14), max(map(len, heads), default=0) * 6.5 if upright else 20
    with axes_of(width, round(high * len(rows) + tall + 10)) as (figure, axes):
        from matplotlib.collections import PolyCollection

        corners = [[(j, i), (j + 1, i), (j + 1, i + 1), (j, i + 1)] for i, j, _ in cells]
        # At most so opaque that the number's ink is read on it, in light and dark.
        shades = [(INK["rl"], 0.55 * min(max(value, 0.0), 1.0)) for *_, value in cells]
        tips = [f"{rows[i]}, {columns[j]}: {share(value)}" for i, j, value in cells]
        axes.add_collection(PolyCollection(corners, facecolors=shades, linewidths=0, gid=tooltips(tips)))
        numbers = {(i, j): f"{100 * value:.0f}" for i, j, value in cells}
        for i, j in product(range(len(rows)), range(len(columns))) if few else ():
            axes.text(j + 0.5, i + 0.5, numbers.get((i, j), "–"), ha="center", va="center")
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        axes.set_xticks([j + 0.5 for j in range(len(heads))], heads, rotation=90 if upright else 0)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], [shortened(name) for name in rows])
        axes.xaxis.tick_top()
        axes.grid(visible=False)
        return svg(figure, title)


def diagonal(
    points: Sequence[tuple[float, float, float]],
    *,
    title: str,
    x_label: str = "confidence",
    y_label: str = "share",
    width: int = 340,
    height: int = 320,
) -> Markup:
    """A reliability diagram of (confidence, share, n): calibrated is what is on the diagonal; a dot's area is n."""
    points = sorted(p for p in points if p[2] > 0)
    if not points:
        return Markup()
    placed = [(confidence, right) for confidence, right, _ in points]
    most = max(n for *_, n in points)
    tips = [f"{x_label} {share(x)}: {share(y)} ({n:g})" for x, y, n in points]
    with axes_of(width, height) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=INK["soft"], linewidth=1, linestyle=(0, (4, 4)))
        axes.plot(*zip(*placed, strict=True), color=colour("rl"), linewidth=1.5)
        dots(axes, placed, "rl", tips, size=[max(6.0, 180 * n / most) for *_, n in points])
        set_ticks(axes, "x", [0, 1], percent=True, most=5)
        set_ticks(axes, "y", [0, 1], percent=True, most=5)
        axes.set(xlabel=shortened(x_label, 50), ylabel=shortened(y_label, 40))
        return svg(figure, title)
