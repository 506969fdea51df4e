"""Answers the routes of the server: the policies behind the OpenAI API, the critic, and the constitution.

Text of a request never becomes structure of a prompt. The critic renders its prompts itself (cai_ray.prompts). Requests
to the policies are rendered by vLLM, so control tokens in them are refused (policy_requests.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import HTTPException, Request
from ray.exceptions import RayError
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from cai_ray.compat.ray_serve_llm import ModelIngress
from cai_ray.constitution import Constitution, parse
from cai_ray.errors import InputError
from cai_ray.prompts.load import load_templates
from cai_ray.serve import constitutions, docs, metrics, page
from cai_ray.serve.calls import retry, within
from cai_ray.serve.constitutions import Constitutions, identity
from cai_ray.serve.errors import invalid_request, translate_errors
from cai_ray.serve.guard import error_body
from cai_ray.serve.policy import adapters_of
from cai_ray.serve.policy_requests import chat_request, completion_request, refuse_control_tokens
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
from cai_ray.serve.streams import stream
from cai_ray.storage.run import Run

logger = logging.getLogger("ray.serve")


class Ingress(ModelIngress):
    """The only way in. Its methods are routes (api.py).

    Args:
        llm_deployments: handles of the policies' deployments, by name.
        critic: handle of the critic.
        scorer: handle of the reward model; None if the run has none.
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
        self.adapters = {name: m for m in llm_deployments for name in adapters_of(m, settings)}
        handles = llm_deployments | {name: llm_deployments[m] for name, m in self.adapters.items()}
        # Only the names of the cards are used: `models` and `model_data` below describe the models.
        super().__init__(handles, dict.fromkeys(handles))
        self.parts = {**llm_deployments, "feedback": critic} | ({"reward": scorer} if scorer else {})
        self.critic = critic
        self.scorer = scorer
        self.run = run
        self.settings = settings
        self.templates = load_templates(run.config.templates)
        self.constitutions = Constitutions(run)
        self.descriptions: dict[str, dict[str, Any]] = {}
        self.started = int(time.time())

    # The state of the server, and its models.

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
        """Whether policies and critic answer. Each request asks them again."""
        calls = (asyncio.wait_for(self._describe(part), 5) for part in self.parts)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        missing = [p for p, o in zip(self.parts, outcomes, strict=True) if isinstance(o, BaseException)]
        status = {"status": "not ready", "waiting_for": missing} if missing else {"status": "ok"}
        return JSONResponse(status, status_code=503 if missing else 200)

    async def models(self) -> Response:
        """The policies and adapters."""
        return JSONResponse({"object": "list", "data": [self._card(m) for m in self.model_names]})

    async def model_data(self, model: str) -> Response:
        """One policy or adapter."""
        self._check_model(model)
        return JSONResponse(self._card(model))

    def _check_model(self, model: str) -> None:
        if model not in self.model_names:
            raise HTTPException(404, f"no model {model!r}; there are: {', '.join(self.model_names)}")

    def _card(self, model: str) -> dict[str, Any]:
        adapter = {"adapter_on": self.adapters[model]} if model in self.adapters else {}
        card = {"id": model, "object": "model", "created": self.started, "owned_by": "cai_ray"}
        return card | {"run": self.run.config.name, **adapter}

    # The policies.

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """An answer of a policy, as in OpenAI's API. With `explain`, also which principle is at stake in it."""
        control_tokens = await self._control_tokens(body.model)
        turns = [{"role": m.role, "content": m.text} for m in body.messages]
        refuse_control_tokens(turns, control_tokens, self.templates.thinking)
        self._log(request, turns)
        vllm_request = chat_request(body, turns, self.templates, self.settings.max_tokens)
        answer = await self._ask_policy(lambda: super(Ingress, self).chat(vllm_request, request))
        if isinstance(answer, StreamingResponse):
            explain = (lambda text: self._explain(turns, text)) if body.explain else None
            return stream(answer, self.settings.timeout_s, explain)
        if not body.explain:
            return answer
        content = json.loads(bytes(answer.body))
        text = content["choices"][0]["message"]["content"] or ""
        return JSONResponse(content | {"explanation": await self._explain(turns, text)})

    async def completions(self, body: CompletionsRequest, request: Request) -> Response:
        """How a policy continues raw text."""
        self._log(request, body.prompt)
        vllm_request = completion_request(body, self.settings.max_tokens)
        answer = await self._ask_policy(lambda: super(Ingress, self).completions(vllm_request, request))
        return stream(answer, self.settings.timeout_s) if isinstance(answer, StreamingResponse) else answer

    async def _ask_policy(self, call: Callable[[], Awaitable[Response]]) -> Response:
        answer: Response = await self._call(lambda: translate_errors(call()))
        return answer

    async def _control_tokens(self, model: str | None) -> list[str]:
        """A policy's control tokens, as text."""
        name = await translate_errors(self.model_id(model))
        self._check_model(name)  # a name with a colon passes the line before
        tokens: list[str] = (await self._description(self.adapters.get(name, name)))["control"]
        return tokens

    async def _explain(self, turns: list[dict[str, str]], text: str) -> dict[str, Any]:
        """Which principle is at stake in an answer. The answer is given even if this fails."""
        document = await self._document()
        conversation = [*turns, {"role": "assistant", "content": text}]
        try:
            explanation = await retry(lambda: self.critic.critique.remote(document, conversation, None, 256))
        except (RayError, HTTPException):
            logger.exception("no explanation")
            explanation = {"fault": "the critic did not answer"}
        metrics.at_stake(explanation, document.sha)
        return explanation | await self._provenance(document)

    # The critic.

    async def critique(self, body: CritiqueRequest, request: Request) -> Response:
        """Critique and revision of a response by each principle, and which one is at stake."""
        arguments = (body.conversation(), body.principles, body.max_tokens)
        return await self._ask_critic(body, request, self.critic.critique, *arguments)

    async def revise(self, body: ReviseRequest, request: Request) -> Response:
        """Rounds of critique and revision of a response."""
        arguments = (
            body.conversation(),
            body.principles,
            body.max_tokens,
            body.rounds,
            body.choose,
            body.seed,
        )
        return await self._ask_critic(body, request, self.critic.revise, *arguments)

    async def compare(self, body: CompareRequest, request: Request) -> Response:
        """The soft preference between two responses, averaged over both orders."""
        arguments = (body.conversation(), body.response_a, body.response_b, body.principles)
        return await self._ask_critic(body, request, self.critic.compare, *arguments)

    async def reward(self, body: ScoreRequest, request: Request) -> Response:
        """The reward model's score of a response."""
        if self.scorer is None:
            raise HTTPException(404, "this run has no reward model; train one with `cai-ray rm`")
        self._log(request, body.conversation())
        answer = await self._call(lambda: self.scorer.score.remote(body.conversation()))
        if "fault" in answer:
            return invalid_request(answer["fault"])
        return JSONResponse({**answer, **await self._provenance(await self._document())})

    async def _ask_critic(
        self, body: CritiqueRequest | CompareRequest, request: Request, method: Any, *arguments: Any
    ) -> Response:
        """One answer of the critic; with several constitutions, an answer by each, side by side."""
        self._log(request, arguments)
        await self._refresh_constitutions()
        try:
            documents = [self.constitutions.find(name) for name in body.constitutions]
        except InputError as e:
            return invalid_request(str(e), "constitutions")
        calls = [retry(lambda d=d: method.remote(d, *arguments)) for d in documents]  # type: ignore[misc]
        answers = await within(self.settings.timeout_s, asyncio.gather(*calls))
        for document, answer in zip(documents, answers, strict=True):
            if "fault" in answer:
                return invalid_request(answer["fault"], answer.get("param"))
            metrics.at_stake(answer, document.sha)
        whole = [
            {**answer, **await self._provenance(document)}
            for document, answer in zip(documents, answers, strict=True)
        ]
        return JSONResponse(whole[0] if len(whole) == 1 else {"object": "list", "answers": whole})

    # The constitution.

    async def constitution(self) -> Response:
        """The critic's current constitution, and those before it."""
        await self._refresh_constitutions()
        document, *before = self.constitutions.documents
        return JSONResponse(
            {
                "object": "constitution",
                **(await self._provenance(document)),
                "document": document.model_dump(mode="json"),
                "previous": [identity(d) for d in before],
            }
        )

    async def put_constitution(self, body: ConstitutionRequest, request: Request) -> Response:
        """Gives the critic another constitution, from the next request on. Needs a key with this right."""
        key = request.scope.get("key")
        if key is not None and not key.admin:
            return JSONResponse(
                error_body(f"key {key.name} may not change the constitution", "permission_error"), 403
            )
        try:
            document = parse(body.document, "of the request")
            await asyncio.to_thread(constitutions.put, self.run, document)
        except InputError as e:
            return invalid_request(str(e), "document")
        await asyncio.to_thread(self.constitutions.reload)
        logger.info("constitution %s %s is the current one", document.name, document.sha)
        return await self.constitution()

    async def _refresh_constitutions(self) -> None:
        if self.constitutions.stale:
            try:
                await asyncio.to_thread(self.constitutions.reload)
            except (InputError, OSError):
                logger.exception("the constitutions cannot be read; the server keeps those that it has")

    async def _document(self) -> Constitution:
        await self._refresh_constitutions()
        return self.constitutions.current

    # What all routes share.

    async def _call(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """The answer of a deployment, in time, and from another replica if one dies."""
        return await within(self.settings.timeout_s, retry(call))

    async def _provenance(self, document: Constitution) -> dict[str, Any]:
        """What every answer of the critic names: constitution and models, with their content hashes."""
        parts = {part: await self._description(part) for part in self.parts}
        return {
            "constitution": identity(document),
            "models": {part: {"name": self._name(part), "sha": d["sha"]} for part, d in parts.items()},
        }

    def _name(self, part: str) -> str:
        return {"feedback": self.settings.judge_of(self.run.config).model, "reward": "rm"}.get(part, part)

    async def _description(self, part: str) -> dict[str, Any]:
        """What a part says about its model, asked once."""
        if part not in self.descriptions:
            self.descriptions[part] = await self._call(lambda: self._describe(part))
        return self.descriptions[part]

    async def _describe(self, part: str) -> dict[str, Any]:
        description: dict[str, Any] = await self.parts[part].describe.remote()
        return description

    def _log(self, request: Request, text: Any) -> None:
        if self.settings.log_prompts:
            logger.info("%s asked: %s", request.url.path, json.dumps(text, ensure_ascii=False))
