"""The one way in: Ray Serve LLM's OpenAI routes for the policies, our own for the critic, one form of error.

Text of a request never becomes structure of a prompt. The critic renders by itself (cai_ray.prompts). The OpenAI
routes are rendered by vLLM, which would read a special token in a content as one: such a request is refused.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from pydantic import ValidationError
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError
from ray.serve.llm.ingress import make_fastapi_ingress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from cai_ray import __version__
from cai_ray.compat.ray_serve_llm import ModelIngress
from cai_ray.constitution import Constitution, parse
from cai_ray.errors import InputError
from cai_ray.prompts.load import load_templates
from cai_ray.prompts.messages import plain_messages
from cai_ray.serve import answers, constitutions, docs, metrics, page
from cai_ray.serve.constitutions import Constitutions, named
from cai_ray.serve.guard import OPEN_PATHS, Guard, error_body
from cai_ray.serve.policy import adapters_of
from cai_ray.serve.schemas import (
    ChatRequest,
    CompareRequest,
    CompletionsRequest,
    ConstitutionRequest,
    CritiqueRequest,
    ReviseRequest,
    ScoreRequest,
)
from cai_ray.serve.settings import ServeSettings
from cai_ray.storage.run import Run

logger = logging.getLogger("ray.serve")

# By method of the ingress. The critic's answers are described for the schema, and not checked again.
ROUTES = {
    "page": lambda app: app.get("/", include_in_schema=False),
    "docs": lambda app: app.get("/docs", include_in_schema=False),
    "healthz": lambda app: app.get("/healthz", tags=["operation"]),
    "readyz": lambda app: app.get("/readyz", tags=["operation"]),
    "models": lambda app: app.get("/v1/models", tags=["policy"]),
    "model_data": lambda app: app.get("/v1/models/{model:path}", tags=["policy"]),
    "chat": lambda app: app.post("/v1/chat/completions", tags=["policy"]),
    "completions": lambda app: app.post("/v1/completions", tags=["policy"]),
    "critique": lambda app: app.post(
        "/v1/critique", **_critic(answers.Critique | answers.SideBySide[answers.Critique])
    ),
    "revise": lambda app: app.post(
        "/v1/revise", **_critic(answers.Revision | answers.SideBySide[answers.Revision])
    ),
    "compare": lambda app: app.post(
        "/v1/compare", **_critic(answers.Comparison | answers.SideBySide[answers.Comparison])
    ),
    "reward": lambda app: app.post("/v1/score", **_critic(answers.Score)),
    "constitution": lambda app: app.get("/v1/constitution", **_critic(answers.ConstitutionText)),
    "put_constitution": lambda app: app.put("/v1/constitution", **_critic(answers.ConstitutionText)),
}
# A request that a dead replica had not begun to answer is given to another one, so often.
_TRIES = 4


class Ingress(ModelIngress):
    """Args:

    llm_deployments: of the policies, by name.
    critic, scorer: deployment handles; a run without a reward model has no scorer.
    """

    def __init__(
        self,
        llm_deployments: dict[str, Any],
        *,
        critic: Any,
        scorer: Any,
        run: Run,
        settings: ServeSettings,
    ):
        # Of its cards only the names are read: `models` and `model_data` below describe them.
        adapters = {name: m for m in llm_deployments for name in adapters_of(m, settings)}
        handles = llm_deployments | {name: llm_deployments[m] for name, m in adapters.items()}
        super().__init__(handles, dict.fromkeys(handles))
        self.parts = {**llm_deployments, "feedback": critic} | ({"reward": scorer} if scorer else {})
        self.adapters = adapters
        self.critic = critic
        self.scorer = scorer
        self.run = run
        self.settings = settings
        self.templates = load_templates(run.config.templates)
        self.constitutions = Constitutions(run)
        self.described: dict[str, dict[str, Any]] = {}
        self.started = int(time.time())

    # What is up, and what there is.

    async def page(self) -> Response:
        """A page to try policies and critic."""
        return HTMLResponse(
            page.html(self.settings.no_auth), headers={"Content-Security-Policy": page.POLICY}
        )

    async def docs(self, request: Request) -> Response:
        return HTMLResponse(
            docs.html(request.app.openapi()), headers={"Content-Security-Policy": docs.POLICY}
        )

    async def healthz(self) -> Response:
        """Whether the server is up."""
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """Whether policies and critic answer, asked anew each time."""
        asked = (asyncio.wait_for(self._describe(part), 5) for part in self.parts)
        found = await asyncio.gather(*asked, return_exceptions=True)
        missing = [p for p, f in zip(self.parts, found, strict=True) if isinstance(f, BaseException)]
        status = {"status": "not ready", "waiting_for": missing} if missing else {"status": "ok"}
        return JSONResponse(status, status_code=503 if missing else 200)

    async def models(self) -> Response:
        """The policies and adapters."""
        return JSONResponse({"object": "list", "data": [self._card(m) for m in self.model_names]})

    async def model_data(self, model: str) -> Response:
        """One policy or adapter."""
        if model not in self.model_names:
            raise HTTPException(404, f"no model {model!r}; there are: {', '.join(self.model_names)}")
        return JSONResponse(self._card(model))

    def _card(self, model: str) -> dict[str, Any]:
        on = {"adapter_on": self.adapters[model]} if model in self.adapters else {}
        card = {"id": model, "object": "model", "created": self.started, "owned_by": "cai_ray"}
        return card | {"run": self.run.config.name, **on}

    # The policies.

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """An answer of a policy, as in OpenAI's API; with `explain`, also which principle is at stake in it."""
        control = await self._control(body.model)
        turns = [{"role": m.role, "content": m.text} for m in body.messages]
        for i, turn in enumerate(turns):
            _refuse_control(turn["content"], control, f"messages.{i}.content")
        self._log(request, turns)
        asked = _request(
            ChatCompletionRequest,
            **self._sampling(body),
            messages=plain_messages(self.templates.answer_messages(turns)),
            logprobs=body.logprobs,
            top_logprobs=body.top_logprobs if body.logprobs else None,
        )
        answer = await self._answered(lambda: super(Ingress, self).chat(asked, request))
        if isinstance(answer, StreamingResponse):
            return self._streamed(answer, turns if body.explain else None)
        if not body.explain:
            return answer
        content = json.loads(bytes(answer.body))
        text = content["choices"][0]["message"]["content"] or ""
        return JSONResponse(content | {"explanation": await self._explain(turns, text)})

    async def completions(self, body: CompletionsRequest, request: Request) -> Response:
        """How a policy goes on with raw text."""
        self._log(request, body.prompt)
        asked = _request(
            CompletionRequest, **self._sampling(body), prompt=body.prompt, logprobs=body.logprobs
        )
        answer = await self._answered(lambda: super(Ingress, self).completions(asked, request))
        return self._streamed(answer, None) if isinstance(answer, StreamingResponse) else answer

    def _sampling(self, body: ChatRequest | CompletionsRequest) -> dict[str, Any]:
        try:
            found = body.sampling(self.settings.max_tokens)
        except ValueError as e:
            raise HTTPException(400, str(e)) from e
        # Left out, it is what the context has room for, up to the server's limit, which the engine knows (policy.py).
        return found if body.tokens is None else found | {"max_tokens": body.tokens}

    async def _answered(self, ask: Callable[[], Awaitable[Response]]) -> Response:
        return await self._within_time(self._tried(lambda: _translated(ask())))

    def _streamed(self, answer: StreamingResponse, explain: list[dict[str, str]] | None) -> Response:
        """A stream with an end in time, and errors that a client can read; perhaps with an explanation last."""
        deadline = asyncio.get_running_loop().time() + self.settings.timeout_s

        async def events() -> AsyncIterator[str]:
            text: list[str] = []
            try:
                async with asyncio.timeout_at(deadline):
                    async for event in answer.body_iterator:
                        event = event if isinstance(event, str) else bytes(event).decode()
                        if explain is None:
                            yield event
                            continue
                        text += _deltas(event)
                        body, done, _ = event.partition("data: [DONE]")
                        if body:
                            yield body
                        if done:
                            found = await self._explain(explain, "".join(text))
                            last = {"object": "chat.completion.chunk", "choices": [], "explanation": found}
                            yield f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n"
            except TimeoutError:
                yield _event(error_body("the time for this request is over", "server_error", "timeout"))
            except RayError:
                logger.exception("a stream was cut")
                yield _event(
                    error_body("the answer was cut off; ask again", "server_error", "stream_interrupted")
                )

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _control(self, model: str | None) -> list[str]:
        """A policy's special tokens, as text."""
        name = await _translated(self.model_id(model))
        if name not in self.model_names:  # such as one that has a colon in it
            raise HTTPException(404, f"no model {name!r}; there are: {', '.join(self.model_names)}")
        return (await self._described(self.adapters.get(name, name)))["control"]

    async def _explain(self, turns: list[dict[str, str]], text: str) -> dict[str, Any]:
        """Which principle is at stake in an answer. The answer is given whatever becomes of this."""
        document = await self._document()
        answered = [*turns, {"role": "assistant", "content": text}]
        try:
            found = await self._tried(lambda: self.critic.critique.remote(document, answered, None, 256))
        except (RayError, HTTPException):
            logger.exception("no explanation")
            found = {"fault": "the critic did not answer"}
        metrics.at_stake(found, document.sha)
        return found | await self._about(document)

    # The critic.

    async def critique(self, body: CritiqueRequest, request: Request) -> Response:
        """Critique and revision of a response by each principle, and which one is at stake."""
        asked = (body.conversation(), body.principles, body.max_tokens)
        return await self._asked(body, request, self.critic.critique, *asked)

    async def revise(self, body: ReviseRequest, request: Request) -> Response:
        """Rounds of critique and revision of a response."""
        asked = (body.conversation(), body.principles, body.max_tokens, body.rounds, body.choose, body.seed)
        return await self._asked(body, request, self.critic.revise, *asked)

    async def compare(self, body: CompareRequest, request: Request) -> Response:
        """The soft preference between two responses, both orders averaged."""
        asked = (body.conversation(), body.response_a, body.response_b, body.principles)
        return await self._asked(body, request, self.critic.compare, *asked)

    async def reward(self, body: ScoreRequest, request: Request) -> Response:
        """The reward model's score of a response."""
        if self.scorer is None:
            raise HTTPException(404, "this run has no reward model; train one with `cai-ray rm`")
        self._log(request, body.conversation())
        found = await self._within_time(self._tried(lambda: self.scorer.score.remote(body.conversation())))
        if "fault" in found:
            return _fault(found["fault"])
        return JSONResponse({**found, **await self._about(await self._document())})

    async def _asked(
        self, body: CritiqueRequest | CompareRequest, request: Request, method: Any, *words: Any
    ) -> Response:
        """One answer of the critic; or, by several constitutions, as many side by side."""
        self._log(request, words)
        await self._look()
        try:
            documents = [self.constitutions.find(name) for name in body.constitutions]
        except InputError as e:
            return _fault(str(e), "constitutions")
        calls = [self._tried(lambda d=d: method.remote(d, *words)) for d in documents]  # type: ignore[misc]
        found = await self._within_time(asyncio.gather(*calls))
        for document, answer in zip(documents, found, strict=True):
            if "fault" in answer:
                return _fault(answer["fault"], answer.get("param"))
            metrics.at_stake(answer, document.sha)
        if len(documents) == 1:
            return JSONResponse({**found[0], **await self._about(documents[0])})
        answers = [
            {**answer, **(await self._about(document))}
            for document, answer in zip(documents, found, strict=True)
        ]
        return JSONResponse({"object": "list", "answers": answers})

    # The constitution.

    async def constitution(self) -> Response:
        """The constitution that the critic asks by, and those before it."""
        await self._look()
        document, *before = self.constitutions.documents
        return JSONResponse(
            {
                "object": "constitution",
                **(await self._about(document)),
                "document": document.model_dump(mode="json"),
                "previous": [named(d) for d in before],
            }
        )

    async def put_constitution(self, body: ConstitutionRequest, request: Request) -> Response:
        """Puts another constitution into the critic, from the next request on. Needs a key that may."""
        key = request.scope.get("key")
        if key is not None and not key.admin:
            return JSONResponse(
                error_body(f"key {key.name} may not change the constitution", "permission_error"), 403
            )
        try:
            document = parse(body.document, "of the request")
            await asyncio.to_thread(constitutions.put, self.run, document)
        except InputError as e:
            return _fault(str(e), "document")
        await asyncio.to_thread(self.constitutions.look)
        logger.info("constitution %s %s is the current one", document.name, document.sha)
        return await self.constitution()

    async def _look(self) -> None:
        if self.constitutions.stale:
            try:
                await asyncio.to_thread(self.constitutions.look)
            except (InputError, OSError):
                logger.exception("the constitutions cannot be read; the server goes on with those it has")

    async def _document(self) -> Constitution:
        await self._look()
        return self.constitutions.current

    # What they share.

    async def _tried(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        """An answer, by another replica where one died before it had begun to answer."""
        for number in range(1, _TRIES + 1):
            try:
                return await ask()
            except BackPressureError as e:
                raise HTTPException(503, "too many requests are waiting; ask again later") from e
            except (RayActorError, TaskCancelledError):
                if number == _TRIES:
                    logger.exception("no replica answered")
                    raise HTTPException(503, "no replica could answer; ask again later") from None
                await asyncio.sleep(0.5 * number)
        raise AssertionError

    async def _within_time(self, answer: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                return await answer
        except TimeoutError as e:
            raise HTTPException(504, f"no answer within {self.settings.timeout_s:g} s") from e

    async def _about(self, document: Constitution) -> dict[str, Any]:
        """What every answer of the critic names: constitution and models, with their content hashes."""
        found = {part: await self._described(part) for part in self.parts}
        return {
            "constitution": named(document),
            "models": {part: {"name": self._name(part), "sha": d["sha"]} for part, d in found.items()},
        }

    def _name(self, part: str) -> str:
        return {"feedback": self.run.config.label.model, "reward": "rm"}.get(part, part)

    async def _described(self, part: str) -> dict[str, Any]:
        if part not in self.described:
            self.described[part] = await self._within_time(self._tried(lambda: self._describe(part)))
        return self.described[part]

    async def _describe(self, part: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.parts[part].describe.remote()
        return found

    def _log(self, request: Request, text: Any) -> None:
        if self.settings.log_prompts:
            logger.info("%s asked: %s", request.url.path, json.dumps(text, ensure_ascii=False))


def make_ingress(settings: ServeSettings) -> type:
    """The ingress class with its routes, behind the guard."""
    app = FastAPI(
        title="cai_ray",
        version=__version__,
        description="Policies (OpenAI API) and critic of one run.",
        docs_url=None,  # these fetch scripts from elsewhere
        redoc_url=None,
        responses={
            code: {"model": answers.Error} for code in (400, 401, 404, 408, 411, 413, 429, 500, 503, 504)
        },
    )
    app.openapi = partial(_schema, app)  # type: ignore[method-assign]
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_middleware(
        Guard,
        keys=None if settings.no_auth else settings.keys,
        max_body=settings.max_body,
        per_minute=settings.requests_per_minute,
        observe=metrics.observe,
        log_texts=settings.log_prompts,
    )
    if settings.cors_origins:  # outside the guard: a browser asks first, without the token
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return make_fastapi_ingress(Ingress, endpoint_map=ROUTES, app=app)


def _request(kind: Any, **fields: Any) -> Any:
    """vLLM's request. What it refuses beyond our own limits is the client's to mend, too."""
    try:
        return kind(**fields)
    except ValidationError as e:
        raise HTTPException(400, e.errors()[0]["msg"]) from None


def _critic(answer: Any) -> dict[str, Any]:
    return {"tags": ["critic"], "responses": {200: {"model": answer}}}


def _schema(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI schema: with the bearer token, and without the 422 that no answer has here."""
    found = FastAPI.openapi(app)
    if "security" not in found:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"token": []}]
        for path, methods in found["paths"].items():
            for method in methods.values():
                method["responses"].pop("422", None)
                if path in OPEN_PATHS:
                    method["security"] = []
    return found


async def _translated(answer: Awaitable[Any]) -> Any:
    """Ray Serve LLM's own exceptions, which carry a status and a message, as FastAPI's."""
    try:
        return await answer
    except RayError:
        raise
    except Exception as e:
        status, message = getattr(e, "status_code", None), getattr(e, "message", None)
        if not isinstance(status, int) or not message:
            raise
        raise HTTPException(status, str(message)) from e


def _refuse_control(text: str, control: list[str], where: str) -> None:
    token = next((t for t in control if t in text), None)
    if token is not None:
        raise HTTPException(400, f"{where} holds {token!r}, a control token of this model; leave it out")


def _deltas(event: str) -> list[str]:
    """What server-sent events add to the first answer."""
    found = []
    for line in event.splitlines():
        if line.startswith("data: {"):
            choices = json.loads(line.removeprefix("data: ")).get("choices") or [{}]
            found.append(choices[0].get("delta", {}).get("content") or "")
    return found


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _fault(message: str, param: str | None = None) -> Response:
    return JSONResponse(error_body(message, "invalid_request_error", param=param), status_code=400)


async def _http_error(request: Request, e: Any) -> Response:
    kind = "invalid_request_error" if e.status_code < 500 else "server_error"
    return JSONResponse(error_body(str(e.detail), kind), status_code=e.status_code, headers=e.headers)


async def _validation_error(request: Request, e: Any) -> Response:
    first = e.errors()[0]
    where = ".".join(str(x) for x in first["loc"] if x != "body")
    message = first["msg"].removeprefix("Value error, ")
    return _fault(f"{where}: {message}" if where else message, where or None)
