"""The charts of the report: what is in them, and what a page needs of them."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from cai_ray.report import charts
from cai_ray.report.charts import Bar, Line
from cai_ray.report.frontier import Point
from cai_ray.report.frontier import frontier as draw_frontier

SVG = "{http://www.w3.org/2000/svg}"
EVIL = '</title><script>alert(1)</script> & "x" $x_1$ \n \x1b[31m\x00 \ud800 \uffff 中 #c0de01 https://example.org'


def lines(name: str = "step") -> str:
    reward = [(0, 0.25), (1, 0.5), (2, 0.75)]
    faint = Line([(0, 0.2), (2, 0.6)], "rl faint")
    other = Line([(0, 0.3)], "base dashed", "other")
    return charts.lines([faint, Line(reward, "rl", name), other], title=name, percent=True, low=0, high=1)


def bars(name: str = "RL-CAI") -> str:
    members = [Bar(name, 0.0, 0.0, 0.125, "rl"), Bar("control", 0.5, None, 0.75, "control c2")]
    return charts.bars([(name, members), ("nobody", [])], title=name)


def frontier(name: str = "RL-CAI") -> str:
    points = [
        Point("base", 0.3, 0.4, None, None, None, None, "base"),
        *(Point(f"step {i}", 0.4 + i / 50, 0.6, None, None, None, None, "rl", "ppo") for i in range(5)),
        Point(name, 0.625, 0.8125, 0.55, 0.7, 0.75, None, "rl"),
    ]
    return draw_frontier(points, title=name, x_label=name, y_label="harmless")


def matrix(name: str = "respect") -> str:
    return charts.matrix([name, "safety"], [name, "safety"], [[0.875, None], [0.0, 1.0]], title=name)


def diagonal(name: str = "confidence") -> str:
    return charts.diagonal([(0.9375, 0.8125, 40), (0.5, 0.5, 10), (0.7, 0.0, 0)], title=name, x_label=name)


KINDS = [lines, bars, frontier, matrix, diagonal]
every = pytest.mark.parametrize("draw", KINDS, ids=lambda draw: draw.__name__)


def tips(svg: str) -> list[str]:
    """Tooltips of the marks: every title but the chart's own."""
    root = ElementTree.fromstring(svg)
    return [title.text or "" for title in root.iter(f"{SVG}title")][1:]


def written(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (lines, ["step 0: 25.0%", "step 1: 50.0%", "step 2: 75.0%", "other 0: 30.0%"]),
        (bars, ["RL-CAI, RL-CAI: 0.0%", "RL-CAI, control: 50.0%"]),
        (frontier, ["base: 0.3, 0.4", *(f"step {i}: {0.4 + i / 50:.4g}, 0.6" for i in range(5))]),
        (matrix, ["respect, respect: 87.5%", "safety, respect: 0.0%", "safety, safety: 100.0%"]),
        (diagonal, ["confidence 50.0%: 50.0% (10)", "confidence 93.8%: 81.2% (40)"]),
    ],
)
def test_every_value_is_in_a_tooltip_and_none_has_none(draw: Callable[[], str], expected: list[str]) -> None:
    found = tips(draw())
    if draw is frontier:
        expected = [*expected, "RL-CAI: 0.625, 0.8125"]
    assert found == expected


@every
def test_a_chart_scales_follows_the_page_and_fetches_nothing(draw: Callable[[], str]) -> None:
    svg = draw()
    root = ElementTree.fromstring(svg)
    assert root.attrib.keys() == {"viewBox", "role", "aria-label"}
    assert (root.get("role"), root[0].tag, root[0].text) == ("img", f"{SVG}title", root.get("aria-label"))
    assert re.findall(r"https?:[^\"]*", svg) == [SVG.strip("{}")]
    assert not re.search(r"#c0de|[:\"]\s*#[0-9a-f]{6}|url\(|font-family|<style|<!|<\?", svg)
    assert {"var(--ink)", "var(--soft)"} & set(re.findall(r"var\(--[a-z0-9-]+\)", svg))
    assert len(svg) < 10_000


@every
def test_hostile_names_are_shown_and_do_nothing(draw: Callable[[str], str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = draw(EVIL)
    root = ElementTree.fromstring(svg)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        *("svg", "title", "g", "defs", "path", "use", "text")
    }
    assert "<script>alert(1)</script>" in (root.get("aria-label") or "")
    assert any("$x_1$" in tip and "#c0de01" in tip for tip in tips(svg)) or draw is diagonal
    assert not {"\x1b", "\x00", "\uffff"} & set(svg)
    svg.encode()


@every
def test_the_same_data_give_the_same_text_whatever_is_set(draw: Callable[[], str]) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "svg.hashsalt": None}):
        changed = draw()
    assert changed == draw()
    assert dict(matplotlib.rcParams) == before


def test_ids_are_the_charts_own_and_what_is_referred_to_is_there() -> None:
    found = []
    for draw in (lines, diagonal):
        for name in ("one", "two"):
            root = ElementTree.fromstring(draw(name))
            ids = [i for element in root.iter() if (i := element.get("id"))]
            assert {e.get("href") for e in root.iter(f"{SVG}use")} <= {f"#{i}" for i in ids}
            found += ids
    assert len(found) == len(set(found)) >= 2


def test_steps_are_whole_and_distances_are_not() -> None:
    assert {"0", "1", "2"} <= set(written(charts.lines([Line([(0, 5.0), (2, 6.0)], "rl")], title="steps")))
    assert "0.2" in written(charts.lines([Line([(0.0, 5.0), (0.5, 6.0)], "rl")], title="distance"))


def test_axes_enclose_what_they_are_given() -> None:
    assert {"0%", "100%"} <= set(written(lines()))
    assert "−2" in written(charts.lines([Line([(0, -1.2), (1, 3.9)], "rl")], title="reward"))
    assert {"4", "0%"} <= set(
        written(charts.lines([Line([(4, 0.0)], "rl")], title="flat", percent=True, low=0))
    )
    assert not any("−" in w for w in written(charts.lines([Line([(4, 0.0)], "rl")], title="kl", low=0)))


def test_a_step_that_diverged_is_left_out() -> None:
    series = [Line([(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 2.0)], "rl", "step")]
    assert tips(charts.lines(series, title="loss")) == ["step 0: 1", "step 3: 2"]


def test_nothing_to_draw_is_nothing() -> None:
    assert charts.lines([Line([], "rl")], title="none") == charts.bars([], title="none") == ""
    assert draw_frontier([], title="none", x_label="x", y_label="y") == ""
    assert charts.matrix(["a"], ["b"], [[None]], title="none") == charts.diagonal([], title="none") == ""


def test_names_of_points_stand_beside_them_and_a_crowded_path_is_named_where_there_is_room() -> None:
    assert {"base", "RL-CAI"} <= set(written(frontier()))
    crowd = [Point(f"step {i}", i / 1000, 0.5, None, None, None, None, "rl", "ppo") for i in range(60)]
    far = Point("base", 1.0, 1.0, None, None, None, None, "base")
    names = written(draw_frontier([*crowd, far], title="crowd", x_label="x", y_label="y"))
    assert "base" in names
    assert 1 <= sum(name.startswith("step") for name in names) < 20


def test_a_matrix_has_numbers_while_they_can_be_read() -> None:
    assert [w for w in written(matrix()) if w in ("88", "–", "0", "100")] == ["88", "–", "0", "100"]
    names = [f"c{i}" for i in range(21)]
    wide = charts.matrix(["row"], names, [[0.5] * 21], title="wide")
    assert "50" not in written(wide)
    assert len(tips(wide)) == 21
    assert re.search(r"opacity: 0\.275\b", wide)


def test_what_draws_nothing_does_not_wait_for_matplotlib() -> None:
    code = "import sys, cai_ray.report.html, cai_ray.cli; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
