"""Markdown around texts that are not ours: whatever they hold, they are text and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from cai_ray.report import text

_SPECIAL = re.compile(r"([\\`*_\[\]|~$])")


def escaped(value: str) -> str:
    """A text as one line of markdown that shows it and does nothing else."""
    line = " ".join(text.visible(value).split())
    return _SPECIAL.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def fence(value: str, language: str) -> str:
    """A block of code that nothing in it can end."""
    value = text.visible(value).strip("\n")
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", value)), default=0))
    return f"{ticks}{language}\n{value}\n{ticks}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[escaped(c) for c in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(front: dict[str, Any], parts: Sequence[str]) -> str:
    top = f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n" if front else ""
    return top + "\n\n".join(parts) + "\n"
