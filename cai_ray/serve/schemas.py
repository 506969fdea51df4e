"""What the critic is asked, and its limits. Answers are plain JSON, described in docs/serving.md."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(max_length=200_000)]


class Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: Text


Conversation = Annotated[list[Turn], Field(min_length=1, max_length=200)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    messages: Conversation

    def conversation(self) -> list[dict[str, str]]:
        return [m.model_dump() for m in self.messages]


class Answered(_Request):
    """A conversation that ends with the response in question."""

    @model_validator(mode="after")
    def _ends_with_answer(self) -> Answered:
        if len(self.messages) < 2 or self.messages[-1].role != "assistant":
            raise ValueError("messages must end with the assistant's response, after at least one other turn")
        return self


class CritiqueRequest(Answered):
    principles: list[str] | None = Field(default=None, min_length=1, max_length=100)
    """Ids of the principles to criticise by; by default all that are enabled."""
    max_tokens: int = Field(default=256, ge=1, le=4096)


class ScoreRequest(Answered):
    pass


class CompareRequest(_Request):
    """Two responses to a conversation that ends with the person's turn."""

    response_a: Text
    response_b: Text
    principles: list[str] | None = Field(default=None, min_length=1, max_length=100)

    @model_validator(mode="after")
    def _ends_with_question(self) -> CompareRequest:
        if self.messages[-1].role != "user":
            raise ValueError(
                "messages must end with the person's turn; the responses come in response_a and response_b"
            )
        return self
