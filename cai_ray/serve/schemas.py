"""The bodies of requests, with their limits. The answers are described in answers.py and docs/serving.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(max_length=200_000)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Part(_Body):
    type: Literal["text"]
    text: Text


class DialogueTurn(_Body):
    role: Literal["system", "user", "assistant"]
    content: Text


class ChatTurn(_Body):
    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=200)]
    name: str | None = Field(default=None, max_length=200)
    """Accepted and not used, like some more of OpenAI's fields."""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class StreamOptions(_Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Sampled(_Body):
    """The fields that chat and plain completions share."""

    model: str | None = Field(default=None, max_length=200)
    """A name from `/v1/models`. It may be left out if there is only one."""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    """0: all tokens."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    n: int = Field(default=1, ge=1, le=16)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    # OpenAI's servers use these; this one accepts and ignores them.
    user: str | None = Field(default=None, max_length=1000)
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _streamed(self) -> _Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs `stream: true`; set it, or leave stream_options out")
        return self

    def sampling(self, max_tokens: int) -> dict[str, Any]:
        """The fields of vLLM's request.

        Raises:
            ValueError: the request asks for more tokens than the server gives.
        """
        names = (
            "model", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "n", "stop", "seed", "stream",
        )  # fmt: skip
        fields = {name: getattr(self, name) for name in names}
        if self.stream_options is not None:
            fields["stream_options"] = self.stream_options.model_dump()
        if self.tokens is not None and self.tokens > max_tokens:
            raise ValueError(f"max_tokens={self.tokens}: at most {max_tokens} here")
        return {k: v for k, v in fields.items() if v is not None}

    @property
    def tokens(self) -> int | None:
        """The most tokens that an answer may have, if the request says so."""
        return self.max_tokens


class ChatRequest(_Sampled):
    messages: list[ChatTurn] = Field(min_length=1, max_length=200)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    explain: bool = False
    """Adds `explanation`: which principle the critic sees at stake in the answer."""

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs `logprobs: true`")
        if self.explain and self.n > 1:
            raise ValueError("explain is for one answer; set n to 1")
        return self

    @property
    def tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionsRequest(_Sampled):
    prompt: Annotated[Text, Field(min_length=1)]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] = False
    suffix: None = None
    best_of: Literal[1] = 1


Conversation = Annotated[list[DialogueTurn], Field(min_length=1, max_length=200)]
Ids = Annotated[list[Annotated[str, Field(max_length=200)]], Field(min_length=1, max_length=1000)]


class _Conversation(_Body):
    messages: Conversation

    def conversation(self) -> list[dict[str, str]]:
        return [m.model_dump() for m in self.messages]


class AnsweredConversation(_Conversation):
    """A conversation that ends with the response to judge."""

    @model_validator(mode="after")
    def _ends_with_answer(self) -> AnsweredConversation:
        if len(self.messages) < 2 or self.messages[-1].role != "assistant":
            raise ValueError("messages must end with the assistant's response, after at least one other turn")
        return self


class _ByConstitution(_Body):
    principles: Ids | None = None
    """Ids of the principles to use; by default all that are enabled."""
    constitutions: list[Annotated[str, Field(max_length=64)]] = Field(
        default=["current"], min_length=1, max_length=4
    )
    """Each is `current`, `previous` or the beginning of a hash. With several, `answers` holds an answer by each."""


class CritiqueRequest(AnsweredConversation, _ByConstitution):
    max_tokens: int = Field(default=256, ge=1, le=4096)
    """The most tokens of each critique and of each revision."""


class ReviseRequest(CritiqueRequest):
    rounds: int = Field(default=1, ge=1, le=16)
    choose: Literal["at_stake", "draw"] = "at_stake"
    """How a round chooses its principle: the one most at stake, until none is; or drawn by weight, as in training."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Seed of the draw."""


class ScoreRequest(AnsweredConversation):
    pass


class CompareRequest(_Conversation, _ByConstitution):
    """Two responses to a conversation that ends with the person's turn."""

    response_a: Text
    response_b: Text

    @model_validator(mode="after")
    def _ends_with_question(self) -> CompareRequest:
        if self.messages[-1].role != "user":
            raise ValueError(
                "messages must end with the person's turn; the responses come in response_a and response_b"
            )
        return self


class ConstitutionRequest(_Body):
    """Another constitution for the critic, in the form of its YAML file."""

    document: dict[str, Any]
