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


class TryAgain(Exception):
    """An attempt failed, but another one may succeed."""

    def __init__(self, text: str, wait: float = 0.0, absent: bool = False):
        """
        Args:
            wait: seconds that the endpoint asks for.
            absent: whether nothing answers at the address.
        """
        super().__init__(text)
        self.wait, self.absent = wait, absent


class _Fields(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class _LikelyToken(_Fields):
    token: str
    logprob: float


class _Position(_Fields):
    top_logprobs: list[_LikelyToken]


class _PositionLogprobs(_Fields):
    content: list[_Position] | None = None


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


def read_first_tokens(answer: ChatCompletion) -> list[tuple[str, float]]:
    """The likeliest first tokens with their log-probabilities."""
    logprobs = answer.choices[0].logprobs
    if logprobs is None or logprobs.content is None:
        raise RowError("the endpoint gave no log-probabilities; use a model and an endpoint that have them")
    if not logprobs.content or not logprobs.content[0].top_logprobs:
        raise TryAgain("answered an empty list of log-probabilities")
    return [(t.token, t.logprob) for t in logprobs.content[0].top_logprobs]


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
