"""The engine for models behind an OpenAI-compatible endpoint: hosted ones, or a vLLM server of one's own.

The endpoint renders the messages with a chat template that is not seen here, so what keeps texts from becoming
structure (cai_ray.prompts) is up to it. The key comes from the environment of this process alone, and is put into no
message: what an endpoint says is cleared of it, and errors of the HTTP library, which hold the request with its
headers, are not chained to ours.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cai_ray.cluster import meter
from cai_ray.cluster.usage import Usage
from cai_ray.config.engine import EngineConfig
from cai_ray.engine.protocol import Completion, Sampling
from cai_ray.errors import Abstained, InputError, RowError
from cai_ray.prompts.messages import Messages, plain_messages
from cai_ray.storage.models import ResolvedModel

T = TypeVar("T")

# Waiting doubles from the first to the second, in seconds.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
# What an endpoint says about one request, and about its own state for a while; 5xx is of the second kind too.
_ROWS_FAULT = {400, 413, 422}
_TRY_AGAIN = {408, 409, 425, 429}
# What is left over beside the likeliest tokens is known no better: their log-probabilities are rounded.
_LEAST = 1e-6


class OpenaiEngine:
    """Asks /chat/completions for the model by the name it is served by.

    Raises:
        InputError: the key is needed and not there; from a call, the endpoint is not there, refuses the key or does
            not know the model: what no row can help.
        RowError: from a call, the endpoint refuses this request, or goes on failing at it.
    """

    def __init__(self, model: ResolvedModel):
        import httpx2

        config = model.engine
        assert config.base_url is not None
        self.model, self.config = model.location, config
        self._template_args = {"chat_template_kwargs": model.template_args} if model.template_args else {}
        self._slots = asyncio.Semaphore(config.max_num_seqs)
        key = read_key(config)
        self._clear = (lambda text: text.replace(key, "***")) if key else (lambda text: text)
        self._http = httpx2
        self._client = httpx2.AsyncClient(
            headers={
                "Content-Type": "application/json",
                **({"Authorization": f"Bearer {key}"} if key else {}),
            },
            timeout=httpx2.Timeout(config.timeout_s, connect=min(10.0, config.timeout_s), pool=None),
            limits=httpx2.Limits(max_connections=config.max_num_seqs),
        )

    async def chat(self, messages: Messages, sampling: Sampling) -> Completion:
        return await self._ask(messages, _completion, **sampling._asdict())

    async def choose(self, messages: Messages, options: Sequence[str]) -> tuple[list[float], Usage]:
        """As the protocol says, but for an option that is not among the likeliest tokens: see `option_logprobs`."""
        check_options(options)
        # Temperature 1 leaves the distribution as it is, wherever the endpoint takes its log-probabilities.
        return await self._ask(
            messages,
            lambda answer: (option_logprobs(_first_tokens(answer), options), _usage(answer)),
            **Sampling(temperature=1.0, max_tokens=1, seed=0)._asdict(),
            logprobs=True,
            top_logprobs=self.config.top_logprobs,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def _ask(self, messages: Messages, read: Callable[[_Answer], T], **fields: Any) -> T:
        """What `read` makes of the answer, after as many attempts as it takes within the bounds."""
        body = {
            "model": self.model,
            "messages": plain_messages(messages),
            **fields,
            **self._template_args,
        }
        if body["messages"][-1]["role"] == "assistant":
            if self.config.continues:
                body |= {"continue_final_message": True, "add_generation_prompt": False}
            else:
                del body["messages"][-1]
        try:
            data = json.dumps(body | self.config.extra, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            raise RowError("text is not valid Unicode (a lone surrogate)") from e
        # The slot is kept while waiting: an endpoint that throttles is then asked less by all rows together.
        async with self._slots:
            started = time.monotonic()
            attempt = 0
            while True:
                attempt += 1
                left = self.config.give_up_s - (time.monotonic() - started)
                try:
                    return read(await self._attempt(data, min(self.config.timeout_s, left)))
                except _Again as e:
                    waiting = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
                    waiting = max(waiting, e.wait)
                    spent = time.monotonic() - started
                    if attempt >= self.config.attempts or spent + waiting >= self.config.give_up_s:
                        tried = f"{self._name()}: {e} ({attempt} attempts in {spent:.0f} s)"
                        if e.absent:
                            raise InputError(f"{tried}; start it, or mend base_url") from None
                        raise RowError(tried) from None
                await asyncio.sleep(waiting)

    async def _attempt(self, data: bytes, seconds: float) -> _Answer:
        try:
            async with asyncio.timeout(seconds):  # the client's own bounds are on each read
                response = await self._client.post(f"{self.config.base_url}/chat/completions", content=data)
        except (TimeoutError, self._http.TimeoutException) as e:
            raise _Again("no answer in time", absent=isinstance(e, self._http.ConnectTimeout)) from None
        except (self._http.ConnectError, self._http.ProxyError):
            raise _Again("nothing answers there", absent=True) from None
        except self._http.HTTPError as e:
            raise _Again(f"the connection failed ({type(e).__name__})") from None
        if response.status_code != 200:
            raise self._refusal(response)
        try:
            answer = _Answer.model_validate_json(response.content)
            meter.paid(_usage(answer))
            return answer
        except ValidationError as e:
            first = e.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(x) for x in first["loc"])
            raise _Again(f"answered what is no chat completion ({where or 'the body'})") from None

    def _refusal(self, response: Any) -> Exception:
        """The error that an answer without success stands for."""
        status = response.status_code
        said = _message(response)
        text = " ".join(self._clear(said).split())[:300]
        what = f"{self._name()}: {status}{f' ({text})' if text else ''}"
        variable = key_variable(self.config)
        if status == 401:  # what it says may hold part of the key
            if variable:
                return InputError(f"{self._name()}: refuses the key in {variable} (401); export a valid one")
            return InputError(f"{self._name()}: wants a key (401); name its variable with api_key_env")
        if status == 429 and "insufficient_quota" in response.text:
            return InputError(
                f"{what}; the account's quota is used up: raise it, and run the same command again"
            )
        if status in _TRY_AGAIN or status >= 500:
            return _Again(f"answered {status}", wait=_retry_after(response.headers.get("retry-after")))
        if status in _ROWS_FAULT:
            return RowError(f"refused by the endpoint: {status}{f' ({text})' if text else ''}")
        if status == 403:
            return InputError(f"{what}; let the key in {variable or 'api_key_env'} use {self.model}")
        return InputError(f"{what}; check base_url (most end in /v1) and the model's name, {self.model!r}")

    def _name(self) -> str:
        return f"endpoint {self.config.base_url}"


class _Again(Exception):
    """An attempt failed in a way that another may not. `wait`: seconds that the endpoint asks for."""

    def __init__(self, text: str, wait: float = 0.0, absent: bool = False):
        super().__init__(text)
        self.wait, self.absent = wait, absent


class _Part(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)


class _Token(_Part):
    token: str
    logprob: float


class _Position(_Part):
    top_logprobs: list[_Token]


class _Logprobs(_Part):
    content: list[_Position] | None = None


class _Message(_Part):
    content: str | None = None


class _Choice(_Part):
    message: _Message
    finish_reason: str | None
    logprobs: _Logprobs | None = None


class _Details(_Part):
    cached_tokens: int | None = None


class _Usage(_Part):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Answer(_Part):
    """What is read of a chat completion."""

    choices: tuple[_Choice]
    usage: _Usage | None = None


def key_variable(config: EngineConfig) -> str:
    """The environment variable that holds the key; empty where the endpoint is asked without one.

    A key that happens to be in the environment is sent to no address without encryption, unless named for it.
    """
    if config.api_key_env is not None:
        return config.api_key_env
    return "OPENAI_API_KEY" if str(config.base_url).startswith("https://") else ""


def read_key(config: EngineConfig) -> str:
    """The key, or nothing where the endpoint is asked without one.

    Raises:
        InputError: the variable is not set, or holds what cannot be a key.
    """
    variable = key_variable(config)
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise InputError(
            f"environment variable {variable} is not set, and {config.base_url} is asked with the key in it; "
            "export it (on every node), or set api_key_env to another name, or to '' for none"
        )
    if not (key.isascii() and key.isprintable() and " " not in key):  # the HTTP library would print it
        raise InputError(
            f"environment variable {variable}: holds characters that no key has; export the key alone"
        )
    return key


def check_options(options: Sequence[str]) -> None:
    """Raises InputError where options cannot be told apart by their tokens' text."""
    stripped = [o.strip() for o in options]
    if not all(stripped) or len(set(stripped)) != len(stripped):
        raise InputError(f"options {list(options)} differ in spaces alone; set others in the template set")


def option_logprobs(top: Sequence[tuple[str, float]], options: Sequence[str]) -> list[float]:
    """Log-probability of each option as the first token, from the likeliest tokens alone.

    Tokens that differ from an option in spaces around it are the same choice: their probabilities add up. Where
    some options are not in the list, each is given the largest probability it can have: that of the list's least
    likely token, or what the list leaves over, if that is less. The label is then nearer to one half than
    the model's own, never further from it.

    Raises:
        Abstained: no option is in the list.
    """
    found = [[logprob for token, logprob in top if token.strip() == o.strip()] for o in options]
    if not any(found):
        raise Abstained(f"abstention: none of {list(options)} is among the likeliest first tokens")
    left = 1 - sum(math.exp(logprob) for _, logprob in top)
    bound = min(math.log(max(left, _LEAST)), *(logprob for _, logprob in top))
    return [max(f) + math.log(sum(math.exp(x - max(f)) for x in f)) if f else bound for f in found]


def _completion(answer: _Answer) -> Completion:
    choice = answer.choices[0]
    text = (choice.message.content or "").strip()
    if choice.finish_reason not in ("stop", "length"):
        raise RowError(f"the endpoint ended the answer by {choice.finish_reason!r}")
    if not text:
        raise RowError("the endpoint gave an empty answer")
    return Completion(text, choice.finish_reason == "stop", _usage(answer))


def _first_tokens(answer: _Answer) -> list[tuple[str, float]]:
    given = answer.choices[0].logprobs
    if given is None or given.content is None:
        raise RowError("the endpoint gave no log-probabilities; use a model and an endpoint that have them")
    if not given.content or not given.content[0].top_logprobs:
        raise _Again("answered an empty list of log-probabilities")
    return [(t.token, t.logprob) for t in given.content[0].top_logprobs]


def _usage(answer: _Answer) -> Usage:
    given = answer.usage or _Usage()
    details = given.prompt_tokens_details or _Details()
    return Usage(given.prompt_tokens or 0, details.cached_tokens or 0, given.completion_tokens or 0, 1)


def _message(response: Any) -> str:
    """What an endpoint says of an error: {"error": {"message": …}}, or some other text."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return str(response.text)


def _retry_after(value: str | None) -> float:
    """Seconds from a Retry-After header: a number of them, or a date."""
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
