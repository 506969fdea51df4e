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
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from cai_ray.cluster.holder import count_paid
from cai_ray.cluster.usage import Usage
from cai_ray.engine.api_key import key_variable, read_key
from cai_ray.engine.chat_completion import (
    ChatCompletion,
    TryAgain,
    read_completion,
    read_error,
    read_first_tokens,
    read_retry_after,
    read_usage,
)
from cai_ray.engine.options import check_options, option_logprobs
from cai_ray.engine.protocol import Completion, Sampling
from cai_ray.errors import InputError, RowError
from cai_ray.prompts.messages import Messages, plain_messages
from cai_ray.storage.models import ResolvedModel

T = TypeVar("T")

# Seconds. The wait doubles with each attempt, from the first of these up to the second.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
# Status codes that concern one request, and those that concern the endpoint for a while (as all of 5xx do).
_ROW_STATUS = {400, 413, 422}
_RETRY_STATUS = {408, 409, 425, 429}


class OpenaiEngine:
    """Asks /chat/completions for the model by the name it is served by.

    Raises:
        InputError: the key is missing. From a call: nothing answers at the address, or the endpoint refuses the key or
            does not know the model, so that every row would fail.
        RowError: from a call, the endpoint refuses this request, or keeps failing at it.
    """

    def __init__(self, model: ResolvedModel):
        import httpx2

        config = model.engine
        assert config.base_url is not None
        self.model, self.config = model.location, config
        self._template_args = {"chat_template_kwargs": model.template_args} if model.template_args else {}
        self._slots = asyncio.Semaphore(config.max_num_seqs)
        key = read_key(config)
        self._without_key = (lambda text: text.replace(key, "***")) if key else (lambda text: text)
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
        return await self._ask(messages, read_completion, **sampling._asdict())

    async def choose(self, messages: Messages, options: Sequence[str]) -> tuple[list[float], Usage]:
        """As in the protocol, except for options that are not among the likeliest tokens: see `option_logprobs`."""
        check_options(options)
        # Temperature 1 leaves the distribution as it is, wherever the endpoint takes its log-probabilities.
        return await self._ask(
            messages,
            lambda answer: (option_logprobs(read_first_tokens(answer), options), read_usage(answer)),
            **Sampling(temperature=1.0, max_tokens=1, seed=0)._asdict(),
            logprobs=True,
            top_logprobs=self.config.top_logprobs,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def _ask(self, messages: Messages, read: Callable[[ChatCompletion], T], **fields: Any) -> T:
        """Asks until an attempt succeeds, within the configured bounds, and returns `read(answer)`."""
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
                    answer = await self._attempt(data, min(self.config.timeout_s, left))
                    return self._read(answer, read)
                except TryAgain as e:
                    wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
                    wait = max(wait, e.wait)
                    spent = time.monotonic() - started
                    if attempt >= self.config.attempts or spent + wait >= self.config.give_up_s:
                        tries = f"{attempt} {'attempt' if attempt == 1 else 'attempts'} in {spent:.0f} s"
                        failure = f"{self._name()}: {e} ({tries})"
                        if e.absent:
                            raise InputError(f"{failure}; start it, or correct base_url") from None
                        raise RowError(failure) from None
                await asyncio.sleep(wait)

    def _read(self, answer: ChatCompletion, read: Callable[[ChatCompletion], T]) -> T:
        try:
            return read(answer)
        except RowError as e:  # the answer is of no use, and has cost something
            e.spent = read_usage(answer)
            raise

    async def _attempt(self, data: bytes, seconds: float) -> ChatCompletion:
        try:
            async with asyncio.timeout(seconds):  # the client's own limits hold for each read
                response = await self._client.post(f"{self.config.base_url}/chat/completions", content=data)
        except (TimeoutError, self._http.TimeoutException) as e:
            raise TryAgain("no answer in time", absent=isinstance(e, self._http.ConnectTimeout)) from None
        except (self._http.ConnectError, self._http.ProxyError):
            raise TryAgain("nothing answers there", absent=True) from None
        except self._http.HTTPError as e:
            raise TryAgain(f"the connection failed ({type(e).__name__})") from None
        if response.status_code != 200:
            raise self._error_of(response)
        try:
            answer = ChatCompletion.model_validate_json(response.content)
            count_paid(read_usage(answer))
            return answer
        except ValidationError as e:
            first = e.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(x) for x in first["loc"])
            raise TryAgain(f"the answer is not a chat completion ({where or 'the body'})") from None

    def _error_of(self, response: Any) -> Exception:
        """The exception to raise for an error response."""
        status = response.status_code
        text = " ".join(self._without_key(read_error(response)).split())[:300]
        what = f"{self._name()}: {status}{f' ({text})' if text else ''}"
        variable = key_variable(self.config)
        if status == 401:  # the message may hold part of the key
            if variable:
                return InputError(f"{self._name()}: refuses the key in {variable} (401); export a valid one")
            return InputError(f"{self._name()}: needs a key (401); name its variable with api_key_env")
        if status == 429 and "insufficient_quota" in response.text:
            return InputError(
                f"{what}; the account's quota is used up: raise it, and run the same command again"
            )
        if status in _RETRY_STATUS or status >= 500:
            return TryAgain(f"answered {status}", wait=read_retry_after(response.headers.get("retry-after")))
        if status in _ROW_STATUS:
            return RowError(f"refused by the endpoint: {status}{f' ({text})' if text else ''}")
        if status == 403:
            return InputError(f"{what}; allow the key in {variable or 'api_key_env'} to use {self.model}")
        return InputError(f"{what}; check base_url (most end in /v1) and the model's name, {self.model!r}")

    def _name(self) -> str:
        return f"endpoint {self.config.base_url}"
