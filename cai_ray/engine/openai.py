"""The engine for models behind an OpenAI-compatible endpoint: hosted ones, or one's own vLLM server.

The endpoint renders the messages with a chat template that is not seen here, so the endpoint has to keep texts from
becoming structure (cai_ray.prompts). The key appears in no message: it is removed from what an endpoint says, and
errors of the HTTP library, which hold the request with its headers, are not chained to ours.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from cai_ray.cluster.holder import count_paid, tell
from cai_ray.cluster.usage import Usage
from cai_ray.engine.api_key import key_variable, read_key
from cai_ray.engine.chat_completion import (
    ChatCompletion,
    TryAgain,
    error_status,
    read_completion,
    read_error,
    read_retry_after,
    read_usage,
)
from cai_ray.engine.http_client import make_client
from cai_ray.engine.options import FirstTokens, check_logprobs, check_options, option_logprobs
from cai_ray.engine.protocol import Completion, Sampling
from cai_ray.engine.refusals import read_refusals
from cai_ray.engine.request_fields import Changes, RequestFields, describe
from cai_ray.errors import InputError, RowError
from cai_ray.prompts.messages import Messages, plain_messages
from cai_ray.storage.models import ResolvedModel

T = TypeVar("T")

# Seconds. The wait doubles with each attempt, from the first of these up to the second.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
# The failed attempt of an endpoint's first request from which on it is tried without the fields that few servers know.
_GUESS_AT = 2
# Status codes that concern the request, and those that concern the endpoint for a while (as all of 5xx do).
_REQUEST_STATUS = {400, 413, 422}
_RETRY_STATUS = {408, 409, 425, 429}
# Those of a server that failed at a request, rather than one that cannot be reached or is starting.
_FAULT = {500, 501}


class _Refused(Exception):
    """The endpoint refuses the request, or a field of it."""

    def __init__(self, response: str, said: str):
        super().__init__(said)
        self.response, self.said = response, said


class OpenaiEngine:
    """Asks /chat/completions for the model by the name it is served by.

    Raises:
        InputError: the key is missing. From a call: nothing answers at the address, or the endpoint refuses the key,
            does not know the model, or gives no log-probabilities, so that every row would fail.
        RowError: from a call, the endpoint refuses this request, or keeps failing at it.
    """

    def __init__(self, model: ResolvedModel):
        import httpx2

        config = model.engine
        assert config.base_url is not None
        self.model, self.config = model.location, config
        self._template_args = {"chat_template_kwargs": model.template_args} if model.template_args else {}
        self._generated = 0
        self._slots = asyncio.Semaphore(config.max_num_seqs)
        key = read_key(config)
        self._without_key = (lambda text: text.replace(key, "***")) if key else (lambda text: text)
        self._http = httpx2
        self._client = make_client(config, key)
        self._fields = RequestFields(config)
        self._first_tokens = FirstTokens(self._name(), config.top_logprobs)

    async def chat(self, messages: Messages, sampling: Sampling) -> Completion:
        return await self._ask(messages, read_completion, **sampling._asdict())

    async def choose(self, messages: Messages, options: Sequence[str]) -> tuple[list[float], Usage]:
        """As in the protocol, except for options that are not among the likeliest tokens: see `option_logprobs`."""
        check_options(options)
        check_logprobs(self.config, self._name())
        # Temperature 1 leaves the distribution as it is, wherever the endpoint takes its log-probabilities.
        return await self._ask(
            messages,
            lambda answer: (option_logprobs(self._first_tokens.read(answer), options), read_usage(answer)),
            **Sampling(temperature=1.0, max_tokens=1, seed=0)._asdict(),
            logprobs=True,
            top_logprobs=self.config.top_logprobs,
        )

    def tokens(self) -> int:
        """Of answers that have come: an endpoint says nothing of the others."""
        return self._generated

    async def close(self) -> None:
        await self._client.aclose()

    async def _ask(self, messages: Messages, read: Callable[[ChatCompletion], T], **fields: Any) -> T:
        """Asks until an attempt succeeds, within the configured bounds, and returns `read(answer)`."""
        body = self._body(messages, fields)
        # The slot is kept while waiting: an endpoint that throttles is then asked less by all rows together.
        async with self._slots:
            started = time.monotonic()
            attempt, changes, guesses = 0, Changes(), Changes()
            while True:
                attempt += 1
                left = self.config.give_up_s - (time.monotonic() - started)
                sent = self._fields.change(body, changes)
                try:
                    answer = await self._attempt(sent, min(self.config.timeout_s, left))
                    if guesses and (better := await self._without_guesses(body, changes, guesses)):
                        answer, sent, changes = better
                    self._learn(sent, changes)
                    return self._read(answer, read)
                except _Refused as e:
                    changes |= self._fields.react(e.response, e.said, sent)
                    attempt -= 1  # each refusal changes something: it is no failure that may pass
                    continue
                except TryAgain as e:
                    named = self._fields.react_to_failure(e.response, sent) if e.status >= 500 else {}
                    changes |= named
                    if named:
                        attempt -= 1
                        continue
                    if e.status in _FAULT and attempt >= _GUESS_AT and not self._fields.knows_any:
                        guesses = guesses or self._fields.guesses(sent)
                        changes |= guesses
                    wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
                    wait = max(wait, e.wait)
                    spent = time.monotonic() - started
                    most = min(self.config.attempts, e.attempts or self.config.attempts)
                    if attempt >= most or spent + wait >= self.config.give_up_s:
                        tries = f"{attempt} {'attempt' if attempt == 1 else 'attempts'} in {spent:.0f} s"
                        failure = f"{self._name()}: {e} ({tries})"
                        if e.remedy:
                            raise InputError(f"{failure}; {e.remedy}") from None
                        raise RowError(failure) from None
                await asyncio.sleep(wait)

    async def _without_guesses(
        self, body: Mapping[str, Any], changes: Changes, guesses: Changes
    ) -> tuple[ChatCompletion, dict[str, Any], Changes] | None:
        """The answer with the fields that were left out on a guess: None if the endpoint still fails with them."""
        kept = {key: instead for key, instead in changes.items() if key not in guesses}
        sent = self._fields.change(body, kept)
        try:
            return await self._attempt(sent, self.config.timeout_s), sent, kept
        except (_Refused, TryAgain):
            return None

    def _read(self, answer: ChatCompletion, read: Callable[[ChatCompletion], T]) -> T:
        try:
            return read(answer)
        except RowError as e:  # the answer is of no use, and has cost something
            e.spent = read_usage(answer)
            raise

    def _body(self, messages: Messages, fields: Mapping[str, Any]) -> dict[str, Any]:
        turns, continued = plain_messages(messages), {}
        if turns[-1]["role"] == "assistant":
            if self.config.continues:
                continued = {"continue_final_message": True, "add_generation_prompt": False}
            else:
                del turns[-1]
        asked = {"model": self.model, "messages": turns, **fields, **self._template_args, **continued}
        return self._fields.complete(asked)

    def _learn(self, sent: Mapping[str, Any], changes: Changes) -> None:
        """Keeps the changes that an answered request was made with, and says the new ones."""
        if new := self._fields.accept(sent, changes):
            tell(f"{self._name()}: refused a field, and from now on cai_ray {describe(new)}", left_out=new)

    async def _attempt(self, sent: Mapping[str, Any], seconds: float) -> ChatCompletion:
        try:
            data = json.dumps(sent, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            raise RowError("text is not valid Unicode (a lone surrogate)") from e
        start_it = "start it, or correct base_url"
        try:
            async with asyncio.timeout(seconds):  # the client's own limits hold for each read
                response = await self._client.post(f"{self.config.base_url}/chat/completions", content=data)
        except (TimeoutError, self._http.TimeoutException) as e:
            remedy = start_it if isinstance(e, self._http.ConnectTimeout) else ""
            raise TryAgain("no answer in time", remedy=remedy) from None
        except self._http.ConnectError:
            raise TryAgain("nothing answers there", remedy=start_it) from None
        except self._http.ProxyError:
            remedy = "correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or name the endpoint's host in NO_PROXY"
            raise TryAgain(
                "the proxy that the environment names does not lead there", remedy=remedy
            ) from None
        except self._http.HTTPError as e:
            raise TryAgain(f"the connection failed ({type(e).__name__})") from None
        if response.status_code not in (200, 201):
            raise self._error_of(response, response.status_code)
        if (status := error_status(response.content)) is not None:
            raise self._error_of(
                response, status or (400 if read_refusals(response.text, dict(sent)) else 500)
            )
        try:
            answer = ChatCompletion.model_validate_json(response.content)
            usage = read_usage(answer)
            count_paid(usage)
            self._generated += usage.generated
            return answer
        except ValidationError as e:
            first = e.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(x) for x in first["loc"])
            raise TryAgain(f"the answer is not a chat completion ({where or 'the body'})") from None

    def _error_of(self, response: Any, status: int) -> Exception:
        """The exception to raise for an error response."""
        text = " ".join(self._without_key(read_error(response)).split())[:300]
        what = f"{self._name()}: {status}{f' ({text})' if text else ''}"
        variable = key_variable(self.config)
        if status == 401:  # the message may hold part of the key
            if variable:
                return InputError(f"{self._name()}: refuses the key in {variable} (401); export a valid one")
            return InputError(f"{self._name()}: needs a key (401); name its variable with api_key_env")
        if status == 402 or (status == 429 and "insufficient_quota" in response.text):
            return InputError(
                f"{what}; the account's quota is used up: raise it, and run the same command again"
            )
        said = f"{status}{f' ({text})' if text else ''}"
        if status in _RETRY_STATUS or status >= 500:
            wait = read_retry_after(response.headers.get("retry-after"))
            asks = f", and asks to wait {wait:.0f} s" if wait > _LONGEST_WAIT else ""
            return TryAgain(f"answered {said}{asks}", wait, status=status, response=response.text)
        if status in _REQUEST_STATUS:
            return _Refused(response.text, said)
        if status == 403:
            if "logprobs" in text:
                return InputError(f"{what}; use a model and an endpoint that give log-probabilities")
            return InputError(f"{what}; allow the key in {variable or 'api_key_env'} to use {self.model}")
        return InputError(f"{what}; check base_url (most end in /v1) and the model's name, {self.model!r}")

    def _name(self) -> str:
        return f"endpoint {self.config.base_url}"
