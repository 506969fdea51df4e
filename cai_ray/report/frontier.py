"""A chart of policies on two scales, such as helpful and harmless, with their names where they cover least."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup

from cai_ray.report.figures import axes_of, colour, svg
from cai_ray.report.marks import dots, exact, set_ticks, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_GAP = 7.0  # between a dot and its name
# Sides of a dot where its name may stand, the best first.
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))


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


def frontier(
    points: Sequence[Point],
    *,
    title: str,
    x_label: str,
    y_label: str,
    percent: bool = False,
    width: int = 640,
    height: int = 400,
) -> Markup:
    """Points on two scales, with their intervals and their names beside them.

    A point of a path whose name finds no free place is named by its tooltip alone; other points always have theirs.
    """
    points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not points:
        return Markup()
    with axes_of(width, height) as (figure, axes):
        for a, b in pairwise(points):
            if a.path and a.path == b.path:
                axes.plot([a.x, b.x], [a.y, b.y], color=colour(b.style), linewidth=1, alpha=0.7)
        for p in points:
            tip = f"{p.name}: {exact(p.x, percent)}, {exact(p.y, percent)}"
            dots(axes, [(p.x, p.y)], p.style, [tip], size=30 if p.path else 60)
            for across, up in _intervals(p):
                axes.plot(across, up, color=colour(p.style), linewidth=1.2, alpha=0.55, solid_capstyle="butt")
        corners = [
            (x, y) for p in points for across, up in _intervals(p) for x, y in zip(across, up, strict=True)
        ]
        xs, ys = zip(*corners, *((p.x, p.y) for p in points), strict=True)
        set_ticks(axes, "x", xs, percent=percent, most=6)
        set_ticks(axes, "y", ys, percent=percent, most=6)
        axes.set(xlabel=shortened(x_label, 80), ylabel=shortened(y_label, 50))
        figure.draw_without_rendering()  # now the axes are where they will be
        _write_names(axes, points)
        return svg(figure, title)


def _intervals(p: Point) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The ends of a point's known intervals: their places on x, and on y."""
    ends = []
    if p.x_low is not None and p.x_high is not None:
        ends.append(((p.x_low, p.x_high), (p.y, p.y)))
    if p.y_low is not None and p.y_high is not None:
        ends.append(((p.x, p.x), (p.y_low, p.y_high)))
    return ends


def _write_names(axes: Axes, points: Sequence[Point]) -> None:
    """Writes each name beside its dot, where it covers least of dots, intervals, paths and other names."""
    taken = list(_obstacles(axes, points))

    def covers(label: Bbox) -> float:
        """Square pixels of other marks below the label, and four for each that lies outside the axes."""
        inside = _common(label, axes.bbox)
        return sum(_common(label, other) for other in taken) + 4 * (label.width * label.height - inside)

    for p in sorted(points, key=lambda p: bool(p.path)):
        text = axes.annotate(shortened(p.name), (p.x, p.y), (0, 0), textcoords="offset points")
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


def _obstacles(axes: Axes, points: Sequence[Point]) -> Iterator[Bbox]:
    """The boxes of dots, intervals and paths, in pixels."""
    import numpy as np
    from matplotlib.transforms import Bbox

    def box(x0: float, x1: float, y0: float, y1: float, pad: float) -> Bbox:
        return Bbox(axes.transData.transform([(x0, y0), (x1, y1)])).padded(pad)

    for p in points:
        yield box(p.x, p.x, p.y, p.y, pad=4)
        for xs, ys in _intervals(p):
            yield box(*xs, *ys, pad=1)
    for a, b in pairwise(points):
        if a.path and a.path == b.path:
            start, end = axes.transData.transform([(a.x, a.y), (b.x, b.y)])
            stations = max(2, int(math.dist(start, end) / 5))
            for at in np.linspace(start, end, stations):
                yield Bbox([at, at]).padded(1)


def _common(a: Bbox, b: Bbox) -> float:
    """Area that two boxes share."""
    across = min(a.x1, b.x1) - max(a.x0, b.x0)
    up = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(across, 0.0) * max(up, 0.0)
