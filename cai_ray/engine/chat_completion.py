"""Reads an endpoint's answers: chat completions, and errors."""

from __future__ import annotations

import math
import time
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from cai_ray.cluster.usage import Usage
from cai_ray.engine.protocol import Completion
from cai_ray.errors import RowError
from cai_ray.prompts.cut import without_incomplete_end

# What vLLM writes in place of minus infinity, which JSON does not have.
_NOTHING = -9999.0


class TryAgain(Exception):
    """An attempt failed, but another one may succeed."""

    def __init__(self, text: str, wait: float = 0.0, remedy: str = "", attempts: int | None = None):
        """
        Args:
            wait: seconds that the endpoint asks for.
            remedy: what a person can do, where no row can succeed if the attempts go on failing.
            attempts: the most attempts, if fewer than the settings allow.
        """
        super().__init__(text)
        self.wait, self.remedy, self.attempts = wait, remedy, attempts


class _Fields(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class _LikelyToken(BaseModel):
    token: str
    logprob: float | None = None
    bytes: Any = None

    def text(self) -> str:
        """The token's text; its bytes tell it where `token` is the vocabulary's own spelling."""
        try:
            return bytes(self.bytes).decode() if isinstance(self.bytes, list) and self.bytes else self.token
        except (TypeError, ValueError):
            return self.token


class _Position(_LikelyToken):
    token: str = ""
    top_logprobs: list[_LikelyToken] | None = None

    def likeliest(self) -> list[_LikelyToken]:
        """The tokens that are listed, or else the one that was drawn."""
        return self.top_logprobs or ([self] if self.token else [])


class _PositionLogprobs(BaseModel):
    content: list[_Position] | None = None
    top_logprobs: list[dict[str, float | None] | None] | None = None
    """The form of text completions, which some servers keep."""


class _ChoiceMessage(_Fields):
    content: str | None = None


class _Choice(_Fields):
    message: _ChoiceMessage
    finish_reason: str | None
    logprobs: _PositionLogprobs | None = None


class _PromptDetails(_Fields):
    cached_tokens: int | None = None


class _TokenCounts(_Fields):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class ChatCompletion(_Fields):
    """The fields of a chat completion that are read. Others may be there."""

    choices: tuple[_Choice]
    usage: _TokenCounts | None = None


def read_completion(answer: ChatCompletion) -> Completion:
    """The text that the model wrote. It is empty only if the token limit fell before the answer, within a thought that
    the endpoint keeps to itself."""
    choice = answer.choices[0]
    text, finished = choice.message.content or "", choice.finish_reason == "stop"
    if choice.finish_reason not in ("stop", "length"):
        raise RowError(f"the endpoint ended the answer with finish_reason {choice.finish_reason!r}")
    text = text.strip() if finished else without_incomplete_end(text).strip()
    if finished and not text:
        raise RowError("the endpoint gave an empty answer")
    return Completion(text, finished, read_usage(answer))


def read_first_tokens(answer: ChatCompletion) -> list[tuple[str, float]] | None:
    """The likeliest first tokens with their log-probabilities; None if the answer has no place for them.

    A token whose log-probability is null, not a number or minus infinity (-9999 in place of it) is not among them: the
    server has cut it off, and how likely it is is not known.
    """
    logprobs = answer.choices[0].logprobs
    if logprobs is None or (logprobs.content is None and logprobs.top_logprobs is None):
        return None
    if logprobs.content is not None:
        listed = [(t.text(), t.logprob) for p in logprobs.content[:1] for t in p.likeliest()]
    else:
        listed = [pair for first in (logprobs.top_logprobs or [])[:1] for pair in (first or {}).items()]
    return [(t, min(p, 0.0)) for t, p in listed if p is not None and math.isfinite(p) and p > _NOTHING]


def read_usage(answer: ChatCompletion) -> Usage:
    counts = answer.usage or _TokenCounts()
    details = counts.prompt_tokens_details or _PromptDetails()
    return Usage(counts.prompt_tokens or 0, details.cached_tokens or 0, counts.completion_tokens or 0, 1)


def read_error(response: Any) -> str:
    """The message of an error response: {"error": {"message": …}}, or else its whole text."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return str(response.text)


def read_retry_after(value: str | None) -> float:
    """Seconds from a Retry-After header, which holds a number of seconds or a date."""
    if not value:
        return 0.0
    try:
        return max(0.0, float(value)) if math.isfinite(float(value)) else 0.0
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
