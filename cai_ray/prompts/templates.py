"""Template sets: the prompts for each step, as data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cai_ray.constitution import Principle
from cai_ray.errors import InputError
from cai_ray.prompts.messages import Message, Messages, Piece
from cai_ray.storage.records import derive_id


class Thinking(BaseModel):
    """The marks around a reasoning model's thoughts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    open: str = Field(min_length=1)
    close: str = Field(min_length=1)
    begun: bool = False
    """Whether the chat template of a model at an endpoint writes the opening mark, which cannot be seen from here. A
    text without the closing mark is then all thought."""


THINKING = Thinking(open="<think>", close="</think>")
"""The marks that most reasoning models write."""


class TemplateSet(BaseModel):
    """The prompts for each step, in one YAML file per family of models.

    A set that `extends` another takes from it the parts that it does not have itself. Each step is a list of messages;
    the item `conversation` stands for the row's own turns. In a content, `{name}` is replaced once, as data: nothing
    inside a replacement is replaced again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    chat_template: str | None = None
    transcript: dict[Literal["user", "assistant", "system"], str]
    """How a turn looks when the conversation is quoted inside one message."""
    answer: tuple[dict[str, str] | Literal["conversation"], ...]
    critique: tuple[dict[str, str] | Literal["conversation"], ...]
    revision: tuple[dict[str, str] | Literal["conversation"], ...]
    feedback: tuple[dict[str, str] | Literal["conversation"], ...]
    direct: tuple[dict[str, str] | Literal["conversation"], ...] | None = None
    """Asks for a revision without a critique (`revise.critique: false`)."""
    options: tuple[str, str]
    thinking: Thinking | None = None
    """The marks of thinking blocks. The run's `thinking` says whether the blocks are kept."""
    prefixes: tuple[str, ...] = ()
    """Regular expressions for the start of a revision. What they match is removed, until none matches."""
    suffixes: tuple[str, ...] = ()
    """Regular expressions for the end of a revision: for whole lines, or a parenthesis. What they match is removed,
    until none matches."""
    critiques: tuple[str, ...] = ()
    """Regular expressions for the start of a revision. If one matches, it is a critique (`sft.drop`)."""
    refusals: tuple[str, ...] = ()
    """Regular expressions for the start of a response. If one matches, it declines (`ppo.watch`, `evaluate.sets`)."""
    reasons: tuple[str, ...] = ()
    """Regular expressions for the whole of a refusal. If none is found, it gives no reason and is evasive."""
    red_team: tuple[dict[str, str] | Literal["conversation"], ...] | None = None
    """The prompt of `cai-ray redteam`. {transcript} quotes the examples as a person's turns."""
    reasoning: tuple[dict[str, str] | Literal["conversation"], ...] | None = None
    """With `verdict`, the prompts of a judge with `answer: reasoned`: it reasons, then weighs the options."""
    verdict: tuple[dict[str, str] | Literal["conversation"], ...] | None = None
    rating: tuple[dict[str, str] | Literal["conversation"], ...] | None = None
    """With `scores`, the prompt of a judge with `ask: response`, which is asked about each response by itself."""
    scores: tuple[str, ...] | None = None
    """Ten texts of one token each, from the worst to the best."""

    @property
    def sha(self) -> str:
        """A hash of the prompts, without the file's name."""
        return derive_id(self.model_dump(mode="json", exclude={"reasons"}))

    def answer_messages(self, conversation: Messages) -> list[Message]:
        return self._fill(self.answer, conversation, {})

    def critique_messages(self, conversation: Messages, response: str, principle: Principle) -> list[Message]:
        return self._fill(
            self.critique,
            conversation,
            {"response": response, "critique_request": principle.critique_request},
        )

    def revision_messages(
        self, conversation: Messages, response: str, principle: Principle, critique: str
    ) -> list[Message]:
        fields = {
            "response": response,
            "critique": critique,
            "critique_request": principle.critique_request,
            "revision_request": principle.revision_request,
        }
        return self._fill(self.revision, conversation, fields)

    def direct_messages(self, conversation: Messages, response: str, principle: Principle) -> list[Message]:
        fields = {"response": response, "revision_request": principle.revision_request}
        return self._fill(self.direct or (), conversation, fields)

    def feedback_messages(
        self, conversation: Messages, response_a: str, response_b: str, principle: Principle
    ) -> list[Message]:
        fields = {"response_a": response_a, "response_b": response_b, "comparison": principle.comparison}
        return self._fill(self.feedback, conversation, fields)

    def reasoning_messages(
        self, conversation: Messages, response_a: str, response_b: str, principle: Principle
    ) -> list[Message]:
        fields = {"response_a": response_a, "response_b": response_b, "comparison": principle.comparison}
        return self._fill(self.reasoning or (), conversation, fields)

    def verdict_messages(
        self, conversation: Messages, response_a: str, response_b: str, principle: Principle, reasoning: str
    ) -> list[Message]:
        fields = {
            "response_a": response_a,
            "response_b": response_b,
            "comparison": principle.comparison,
            "reasoning": reasoning,
        }
        return self._fill(self.verdict or (), conversation, fields)

    def rating_messages(self, conversation: Messages, response: str, principle: Principle) -> list[Message]:
        return self._fill(
            self.rating or (), conversation, {"response": response, "principle": principle.text}
        )

    def red_team_messages(self, examples: Sequence[str]) -> list[Message]:
        if self.red_team is None:
            raise InputError(
                f"template set {self.name} has no red_team; add it (see cai_ray/templates/general.yaml)"
            )
        return self._fill(self.red_team, [Message(role="user", content=e) for e in examples], {})

    def _fill(self, step: Sequence[Any], conversation: Messages, fields: dict[str, str]) -> list[Message]:
        messages: list[Message] = []
        for item in step:
            if item == "conversation":
                messages += [Message(role=m["role"], content=m["content"]) for m in conversation]
            else:
                messages.append(
                    Message(role=item["role"], content=self._pieces(item["content"], conversation, fields))
                )
        return messages

    def _pieces(self, text: str, conversation: Messages, fields: dict[str, str]) -> list[Piece]:
        pieces: list[Piece] = []
        for i, part in enumerate(_split(text)):
            if i % 2 == 0:
                pieces.append(Piece(part, True))
            elif part == "transcript":
                for m in conversation:
                    before, _, after = self.transcript[m["role"]].partition("{content}")
                    pieces += [Piece(before, True), Piece(m["content"], False), Piece(after, True)]
            else:
                pieces.append(Piece(fields[part], False))
        return [p for p in pieces if p.text]


FIELD = re.compile(
    r"\{(transcript|response|response_a|response_b|critique|critique_request|revision_request|comparison"
    r"|reasoning|principle)\}"
)


@lru_cache(maxsize=1024)
def _split(text: str) -> list[str]:
    """A content of a step as plain texts and, between them, the names of fields."""
    return FIELD.split(text)
