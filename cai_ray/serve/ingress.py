"""The one way in: Ray Serve LLM's OpenAI routes for the policy, our own for the critic, one form of error.

Text of a request never becomes structure of a prompt. The critic renders by itself (cai_ray.prompts). The OpenAI
routes are rendered by vLLM, which would read a special token in a content as one: such a request is refused.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, Response

from cai_ray import __version__
from cai_ray.prompts import TemplateSet, plain_messages
from cai_ray.serve.auth import Guard, error_body
from cai_ray.serve.schemas import CompareRequest, CritiqueRequest, ScoreRequest

ROUTES = {
    "models": lambda app: app.get("/v1/models"),
    "model_data": lambda app: app.get("/v1/models/{model:path}"),
    "chat": lambda app: app.post("/v1/chat/completions"),
    "completions": lambda app: app.post("/v1/completions"),
    "critique": lambda app: app.post("/v1/critique"),
    "compare": lambda app: app.post("/v1/compare"),
    "reward": lambda app: app.post("/v1/score"),
    "constitution": lambda app: app.get("/v1/constitution"),
}


class Ingress(OpenAiIngress):
    """Args, besides OpenAiIngress's own:

    critic, scorer: deployment handles; a run without a reward model has no scorer.
    templates: how the policy was asked in training, and is asked here.
    control: the policy's special tokens, as text.
    about: what every answer of the critic names: constitution and models.
    constitution: its text, as data.
    """

    def __init__(
        self,
        llm_deployments: dict[str, Any],
        model_cards: dict[str, Any],
        *,
        critic: Any,
        scorer: Any,
        templates: TemplateSet,
        control: Sequence[str],
        about: dict[str, Any],
        constitution: dict[str, Any],
    ):
        super().__init__(llm_deployments, model_cards)
        self.critic = critic
        self.scorer = scorer
        self.templates = templates
        self.control = tuple(control)
        self.about = about
        self.document = constitution

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        turns = [{**m, "content": _flat(m)} for m in body.messages]
        for i, turn in enumerate(turns):
            self._refuse_control(turn["content"], f"messages.{i}.content")
        body.messages = plain_messages(self.templates.answer_messages(turns))
        return await _translated(super().chat(body, request))

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        return await _translated(super().completions(body, request))

    async def critique(self, body: CritiqueRequest) -> Response:
        return self._answer(
            await self.critic.critique.remote(body.conversation(), body.principles, body.max_tokens)
        )

    async def compare(self, body: CompareRequest) -> Response:
        return self._answer(
            await self.critic.compare.remote(
                body.conversation(), body.response_a, body.response_b, body.principles
            )
        )

    async def reward(self, body: ScoreRequest) -> Response:
        if self.scorer is None:
            raise HTTPException(404, "this run has no reward model; train one with `cai-ray rm`")
        return self._answer(await self.scorer.score.remote(body.conversation()))

    async def constitution(self) -> Response:
        return JSONResponse({"object": "constitution", **self.about, "document": self.document})

    def _answer(self, found: dict[str, Any]) -> Response:
        if "fault" in found:
            return JSONResponse(
                error_body(found["fault"], "invalid_request_error", param=found.get("param")), status_code=400
            )
        return JSONResponse({**found, **self.about})

    def _refuse_control(self, text: str, where: str) -> None:
        token = next((t for t in self.control if t in text), None)
        if token is not None:
            raise HTTPException(400, f"{where} holds {token!r}, a control token of this model; leave it out")


def make_ingress(token_hash: str | None) -> type:
    """The ingress class with its routes, behind the guard."""
    app = FastAPI(
        title="cai_ray", version=__version__, description="Policy (OpenAI API) and critic of one run."
    )
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_middleware(Guard, token_hash=token_hash)
    return make_fastapi_ingress(Ingress, endpoint_map=ROUTES, app=app)


async def _translated(answer: Awaitable[Response]) -> Response:
    """Ray Serve LLM's own exceptions, which carry a status and a message, as FastAPI's."""
    try:
        return await answer
    except Exception as e:
        status, message = getattr(e, "status_code", None), getattr(e, "message", None)
        if not isinstance(status, int) or not message:
            raise
        raise HTTPException(status, str(message)) from e


def _flat(message: Any) -> str:
    """A message's text; parts are joined, and what is not text is refused."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    texts = []
    for part in content or []:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise HTTPException(400, "only text is understood; leave out parts of other types")
        texts.append(part["text"])
    return "".join(texts)


async def _http_error(request: Request, e: Any) -> Response:
    kind = "invalid_request_error" if e.status_code < 500 else "server_error"
    return JSONResponse(error_body(str(e.detail), kind), status_code=e.status_code, headers=e.headers)


async def _validation_error(request: Request, e: Any) -> Response:
    first = e.errors()[0]
    where = ".".join(str(x) for x in first["loc"] if x != "body")
    message = first["msg"].removeprefix("Value error, ")
    return JSONResponse(
        error_body(f"{where}: {message}" if where else message, "invalid_request_error", param=where or None),
        status_code=400,
    )
