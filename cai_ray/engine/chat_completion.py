"""Reads an endpoint's answers: chat completions, and errors."""

from __future__ import annotations

import json
import math
import time
from email.utils import parsedate_to_datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from cai_ray.cluster.usage import Usage
from cai_ray.engine.protocol import Completion
from cai_ray.errors import RowError
from cai_ray.prompts.cut import without_incomplete_end

# What vLLM writes in place of minus infinity, which JSON does not have.
_NOTHING = -9999.0
# Servers round: a log-probability above 0 by more than this is something else, such as a probability.
_ROUNDED = 0.01
# How servers name the two ways in which an answer may end.
_STOP = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")
_LENGTH = ("length", "max_tokens", "model_length")


class TryAgain(Exception):
    """An attempt failed, but another one may succeed."""

    def __init__(
        self,
        text: str,
        wait: float = 0.0,
        remedy: str = "",
        attempts: int | None = None,
        status: int = 0,
        response: str = "",
    ):
        """
        Args:
                wait: seconds that the endpoint asks for.
            remedy: what a person can do, where no row can succeed if the attempts go on failing.
            attempts: the most attempts, if fewer than the settings allow.
            status: the status of an error response, and what it says.
        """
        super().__init__(text)
        self.status, self.response = status, response
        self.wait, self.remedy, self.attempts = wait, remedy, attempts


class _Fields(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


def _number(value: Any) -> float | None:
    """A number, also as a text; None for anything else that stands in the place of one."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _count(value: Any) -> int:
    number = _number(value)
    return max(0, int(number)) if number is not None and math.isfinite(number) else 0


def _pairs(value: Any) -> Any:
    """A list of tokens with their log-probabilities that has the form {token: log-probability}."""
    if isinstance(value, dict):
        return [{"token": token, "logprob": logprob} for token, logprob in value.items()]
    return value


def _fields_or_none(value: Any) -> Any:
    return value if isinstance(value, dict) else None


class _LikelyToken(BaseModel):
    token: Any = None
    logprob: Annotated[float | None, BeforeValidator(_number)] = None
    bytes: Any = None

    def text(self) -> str | None:
        """The token's text; its bytes tell it where `token` is the vocabulary's own spelling, or a number."""
        given = self.token if isinstance(self.token, str) else None
        try:
            return bytes(self.bytes).decode() if isinstance(self.bytes, list) and self.bytes else given
        except (TypeError, ValueError):
            return given


class _Position(_LikelyToken):
    top_logprobs: Annotated[list[_LikelyToken] | None, BeforeValidator(_pairs)] = None

    def likeliest(self) -> list[_LikelyToken]:
        """The tokens that are listed, or else the one that was drawn."""
        return self.top_logprobs or ([self] if self.token else [])


_Logprobs = dict[str, Annotated[float | None, BeforeValidator(_number)]]


class _PositionLogprobs(BaseModel):
    content: list[_Position] | None = None
    top_logprobs: Annotated[
        list[_Logprobs | None] | None, BeforeValidator(lambda v: [v] if isinstance(v, dict) else v)
    ] = None
    """The form of text completions, which some servers keep."""


def _text(content: Any) -> Any:
    """The text of a content that is a list of parts; thoughts among them are no part of the answer."""
    if not isinstance(content, list):
        return content
    parts = [part if isinstance(part, dict) else {"text": part} for part in content]
    return "".join(part["text"] for part in parts if isinstance(part.get("text"), str))


class _ChoiceMessage(_Fields):
    content: Annotated[str | None, BeforeValidator(_text)] = None


class _Choice(_Fields):
    message: _ChoiceMessage
    finish_reason: str | None
    logprobs: Annotated[_PositionLogprobs | None, BeforeValidator(_fields_or_none)] = None

    @property
    def ends(self) -> str | None:
        """`stop` or `length`; or another reason, as the endpoint says it."""
        reason = (self.finish_reason or "").casefold()
        return "stop" if reason in _STOP else "length" if reason in _LENGTH else self.finish_reason


class _PromptDetails(_Fields):
    cached_tokens: Annotated[int, BeforeValidator(_count)] = 0


class _TokenCounts(_Fields):
    prompt_tokens: Annotated[int, BeforeValidator(_count)] = 0
    completion_tokens: Annotated[int, BeforeValidator(_count)] = 0
    prompt_tokens_details: Annotated[_PromptDetails | None, BeforeValidator(_fields_or_none)] = None


class ChatCompletion(_Fields):
    """The fields of a chat completion that are read. Others may be there."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: Annotated[_TokenCounts | None, BeforeValidator(_fields_or_none)] = None


def read_completion(answer: ChatCompletion) -> Completion:
    """The text that the model wrote. It is empty only if the token limit fell before the answer, within a thought that
    the endpoint keeps to itself."""
    choice = answer.choices[0]
    text, finished = choice.message.content or "", choice.ends == "stop"
    if choice.ends not in ("stop", "length"):
        raise RowError(f"the endpoint ended the answer with finish_reason {choice.finish_reason!r}")
    text = text.strip() if finished else without_incomplete_end(text).strip()
    if finished and not text:
        raise RowError("the endpoint gave an empty answer")
    return Completion(text, finished, read_usage(answer))


def read_first_tokens(answer: ChatCompletion) -> list[tuple[str, float]] | None:
    """The likeliest first tokens with their log-probabilities; None if the answer has no place for them.

    A token whose log-probability is null, not a number or minus infinity (-9999 in place of it) is not among them: the
    server has cut it off, and how likely it is is not known. Neither is a token without a text.

    Raises:
        ValueError: a number above 0 stands in the place of a log-probability.
    """
    logprobs = answer.choices[0].logprobs
    if logprobs is None or (logprobs.content is None and logprobs.top_logprobs is None):
        return None
    if logprobs.content is not None:
        listed = [(t.text(), t.logprob) for p in logprobs.content[:1] for t in p.likeliest()]
    else:
        listed = [pair for first in (logprobs.top_logprobs or [])[:1] for pair in (first or {}).items()]
    known = [(t, p) for t, p in listed if t is not None and p is not None and math.isfinite(p)]
    if any(p > _ROUNDED for _, p in known):
        raise ValueError(
            f"the endpoint gave {max(p for _, p in known):g} as a log-probability, which is above 0"
        )
    return [(t, min(p, 0.0)) for t, p in known if p > _NOTHING]


def read_usage(answer: ChatCompletion) -> Usage:
    counts = answer.usage or _TokenCounts()
    details = counts.prompt_tokens_details or _PromptDetails()
    return Usage(counts.prompt_tokens, details.cached_tokens, counts.completion_tokens, 1)


def read_error(response: Any) -> str:
    """The message of an error response: {"error": {"message": …}}, or else its whole text."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return str(response.text)


def error_status(body: bytes) -> int | None:
    """The status that a body reports though the response's own is 200, as routers do: 0 if it does not say a number,
    None if it is no error."""
    try:
        error = json.loads(body).get("error")
    except (ValueError, AttributeError, RecursionError):
        return None
    if not error:
        return None
    code = _number(error.get("code") or error.get("status")) if isinstance(error, dict) else None
    return int(code) if code is not None and 400 <= code < 600 else 0


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
