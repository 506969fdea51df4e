"""The reference of all settings, from their declarations: JSON Schema, and docs/configuration.md."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cai_ray.config.engine import EngineConfig
from cai_ray.config.judge import JudgeConfig, PromptedModel
from cai_ray.config.run import RunConfig
from cai_ray.config.section import CHANGES, COMPARED_BY, Section, marks
from cai_ray.config.sources import Comparisons, PromptSource
from cai_ray.config.training import LoraConfig, PreferenceConfig, TrainConfig

_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "length ≥"}
_SHARED: dict[type[Section], tuple[str, str]] = {
    TrainConfig: ("Training", "Shared by `sft`, `rm`, `ppo` and `dpo`, each of which has its own values."),
    PreferenceConfig: ("Preferences", "Shared by `rm` and `dpo`, beside the settings of training."),
    EngineConfig: ("Engines", "The keys of `engine`, and of every other engine that a section names."),
    PromptedModel: ("Prompted models", "The keys of `revise.reviser` and of every judge."),
    JudgeConfig: (
        "Judges",
        "The keys of `label.judge`, `ppo.watch.judge` and `evaluate.judge`, beside those of every prompted model.",
    ),
    PromptSource: ("Prompts", "The keys of each item of `prompts`, and of every other list of prompts."),
    Comparisons: ("Human comparisons", "The keys of each item of `rm.human` and `dpo.human`."),
    LoraConfig: ("LoRA", "The keys of `lora` in `sft`, `rm`, `ppo` and `dpo`."),
}
"""Sections that several others hold or extend: they are described once."""
_INTRODUCTION = """# Configuration

Every setting of a run. A configuration is a YAML file with these keys; `--set ppo.steps=100`
overrides one on the command line. Unknown keys are errors.

The column *changes* says what changing a setting does to a run that exists:

- *result*: the stages that read it have to be made again. Without `--overwrite` the command stops
  with one line and deletes nothing.
- *how*: it changes only how a stage runs. Complete stages stay complete, and a stopped stage goes
  on from its last checkpoint or its finished rows.
- *layout*: as *how*, but a training stage that was stopped cannot go on from its checkpoints until
  the setting is set back.
- *content*: the file, folder or model that it names is compared by its content. A copy in another
  place is the same.

This page is written by `cai-ray config docs > docs/configuration.md`; `cai-ray config schema`
prints the same as JSON Schema, for editors.
"""


class SettingsTable(NamedTuple):
    title: str
    introduction: str
    rows: list[tuple[str, str, str, str, str]]
    """Key, type, default, changes, description."""


def json_schema() -> dict[str, Any]:
    """JSON Schema of a configuration. `x-changes` of a property is `result` or `operational`."""
    schema = RunConfig.model_json_schema()
    for definition in (schema, *schema["$defs"].values()):
        for setting in definition.get("properties", {}).values():
            setting.setdefault(CHANGES, "result")
            setting.pop("title", None)
            if "description" in setting:
                setting["description"] = " ".join(setting["description"].split())
    return schema


def markdown() -> str:
    """The text of docs/configuration.md."""
    parts = [_INTRODUCTION]
    for title, introduction, rows in _tables():
        lines = ["| key | type | default | changes | what it does |", "| --- | --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        parts.append("\n".join([f"## {title}", "", *_wrapped(introduction), "", *lines]) + "\n")
    return "\n".join(parts)


def _tables() -> Iterator[SettingsTable]:
    top = [(name, field) for name, field in RunConfig.model_fields.items()]
    yield SettingsTable("The run", "Keys at the top of the file. The tables below have the keys of its sections.", [
        _row(RunConfig, name, field) for name, field in top
    ])  # fmt: skip
    for kind, (title, introduction) in _SHARED.items():
        yield SettingsTable(title, introduction, [_row(kind, *item) for item in _own_fields(kind)])
    for name, field in top:
        yield from _section(name, field)


def _section(key: str, field: FieldInfo) -> Iterator[SettingsTable]:
    """The tables of a section and of the sections in it, without those that are described once."""
    for kind in _sections_in(field.annotation):
        if kind not in _SHARED:
            doc = " ".join((kind.__doc__ or "").split())
            yield SettingsTable(f"`{key}`", doc, [_row(kind, *item) for item in _own_fields(kind)])
            for name, inner in _own_fields(kind):
                yield from _section(f"{key}.{name}", inner)


def _own_fields(kind: type[Section]) -> list[tuple[str, FieldInfo]]:
    """The fields of a section that it does not take over from one that is described once."""
    bases = [base for base in kind.__mro__[1:] if base in _SHARED]
    inherited = {name for base in bases for name in base.model_fields}  # type: ignore[attr-defined]
    return [(name, field) for name, field in kind.model_fields.items() if name not in inherited]


def _row(kind: type[Section], name: str, field: FieldInfo) -> tuple[str, str, str, str, str]:
    description = " ".join((field.description or "").split())
    texts = (_type(field), _default(field), _changes(field), description)
    return (f"`{name}`", *(text.replace("|", "\\|") for text in texts))  # type: ignore[return-value]


def _changes(field: FieldInfo) -> str:
    mark = marks(field)
    if mark.get(CHANGES) == "operational":
        return "layout" if len(mark) > 1 else "how"
    if COMPARED_BY in mark:
        return "content"
    return "" if _sections_in(field.annotation) else "result"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "null" if not _sections_in(field.annotation) else ""
    plain = field.default
    if isinstance(plain, Section) or (
        isinstance(plain, tuple) and any(isinstance(p, Section) for p in plain)
    ):
        return ""
    return f"`{json.dumps(plain, ensure_ascii=False)}`"


def _type(field: FieldInfo) -> str:
    return ", ".join([_type_name(field.annotation), *_bounds(field.metadata)])


def _bounds(metadata: Sequence[Any]) -> list[str]:
    return [
        f"{sign} {value:g}"
        for part in metadata
        for name, sign in _BOUNDS.items()
        if isinstance(value := getattr(part, name, None), int | float)
    ]


def _type_name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join([_type_name(args[0]), *_bounds(args[1:])])
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in args if arg is not type(None))
    if origin in (tuple, list):
        if origin is tuple and Ellipsis not in args:
            return f"{len(args)} × {_type_name(args[0])}"
        return f"list of {_type_name(args[0])}"
    if origin is dict or annotation is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        title = _SHARED.get(annotation, ("section", ""))[0]
        return "section" if title == "section" else f"section ({title})"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a field of this type holds."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [kind for arg in get_args(annotation) for kind in _sections_in(arg)]


def _wrapped(text: str) -> list[str]:
    from textwrap import wrap

    return wrap(text, 100, break_long_words=False, break_on_hyphens=False)
