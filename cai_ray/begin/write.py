"""A configuration as YAML in which every line says why."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import yaml

from cai_ray.begin.plan import Setting

_WIDTH = 44
"""The column at which comments begin, where a line is shorter."""


def to_yaml(head: Iterable[str], settings: Iterable[Setting]) -> str:
    """Settings in sections, each with its reason as a comment.

    Args:
        head: lines of the comment at the top.
    """
    lines = [f"# {line}".rstrip() for line in head]
    sections: tuple[str, ...] = ()
    for setting in _together(settings):
        *parents, key = setting.key.split(".")
        if tuple(parents[:1]) != sections[:1] or not lines[-1:] or lines[-1].startswith("#"):
            lines.append("")
        for depth, name in enumerate(parents):
            if tuple(parents[: depth + 1]) != sections[: depth + 1]:
                lines.append(f"{'  ' * depth}{name}:")
        sections = tuple(parents)
        lines += _lines("  " * len(parents), key, setting)
    return "\n".join(lines) + "\n"


def nested(settings: Iterable[Setting]) -> dict[str, Any]:
    """The same settings as plain data."""
    data: dict[str, Any] = {}
    for setting in settings:
        *parents, key = setting.key.split(".")
        node = data
        for name in parents:
            node = node.setdefault(name, {})
        node[key] = setting.value
    return data


def _together(settings: Iterable[Setting]) -> list[Setting]:
    """Settings of one section side by side, and in it those that have no section of their own first."""
    listed = list(settings)
    order = list(dict.fromkeys(setting.key.split(".")[0] for setting in listed))
    return sorted(
        listed, key=lambda s: (order.index(s.key.split(".")[0]), s.key.count("."), s.key.rpartition(".")[0])
    )


def _lines(indent: str, key: str, setting: Setting) -> list[str]:
    first, *items = _value(indent, key, setting.value)
    return [f"{first.ljust(_WIDTH)} # {setting.why}" if setting.why else first, *items]


def _value(indent: str, key: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"{indent}{key}:", *(f"{indent}  - {_flow(item)}" for item in value)]
    return [f"{indent}{key}: {_flow(value)}"]


def _flow(value: Any) -> str:
    """A value on one line. A text that YAML would read as something else is quoted."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return value if _is_plain(value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < value < 1e-3 else repr(value)
    return json.dumps(value)


def _is_plain(text: str) -> bool:
    """Whether a text is itself where it stands without quotes, in a mapping on one line and before a comment."""
    try:
        return all(
            yaml.safe_load(form.format(text)) == {"key": text} for form in ("{{key: {}}}", "key: {} # why")
        )
    except yaml.YAMLError:
        return False
