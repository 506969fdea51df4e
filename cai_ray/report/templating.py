"""The one way from data to HTML: Jinja2 templates in which every text is escaped.

Templates hold the structure of a page and stand in a folder `templates` beside the code that fills them. What they are
given is text, unless it is `Markup`: a chart (figures.py), or a style sheet or script of ours (`inline`).
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cai_ray.report.text import visible


def render(folder: Path, name: str, **data: Any) -> str:
    """Fills the template `name` of a folder. A variable that the template uses and nobody gave is an error."""
    return _environment(folder).get_template(name).render(data)


@cache
def inline(path: Path) -> Markup:
    """A style sheet or script that comes with this package, to stand inside a page."""
    return Markup(path.read_text(encoding="utf-8"))


def digest(content: str) -> str:
    """The name by which a Content-Security-Policy allows one inline style sheet or script."""
    return "sha256-" + b64encode(hashlib.sha256(content.encode()).digest()).decode()


@cache
def _environment(folder: Path) -> Environment:
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _printable(value: Any) -> Any:
    """A value before it is escaped: None as nothing, and texts without control characters or lone surrogates."""
    if value is None:
        return ""
    if isinstance(value, str) and not isinstance(value, Markup):
        return visible(value)
    return value
