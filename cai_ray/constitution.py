"""The constitution: a list of principles, validated, with a content hash over what matters.

The hash covers what changes a model's behaviour (texts, requests, weights, which principles are enabled) and
leaves out what does not (source, tags, file layout), so that a better citation does not invalidate a run.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cai_ray.errors import InputError


class Principle(BaseModel):
    """One principle, in the words that the critique, revision and feedback models read."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    id: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    title: str = Field(min_length=1)
    text: str = Field(min_length=1)
    critique_request: str = Field(min_length=1)
    revision_request: str = Field(min_length=1)
    comparison: str = Field(min_length=1)
    """The question put to the feedback model when two responses are compared."""
    source: str = ""
    tags: tuple[str, ...] = ()
    weight: float = Field(default=1.0, gt=0)
    enabled: bool = True

    @property
    def sha(self) -> str:
        """Hash of what changes behaviour, `enabled` left out: a disabled principle keeps its identity."""
        return _sha(
            [self.id, self.text, self.critique_request, self.revision_request, self.comparison, self.weight]
        )


class Constitution(BaseModel):
    """A named, versioned list of principles."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1)
    version: str = "1"
    description: str = ""
    source: str = ""
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

    def __getitem__(self, principle_id: str) -> Principle:
        for principle in self.principles:
            if principle.id == principle_id:
                return principle
        raise KeyError(principle_id)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def load(path: str | Path) -> Constitution:
    """Reads a constitution from YAML.

    Raises:
        InputError: the file is missing, is no YAML, or a principle lacks a field.
    """
    path = find(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f"constitution {path}: cannot be read ({_one_line(e)}); give a YAML file") from e
    return parse(data, str(path))


def parse(data: object, name: str) -> Constitution:
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
    """A path as given, or the name of a constitution that ships with the package."""
    given = Path(path)
    if given.exists():
        return given
    shipped = Path(__file__).parent / "constitutions"
    for candidate in (shipped / given.name, shipped / f"{given.name}.yaml"):
        if len(given.parts) == 1 and candidate.exists():
            return candidate
    names = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
    raise InputError(f"constitution {given}: no such file; give a path, or one of: {names}")


def _sha(value: object) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:16]


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())
