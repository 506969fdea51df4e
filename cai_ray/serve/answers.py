"""What the critic answers, for the OpenAPI schema. The server itself sends plain data, which is not checked again."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Named(_Part):
    id: str
    title: str


class ConstitutionName(_Part):
    name: str
    version: str
    sha: str
    """Content hash."""


class ModelName(_Part):
    name: str
    sha: str
    """Content hash of the model's folder."""


class _Answer(_Part):
    constitution: ConstitutionName
    models: dict[str, ModelName]
    """Every model of the server: the policies by name, `feedback` and `reward`."""


class Found(_Part):
    principle: Named
    at_stake: bool
    """Whether the feedback model prefers the revision with a probability above 0.6."""
    p_at_stake: float
    critique: str
    revision: str


class Critique(_Answer):
    object: Literal["critique"]
    principle: Named | None
    """The one most at stake, or none is."""
    p_at_stake: float
    critique: str | None
    principles: list[Found]
    """Of each principle, the one most at stake first."""


class Step(Found):
    round: int


class Revision(_Answer):
    object: Literal["revision"]
    revision: str
    changed: bool
    steps: list[Step]


class Vote(_Part):
    principle: Named
    p_a: float | None
    """Probability that response a is better; null where the model abstains."""


class Comparison(_Answer):
    object: Literal["comparison"]
    p_a: float
    slot_bias: float | None
    principle: Named | None
    """The one that decided most."""
    principles: list[Vote]


class Score(_Answer):
    object: Literal["score"]
    score: float
    """Centred and scaled on the reward model's reference set."""
    raw_score: float


class ConstitutionText(_Answer):
    object: Literal["constitution"]
    document: dict[str, Any]
    previous: list[ConstitutionName]


A = TypeVar("A")


class SideBySide(_Part, Generic[A]):
    """By several constitutions, in the order they were asked for."""

    object: Literal["list"]
    answers: list[A]


class Fault(_Part):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(_Part):
    """An error, in OpenAI's form."""

    error: Fault
