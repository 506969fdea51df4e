"""The critic's answers, for the OpenAPI schema. The server itself sends plain data, which is not checked again."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict


class _AnswerPart(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class PrincipleName(_AnswerPart):
    id: str
    title: str


class ConstitutionName(_AnswerPart):
    name: str
    version: str
    sha: str
    """Content hash."""


class ModelName(_AnswerPart):
    name: str
    sha: str
    """Content hash of the model's folder."""


class _CriticAnswer(_AnswerPart):
    constitution: ConstitutionName
    models: dict[str, ModelName]
    """Every model of the server: the policies by their names, `feedback` and `reward`."""


class PrincipleCritique(_AnswerPart):
    principle: PrincipleName
    at_stake: bool
    """Whether the feedback model prefers the revision with a probability above 0.6."""
    p_at_stake: float
    critique: str
    revision: str


class CritiqueAnswer(_CriticAnswer):
    object: Literal["critique"]
    principle: PrincipleName | None
    """The principle most at stake; null if none is."""
    p_at_stake: float
    critique: str | None
    principles: list[PrincipleCritique]
    """What each principle finds, the one most at stake first."""


class RevisionStep(PrincipleCritique):
    round: int


class RevisionAnswer(_CriticAnswer):
    object: Literal["revision"]
    revision: str
    changed: bool
    steps: list[RevisionStep]


class PrincipleVote(_AnswerPart):
    principle: PrincipleName
    p_a: float | None
    """Probability that response a is better; null if the model abstains."""


class ComparisonAnswer(_CriticAnswer):
    object: Literal["comparison"]
    p_a: float
    slot_bias: float | None
    principle: PrincipleName | None
    """The principle that decided most."""
    principles: list[PrincipleVote]


class ScoreAnswer(_CriticAnswer):
    object: Literal["score"]
    score: float
    """Centred and scaled on the reward model's reference set."""
    raw_score: float


class ConstitutionText(_CriticAnswer):
    object: Literal["constitution"]
    document: dict[str, Any]
    previous: list[ConstitutionName]


A = TypeVar("A")


class SideBySide(_AnswerPart, Generic[A]):
    """Answers by several constitutions, in the order of the request."""

    object: Literal["list"]
    answers: list[A]


class ErrorDetail(_AnswerPart):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(_AnswerPart):
    """An error, in OpenAI's form."""

    error: ErrorDetail
