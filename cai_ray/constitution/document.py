"""The document: validated principles, with a content hash for each and for all together.

The hash covers what changes a model's behaviour (texts, requests, weights, which principles are enabled) and leaves out
what does not (sources, tags, examples, file layout), so that a better citation does not invalidate a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cai_ray.constitution import markdown
from cai_ray.errors import InputError


class _DocumentPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ExampleResponse(_DocumentPart):
    """A response to a prompt, with which `cai-ray constitution test` tests a principle."""

    prompt: str = Field(min_length=1)
    response: str = Field(min_length=1)


class Examples(_DocumentPart):
    violates: tuple[ExampleResponse, ...] = ()
    """Responses that a critique by this principle must find fault with."""
    follows: tuple[ExampleResponse, ...] = ()
    """Responses that it must not find fault with."""


class Principle(_DocumentPart):
    """One principle, in the words that the critique, revision and feedback models read."""

    id: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    title: str = Field(min_length=1)
    text: str = Field(min_length=1)
    critique_request: str = Field(min_length=1)
    revision_request: str = Field(min_length=1)
    comparison: str = Field(min_length=1)
    """The question to the feedback model when two responses are compared."""
    form: Literal["positive", "negative"] = "positive"
    """Whether `comparison` asks for the better response or for the worse one."""
    source: str = ""
    tags: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    """Families of prompts in which the principle is expected to be at stake."""
    priority: int = Field(default=0, ge=0)
    """For readers of reports: 1 goes before 2 if principles conflict, and 0 is no priority. Votes use `weight`."""
    weight: float = Field(default=1.0, gt=0)
    enabled: bool = True
    examples: Examples = Examples()

    @property
    def sha(self) -> str:
        """Hash of what changes behaviour, without `enabled`: a disabled principle keeps its identity."""
        parts = [
            self.id,
            self.text,
            self.critique_request,
            self.revision_request,
            self.comparison,
            self.weight,
        ]
        return _sha([*parts, self.form] if self.form == "negative" else parts)


class DocumentSection(_DocumentPart):
    """What a document says about the principles of a section. People read it; models read principles alone."""

    title: str = ""
    text: str = Field(min_length=1)
    priority: int = Field(default=0, ge=0)
    """The priority of the section's principles."""


class SignOff(_DocumentPart):
    """Who approves this version of the document, and since when."""

    name: str = Field(min_length=1)
    date: str = Field(default="", pattern=r"^(\d{4}-\d{2}-\d{2})?$")
    note: str = ""


class Constitution(_DocumentPart):
    """A named, versioned list of principles."""

    name: str = Field(min_length=1)
    version: str = "1"
    description: str = ""
    source: str = ""
    authors: tuple[str, ...] = ()
    sign_off: tuple[SignOff, ...] = ()
    sources: tuple[str, ...] = ()
    """Documents that principles draw on, if one line (`source`) is not enough."""
    sections: tuple[DocumentSection, ...] = ()
    """The texts of sections of principles."""
    principles: tuple[Principle, ...] = Field(min_length=1)

    @field_validator("principles")
    @classmethod
    def _unique_ids(cls, principles: tuple[Principle, ...]) -> tuple[Principle, ...]:
        ids = [p.id for p in principles]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"principle id {twice[0]!r} occurs twice; give each principle its own id")
        if not any(p.enabled for p in principles):
            raise ValueError("no principle is enabled; enable at least one")
        return principles

    @property
    def sha(self) -> str:
        return _sha([[p.sha, p.enabled] for p in self.principles])

    @property
    def enabled(self) -> list[Principle]:
        return [p for p in self.principles if p.enabled]

    def without(self, ids: Iterable[str]) -> Constitution:
        """The same document with some of its principles disabled.

        Raises:
            InputError: it has no such principle, or no enabled principle would be left.
        """
        ids = set(ids)
        if unknown := sorted(ids - {p.id for p in self.principles}):
            ids_here = ", ".join(p.id for p in self.principles)
            raise InputError(
                f"without {unknown[0]}: constitution {self.name} has no such principle; it has {ids_here}"
            )
        if all(p.id in ids for p in self.enabled):
            raise InputError(
                f"without {', '.join(sorted(ids))}: no principle of {self.name} is left; leave one"
            )
        principles = tuple(
            p.model_copy(update={"enabled": p.enabled and p.id not in ids}) for p in self.principles
        )
        return self.model_copy(update={"principles": principles})

    def __getitem__(self, principle_id: str) -> Principle:
        for principle in self.principles:
            if principle.id == principle_id:
                return principle
        raise KeyError(principle_id)

    def to_yaml(self) -> str:
        """The YAML form, without optional fields that have their defaults."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def load(path: str | Path) -> Constitution:
    """Reads a constitution: YAML, or a document in Markdown (`*.md`, constitution/markdown.py).

    Raises:
        InputError: the file does not exist or cannot be read, or the document is not valid (see `parse`).
    """
    path = find(path)
    try:
        text = path.read_text(encoding="utf-8")
        data = markdown.read(text, path.stem) if path.suffix == ".md" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(
            f"constitution {path}: cannot be read ({_one_line(e)}); give a file in YAML or Markdown"
        ) from e
    return parse(data, str(path))


def parse(data: Any, name: str) -> Constitution:
    """A constitution from plain data, as YAML gives it.

    Raises:
        InputError: a field is missing, unknown or not valid; the message names the principle.
    """
    if not isinstance(data, dict):
        raise InputError(f"constitution {name}: a mapping with `name` and `principles` is needed")
    try:
        return Constitution.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(x) for x in first["loc"])
        loc = first["loc"]
        if len(loc) > 1 and loc[0] == "principles" and isinstance(loc[1], int):
            principle = data["principles"][loc[1]]
            if isinstance(principle, dict) and principle.get("id"):
                where += f" (principle {principle['id']!r})"
        remedy = "add the field" if first["type"] == "missing" else "see docs/constitution.md"
        raise InputError(f"constitution {name}: {where}: {first['msg']}; {remedy}") from e


def find(path: str | Path) -> Path:
    """The file of a constitution: a path as given, or the name of one that ships with the package."""
    file = Path(path)
    if file.exists():
        return file
    shipped = Path(__file__).parents[1] / "constitutions"
    for candidate in (shipped / file.name, shipped / f"{file.name}.yaml", shipped / f"{file.name}.md"):
        if len(file.parts) == 1 and candidate.exists():
            return candidate
    names = ", ".join(shipped_names())
    raise InputError(f"constitution {file}: no such file; give a path, or one of: {names}")


def shipped_names() -> list[str]:
    """The names of the constitutions that ship with the package."""
    folder = Path(__file__).parents[1] / "constitutions"
    return sorted(p.stem for kind in ("*.yaml", "*.md") for p in folder.glob(kind))


def schema() -> dict[str, Any]:
    """The JSON Schema of the YAML form, with which editors complete and check a file."""
    fields = Constitution.model_json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **fields,
        "title": "cai_ray constitution",
    }


def _sha(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())
