"""The one way from data to Markdown: templates in which every text is escaped, like those of the report for HTML.

Whatever a template is given is text and nothing else, unless it is `Markdown`: what the functions here return.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cai_ray.report.text import visible

_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")
# What makes a line a heading, a rule, or an item of a list.
_START = re.compile(r"^(\d*)(?=[-+=#]+(\s|$)|(?<=\d)[.)](\s|$))")


class Markdown(str):
    """Markdown that a template prints as it is."""

    __slots__ = ()


def render(template: str, **data: Any) -> str:
    """Fills a template of the folder `templates`. A variable that it uses and nobody gave is an error."""
    return _environment().get_template(template).render(data).rstrip("\n") + "\n"


def escaped(value: Any) -> Markdown:
    """A text as one line of Markdown that shows it and does nothing else."""
    line = " ".join(visible(str(value)).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markdown(_START.sub(r"\1\\", _SPECIAL.sub(r"\\\1", line)))


def code(value: str) -> Markdown:
    """A text as code within a line, which nothing in it can end."""
    line = " ".join(visible(value).split())
    ticks = _longer_than_any_in(line, 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return Markdown(f"{ticks}{space}{line}{space}{ticks}")


def code_block(value: str, language: str) -> Markdown:
    """A block of code, which nothing in it can end."""
    value = visible(value).strip("\n")
    ticks = _longer_than_any_in(value, 3)
    return Markdown(f"{ticks}{language}\n{value}\n{ticks}")


def table(rows: Iterable[Iterable[str]], *head: str) -> Markdown:
    lines = [[escaped(cell) for cell in row] for row in (head, *rows)]
    lines.insert(1, [Markdown("---")] * len(head))
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _longer_than_any_in(text: str, least: int) -> str:
    """A fence of backticks that is longer than every run of them in a text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=False,  # that would escape for HTML; `finalize` does it for Markdown
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markdown) else escaped(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": code, "code_block": code_block, "table": table}
    return environment
