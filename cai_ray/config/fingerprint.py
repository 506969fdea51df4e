"""What of a section decides a stage's result: manifests, unfinished stages and checkpoints are compared by it."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

from cai_ray.config.section import CHANGES, CHECKPOINTS, COMPARED_BY, Section, marks


class Content(NamedTuple):
    """A setting that is compared by what it names."""

    section: Section
    """Where it is set."""
    kind: str
    """`files`, `folder`, `model`, `engine`, `templates` or `constitution`."""
    value: Any


def fingerprint(section: Section, contents: tuple[str, ...] = ()) -> str:
    """A hash of a section's result settings.

    Args:
        contents: hashes of what the section names (`named_contents`), in the same order.
    """
    text = json.dumps([result_settings(section), contents], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def result_settings(section: Section, paths: bool = False) -> dict[str, Any]:
    """The settings of a section that decide a result, as plain data.

    Args:
        paths: include paths and models, which are compared by their content.
    """
    settings = {}
    for name, field in type(section).model_fields.items():
        mark = marks(field)
        if mark.get(CHANGES) != "operational" and (paths or COMPARED_BY not in mark):
            settings[name] = _plain(section, name, paths)
    return settings


def layout_settings(section: Section) -> dict[str, Any]:
    """The operational settings of a section that checkpoints depend on."""
    names = {name for name, field in type(section).model_fields.items() if CHECKPOINTS in marks(field)}
    return section.model_dump(mode="json", include=names)


def named_contents(section: Section) -> list[Content]:
    """The settings of a section, and of the sections in it, that are compared by what they name."""
    named: list[Content] = []
    for name, field in type(section).model_fields.items():
        mark, value = marks(field), getattr(section, name)
        if kind := mark.get(COMPARED_BY):
            named.append(Content(section, kind, value))
        elif mark.get(CHANGES) != "operational":
            for part in value if isinstance(value, tuple) else (value,):
                named += named_contents(part) if isinstance(part, Section) else []
    return named


def _plain(section: Section, name: str, paths: bool) -> Any:
    value = getattr(section, name)
    if isinstance(value, Section):
        return result_settings(value, paths)
    if isinstance(value, tuple) and any(isinstance(part, Section) for part in value):
        return [result_settings(part, paths) for part in value]
    return section.model_dump(mode="json", include={name})[name]
