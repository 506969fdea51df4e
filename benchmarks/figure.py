"""Draws docs/results.svg from the first table of docs/results.md.

    python benchmarks/figure.py [--check]

The table is the only source of the numbers. `--check` writes nothing and exits with 1 if the figure is not the one
that the table gives. The figure has its own background and follows the reader's light or dark theme.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

DOCS = Path(__file__).resolve().parents[1] / "docs"
ROWS = ("harm", "helpful", "over-refusal")
"""The rows of the table that are drawn, by how their first cell begins."""
NOTES = {"harm": "lower is better", "helpful": "higher is better", "over-refusal": "lower is better"}

WIDTH, LEFT, RIGHT = 720, 190, 150
BAR, GAP, GROUP = 18, 5, 30
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #24292f }
  .note, .tick { font-size: 11px; fill: #57606a }
  .back { fill: #ffffff } .grid { stroke: #d0d7de } .range { stroke: #24292f; stroke-width: 1.5 }
  .base { fill: #8c959f } .sl { fill: #54aeff } .rl { fill: #0550ae }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .note, .tick { fill: #8d96a0 } .back { fill: #0d1117 }
    .grid { stroke: #30363d } .range { stroke: #e6edf3 } .rl { fill: #a5d6ff }
  }"""


class Rate(NamedTuple):
    """A percentage as the table states it, with its 95% interval if it has one."""

    text: str
    value: float
    low: float
    high: float


def read_table(markdown: str) -> dict[str, dict[str, Rate]]:
    """The drawn rows of the first table: row name to column name to rate."""
    lines = iter(markdown.splitlines())
    columns = next(cells(line) for line in lines if line.startswith("| percent"))
    next(lines)
    table = {}
    for line in lines:
        if not line.startswith("|"):
            break
        row = dict(zip(columns, cells(line), strict=True))
        name = row["percent"].partition(":")[0]
        if name in ROWS:
            table[name] = {column: parse_rate(row[column]) for column in columns[1:4]}
    return table


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def parse_rate(text: str) -> Rate:
    """Reads `5.0 (3.5–6.5)` or `100.0`."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]
    value, low, high = numbers if len(numbers) == 3 else (numbers[0],) * 3
    return Rate(text, value, low, high)


def draw(table: dict[str, dict[str, Rate]]) -> str:
    """The figure as SVG: one group of bars per row, one bar per policy, a line for each interval."""
    parts, y = [], 34
    for name, rates in table.items():
        middle = y + (len(rates) * (BAR + GAP) - GAP) / 2
        parts.append(f'<text x="16" y="{middle - 2:g}">{escape(name)}</text>')
        parts.append(f'<text class="note" x="16" y="{middle + 14:g}">{NOTES[name]}</text>')
        for policy, rate in rates.items():
            parts += bar(policy, rate, y)
            y += BAR + GAP
        y += GROUP - GAP
    height = y + 6
    grid = [
        f'<line class="grid" x1="{place(tick):g}" y1="24" x2="{place(tick):g}" y2="{height - 26}"/>'
        f'<text class="tick" text-anchor="middle" x="{place(tick):g}" y="{height - 10}">{tick}%</text>'
        for tick in (0, 25, 50, 75, 100)
    ]
    title = "Errand Town, held-out prompts: mean of three seeds with 95% intervals"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            f"<title>{title}</title>",
            f"<style>{STYLE}\n</style>",
            f'<rect class="back" width="{WIDTH}" height="{height}" rx="6"/>',
            f'<text class="note" x="16" y="16">{title}</text>',
            *grid,
            *parts,
            "</svg>\n",
        ]
    )


def bar(policy: str, rate: Rate, y: float) -> list[str]:
    kind, middle = policy.partition("-")[0].lower(), y + BAR / 2
    low, high = place(rate.low), place(rate.high)
    return [
        f'<text class="note" text-anchor="end" x="{LEFT - 8}" y="{middle + 4:g}">{escape(policy)}</text>',
        f'<rect class="{kind}" x="{LEFT}" y="{y:g}" width="{max(place(rate.value) - LEFT, 1):g}" height="{BAR}"/>',
        f'<line class="range" x1="{low:g}" y1="{middle:g}" x2="{high:g}" y2="{middle:g}"/>',
        f'<text x="{high + 8:g}" y="{middle + 4.5:g}">{escape(rate.text)}</text>',
    ]


def place(percent: float) -> float:
    """The x coordinate of a percentage."""
    return round(LEFT + percent / 100 * (WIDTH - LEFT - RIGHT), 1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if it is stale")
    check = parser.parse_args().check
    figure = draw(read_table((DOCS / "results.md").read_text(encoding="utf-8")))
    target = DOCS / "results.svg"
    if not check:
        target.write_text(figure, encoding="utf-8")
        return 0
    fresh = target.exists() and target.read_text(encoding="utf-8") == figure
    if not fresh:
        print("docs/results.svg is stale: run `python benchmarks/figure.py`", file=sys.stderr)
    return 0 if fresh else 1


if __name__ == "__main__":
    raise SystemExit(main())
