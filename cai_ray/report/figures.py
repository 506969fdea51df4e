"""A figure of Matplotlib as inline SVG in the page's colours and font: what every chart (charts.py) is drawn on."""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from cai_ray.report.text import visible
from cai_ray.stages import POLICIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The page's variable behind each class that asks for a colour; where several do, the last.
_COLOURS: dict[str, str] = {
    **{role: role for role in POLICIES},
    "control": "control",
    "c1": "control-1",
    "c2": "control-2",
}
# Matplotlib takes no variable for a colour. It draws in these, and `_svg` puts the variables in their place.
INK = {name: f"#c0de{i:02x}" for i, name in enumerate(("ink", "soft", "rule", *_COLOURS.values()), start=1)}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "cai_ray",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.family": "DejaVu Sans",  # texts are measured in it: it comes with Matplotlib, and most are narrower
    "font.size": 10.5,
    "text.color": INK["ink"],
    "axes.labelcolor": INK["soft"],
    "axes.labelsize": 10.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.autolimit_mode": "round_numbers",  # for `_ticks`: the outermost enclose the values
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
    "grid.color": INK["rule"],
    "grid.linewidth": 1,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{
        f"{ticks}.{key}": value
        for ticks in ("xtick", "ytick")
        for key, value in {
            "major.size": 0,
            "major.pad": 7,
            "labelsize": 10.5,
            "labelcolor": INK["soft"],
        }.items()
    },
}
_SVG, _HREF = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}href"
_DRAWN = ("d", "x", "y", "transform", "style")  # attributes of what is drawn


@contextmanager
def axes_of(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A new figure and its axes; within, Matplotlib's settings are ours and nobody else's."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A character that the measuring font lacks is measured as a box, and drawn by the browser.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type]  # its keys are typed as literals
        figure = Figure((width / 72, height / 72), dpi=72, layout="constrained")  # a point is then a pixel
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        yield figure, axes


def colour(style: str) -> str:
    return INK[["ink", *(variable for word, variable in _COLOURS.items() if word in style.split())][-1]]


def line(text: str) -> str:
    """A text as one line without what steers a terminal or stands in no XML."""
    return re.sub(r"[\n\ufffe\uffff]", " ", visible(text))


def svg(figure: Figure, title: str) -> Markup:
    """A figure as part of a page: marks and their tooltips, without what a file of its own needs.

    ElementTree has escaped its texts, so this is the one place where a chart becomes markup.
    """
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    title, text = line(title), drawn.getvalue()
    root = ElementTree.fromstring(text.replace(f' xmlns="{_SVG}"', "", 1))  # tags then are plain words
    for group in root.iter("g"):
        if (name := group.get("id", "")).startswith("["):
            marks = group.findall(".//use") or group.findall(".//path")
            for mark, tip in zip(marks, json.loads(name), strict=True):
                ElementTree.SubElement(mark, "title").text = line(tip)
    about = {"xmlns": _SVG, "viewBox": root.get("viewBox", ""), "role": "img", "aria-label": title}
    page = ElementTree.Element("svg", about)
    ElementTree.SubElement(page, "title").text = title
    # Charts of one page may not share an id.
    chart = "i" + hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:8]
    for style, alike in groupby(_marks(root, chart), lambda mark: mark.attrib.pop("style", "")):
        ElementTree.SubElement(page, "g", {"style": style} if style else {}).extend(alike)
    return Markup(ElementTree.tostring(page, encoding="unicode"))


def _marks(group: ElementTree.Element, chart: str) -> Iterator[ElementTree.Element]:
    """What is drawn, in order, out of Matplotlib's groups.

    Clips stay behind: the axes hold their data, and what is written beside them is meant to be seen.
    """
    for mark in group:
        if mark.tag == "g":
            yield from _marks(mark, chart)
        elif mark.tag in ("path", "text", "use") or mark.find("path") is not None:
            mark.tail = None
            for part in (mark, *mark.findall("path")):  # the path of a definition
                part.tail = None
                attributes = {key: _trim(key, value) for key, value in part.items() if key in _DRAWN}
                if mark.tag == "use":
                    attributes["href"] = f"#{chart}-{part.get(_HREF, '')[1:]}"
                elif part is not mark:
                    attributes["id"] = f"{chart}-{part.get('id')}"
                part.attrib = {key: value for key, value in attributes.items() if value}
            if mark.tag != "text":
                mark.text = None  # white space
            yield mark


def _trim(key: str, value: str) -> str:
    """An attribute with the page's variables and font, and places to a tenth of a pixel."""
    if key != "style":
        value = re.sub(r"rotate\(-0 [^)]*\)", "", " ".join(value.split()))
        return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), value)
    value = re.sub(r"font-family: [^;]*;? ?", "", value)
    for name, colour in INK.items():
        value = value.replace(colour, f"var(--{name})")
    return value
