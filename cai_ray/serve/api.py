"""The HTTP interface of the ingress: its routes, their OpenAPI schema, and the guard before them."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from ray.serve.llm.ingress import make_fastapi_ingress

from cai_ray import __version__
from cai_ray.serve import answers, metrics
from cai_ray.serve.errors import handle_errors
from cai_ray.serve.guard import OPEN_PATHS, Guard
from cai_ray.serve.ingress import Ingress
from cai_ray.serve.settings import ServeSettings


def _critic(answer: Any) -> dict[str, Any]:
    # The critic's answers are described in the schema, and not checked again.
    return {"tags": ["critic"], "responses": {200: {"model": answer}}}


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
        "/v1/critique", **_critic(answers.CritiqueAnswer | answers.SideBySide[answers.CritiqueAnswer])
    ),
    "revise": lambda app: app.post(
        "/v1/revise", **_critic(answers.RevisionAnswer | answers.SideBySide[answers.RevisionAnswer])
    ),
    "compare": lambda app: app.post(
        "/v1/compare", **_critic(answers.ComparisonAnswer | answers.SideBySide[answers.ComparisonAnswer])
    ),
    "reward": lambda app: app.post("/v1/score", **_critic(answers.ScoreAnswer)),
    "constitution": lambda app: app.get("/v1/constitution", **_critic(answers.ConstitutionText)),
    "put_constitution": lambda app: app.put("/v1/constitution", **_critic(answers.ConstitutionText)),
}
"""The route of each method of `Ingress`."""


def make_ingress(settings: ServeSettings) -> type:
    """The ingress class with its routes, behind the guard."""
    app = FastAPI(
        title="cai_ray",
        version=__version__,
        description="Policies (OpenAI API) and critic of one run.",
        docs_url=None,  # FastAPI's own pages fetch scripts from elsewhere
        redoc_url=None,
        responses={
            code: {"model": answers.Error} for code in (400, 401, 404, 408, 411, 413, 429, 500, 503, 504)
        },
    )
    app.openapi = partial(_schema, app)  # type: ignore[method-assign]
    handle_errors(app)
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


def _schema(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI schema, with the bearer token, and without status 422, which no route answers with."""
    schema = FastAPI.openapi(app)
    if "security" not in schema:
        schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"token": []}]
        for path, methods in schema["paths"].items():
            for method in methods.values():
                method["responses"].pop("422", None)
                if path in OPEN_PATHS:
                    method["security"] = []
    return schema
