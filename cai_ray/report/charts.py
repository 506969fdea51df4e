"""Charts as inline SVG, drawn by Matplotlib and coloured by the page's style, so that they follow light and dark.

Each function gives one `<svg>`, or nothing where there is nothing to draw. The same data give the same text, whatever a
user has set Matplotlib to. It takes half a second to import, so it is imported by what draws. Sizes are CSS pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING, NamedTuple

from cai_ray.report.figures import INK, axes_of, colour, line, svg
from cai_ray.report.text import percent as share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_LONGEST = 28  # characters of a label; its tooltip has them all
_GAP = 7.0  # between a dot and its label
_SIDES = (
    (1, 0),
    (-1, 0),
    (0, 1),
    (0, -1),
    (1, 1),
    (-1, 1),
    (1, -1),
    (-1, -1),
)  # of a dot, where its label may stand


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


class Point(NamedTuple):
    name: str
    x: float
    y: float
    x_low: float | None
    x_high: float | None
    y_low: float | None
    y_high: float | None
    style: str
    path: str = ""
    """Consecutive points of one path are joined."""


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
    """Lines over steps, which are whole numbers if all are. `low` and `high` widen the vertical axis to hold them."""
    # A value that diverged has no place on an axis.
    series = [line._replace(points=[p for p in line.points if all(map(math.isfinite, p))]) for line in series]
    series = [line for line in series if line.points]
    if not series:
        return ""
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
                tips = [f"{name}{x:g}: {_exact(y, percent)}" for x, y in line.points]
                _dots(axes, line.points, line.style, tips, size=min(36.0, 2400 / len(tips)))
        _ticks(axes, "y", [*ys, *(v for v in (low, high) if v is not None)], percent=percent)
        if low is not None and low <= min(ys):
            axes.set_ylim(bottom=low)  # also where all values are `low`: nothing lies below
        whole = all(float(x).is_integer() for x in xs)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=whole, min_n_ticks=1, steps=[1, 2, 5, 10]))
        alone = 0.5 if min(xs) == max(xs) else 0.0
        axes.set_xlim(min(xs) - alone, max(xs) + alone)
        axes.grid(visible=False, axis="x")
        return svg(figure, title)


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], *, title: str, width: int = 640) -> str:
    """Horizontal bars of shares with their intervals, in groups with a label each."""
    groups = [(label, members) for label, members in groups if members]
    if not groups:
        return ""
    thick, step, between = 13, 16, 14
    middles, y = [], 0.0
    with axes_of(width, sum(step * len(members) + between for _, members in groups)) as (figure, axes):
        for label, members in groups:
            middles.append(y + step * (len(members) - 1) / 2)
            for bar in members:
                tip = f"{label}, {bar.name}: {share(bar.value)}"
                # A bar of nothing still shows whose it is.
                axes.barh(y, max(bar.value, 0.003), thick, color=colour(bar.style), gid=_tips([tip]))
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
        axes.set_yticks(middles, [_short(label) for label, _ in groups], color=INK["ink"], fontsize=11.5)
        axes.grid(visible=False)
        return svg(figure, title)


def frontier(
    points: Sequence[Point],
    *,
    title: str,
    x_label: str,
    y_label: str,
    percent: bool = False,
    width: int = 640,
    height: int = 400,
) -> str:
    """Points on two scales, with their intervals and their names beside them.

    A point of a path whose name finds no free place is named by its tooltip alone; other points always have theirs.
    """
    points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not points:
        return ""
    with axes_of(width, height) as (figure, axes):
        for a, b in pairwise(points):
            if a.path and a.path == b.path:
                axes.plot([a.x, b.x], [a.y, b.y], color=colour(b.style), linewidth=1, alpha=0.7)
        for p in points:
            tip = f"{p.name}: {_exact(p.x, percent)}, {_exact(p.y, percent)}"
            _dots(axes, [(p.x, p.y)], p.style, [tip], size=30 if p.path else 60)
            for across, up in _intervals(p):
                axes.plot(across, up, color=colour(p.style), linewidth=1.2, alpha=0.55, solid_capstyle="butt")
        corners = [
            (x, y) for p in points for across, up in _intervals(p) for x, y in zip(across, up, strict=True)
        ]
        xs, ys = zip(*corners, *((p.x, p.y) for p in points), strict=True)
        _ticks(axes, "x", xs, percent=percent, most=6)
        _ticks(axes, "y", ys, percent=percent, most=6)
        axes.set(xlabel=_short(x_label, 80), ylabel=_short(y_label, 50))
        figure.draw_without_rendering()  # now the axes are where they will be
        _name(axes, points)
        return svg(figure, title)


def matrix(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    width: int = 640,
) -> str:
    """A heat map of shares, `values[i][j]` that of row i in column j; the cell of None has no colour.

    Up to 20 columns have their number in the cell; more than 60 are named by the tooltips alone.
    """
    known = [
        (i, j, value)
        for i, line in enumerate(values)
        for j, value in enumerate(line)
        if value is not None and math.isfinite(value)
    ]
    if not known:
        return ""
    few = len(columns) <= 20
    heads = [_short(name) for name in columns] if len(columns) <= 60 else []
    # Names that would touch their neighbours stand upright.
    upright = max(map(len, heads), default=0) * 6.5 > (width - 120) / len(columns)
    high, tall = (24 if few else 14), max(map(len, heads), default=0) * 6.5 if upright else 20
    with axes_of(width, round(high * len(rows) + tall + 10)) as (figure, axes):
        from matplotlib.collections import PolyCollection

        corners = [[(j, i), (j + 1, i), (j + 1, i + 1), (j, i + 1)] for i, j, _ in known]
        # At most so opaque that the number's ink is read on it, in light and dark.
        shades = [(INK["rl"], 0.55 * min(max(value, 0.0), 1.0)) for *_, value in known]
        tips = [f"{rows[i]}, {columns[j]}: {share(value)}" for i, j, value in known]
        axes.add_collection(PolyCollection(corners, facecolors=shades, linewidths=0, gid=_tips(tips)))
        numbers = {(i, j): f"{100 * value:.0f}" for i, j, value in known}
        for i, j in product(range(len(rows)), range(len(columns))) if few else ():
            axes.text(j + 0.5, i + 0.5, numbers.get((i, j), "–"), ha="center", va="center")
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        axes.set_xticks([j + 0.5 for j in range(len(heads))], heads, rotation=90 if upright else 0)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], [_short(name) for name in rows])
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
) -> str:
    """A reliability diagram of (confidence, share, n): calibrated is what is on the diagonal; a dot's area is n."""
    points = sorted(p for p in points if p[2] > 0)
    if not points:
        return ""
    placed = [(confidence, right) for confidence, right, _ in points]
    most = max(n for *_, n in points)
    tips = [f"{x_label} {share(x)}: {share(y)} ({n:g})" for x, y, n in points]
    with axes_of(width, height) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=INK["soft"], linewidth=1, linestyle=(0, (4, 4)))
        axes.plot(*zip(*placed, strict=True), color=colour("rl"), linewidth=1.5)
        _dots(axes, placed, "rl", tips, size=[max(6.0, 180 * n / most) for *_, n in points])
        _ticks(axes, "x", [0, 1], percent=True, most=5)
        _ticks(axes, "y", [0, 1], percent=True, most=5)
        axes.set(xlabel=_short(x_label, 50), ylabel=_short(y_label, 40))
        return svg(figure, title)


def _dots(
    axes: Axes,
    at: Sequence[tuple[float, float]],
    style: str,
    tips: Sequence[str],
    size: float | Sequence[float],
) -> None:
    """Dots with a tooltip each. `size` is the square of the diameter in pixels."""
    xs, ys = zip(*at, strict=True)
    axes.scatter(xs, ys, size, color=colour(style), linewidths=0, zorder=3, gid=_tips(tips))


def _tips(texts: Sequence[str]) -> str:
    """Tooltips of an artist's marks, in the one place that Matplotlib carries into the SVG: the artist's id."""
    return json.dumps(texts)


def _ticks(axes: Axes, axis: str, values: Sequence[float], *, percent: bool = False, most: int = 4) -> None:
    """Gives the axis x or y the round numbers that enclose the values, in `most` steps or fewer; it ends with them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    low, high = min(values), max(values)
    around = 0.05 * (abs(low) or 1.0) if low == high else 0.0
    ticks = MaxNLocator(most, steps=[1, 2, 2.5, 5, 10]).tick_values(low - around, high + around)
    axes.set(**{f"{axis}ticks": ticks, f"{axis}lim": (ticks[0], ticks[-1])})
    if percent:
        (axes.xaxis if axis == "x" else axes.yaxis).set_major_formatter(
            FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %")
        )


def _intervals(p: Point) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The ends of a point's known intervals: their places on x, and on y."""
    found = []
    if p.x_low is not None and p.x_high is not None:
        found.append(((p.x_low, p.x_high), (p.y, p.y)))
    if p.y_low is not None and p.y_high is not None:
        found.append(((p.x, p.x), (p.y_low, p.y_high)))
    return found


def _name(axes: Axes, points: Sequence[Point]) -> None:
    """Writes each name beside its dot, where it covers least of dots, intervals, paths and other names."""
    import numpy as np
    from matplotlib.transforms import Bbox

    def box(x0: float, x1: float, y0: float, y1: float, pad: float) -> Bbox:
        return Bbox(axes.transData.transform([(x0, y0), (x1, y1)])).padded(pad)

    taken = [box(p.x, p.x, p.y, p.y, pad=4) for p in points]
    taken += [box(*xs, *ys, pad=1) for p in points for xs, ys in _intervals(p)]
    for a, b in pairwise(points):
        if a.path and a.path == b.path:
            start, end = axes.transData.transform([(a.x, a.y), (b.x, b.y)])
            stations = max(2, int(math.dist(start, end) / 5))
            taken += [Bbox([at, at]).padded(1) for at in np.linspace(start, end, stations)]

    def covers(label: Bbox) -> float:
        """Square pixels of what it covers, and of what of it leaves the axes."""
        inside = _common(label, axes.bbox)
        return sum(_common(label, other) for other in taken) + 4 * (label.width * label.height - inside)

    for p in sorted(points, key=lambda p: bool(p.path)):
        text = axes.annotate(_short(p.name), (p.x, p.y), (0, 0), textcoords="offset points")
        text.set(fontsize=10 if p.path else 11.5, in_layout=False)  # the axes stay where they are

        def cost(side: tuple[int, int], text: Annotation = text) -> float:
            across, up = side
            text.set(ha=("center", "left", "right")[across], va=("center", "bottom", "top")[up])
            text.xyann = (across * _GAP, up * _GAP)
            return covers(text.get_window_extent())

        if cost(min(_SIDES, key=cost)) > 0 and p.path:
            text.remove()
        else:
            taken.append(text.get_window_extent())


def _common(a: Bbox, b: Bbox) -> float:
    """Area that two boxes share."""
    across = min(a.x1, b.x1) - max(a.x0, b.x0)
    up = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(across, 0.0) * max(up, 0.0)


def _exact(value: float, percent: bool) -> str:
    return share(value) if percent else f"{value:.4g}"


def _short(text: str, most: int = _LONGEST) -> str:
    text = line(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"
