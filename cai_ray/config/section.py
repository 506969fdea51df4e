"""What every section of the configuration shares, and the marks that say what changing a field does.

A field without a mark is a result setting: another value gives another result, so that a stage that was made with the
old one has to be made again (`--overwrite`). config/fingerprint.py reads the marks.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from pydantic.fields import FieldInfo

ContentKind = Literal["files", "folder", "model", "engine", "templates", "constitution"]
Threads = PositiveInt | Literal["auto"]
CHANGES, COMPARED_BY, CHECKPOINTS = "x-changes", "x-compared-by", "x-checkpoints"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def operational(default: Any = ..., **bounds: Any) -> Any:
    """Declares a field that changes how a stage runs, and its result by rounding at most.

    A complete stage stays complete when it changes, and a stopped one goes on.
    """
    return Field(default, json_schema_extra={CHANGES: "operational"}, **bounds)


def checkpoint_layout(default: Any = ..., **bounds: Any) -> Any:
    """Declares an operational field that checkpoints depend on: a training stage cannot go on with another value."""
    return Field(default, json_schema_extra={CHANGES: "operational", CHECKPOINTS: "layout"}, **bounds)


def by_content(kind: ContentKind, default: Any = ..., **bounds: Any) -> Any:
    """Declares a path, URI or name that is compared by the content of what it names: a copy elsewhere is the same.

    `engine`: the settings are compared of the engine that answers in the end, the run's where none is given.
    """
    return Field(default, json_schema_extra={COMPARED_BY: kind}, **bounds)


def marks(field: FieldInfo) -> dict[str, Any]:
    """The marks of a declared field."""
    extra = field.json_schema_extra
    return extra if isinstance(extra, dict) else {}
